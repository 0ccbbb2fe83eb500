"""Recording inside compiled code: the same records as without a compiler, from one graph without a break."""

import pytest
import torch
from models import tiny_olmoe, tokens
from torch._dynamo.utils import counters
from transformers import CompileConfig, StaticCache

from bhlib import BHRoutingIntegration, RoutingPatch
from bhlib.rules import TopP


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def analyzed(model, **options):
    """A patch under which nothing keeps a compiler from one graph, on a CPU too."""
    model.set_experts_implementation("grouped_mm")
    return BHRoutingIntegration(model, alpha=0.2, mode="analyze", **options)


def compiled_steps(model, ids, **options):
    """Greedy generation whose decoding steps are compiled, on a static cache."""
    config = CompileConfig(backend="eager", fullgraph=True, mode=None)
    config._compile_all_devices = True  # generate() compiles for accelerators only, if not told so
    vars(model).pop("_compiled_call", None)
    options = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": "static"} | options
    return model.generate(ids, compile_config=config, **options)


def assert_same_records(one, other):
    first, second = one.records.to_frame(), other.records.to_frame()
    assert first.equals(second) and len(first)
    assert one.get_routing_stats() == other.get_routing_stats()


def padded_batch():
    ids, mask = tokens(3, 7), torch.ones(3, 7, dtype=torch.long)
    ids[1, :3], mask[1, :3] = 0, 0
    return ids, mask


def test_compiled_steps_are_recorded_like_others():
    """Two generations with padding, in which a sequence ends early, on caches that are made, and used again."""
    model = tiny_olmoe()
    ids, mask = padded_batch()
    model.generation_config.eos_token_id = [model.generate(ids, max_new_tokens=6, do_sample=False)[0, 9].item()]
    recorded = []
    for compiled in (False, True):
        with analyzed(model) as bh:
            for rows in (3, 2):
                options = {"attention_mask": mask[:rows], "pad_token_id": 0}
                if compiled:
                    compiled_steps(model, ids[:rows], **options)
                else:
                    options |= {"max_new_tokens": 6, "do_sample": False, "cache_implementation": "static"}
                    model.generate(ids[:rows], disable_compile=True, **options)
        recorded.append(bh)
    assert_same_records(*recorded)
    assert sum(counters["graph_break"].values()) == 0
    assert recorded[0].records.to_frame()["generated"].sum() > 0


def test_one_graph_for_every_step():
    model = tiny_olmoe()
    with analyzed(model) as bh:
        compiled_steps(model, tokens(2, 5), max_new_tokens=12)
        graphs = counters["stats"]["unique_graphs"]
        compiled_steps_again = model._compiled_call
        model.generate(tokens(2, 5), max_new_tokens=12, do_sample=False, cache_implementation="static",
                       compile_config=model._last_compile_config)  # fmt: skip
        assert model._compiled_call is compiled_steps_again
    assert graphs == counters["stats"]["unique_graphs"] == 1
    assert bh.get_routing_stats()["total_tokens"] == 2 * 2 * (5 + 11)


@pytest.mark.parametrize("masks", ["none", "left", "four"])
def test_passes_without_a_cache(masks):
    """Prompts of several lengths, each compiled whole."""
    model = tiny_olmoe()
    recorded = []
    for compiled in (False, True):
        with analyzed(model) as bh, torch.no_grad():
            call = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
            for length in (7, 9, 12):
                ids, mask = tokens(2, length), torch.ones(2, length, dtype=torch.long)
                mask[0, :2] = 0
                if masks == "four":
                    causal = torch.ones(length, length, dtype=torch.bool).tril()
                    mask = causal & mask.bool()[:, None, None, :]
                call(ids, attention_mask=None if masks == "none" else mask, use_cache=False)
        recorded.append(bh)
    assert_same_records(*recorded)


def test_two_caches_in_turns():
    """Compiled code knows a cache by where it lies; the sequences of two go on side by side."""
    model = tiny_olmoe()
    recorded = []
    for compiled in (False, True):
        with analyzed(model) as bh, torch.no_grad():
            call = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
            caches = [StaticCache(model.config, max_cache_len=16) for _ in range(2)]
            for number, cache in enumerate(caches):
                model(tokens(2, 4 + number), None, None, cache)  # where compiled code would take its addresses anew
            for step in range(3):
                for number, cache in enumerate(caches):
                    past = torch.tensor([[4 + number + step]]).expand(2, 1)
                    call(tokens(2, 1, seed=step + number), None, past, cache)
        recorded.append(bh)
    assert_same_records(*recorded)
    frame = recorded[1].records.to_frame().query("layer == 0")
    assert frame.groupby("sequence")["position"].apply(list).tolist() == [[*range(7)]] * 2 + [[*range(8)]] * 2


def test_a_cache_that_only_compiled_code_has_seen():
    model = tiny_olmoe()
    with analyzed(model) as bh, torch.no_grad():
        call = torch.compile(model, backend="eager")
        cache = StaticCache(model.config, max_cache_len=16)
        for start, length in ((0, 5), (5, 1), (6, 1)):
            call(tokens(2, length), None, torch.arange(start, start + length).expand(2, length), cache)
    frame = bh.records.to_frame().query("layer == 0")
    assert frame.groupby("sequence")["position"].apply(list).tolist() == [[*range(7)]] * 2


def test_a_cache_that_grows():
    """Every step has another shape, and is recorded at the end by Python."""
    model = tiny_olmoe()
    recorded = []
    for compiled in (False, True):
        with analyzed(model) as bh, torch.no_grad():
            call = torch.compile(model, backend="eager", dynamic=True) if compiled else model
            cache = call(tokens(2, 5), use_cache=True)[1]
            for step in range(3):
                call(tokens(2, 1, seed=step), None, None, cache)
        recorded.append(bh)
    assert_same_records(*recorded)


def test_layers_that_are_compiled_alone():
    """The pass around them is not: they are recorded in it, as others are."""
    model = tiny_olmoe()
    ids, recorded = tokens(2, 5), []
    for compiled in (False, True):
        with analyzed(model) as bh, torch.no_grad():
            if compiled:
                for layer in model.model.layers[:2]:
                    layer.compile(backend="eager")
            model(ids, use_cache=False)
        recorded.append(bh)
    assert_same_records(*recorded)
    assert len(recorded[1].records.passes[0].layers) == 3


def test_a_packed_pass():
    """Several sequences in a row, and what says so is an argument like any other."""
    model = tiny_olmoe()
    ids, ends = tokens(1, 9), torch.tensor([0, 4, 9], dtype=torch.int32)
    arguments = {"position_ids": torch.tensor([[*range(4), *range(5)]]), "cu_seq_lens_q": ends, "use_cache": False}
    recorded = []
    for compiled in (False, True):
        with analyzed(model) as bh, torch.no_grad():
            (torch.compile(model, backend="eager") if compiled else model)(ids, **arguments)
        recorded.append(bh)
    assert_same_records(*recorded)
    frame = recorded[1].records.to_frame().query("layer == 0")
    assert set(frame["sequence"]) == {-1} and frame["position"].tolist() == [*range(4), *range(5)]


def test_logits_are_recorded_too():
    model = tiny_olmoe()
    ids = tokens(1, 6)
    with analyzed(model, record_logits=True) as bh, torch.no_grad():
        torch.compile(model, backend="eager", fullgraph=True)(ids, use_cache=False)
    with analyzed(model, record_logits=True) as other, torch.no_grad():
        model(ids, use_cache=False)
    assert bh.explain((0, 3), 1).equals(other.explain((0, 3), 1))


def test_a_rule_that_is_replaced_while_it_routes():
    """The next pass goes by it, and a token is explained by the rule that routed it."""
    model = tiny_olmoe()
    ids = tokens(1, 6)
    with RoutingPatch(model, TopP(0.2), record_logits=True) as patch, torch.no_grad():
        model(ids)
        patch.rule = TopP(0.9)
        model(ids)
        counts = patch.records.counts()
        assert counts[:6].sum() < counts[6:].sum()
        few, many = (int(patch.explain((sequence, 3), 0)["kept"].sum()) for sequence in (0, 1))
    assert few == counts[3, 0] and many == counts[9, 0]
    with RoutingPatch(model, TopP(0.9)) as alone, torch.no_grad():
        model(ids)
    assert (alone.records.counts() == counts[6:]).all()
