"""Patching real transformers models: what changes, what does not, and that all of it is taken back."""

import gc
import weakref

import pytest
import torch
from models import state_of, tiny_olmoe, tokens
from rows import count_rows
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from bhlib import BHRoutingIntegration, RoutingPatch, discovery, find_moe_layers, patching
from bhlib.rules import BH, Rule, TopK

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@torch.no_grad()
def logits_of(model, input_ids):
    return model(input_ids=input_ids).logits


def test_finds_every_router():
    layers = find_moe_layers(tiny_olmoe())
    assert [layer.name for layer in layers] == [f"model.layers.{i}.mlp.gate" for i in range(3)]
    assert all((layer.num_experts, layer.top_k, layer.weighting) == (64, 8, "softmax") for layer in layers)
    normalized = find_moe_layers(tiny_olmoe(norm_topk_prob=True))
    assert {layer.weighting for layer in normalized} == {"normalized"}


def test_refuses_what_it_cannot_patch():
    config = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    dense = LlamaForCausalLM(LlamaConfig(vocab_size=64, **config))
    with pytest.raises(ValueError, match="LlamaForCausalLM has no mixture-of-experts layer"):
        BHRoutingIntegration(dense)
    with pytest.raises(TypeError, match="model must be a torch.nn.Module such as OlmoeForCausalLM, got str"):
        BHRoutingIntegration("allenai/OLMoE-1B-7B-0924")


def test_refuses_an_old_transformers(monkeypatch):
    monkeypatch.setattr(discovery.transformers, "__version__", "4.57.1")
    with pytest.raises(ImportError, match=r"transformers 5.6 or newer, found 4.57.1.*pip install -U"):
        BHRoutingIntegration(tiny_olmoe())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_models_own_rule_gives_its_own_bits(implementation, dtype):
    model = tiny_olmoe().to(dtype)
    model.set_experts_implementation(implementation)
    ids = tokens(3, 40)
    before = logits_of(model, ids)
    with RoutingPatch(model, TopK(8)):
        assert torch.equal(logits_of(model, ids), before)
    # So does BH when it may not choose.
    with BHRoutingIntegration(model, min_k=8, max_k=8):
        assert torch.equal(logits_of(model, ids), before)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_patching_changes_and_restoring_gives_back(implementation):
    model = tiny_olmoe()
    model.set_experts_implementation(implementation)
    ids, state = tokens(2, 30), state_of(model)
    before = logits_of(model, ids)
    bh = BHRoutingIntegration(model, alpha=0.05)
    bh.patch_model()
    assert bh.is_patched and not torch.equal(logits_of(model, ids), before)
    bh.unpatch_model()
    assert not bh.is_patched and torch.equal(logits_of(model, ids), before)
    assert state_of(model) == state
    bh.unpatch_model()  # a second time does nothing
    assert state_of(model) == state


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("max_k", [8, 20])
def test_output_is_that_of_the_dense_mask(implementation, max_k):
    """The same selection, computed by the unpatched model with weight 0 for what was dropped."""
    model = tiny_olmoe()
    model.set_experts_implementation(implementation)
    ids = tokens(2, 30)
    rule = BH(alpha=0.3, max_k=max_k)
    with RoutingPatch(model, rule):
        sparse = logits_of(model, ids)

    def mask(router, args, output):
        weights, experts, _ = rule(output[0])
        return output[0], weights, experts.clamp(min=0)

    handles = [layer.router.register_forward_hook(mask) for layer in find_moe_layers(model)]
    dense = logits_of(model, ids)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(sparse, dense, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_dropped_experts_are_not_computed(implementation):
    """In prefill and in every decoding step, the matrices see as many rows as experts were selected."""
    model = tiny_olmoe()
    model.set_experts_implementation(implementation)
    experts = [layer.experts for layer in find_moe_layers(model)]
    with BHRoutingIntegration(model, alpha=0.2) as bh, count_rows(*experts) as counter:
        model.generate(tokens(2, 7), max_new_tokens=6, do_sample=False)
    selected = int(bh.records.counts().sum())
    assert counter.rows == {"gate_up_proj": selected, "down_proj": selected}
    assert selected < 8 * len(bh.records.counts()) * 3


def test_unpatched_rows_are_the_slots():
    """The counter itself: without a patch it finds top-8 rows for every token and layer."""
    model = tiny_olmoe()
    for implementation in IMPLEMENTATIONS:
        model.set_experts_implementation(implementation)
        with count_rows(*[layer.experts for layer in find_moe_layers(model)]) as counter:
            logits_of(model, tokens(2, 7))
        assert counter.rows == {"gate_up_proj": 2 * 7 * 3 * 8, "down_proj": 2 * 7 * 3 * 8}


def test_analyze_touches_nothing_and_records():
    model = tiny_olmoe()
    ids = tokens(2, 30)
    before = logits_of(model, ids)
    with BHRoutingIntegration(model, alpha=0.1, mode="analyze") as bh:
        assert torch.equal(logits_of(model, ids), before)
        assert model.config._experts_implementation == "grouped_mm"
    stats = bh.get_routing_stats()
    assert stats["total_tokens"] == 60 and stats["mean_experts_per_token"] == 8.0 and stats["sparsity_gain"] == 0.0
    assert 1 < stats["bh_would_select_mean"] < 8 and stats["bh_would_select_std"] > 0
    # The first layer sees the same logits with and without the patch, so it must decide alike.
    with BHRoutingIntegration(model, alpha=0.1) as patched:
        logits_of(model, ids)
    first = patched.get_routing_stats()["mean_experts_per_layer"][0]
    assert stats["mean_experts_per_layer"][0] == first


def test_generate_with_patch():
    model = tiny_olmoe()
    ids = tokens(2, 6)
    plain = model.generate(ids, max_new_tokens=8, do_sample=False)
    with BHRoutingIntegration(model) as bh:
        routed = model.generate(ids, max_new_tokens=8, do_sample=False)
        # The cache must not change what is generated.
        uncached = model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=False)
    assert routed.shape == (2, 14) and torch.equal(routed, uncached)
    assert bh.get_routing_stats()["total_tokens"] == 2 * 13 + 2 * sum(range(6, 14))
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), plain)


@pytest.mark.parametrize("exception", [RuntimeError, KeyboardInterrupt])
def test_restores_when_the_body_raises(exception):
    model = tiny_olmoe()
    state = state_of(model)
    with pytest.raises(exception), BHRoutingIntegration(model):
        raise exception("stop")
    assert state_of(model) == state


def test_restores_when_the_rule_raises():
    class Broken(Rule):
        def select(self, router_logits, scores, layer):
            raise ZeroDivisionError

    model = tiny_olmoe()
    state, before = state_of(model), logits_of(model, tokens(1, 5))
    with pytest.raises(ZeroDivisionError), RoutingPatch(model, Broken()):
        logits_of(model, tokens(1, 5))
    assert state_of(model) == state and torch.equal(logits_of(model, tokens(1, 5)), before)


def test_patching_twice_is_refused_and_harmless():
    model = tiny_olmoe()
    state = state_of(model)
    with BHRoutingIntegration(model, alpha=0.05):
        patched = logits_of(model, tokens(1, 9))
        for mode in ("patch", "analyze"):
            with pytest.raises(RuntimeError, match=r"patched already.*unpatch_model\(\)"):
                BHRoutingIntegration(model, mode=mode).patch_model()
        with pytest.raises(RuntimeError, match="patched already"):
            BHRoutingIntegration(model.model).patch_model()
        assert torch.equal(logits_of(model, tokens(1, 9)), patched)
    assert state_of(model) == state


def test_two_models_at_once():
    one, two = tiny_olmoe(seed=1), tiny_olmoe(seed=2)
    ids = tokens(1, 12)
    alone = []
    for model, alpha in ((one, 0.01), (two, 0.3)):
        with BHRoutingIntegration(model, alpha=alpha):
            alone.append(logits_of(model, ids))
    with BHRoutingIntegration(one, alpha=0.01), BHRoutingIntegration(two, alpha=0.3):
        assert torch.equal(logits_of(one, ids), alone[0]) and torch.equal(logits_of(two, ids), alone[1])


def test_a_shared_config_is_refused():
    one = tiny_olmoe()
    two = type(one)(one.config).eval()
    with BHRoutingIntegration(one), pytest.raises(ValueError, match="twin already"):
        BHRoutingIntegration(two).patch_model()
    with BHRoutingIntegration(two):
        pass


def test_changing_the_implementation_while_patched_is_an_error():
    model = tiny_olmoe()
    with BHRoutingIntegration(model), pytest.raises(RuntimeError, match="set it before patching"):
        model.set_experts_implementation("eager")
        logits_of(model, tokens(1, 5))


def test_not_collecting_records_nothing():
    model = tiny_olmoe()
    with BHRoutingIntegration(model, collect_stats=False) as bh:
        logits_of(model, tokens(1, 5))
    assert bh.get_routing_stats()["total_tokens"] == 0
    assert "nothing was routed" in repr(bh.get_routing_stats())


def test_a_patch_lets_go_of_the_model():
    others = len(patching._patched_routers)  # other test files may keep a patched model
    model = tiny_olmoe()
    with BHRoutingIntegration(model):
        logits_of(model, tokens(1, 5))
    gc.collect()
    assert len(patching._patched_routers) == others


def test_a_model_dropped_while_patched_is_freed():
    others = len(patching._patched_routers)
    model = tiny_olmoe()
    dropped = [weakref.ref(model)]
    bh = BHRoutingIntegration(model).patch_model()
    logits_of(model, tokens(1, 5))
    dropped.append(weakref.ref(bh))
    with pytest.raises(RuntimeError, match=r"patched already \(by BHRoutingIntegration"):
        BHRoutingIntegration(model).patch_model()
    del model, bh
    gc.collect()
    assert [one() for one in dropped] == [None, None] and len(patching._patched_routers) == others


def test_a_patch_nobody_holds_stays_in_the_model():
    model = tiny_olmoe()
    plain = logits_of(model, tokens(1, 9))
    BHRoutingIntegration(model).patch_model()
    gc.collect()
    assert not torch.equal(logits_of(model, tokens(1, 9)), plain)
    with pytest.raises(RuntimeError, match="patched already"):
        BHRoutingIntegration(model).patch_model()


def test_a_patch_says_what_it_was_made_with():
    bh = BHRoutingIntegration(tiny_olmoe(), alpha=0.2, temperature=2.0, min_k=2, max_k=12)
    assert (bh.alpha, bh.temperature, bh.min_k, bh.max_k) == (0.2, 2.0, 2, 12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": 0.0}, "alpha=0.0 must lie strictly between 0 and 1"),
        ({"alpha": 1.5}, "alpha=1.5"),
        ({"temperature": 0.0}, "temperature must be a finite number above 0, got 0.0"),
        ({"temperature": float("inf")}, "got inf"),
        ({"min_k": 9}, "min_k=9 and max_k=8"),
        ({"max_k": 65}, "max_k=65 for 64 experts: use max_k=64"),
        ({"mode": "watch"}, "mode must be one of .*got 'watch'"),
        ({"method": "magic"}, "magic"),
        ({"pvalues": "magic"}, "magic"),
        ({"weights": "magic"}, "weights must be 'model' or one of .*got 'magic'"),
    ],
)
def test_bad_arguments_are_named_and_leave_the_model_alone(arguments, message):
    model = tiny_olmoe()
    state = state_of(model)
    with pytest.raises(ValueError, match=message):
        BHRoutingIntegration(model, **arguments)
    assert state_of(model) == state


def test_nan_logits_are_an_error():
    model = tiny_olmoe()
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = float("nan")
    state = state_of(model)
    with pytest.raises(ValueError, match=r"(?i)nan"), BHRoutingIntegration(model):
        logits_of(model, torch.tensor([[1, 7, 3]]))
    assert state_of(model) == state


def test_weights_follow_the_model_unless_asked():
    model = tiny_olmoe()
    seen = {}

    def spy(name):
        def hook(module, args):
            seen[name] = args[2].sum(dim=-1)

        return hook

    for choice in ("model", "normalized"):
        handle = model.model.layers[0].mlp.experts.register_forward_pre_hook(spy(choice))
        with BHRoutingIntegration(model, weights=choice):
            logits_of(model, tokens(1, 20))
        handle.remove()
    assert (seen["model"] < 1).all()
    torch.testing.assert_close(seen["normalized"], torch.ones(20))


def test_training_mode_and_gradients():
    """Gradients reach the router; checkpointing repeats passes without counting them twice."""
    model = tiny_olmoe().train()
    model.gradient_checkpointing_enable()
    ids = tokens(2, 10)
    with BHRoutingIntegration(model, alpha=0.2) as bh:
        model(input_ids=ids, labels=ids).loss.backward()
    assert bh.get_routing_stats()["total_tokens"] == 20
    assert model.model.layers[0].mlp.gate.weight.grad.abs().sum() > 0


def test_layers_that_differ_are_refused():
    model = tiny_olmoe()
    model.model.layers[1].mlp.gate.top_k = 4
    with pytest.raises(ValueError, match=r"differ in \(experts, top-k\): \[\(64, 4\), \(64, 8\)\]"):
        find_moe_layers(model)


def test_a_correction_of_the_scores_is_refused_however_small():
    model = tiny_olmoe()
    gate = model.model.layers[1].mlp.gate
    gate.register_buffer("score_correction", torch.zeros(64))
    assert len(find_moe_layers(model)) == 3  # none yet
    gate.score_correction[5] = 1e-9
    with pytest.raises(ValueError, match=r"'model.layers.1.mlp.gate' .*corrects the scores .*\(score_correction\)"):
        find_moe_layers(model)


def test_a_linear_gate_is_refused_by_name():
    model = tiny_olmoe()
    model.model.layers[1].mlp.gate = nn.Linear(64, 64, bias=False)
    with pytest.raises(ValueError, match=r"'model.layers.1.mlp.gate' \(Linear\).*does not return"):
        find_moe_layers(model)
