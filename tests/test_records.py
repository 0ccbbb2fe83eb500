"""Records against counts by hand."""

import json
import pickle
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from models import tiny_olmoe, tokens

from bhlib import BHRoutingIntegration, RoutingPatch
from bhlib.passes import PassTokens
from bhlib.recorded_passes import BLOCK_TOKENS
from bhlib.records import MAX_RECORDED_TOKENS, Records
from bhlib.rules import PrefixRule, Replay, Routing, Rule, TopK


def run(model, **inputs):
    with torch.no_grad():
        return model(**inputs)


def by_hand(model, bh, input_ids, mask):
    """Counts [layers][real tokens] from hidden states hooked out of the patched model, one token at a time."""
    counts = []

    def hook(router, args, output):
        logits = args[0].reshape(-1, args[0].shape[-1]) @ router.weight.T
        counts.append([int(bh.rule(row[None]).counts) for row in logits[mask.flatten().bool()]])

    handles = [layer.router.register_forward_hook(hook) for layer in bh.layers]
    run(model, input_ids=input_ids, attention_mask=mask)
    for handle in handles:
        handle.remove()
    return np.array(counts)


@pytest.mark.parametrize("side", ["left", "right"])
def test_stats_equal_a_count_by_hand_and_skip_padding(side):
    model = tiny_olmoe()
    ids, mask = tokens(3, 12), torch.ones(3, 12, dtype=torch.long)
    for row, padding in enumerate((0, 5, 9)):
        where = slice(0, padding) if side == "left" else slice(12 - padding, 12)
        mask[row, where] = 0
        ids[row, where] = 0
    with BHRoutingIntegration(model, alpha=0.2) as bh:
        counts = by_hand(model, bh, ids, mask)
    stats = bh.get_routing_stats()
    assert stats["total_tokens"] == mask.sum() == 22
    assert stats["mean_experts_per_token"] == pytest.approx(counts.mean())
    assert stats["std_experts_per_token"] == pytest.approx(counts.std())
    assert stats["sparsity_gain"] == pytest.approx(1 - counts.mean() / 8)
    assert stats["mean_experts_per_layer"] == pytest.approx(counts.mean(axis=1).tolist())
    assert stats["histogram"] == np.bincount(counts.flatten(), minlength=65).tolist()
    assert np.array_equal(bh.records.counts(), counts.T)
    assert bh.records.expert_load().sum() == counts.sum()
    frame = bh.records.to_frame()
    assert len(frame) == 22 * 3
    assert frame.query("layer == 0").groupby("sequence")["position"].apply(list).tolist() == [
        list(range(12)), list(range(7)), list(range(3))
    ]  # fmt: skip
    real = ids[mask.bool()].tolist()
    assert frame.query("layer == 1")["token_id"].tolist() == real


def test_frame_through_prefill_and_decoding():
    model = tiny_olmoe()
    prompt = tokens(2, 5)
    mask = torch.ones_like(prompt)
    mask[1, :2] = 0  # left padding
    with BHRoutingIntegration(model, alpha=0.2) as bh:
        out = model.generate(prompt, attention_mask=mask, max_new_tokens=4, do_sample=False)
    frame = bh.records.to_frame().query("layer == 2").sort_values(["sequence", "position"])
    first, second = (frame[frame["sequence"] == row] for row in (0, 1))
    assert first["token_id"].tolist() == out[0, :-1].tolist()  # the last token is not fed back
    assert second["token_id"].tolist() == out[1, 2:-1].tolist()
    assert second["position"].tolist() == list(range(6))
    assert first["generated"].tolist() == [False] * 5 + [True] * 3
    assert all(len(e) == len(w) == c for e, w, c in zip(frame.experts, frame.weights, frame["count"], strict=True))


def test_decoding_decides_as_one_pass_does():
    """Token for token: what was recorded step by step is what one pass over the whole text records."""
    model = tiny_olmoe()
    with BHRoutingIntegration(model, alpha=0.2) as bh:
        out = model.generate(tokens(1, 5), max_new_tokens=10, do_sample=False)
        stepwise = bh.records.counts()
        bh.reset_stats()
        run(model, input_ids=out[:, :-1])
        assert np.array_equal(bh.records.counts(), stepwise)


def test_sequences_are_numbered_through_and_reset():
    model = tiny_olmoe()
    with BHRoutingIntegration(model) as bh:
        run(model, input_ids=tokens(2, 4))
        run(model, input_ids=tokens(3, 4))
        assert sorted(bh.records.to_frame()["sequence"].unique()) == [0, 1, 2, 3, 4]
        bh.reset_stats()
        assert bh.get_routing_stats()["total_tokens"] == 0 and bh.records.to_frame().empty
        run(model, input_ids=tokens(1, 4))
        assert bh.records.to_frame()["sequence"].unique().tolist() == [0]


def test_the_inner_model_is_recorded_too():
    model = tiny_olmoe()
    with BHRoutingIntegration(model) as bh:
        run(model.model, input_ids=tokens(2, 4))
    assert bh.get_routing_stats()["total_tokens"] == 8


def test_rows_are_bounded_and_totals_are_not():
    model = tiny_olmoe()
    with BHRoutingIntegration(model, max_recorded_tokens=8) as bh:
        for _ in range(5):
            run(model, input_ids=tokens(1, 4))
    with pytest.warns(UserWarning, match="these rows hold 8 of 20 tokens"):
        assert len(bh.records.counts()) == 8
    assert bh.get_routing_stats()["total_tokens"] == 20


@pytest.mark.parametrize("read", ["counts", "coactivation", "to_frame"])
def test_rows_are_bounded_by_default_and_whoever_reads_them_is_told(read):
    model = tiny_olmoe(num_hidden_layers=1)
    with BHRoutingIntegration(model) as bh:
        run(model, input_ids=tokens(20, MAX_RECORDED_TOKENS // 20))
        getattr(bh.records, read)()
        run(model, input_ids=tokens(1, 1))
    with pytest.warns(UserWarning, match="10000 of 10001 tokens.* patch with max_recorded_tokens=None"):
        getattr(bh.records, read)()
    assert bh.get_routing_stats()["total_tokens"] == bh.records.histogram().sum() == MAX_RECORDED_TOKENS + 1
    with BHRoutingIntegration(model, max_recorded_tokens=None) as bh:
        run(model, input_ids=tokens(21, MAX_RECORDED_TOKENS // 20))
    assert len(bh.records.counts()) == 21 * MAX_RECORDED_TOKENS // 20


def test_stats_are_a_dict_with_a_story():
    model = tiny_olmoe()
    with BHRoutingIntegration(model, alpha=0.2) as bh:
        run(model, input_ids=tokens(1, 4))
        run(model, input_ids=tokens(1, 3))
    stats = bh.get_routing_stats()
    assert dict(stats)["top_k"] == 8 and "7 tokens used" in repr(stats)
    assert (stats["total_forward_passes"], stats["alpha"], stats["mode"]) == (2, 0.2, "patch")
    assert json.loads(json.dumps(stats)) == stats == pickle.loads(pickle.dumps(stats))
    with pytest.raises(KeyError, match="'mean' is not among the statistics: mean_experts_per_token"):
        stats["mean"]
    assert stats.get("mean") is None
    with RoutingPatch(model, TopK(4), mode="analyze") as watched:
        run(model, input_ids=tokens(1, 4))
    stats = watched.get_routing_stats()
    assert (stats["total_forward_passes"], stats["alpha"], stats["mode"]) == (1, None, "analyze")


def test_the_bound_on_rows_is_kept():
    """A pass that does not fit is left out whole, and so is all that comes after it: no gaps."""
    model = tiny_olmoe()
    with BHRoutingIntegration(model, max_recorded_tokens=10) as bh:
        for length, kept in ((4, 4), (7, 4), (2, 4)):
            run(model, input_ids=tokens(1, length))
            assert sum(one.rows.counts.shape[1] for one in bh.records.passes) == kept
        assert bh.records.truncated and bh.get_routing_stats()["total_tokens"] == 13
        bh.reset_stats()
        assert not bh.records.truncated


@pytest.mark.parametrize("max_k", [1, 8, 20])
def test_memory_is_as_stated(max_k):
    model = tiny_olmoe()
    with BHRoutingIntegration(model, max_k=max_k) as bh:
        assert bh.records.nbytes == 0
        model.generate(tokens(2, 5), max_new_tokens=4, do_sample=False)
    stated = 2 * 8 * bh.records.bytes_per_token(max_k)
    assert bh.records.bytes_per_token(max_k) == 3 * (6 * max_k + 2) + 9
    assert bh.records.nbytes == stated
    # Nothing larger stays alive with them than the room of one block: a pickle holds whole storages.
    room = (BLOCK_TOKENS - 2 * 8) * bh.records.bytes_per_token(max_k)
    assert len(pickle.dumps(bh.records)) <= stated + room + 10_000
    with BHRoutingIntegration(model, max_recorded_tokens=0) as bounded:
        run(model, input_ids=tokens(2, 5))
    assert bounded.records.nbytes == 0 and bounded.get_routing_stats()["total_tokens"] == 10


def random_pass(generator, num_tokens, num_layers, num_experts=64):
    """The tokens of a pass, and what some layers decide: as many slots as the layer with most experts needs."""
    slots = int(torch.randint(1, 9, (), generator=generator))
    layers = [layer for layer in range(num_layers) if torch.rand((), generator=generator) < 0.9] or [0]
    given = PassTokens(
        torch.rand(1, num_tokens, generator=generator) < 0.8,
        torch.arange(num_tokens, dtype=torch.int32)[None],
        torch.randint(0, 1000, (1, num_tokens), generator=generator, dtype=torch.int32),
        first_sequence=int(torch.randint(0, 99, (), generator=generator)),
        generated=num_tokens == 1,
    )
    routings = {}
    for layer in layers:
        counts = torch.randint(0, slots + 1, (num_tokens,), generator=generator)
        empty = torch.arange(slots) >= counts[:, None]
        order = torch.rand(num_tokens, num_experts, generator=generator).argsort(dim=-1)[:, :slots]
        weights = torch.rand(num_tokens, slots, generator=generator).masked_fill(empty, 0.0)
        routings[layer] = Routing(weights, order.masked_fill(empty, -1), counts)
    return given, routings


@pytest.mark.parametrize("mode", [nullcontext, torch.inference_mode, torch.no_grad])
def test_what_is_read_back_is_what_was_recorded(mode):
    """Passes of all lengths, with several widths and layers that did not run, through blocks that fill and close."""
    generator, records, put = torch.Generator().manual_seed(0), Records(3, 64, 8), []
    for number in range(120):
        num_tokens = (1, 1, 1, 40, 200, 300)[number % 6]
        # In turn in the mode and out of it: blocks that one began, the other fills.
        with mode() if number % 2 else nullcontext():
            given, routings = random_pass(generator, num_tokens, num_layers=3)
            current = records.begin(given)
            for layer, routing in routings.items():
                current.add(layer, routing)
            records.end(current)
        put.append((given, routings))
    assert len(records.passes) == len(put) and len(records.passes.blocks) < 60
    histogram, load = np.zeros((3, 65), np.int64), np.zeros((3, 64), np.int64)
    for found, (given, routings) in zip(records.passes, put, strict=True):
        assert (found.tokens.first_sequence, found.tokens.generated) == (given.first_sequence, given.generated)
        for name in ("valid", "position", "token_ids"):
            assert torch.equal(getattr(found.tokens, name), getattr(given, name))
        assert list(found.routings) == list(routings)
        for layer, routing in routings.items():
            back = found.routings[layer]
            assert torch.equal(back.weights, routing.weights)
            assert torch.equal(back.experts.long(), routing.experts) and torch.equal(back.counts.long(), routing.counts)
            real = given.valid[0]
            histogram[layer] += np.bincount(routing.counts[real], minlength=65)
            load[layer] += np.bincount(routing.experts[real][routing.experts[real] >= 0], minlength=64)
    assert (records.histogram() == histogram).all() and (records.expert_load() == load).all()
    assert (records.passes[-1].rows.counts == records.passes[119].rows.counts).all()
    assert pickle.loads(pickle.dumps(records)).to_frame().equals(records.to_frame())


@pytest.mark.parametrize("surroundings", ["autocast", "bfloat16 by default"])
def test_coactivation_counts_exactly_in_low_precision(surroundings):
    """Beyond 256, where bfloat16 can no longer tell a number from the next."""
    valid, records = torch.ones(7, 43, dtype=torch.bool), Records(1, 4, 2)
    current = records.begin(PassTokens(valid, valid.int(), None, 0, generated=False))
    experts = torch.tensor([[0, 2], [3, -1]])[[0] * 259 + [1] * 42]
    current.add(0, Routing((experts >= 0).float(), experts, (experts >= 0).sum(dim=-1)))
    records.end(current)
    if surroundings == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = records.coactivation()
    else:
        torch.set_default_dtype(torch.bfloat16)
        try:
            found = records.coactivation()
        finally:
            torch.set_default_dtype(torch.float32)
    assert found.tolist() == [[[259, 0, 259, 0], [0, 0, 0, 0], [259, 0, 259, 0], [0, 0, 0, 42]]]


@pytest.mark.parametrize("max_k", [8, 20])
def test_coactivation_is_the_count_of_pairs(max_k):
    model = tiny_olmoe()
    ids, mask = tokens(2, 10), torch.ones(2, 10, dtype=torch.long)
    mask[1, :4] = 0
    with BHRoutingIntegration(model, alpha=0.3, max_k=max_k) as bh:
        run(model, input_ids=ids, attention_mask=mask)
        run(model, input_ids=tokens(1, 5))
    expected = np.zeros((3, 64, 64), dtype=np.int64)
    for row in bh.records.to_frame().itertuples():
        for one in row.experts:
            for other in row.experts:
                expected[row.layer, one, other] += 1
    found = bh.records.coactivation()
    assert np.array_equal(found, expected) and expected.sum() > expected.trace(axis1=1, axis2=2).sum()
    assert np.array_equal(np.diagonal(found, axis1=1, axis2=2), bh.records.expert_load())


def test_load_balance():
    model = tiny_olmoe()
    with RoutingPatch(model, TopK(64)) as everything:
        run(model, input_ids=tokens(1, 5))
    even = everything.records.load_balance()
    assert even["max_over_mean"].tolist() == [1.0] * 3 and even["unused"].tolist() == [0] * 3
    np.testing.assert_allclose(even["entropy"], 1.0)
    with RoutingPatch(model, TopK(1)) as single:
        run(model, input_ids=tokens(1, 1))
    alone = single.records.load_balance()
    assert alone["max_over_mean"].tolist() == [64.0] * 3 and alone["entropy"].tolist() == [0.0] * 3
    assert alone["unused"].tolist() == [63] * 3
    single.reset_stats()
    assert single.records.load_balance()["max_over_mean"].isna().all()


def test_records_can_be_pickled():
    model = tiny_olmoe()
    with BHRoutingIntegration(model) as bh:
        run(model, input_ids=tokens(1, 5))
    loaded = pickle.loads(pickle.dumps(bh.records))
    assert loaded.to_frame().equals(bh.records.to_frame()) and loaded.stats() == bh.records.stats()
    run_again(model, Replay(loaded), tokens(1, 5))


def test_own_caches_are_followed():
    """Two conversations in turn, each with a cache that its first pass made."""
    model = tiny_olmoe()
    with BHRoutingIntegration(model) as bh:
        one, two = run(model, input_ids=tokens(1, 4)), run(model, input_ids=tokens(1, 3, seed=1))
        run(model, input_ids=torch.tensor([[9]]), past_key_values=one.past_key_values)
        run(model, input_ids=torch.tensor([[8, 7]]), past_key_values=two.past_key_values)
    frame = bh.records.to_frame().query("layer == 0").sort_values(["sequence", "position"])
    assert frame["sequence"].tolist() == [0] * 5 + [1] * 5
    assert frame["position"].tolist() == [0, 1, 2, 3, 4] * 2
    assert frame["token_id"].tolist()[4] == 9 and frame["token_id"].tolist()[-2:] == [8, 7]
    # A decoding step reads one token; more at once are a prompt that goes on.
    assert frame["generated"].tolist() == [False] * 4 + [True] + [False] * 5


def test_tokens_that_cannot_be_aligned_are_an_error():
    model = tiny_olmoe()

    def halve(module, args):
        return (args[0][:, ::2],)

    handle = model.model.layers[1].mlp.register_forward_pre_hook(halve)
    message = "layer 1 routed 3 tokens in a forward pass of 6"
    with BHRoutingIntegration(model), pytest.raises(RuntimeError, match=message):
        run(model, input_ids=tokens(1, 6))
    handle.remove()


# -- record and replay ------------------------------------------------------------------------------------------


def run_again(model, rule, ids, **arguments):
    with RoutingPatch(model, rule, **arguments):
        return run(model, input_ids=ids).logits


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", ["model", "recorded"])
def test_replay_reproduces_the_logits(implementation, dtype, weights):
    model = tiny_olmoe().to(dtype)
    model.set_experts_implementation(implementation)
    ids = tokens(2, 9)
    plain = run(model, input_ids=ids).logits
    with BHRoutingIntegration(model, alpha=0.2, max_k=12) as bh:
        routed = run(model, input_ids=ids).logits
    replay = Replay(bh.records, weights=weights)
    assert torch.equal(run_again(model, replay, ids), routed) and not torch.equal(routed, plain)
    assert torch.equal(run_again(model, replay, ids), routed)  # a rule begins anew in each patch


def test_replay_through_generate():
    model = tiny_olmoe()
    with BHRoutingIntegration(model, alpha=0.2) as bh:
        text = model.generate(tokens(2, 5), max_new_tokens=5, do_sample=False)
    with RoutingPatch(model, Replay(bh.records)) as again:
        assert torch.equal(model.generate(tokens(2, 5), max_new_tokens=5, do_sample=False), text)
    assert again.records.to_frame().equals(bh.records.to_frame())


def test_replay_imposes_the_routing_of_another_model():
    """The experts are the recorded ones; the weights are of the moment, or recorded as well."""
    model, other = tiny_olmoe(seed=1), tiny_olmoe(seed=2)
    ids = tokens(1, 9)
    with BHRoutingIntegration(model, alpha=0.2) as bh:
        run(model, input_ids=ids)
    frame = bh.records.to_frame()
    for weights, same in (("model", False), ("recorded", True)):
        with RoutingPatch(other, Replay(bh.records, weights=weights)) as replayed:
            run(other, input_ids=ids)
        found = replayed.records.to_frame()
        assert found["experts"].equals(frame["experts"]) and found["weights"].equals(frame["weights"]) == same


def test_replay_refuses_what_does_not_fit():
    model = tiny_olmoe()
    ids = tokens(1, 6)
    with BHRoutingIntegration(model) as bh:
        run(model, input_ids=ids)
    replay = Replay(bh.records)
    with pytest.raises(ValueError, match="routed 6 tokens, and now there are 5"):
        run_again(model, replay, ids[:, :5])
    with RoutingPatch(model, replay), pytest.raises(RuntimeError, match="holds 1 forward passes, and MoE layer 0"):
        run(model, input_ids=ids)
        run(model, input_ids=ids)
    with pytest.raises(ValueError, match="of 3 MoE layers cannot be replayed on 2"):
        RoutingPatch(tiny_olmoe(num_hidden_layers=2), replay)
    with pytest.raises(ValueError, match="of 64 experts cannot be replayed on 32"):
        RoutingPatch(tiny_olmoe(num_experts=32), replay)
    with pytest.raises(ValueError, match="weights must be 'model' or 'recorded', got 'mine'"):
        Replay(bh.records, weights="mine")
    with BHRoutingIntegration(model, max_recorded_tokens=3) as cut:
        run(model, input_ids=ids)
    with pytest.raises(ValueError, match="cut short by max_recorded_tokens=3"):
        Replay(cut.records)
    cut.reset_stats()
    with pytest.raises(ValueError, match="recording is empty"):
        Replay(cut.records)


# -- rules of one's own -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MinP(PrefixRule):
    """The example of `Rule`'s docstring."""

    ratio: float = 0.2

    def count(self, top, scores, layer):
        return (top >= self.ratio * top[:, :1]).sum(dim=-1)


@dataclass(frozen=True)
class Worst(Rule):
    """The two worst experts, in even layers only: not a prefix of the ranking, and it knows its layer."""

    def select(self, router_logits, scores, layer):
        order = scores.argsort(dim=-1)[:, : self.max_k]
        return order, torch.full(scores.shape[:1], 2 if layer % 2 == 0 else self.min_k)


def test_a_rule_of_ones_own():
    model = tiny_olmoe()
    with RoutingPatch(model, MinP(ratio=0.5, max_k=64)) as patch:
        assert "MinP(min_k=1, max_k=64, ratio=0.5)" in repr(patch)
        run(model, input_ids=tokens(2, 9))
    for row in patch.records.to_frame().itertuples():
        assert row.count >= 1 and min(row.weights) >= 0.5 * max(row.weights) * (1 - 1e-6)
    with RoutingPatch(model, Worst(min_k=0)) as patch:
        run(model, input_ids=tokens(2, 9))
    assert patch.get_routing_stats()["mean_experts_per_layer"] == [2.0, 0.0, 2.0]


def test_a_rule_that_is_not_finished_says_what_is_missing():
    with pytest.raises(NotImplementedError, match="Rule has to define select"):
        run_again(tiny_olmoe(), Rule(), tokens(1, 3))
