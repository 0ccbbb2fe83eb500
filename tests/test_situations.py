"""What people do to models: under each of these a patch keeps routing, recording and restoring as it should.

Each test is one situation; where something cannot work, the test is of the error that says so.
"""

import copy
import io
import pickle
import threading
import time

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from models import state_of, tiny_olmoe, tokens
from packaging.version import Version
from rows import count_rows
from transformers import AutoModelForCausalLM, CompileConfig, OlmoeForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface

from bhlib import BHRoutingIntegration, RoutingPatch, find_moe_layers
from bhlib.experts import TWIN_NAMES_COMPILE
from bhlib.hooks import NewForward
from bhlib.rules import Replay, TopK

#: The limit that `bhlib.experts` documents: there, a copied configuration keeps the twin's name.
COPIES_KEEP_THE_NAME = Version(torch.__version__) < Version(TWIN_NAMES_COMPILE)
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")


@torch.no_grad()
def logits_of(model, input_ids, **inputs):
    return model(input_ids=input_ids, **inputs).logits


def greedy(model, ids, **arguments):
    return model.generate(ids, **({"max_new_tokens": 6, "do_sample": False} | arguments))


def rows_are_exact(model, bh, run):
    """Whether the experts' matrices see as many rows as the records say were selected; returns the output."""
    with count_rows(*[layer.experts for layer in find_moe_layers(model)]) as counter:
        output = run()
    selected = int(bh.records.counts().sum())
    assert counter.rows == {"gate_up_proj": selected, "down_proj": selected} and selected > 0
    return output


# -- copies and files --------------------------------------------------------------------------------------------


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved_and_loaded],
    ids=["deepcopy", "pickle", "torch_save"],
)  # fmt: skip
@pytest.mark.parametrize("mode", ["patch", "analyze"])
def test_a_copy_of_a_patched_model_is_plain(duplicate, mode):
    model = tiny_olmoe()
    ids, state, before = tokens(2, 9), state_of(model), logits_of(model, tokens(2, 9))
    with BHRoutingIntegration(model, mode=mode) as bh:
        twin = duplicate(model)
        if mode == "patch" and COPIES_KEEP_THE_NAME:
            assert torch.equal(logits_of(twin, ids), before)  # under either name
            twin.set_experts_implementation("grouped_mm")
        assert state_of(twin) == state
        routed = logits_of(model, ids)  # the original stays patched
        assert torch.equal(logits_of(twin, ids), before)
        # A copy is a model like others: it can be patched itself, and its tokens are not in the original's records.
        with BHRoutingIntegration(twin, mode=mode) as other:
            assert torch.equal(logits_of(twin, ids), routed)
        assert other.get_routing_stats()["total_tokens"] == bh.get_routing_stats()["total_tokens"] == 18
    assert state_of(model) == state


@pytest.mark.skipif(COPIES_KEEP_THE_NAME, reason=f"a copy keeps the twin's name before torch {TWIN_NAMES_COMPILE}")
def test_a_copy_of_one_layer_or_of_the_configuration_is_plain():
    model = tiny_olmoe()
    model.set_experts_implementation("eager")
    with BHRoutingIntegration(model):
        assert model.config._experts_implementation.startswith("bh_")
        layer, config = copy.deepcopy(model.model.layers[0]), copy.deepcopy(model.config)
        assert not layer.mlp.gate._forward_hooks and "__reduce_ex__" not in vars(layer.mlp.gate)
        for name in (layer.mlp.experts.config._experts_implementation, config._experts_implementation):
            assert name == "eager" and type(name) is str
        assert pickle.loads(pickle.dumps(model.config))._experts_implementation == "eager"


def test_save_pretrained_saves_the_plain_model(tmp_path):
    model = tiny_olmoe()
    before = logits_of(model, tokens(1, 9))
    model.save_pretrained(tmp_path / "plain")
    with BHRoutingIntegration(model):
        model.save_pretrained(tmp_path / "patched")
    for path in (tmp_path / "plain").iterdir():
        assert (tmp_path / "patched" / path.name).read_bytes() == path.read_bytes(), path.name
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "patched").eval()
    assert torch.equal(logits_of(loaded, tokens(1, 9)), before)
    assert loaded.config._experts_implementation == model.config._experts_implementation == "grouped_mm"


def test_the_hub_layout_of_one_matrix_per_expert_loads_and_patches(tmp_path):
    from safetensors.torch import load_file, save_file

    from bhlib import load_demo

    model, _ = load_demo()
    # Split by hand, as the checkpoints on the hub are.
    state = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            for expert, matrix in enumerate(tensor):
                gate, up = matrix.chunk(2)
                state[name.replace("gate_up_proj", f"{expert}.gate_proj.weight")] = gate.contiguous()
                state[name.replace("gate_up_proj", f"{expert}.up_proj.weight")] = up.contiguous()
        elif name.endswith("experts.down_proj"):
            for expert, matrix in enumerate(tensor):
                state[name.replace("down_proj", f"{expert}.down_proj.weight")] = matrix.contiguous()
        else:
            state[name] = tensor.contiguous()
    model.config.save_pretrained(tmp_path)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert "model.layers.7.mlp.experts.63.up_proj.weight" in load_file(tmp_path / "model.safetensors")
    loaded = OlmoeForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = tokens(1, 20)
    assert torch.equal(logits_of(loaded, ids), logits_of(model, ids))
    with BHRoutingIntegration(loaded) as bh:
        rows_are_exact(loaded, bh, lambda: logits_of(loaded, ids))


# -- threads -----------------------------------------------------------------------------------------------------


def test_threads_generate_on_one_patched_model():
    model = tiny_olmoe()
    prompts = [tokens(2, 7, seed=seed) for seed in range(4)]
    with BHRoutingIntegration(model, alpha=0.2) as bh:
        alone = [greedy(model, prompt, max_new_tokens=12) for prompt in prompts]
        counts = sorted(map(tuple, bh.records.counts().tolist()))
        stats = dict(bh.get_routing_stats())
        bh.reset_stats()
        together = [None] * len(prompts)

        def work(number):
            together[number] = greedy(model, prompts[number], max_new_tokens=12)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(torch.equal(one, two) for one, two in zip(alone, together, strict=True))
        assert dict(bh.get_routing_stats()) == stats
        assert sorted(map(tuple, bh.records.counts().tolist())) == counts
        # Every sequence is in one piece: its positions, and the ids that the model was given.
        frame = bh.records.to_frame().query("layer == 0").sort_values(["sequence", "position"])
        texts = [row[:-1].tolist() for output in alone for row in output]
        found = frame.groupby("sequence")["token_id"].apply(list).tolist()
        assert sorted(found) == sorted(texts)
        assert frame.groupby("sequence")["position"].apply(list).tolist() == [list(range(18))] * 8


# -- ways to run -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_autocast(implementation):
    model = tiny_olmoe()
    model.set_experts_implementation(implementation)
    ids = tokens(2, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = logits_of(model, ids)
        with RoutingPatch(model, TopK(8)):
            assert torch.equal(logits_of(model, ids), before)
        with BHRoutingIntegration(model, alpha=0.2) as bh:
            routed = rows_are_exact(model, bh, lambda: logits_of(model, ids))
    assert routed.isfinite().all() and 1 < bh.get_routing_stats()["mean_experts_per_token"] < 8


@pytest.mark.parametrize("padded", [False, True], ids=["even", "left_padded"])
def test_static_cache(padded):
    """The same text and records as with the cache that grows; also where transformers makes 4-D masks."""
    model = tiny_olmoe()
    ids, mask = tokens(2, 8), torch.ones(2, 8, dtype=torch.long)
    if padded:
        mask[1, :3], ids[1, :3] = 0, 0
    runs = []
    with BHRoutingIntegration(model, alpha=0.2) as bh:
        for cache in ("dynamic", "static"):
            bh.reset_stats()
            text = greedy(model, ids, attention_mask=mask, cache_implementation=cache)
            runs.append((text, bh.records.to_frame().drop(columns="weights")))
    assert torch.equal(runs[0][0], runs[1][0])
    assert runs[0][1].equals(runs[1][1]) and len(runs[0][1]) == (26 - 3 * padded) * 3


def test_left_padded_batch_generates_as_each_alone():
    model = tiny_olmoe()
    long, short = tokens(1, 8, seed=1), tokens(1, 5, seed=2)
    ids = torch.cat([long, torch.cat([torch.zeros(1, 3, dtype=torch.long), short], dim=1)])
    mask = (ids != 0).long()
    frames = []
    with BHRoutingIntegration(model, alpha=0.2) as bh:
        batch = greedy(model, ids, attention_mask=mask)
        together = bh.records.to_frame()
        for prompt in (long, short):
            bh.reset_stats()
            alone = greedy(model, prompt)
            frames.append(bh.records.to_frame())
            assert batch[len(frames) - 1, -6:].tolist() == alone[0, -6:].tolist()
    for sequence, frame in enumerate(frames):
        part = together[together["sequence"] == sequence]
        for column in ("position", "generated", "token_id", "layer", "count"):
            assert part[column].tolist() == frame[column].tolist(), column


def test_sequences_that_end_early_are_not_counted_on():
    model = tiny_olmoe()
    ids = tokens(3, 6)
    end = greedy(model, ids)[0, 8].item()  # the third token that the first sequence is given
    with BHRoutingIntegration(model, mode="analyze") as bh:
        out = greedy(model, ids, eos_token_id=end, pad_token_id=0)
    fed = out[:, :-1]
    assert (fed == 0).sum() > 0
    assert bh.get_routing_stats()["total_tokens"] == (fed != 0).sum()
    texts = bh.records.to_frame().query("layer == 0").sort_values(["sequence", "position"])
    assert texts.groupby("sequence")["token_id"].apply(list).tolist() == [row[row != 0].tolist() for row in fed]


def test_beam_search_rows_and_hypotheses():
    model = tiny_olmoe()
    ids = tokens(2, 6)
    with BHRoutingIntegration(model, alpha=0.2) as bh:
        out = rows_are_exact(
            model,
            bh,
            lambda: greedy(
                model, ids, num_beams=3, num_return_sequences=2, return_dict_in_generate=True, output_scores=True
            ),
        )
        # A row of the batch is a beam: two prompts of three beams, which change places from step to step.
        assert bh.records.to_frame()["sequence"].nunique() == 6
        hypotheses = bh.records.to_frame(beam_indices=out.beam_indices).query("layer == 1")
        texts = hypotheses.sort_values(["sequence", "position"]).groupby("sequence")["token_id"].apply(list).tolist()
        assert texts == [row[:-1].tolist() for row in out.sequences]
        # Recorded along the way, its decisions are those of the finished text.
        bh.reset_stats()
        logits_of(model, out.sequences[:, :-1])
        again = bh.records.to_frame().query("layer == 1")
        assert hypotheses.sort_values(["sequence", "position"])["count"].tolist() == again["count"].tolist()
        with pytest.raises(ValueError, match=r"call reset_stats\(\) before that generate"):
            logits_of(model, ids)
            bh.records.to_frame(beam_indices=out.beam_indices)


def test_sampling_several_sequences_for_a_prompt():
    model = tiny_olmoe()
    with BHRoutingIntegration(model, alpha=0.2) as bh:
        out = greedy(model, tokens(2, 6), do_sample=True, num_return_sequences=3)
    frame = bh.records.to_frame().query("layer == 0").sort_values(["sequence", "position"])
    kept = [row[:-1][row[:-1] != 0].tolist() for row in out]
    assert frame.groupby("sequence")["token_id"].apply(list).tolist() == kept


def test_assisted_generation():
    """Several tokens are checked at a time: the text is that of plain decoding, and each row computed is counted."""
    model = tiny_olmoe()
    ids = tokens(1, 4).repeat(1, 3)
    with BHRoutingIntegration(model, alpha=0.2) as bh:
        plain = greedy(model, ids)
        bh.reset_stats()
        assisted = rows_are_exact(model, bh, lambda: greedy(model, ids, prompt_lookup_num_tokens=3))
    assert torch.equal(plain, assisted)


def listing_backend(graphs):
    """A compiler's backend that lists what it is given to compile, and runs it as it is."""

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    return backend


@pytest.fixture
def multiplied():
    """Rows that an experts implementation named ``counted`` is handed; a dispatcher's mode would stop the compiler."""
    rows = []

    def counted(module, hidden_states, top_k_index, top_k_weights):
        rows.append(top_k_index.numel())
        return ALL_EXPERTS_FUNCTIONS["grouped_mm"](module, hidden_states, top_k_index, top_k_weights)

    ALL_EXPERTS_FUNCTIONS.register("counted", counted)
    yield rows
    for name in ("counted", "bh_counted"):
        ExpertsInterface._global_mapping.pop(name, None)


@pytest.mark.parametrize("compiled_before", [True, False])
def test_torch_compile(compiled_before, multiplied):
    """Compiled code notices that a patch has come, and that it has gone; records are those of the plain run."""
    model = tiny_olmoe(num_hidden_layers=1)
    ids = tokens(2, 9)
    before = logits_of(model, ids)
    with BHRoutingIntegration(model, alpha=0.2) as bh:
        routed, counts = logits_of(model, ids), bh.records.counts()
    model.set_experts_implementation("counted")
    graphs = []
    compiled = torch.compile(model, backend=listing_backend(graphs))
    if compiled_before:
        torch.testing.assert_close(logits_of(compiled, ids), before)
    with BHRoutingIntegration(model, alpha=0.2) as bh:
        torch.testing.assert_close(logits_of(compiled, ids), routed)
        assert (bh.records.counts() == counts).all()
        bh.reset_stats()
        multiplied.clear()
        graphs.clear()
        logits_of(compiled, tokens(1, 5))  # another shape
        assert sum(multiplied) == bh.records.counts().sum() > 0 and graphs
    torch.testing.assert_close(logits_of(compiled, ids), before)


def test_torch_compile_of_the_patched_object():
    """The compiled wrapper may be handed over in the place of the model."""
    model = tiny_olmoe(num_hidden_layers=1)
    ids, graphs = tokens(2, 9), []
    compiled = torch.compile(model, backend=listing_backend(graphs))
    with BHRoutingIntegration(model, alpha=0.2):
        routed = logits_of(model, ids)
    with BHRoutingIntegration(compiled, alpha=0.2) as bh:
        torch.testing.assert_close(logits_of(compiled, ids), routed)
    assert bh.get_routing_stats()["total_tokens"] == 18 and graphs


def test_generate_compiles_its_steps(multiplied):
    """A static cache makes `generate()` compile the decoding steps, on a GPU by default."""
    model = tiny_olmoe(num_hidden_layers=1)
    model.set_experts_implementation("counted")
    graphs = []
    config = CompileConfig(fullgraph=False, backend=listing_backend(graphs), mode=None)
    config._compile_all_devices = True
    ids = tokens(2, 6)
    with BHRoutingIntegration(model, alpha=0.2) as bh:
        plain, counts = greedy(model, ids), bh.records.counts()
        bh.reset_stats()
        multiplied.clear()
        assert not graphs
        compiled = greedy(model, ids, cache_implementation="static", compile_config=config)
        assert sum(multiplied) == bh.records.counts().sum() and graphs
    assert torch.equal(plain, compiled) and (bh.records.counts() == counts).all()


# -- training ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_counts_once(reentrant):
    model = tiny_olmoe().train()
    ids = tokens(2, 10)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        with BHRoutingIntegration(model, alpha=0.2) as bh:
            model(input_ids=ids, labels=ids).loss.backward()
        assert bh.get_routing_stats()["total_tokens"] == 20
        gradients.append(model.model.layers[0].mlp.gate.weight.grad.clone())
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(*gradients)


def test_train_mode_routes_and_restores():
    model = tiny_olmoe().train()
    state = state_of(model)
    with BHRoutingIntegration(model, alpha=0.2) as bh:
        rows_are_exact(model, bh, lambda: logits_of(model, tokens(2, 9)))
        assert model.training and all(layer.router.training for layer in bh.layers)
    assert state_of(model) == state


# -- where the weights are ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["device_map", "cpu_offload", "disk_offload"])
def test_accelerate(how, tmp_path):
    """Under accelerate's hooks, which bring weights in from another device or from disk for each forward pass."""
    model, ids = tiny_olmoe(), tokens(2, 9)
    before = logits_of(model, ids)
    with BHRoutingIntegration(model, alpha=0.2):
        routed = logits_of(model, ids)
    if how == "cpu_offload":
        cpu_offload(model, execution_device="cpu")
    elif how == "disk_offload":
        disk_offload(model, tmp_path, execution_device="cpu")
    else:
        places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
        places |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "cpu"}
        dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    assert how == "cpu_offload" or any(parameter.is_meta for parameter in model.parameters())
    state = state_of(model)
    with RoutingPatch(model, TopK(8)):
        assert torch.equal(logits_of(model, ids), before)
    with BHRoutingIntegration(model, alpha=0.2) as bh:
        output = rows_are_exact(model, bh, lambda: logits_of(model, ids))
        assert torch.equal(output, routed)
    assert state_of(model) == state and torch.equal(logits_of(model, ids), before)
    remove_hook_from_submodules(model)


def test_accelerate_comes_while_the_model_is_patched():
    """It wraps the forward that the patch has put in a router, and keeps it: what is left must be the router's own."""
    model, ids = tiny_olmoe(), tokens(2, 9)
    before, gate = logits_of(model, ids), model.model.layers[0].mlp.gate
    with BHRoutingIntegration(model, alpha=0.2) as bh:
        routed = logits_of(model, ids)
        cpu_offload(model, execution_device="cpu")
        assert torch.equal(logits_of(model, ids), routed)
    counted = bh.get_routing_stats()["total_tokens"]
    assert torch.equal(logits_of(model, ids), before) and bh.get_routing_stats()["total_tokens"] == counted == 2 * 18
    remove_hook_from_submodules(model)
    assert torch.equal(logits_of(model, ids), before)
    assert not any(isinstance(value, NewForward) for value in vars(gate).values())


def test_a_router_that_is_called_alone_answers_as_in_the_model():
    """Other people's hooks see what the rule decided; the logits are the router's own, bit for bit."""
    model, seen = tiny_olmoe(), []
    gate = model.model.layers[0].mlp.gate
    hidden = torch.randn(5, model.config.hidden_size)
    own = gate(hidden)
    with RoutingPatch(model, TopK(3), collect_stats=False):
        assert "forward" in vars(gate)
        handle = gate.register_forward_hook(lambda module, args, output: seen.append(output))
        routed = gate(hidden)
        handle.remove()
    assert torch.equal(routed[0], own[0]) and all(one is other for one, other in zip(seen[0], routed, strict=True))
    assert torch.equal(routed[2], own[2][:, :3]) and "forward" not in vars(gate)


def test_a_model_without_values_is_refused():
    with torch.device("meta"):
        model = tiny_olmoe()
    with pytest.raises(ValueError, match=r"'model.layers.0.mlp.gate' .*on the meta device, without values"):
        BHRoutingIntegration(model)


# -- adapters ----------------------------------------------------------------------------------------------------


def lora(model, **arguments):
    peft = pytest.importorskip("peft", reason="needs peft, whose adapters it puts into a model")
    return peft.get_peft_model(model, peft.LoraConfig(r=4, init_lora_weights=False, **arguments)).eval()


@pytest.mark.parametrize(
    "targets",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]},
    ],
    ids=["attention", "experts"],
)
def test_peft_adapters(targets):
    model = tiny_olmoe()
    ids, plain = tokens(2, 9), logits_of(model, tokens(2, 9))
    adapted = lora(model, **targets)
    before = logits_of(adapted, ids)
    assert not torch.equal(before, plain)
    state = state_of(adapted)
    with RoutingPatch(adapted, TopK(8)):
        assert torch.equal(logits_of(adapted, ids), before)
    with BHRoutingIntegration(adapted, alpha=0.2) as bh:
        rows_are_exact(adapted, bh, lambda: greedy(adapted, ids))
        with adapted.disable_adapter():
            bh.reset_stats()
            logits_of(adapted, ids)
    assert state_of(adapted) == state and torch.equal(logits_of(adapted, ids), before)


def test_an_adapter_added_while_patched_is_routed_too():
    model = tiny_olmoe()
    with BHRoutingIntegration(model, alpha=0.2) as bh:
        adapted = lora(model, target_modules=["q_proj"])
        rows_are_exact(adapted, bh, lambda: logits_of(adapted, tokens(2, 9)))
    assert bh.get_routing_stats()["total_tokens"] == 18


# -- interruptions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exception", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_pass_leaves_no_record(exception):
    model = tiny_olmoe()
    ids, state = tokens(2, 9), state_of(model)

    def stop(module, args):
        raise exception("stop")

    with BHRoutingIntegration(model, alpha=0.2) as bh:
        logits_of(model, ids)
        counts, stats = bh.records.counts(), dict(bh.get_routing_stats())
        handle = model.model.layers[1].register_forward_pre_hook(stop)
        with pytest.raises(exception):
            logits_of(model, ids)
        handle.remove()
        assert (bh.records.counts() == counts).all() and dict(bh.get_routing_stats()) == stats
        logits_of(model, ids)
        assert bh.get_routing_stats()["total_tokens"] == 36
        assert bh.records.to_frame()["sequence"].nunique() == 4
    assert state_of(model) == state


def test_interrupting_generate_restores():
    model = tiny_olmoe()
    state, started = state_of(model), time.perf_counter()

    class Stop(torch.nn.Module):
        def __call__(self, input_ids, scores):
            if input_ids.shape[1] > 8:
                raise KeyboardInterrupt
            return scores

    with pytest.raises(KeyboardInterrupt), BHRoutingIntegration(model) as bh:
        greedy(model, tokens(2, 6), logits_processor=[Stop()], max_new_tokens=1000)
    assert state_of(model) == state and time.perf_counter() - started < 60
    assert bh.get_routing_stats()["total_tokens"] == 2 * 9


def test_nested_patches_are_refused():
    model = tiny_olmoe()
    state = state_of(model)
    with BHRoutingIntegration(model) as outer:
        for mode in ("patch", "analyze"):
            with pytest.raises(RuntimeError, match="OlmoeForCausalLM is patched already .*call unpatch_model"):
                BHRoutingIntegration(model, mode=mode).patch_model()
        with pytest.raises(RuntimeError, match="patched already"):
            outer.patch_model()
        assert outer.is_patched
        logits_of(model, tokens(1, 5))
    assert outer.get_routing_stats()["total_tokens"] == 5 and state_of(model) == state


def test_other_peoples_hooks_stay():
    """Hooks added before, during and after a patch are called, and remain when it goes."""
    model, seen = tiny_olmoe(), []
    gate = model.model.layers[0].mlp.gate
    before = gate.register_forward_hook(lambda *_: seen.append("before"))
    with BHRoutingIntegration(model):
        gate.register_forward_hook(lambda *_: seen.append("during"))
        logits_of(model, tokens(1, 5))
        assert len(copy.deepcopy(gate)._forward_hooks) == 2
    assert seen == ["before", "during"]
    logits_of(model, tokens(1, 5))
    before.remove()
    assert seen == ["before", "during"] * 2 and len(gate._forward_hooks) == 1


def test_an_aborted_pass_is_replayed_again():
    model = tiny_olmoe()
    ids = tokens(2, 9)
    with BHRoutingIntegration(model, alpha=0.2) as bh:
        first, second = logits_of(model, ids), logits_of(model, ids.flip(1))

    def stop(module, args, output=None):
        raise RuntimeError("out of memory")

    last = model.model.layers[-1]
    places = [model.model.layers[1].register_forward_pre_hook, last.mlp.experts.register_forward_pre_hook]
    for collect_stats in (True, False):
        with RoutingPatch(model, Replay(bh.records), collect_stats=collect_stats):
            for register in places:
                handle = register(stop)
                with pytest.raises(RuntimeError, match="out of memory"):
                    logits_of(model, ids)
                handle.remove()
            assert torch.equal(logits_of(model, ids), first)
            assert torch.equal(logits_of(model, ids.flip(1)), second)
            with pytest.raises(RuntimeError, match="holds 2 forward passes"):
                logits_of(model, ids)


@pytest.mark.parametrize("exception", [RuntimeError, KeyboardInterrupt])
def test_a_layer_called_alone_is_routed_and_said_not_to_be_recorded(exception):
    model = tiny_olmoe()
    hidden = torch.randn(1, 5, 64)

    def stop(module, args):
        raise exception("stop")

    with BHRoutingIntegration(model, alpha=0.2) as bh, torch.no_grad():
        with pytest.warns(UserWarning, match="'model.layers.1.mlp.gate' was run outside a forward pass of OlmoeModel"):
            model.model.layers[1].mlp(hidden)
        assert bh.get_routing_stats()["total_tokens"] == 0
        handle = model.model.layers[2].register_forward_pre_hook(stop)
        with pytest.raises(exception):
            logits_of(model, tokens(1, 5))
        handle.remove()
        with pytest.warns(UserWarning, match="not recorded. Call the model, or patch the part"):
            model.model.layers[1].mlp(hidden)
        logits_of(model, tokens(1, 4))
    assert bh.get_routing_stats()["total_tokens"] == 4


def test_a_part_of_a_model_can_be_patched_alone():
    model = tiny_olmoe()
    layer, hidden = model.model.layers[1], torch.randn(2, 5, 64)
    places = model.model.rotary_emb(hidden, torch.arange(5)[None])
    with torch.no_grad():
        for part, arguments in ((layer, {"position_embeddings": places}), (layer.mlp, {})):
            with BHRoutingIntegration(part, alpha=0.2) as bh:
                part(hidden, **arguments)
            frame = bh.records.to_frame()
            assert frame.groupby("sequence")["position"].apply(list).tolist() == [[0, 1, 2, 3, 4]] * 2
            assert set(frame["token_id"]) == {-1}
            with BHRoutingIntegration(part), pytest.raises(TypeError, match=r"no tokens among the arguments \['x'\]"):
                part(x=hidden)


@pytest.mark.parametrize("collect_stats", [True, False])
def test_leaving_the_block_while_another_thread_generates(collect_stats):
    """There one error that says so, or text that was made wholly with the patch; the model is whole again."""
    model = tiny_olmoe()
    state, ids, failures = state_of(model), tokens(2, 8), []
    plain = logits_of(model, ids)
    with BHRoutingIntegration(model, alpha=0.2):
        routed = logits_of(model, ids)
    running = threading.Event()

    def work():
        try:
            for _ in range(100):
                running.set()
                output = logits_of(model, ids)
                if torch.equal(output, plain):
                    return
                assert torch.equal(output, routed), "half-patched"
        except BaseException as error:
            failures.append(error)

    for attempt in range(40):
        running.clear()
        with BHRoutingIntegration(model, alpha=0.2, collect_stats=collect_stats) as bh:
            thread = threading.Thread(target=work)
            thread.start()
            running.wait()
            time.sleep(0.0007 * (attempt % 10))
        assert state_of(model) == state
        assert torch.equal(logits_of(model, ids), plain)
        thread.join()
        bh.get_routing_stats()
    assert all("was taken back while another thread ran the model" in str(error) for error in failures), failures
    assert failures and {type(error) for error in failures} == {RuntimeError}
