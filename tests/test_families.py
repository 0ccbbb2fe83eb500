"""Every family of mixtures of experts in transformers: patched with parity, real skipping and restoring, or refused."""

import copy

import pytest
import torch
import transformers
from families import PAGE, PATCHED, REFUSED, render_page, tiny
from models import state_of, tokens
from packaging.version import Version
from rows import count_rows

from bhlib import BHRoutingIntegration, RoutingPatch, find_moe_layers
from bhlib.rules import TopK
from bhlib.weighting import of_model

pytestmark = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason="the table is of transformers 5.23: before, the routers of some families returned other things",
)


@torch.no_grad()
def logits_of(model, input_ids):
    return model(input_ids=input_ids, use_cache=False).logits


@pytest.fixture(scope="module", params=PATCHED, ids=str)
def family(request):
    return request.param, tiny(request.param)


def implementations(model):
    config = find_moe_layers(model)[0].experts.config
    for name in ("eager", "grouped_mm", "batched_mm"):
        config._experts_implementation = name
        yield name


def test_parity_and_restoring(family):
    """With the model's own top-k as the rule its logits are the same bits, and so are they after the patch."""
    row, model = family
    ids = tokens(2, 9) % 128
    layers = find_moe_layers(model)
    assert {(layer.num_experts, layer.top_k, layer.weighting) for layer in layers} == {(16, 4, row.weighting)}
    for name in implementations(model):
        state, before = state_of(model), logits_of(model, ids)
        with RoutingPatch(model, TopK(4)):
            assert torch.equal(logits_of(model, ids), before), name
        with BHRoutingIntegration(model, alpha=0.2):
            assert not torch.equal(logits_of(model, ids), before), name
        assert torch.equal(logits_of(model, ids), before), name
        assert state_of(model) == state


def test_dropped_experts_are_not_computed(family):
    _, model = family
    ids = tokens(2, 9) % 128
    layers = find_moe_layers(model)
    for name in implementations(model):
        with BHRoutingIntegration(model, alpha=0.2) as bh, count_rows(*[layer.experts for layer in layers]) as counter:
            logits_of(model, ids)
        selected = int(bh.records.counts().sum())
        assert counter.rows == {"gate_up_proj": selected, "down_proj": selected}, name
        assert 18 * len(layers) <= selected < 18 * len(layers) * 4


def test_output_is_that_of_the_dense_mask(family):
    """The same selection, computed by the unpatched model with weight 0 for what was dropped."""
    _, model = family
    ids = tokens(2, 9) % 128
    for name in implementations(model):
        with BHRoutingIntegration(model, alpha=0.2) as bh:
            sparse = logits_of(model, ids)

        own = bh.layers[0]
        weighting = of_model(own.weighting, bh.rule.max_k, own.top_k)

        def mask(router, args, output, rule=bh.rule, weighting=weighting):
            weights, experts, _ = rule(output[0].reshape(-1, 16), weighting=weighting)
            return output[0], weights, experts.clamp(min=0)

        handles = [layer.router.register_forward_hook(mask) for layer in bh.layers]
        dense = logits_of(model, ids)
        for handle in handles:
            handle.remove()
        torch.testing.assert_close(sparse, dense, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_a_float64_model_is_routed_as_it_routes_itself(family):
    """Most routers score in float32 whatever the model's precision; GPT-OSS scores in the model's."""
    row, model = family
    ids = tokens(2, 9) % 128
    for name in implementations(model):
        if name == "grouped_mm":
            continue  # torch multiplies no groups in float64
        with torch.no_grad():
            wide = copy.deepcopy(model).double()
        own = logits_of(wide, ids)
        with RoutingPatch(wide, TopK(4)):
            assert torch.equal(logits_of(wide, ids), own), name
        with BHRoutingIntegration(wide, alpha=0.2) as bh:
            assert not torch.equal(logits_of(wide, ids), own), name
        assert {layer.weighting for layer in bh.layers} == {row.weighting}


@pytest.mark.parametrize("row", REFUSED, ids=str)
def test_what_cannot_be_patched_is_refused_by_name(row):
    model = tiny(row)
    state = state_of(model)
    with pytest.raises(ValueError, match=row.refused) as refusal:
        BHRoutingIntegration(model)
    assert type(model).__name__ in str(refusal.value) or "The router 'model." in str(refusal.value)
    assert state_of(model) == state


def test_the_page_lists_these_families():
    assert PAGE.read_text(encoding="utf-8") == render_page(), "write it anew: python tests/families.py"
