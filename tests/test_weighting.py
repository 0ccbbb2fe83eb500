"""How logits become weights: every convention against its definition, and what a kernel must not touch."""

import pytest
import torch
from families import Family, tiny
from models import tiny_olmoe, tokens

from bhlib import RoutingPatch, find_moe_layers
from bhlib.rules import BH, Threshold, TopK
from bhlib.weighting import KERNEL_PLAIN, WEIGHTINGS, Weighting, find_weighting, plain, probabilities, register


def logits_of(rows=20, experts=16, seed=0):
    return 2 * torch.randn(rows, experts, generator=torch.Generator().manual_seed(seed))


#: The weights of one token's kept logits, given all of its logits.
BY_HAND = {
    "softmax": lambda kept, row: kept.exp() / row.exp().sum(),
    "normalized": lambda kept, row: kept.exp() / kept.exp().sum(),
    "softmax_selected": lambda kept, row: kept.exp() / kept.exp().sum(),
    "sigmoid": lambda kept, row: 1 / (1 + (-kept).exp()),
    "sigmoid_normalized": lambda kept, row: 1 / (1 + (-kept).exp()) / (1 / (1 + (-kept).exp())).sum(),
    "share_of_top": lambda kept, row: kept.exp() / row.exp().topk(6).values.sum(),
}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", WEIGHTINGS)
def test_weights_are_those_of_the_definition(name, temperature):
    logits = logits_of()
    routing = Threshold(0.05, min_k=0, max_k=6)(logits, weighting=name, temperature=temperature)
    assert len(set(routing.counts.tolist())) > 2
    for row, weights, experts, count in zip(logits / temperature, *routing, strict=True):
        expected = BY_HAND[name](row[experts[:count]], row)
        torch.testing.assert_close(weights[:count], expected)
        assert (weights[count:] == 0).all() and (experts[count:] == -1).all()


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_a_token_that_keeps_nothing_has_no_weights(name):
    routing = Threshold(1.0, min_k=0)(logits_of(), weighting=name)
    assert (routing.counts == 0).all() and (routing.weights == 0).all() and (routing.experts == -1).all()


def test_unknown_names_are_an_error_that_lists_the_known():
    known = "softmax, normalized, softmax_selected, sigmoid, sigmoid_normalized, share_of_top"
    for route in (BH(0.05), BH(0.05).fused):
        with pytest.raises(ValueError, match=f"no weighting is called 'softmaxx'; there are: {known}"):
            route(logits_of(), weighting="softmaxx")
    with pytest.raises(ValueError, match="weights must be 'model' or one of .*'sigmoid'.*got 'softmaxx'"):
        RoutingPatch(tiny_olmoe(), BH(0.05), weights="softmaxx")
    with pytest.raises(ValueError, match="a weighting called 'softmax' is registered already"):
        register(Weighting("softmax", "another", probabilities, plain))
    assert find_weighting("softmax").kernel == KERNEL_PLAIN


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_what_a_kernel_does_not_know_it_is_not_asked(name, monkeypatch):
    """It would give its own two ways for any other."""
    monkeypatch.setattr(BH, "kernel_cuts", lambda *_: pytest.fail("a kernel was asked"))
    if name in ("sigmoid", "sigmoid_normalized", "share_of_top"):
        rule, logits = BH(0.05), logits_of()
        for fused, slow in zip(rule.fused(logits, weighting=name), rule(logits, weighting=name), strict=True):
            assert torch.equal(fused, slow)
    else:
        with pytest.raises(pytest.fail.Exception, match="a kernel was asked"):
            BH(0.05).fused(logits_of(), weighting=name)


def test_shares_of_the_top_do_not_depend_on_what_is_kept():
    """With the model's own bound they are its own weights, whatever is dropped; and where nothing is, to the bit."""
    logits = logits_of()
    whole = TopK(6)(logits, weighting="normalized")
    part = Threshold(0.05, min_k=0, max_k=6)(logits, weighting="share_of_top")
    kept = part.experts >= 0
    assert torch.equal(part.weights[kept], whole.weights[kept]) and not kept.all()
    assert torch.equal(TopK(6)(logits, weighting="share_of_top").weights, whole.weights)
    model = tiny_olmoe(norm_topk_prob=True)
    assert {layer.weighting for layer in find_moe_layers(model)} == {"normalized"}
    ids = tokens(2, 20)
    with torch.no_grad():
        own = model(ids).logits
        with RoutingPatch(model, TopK(find_moe_layers(model)[0].top_k), weights="share_of_top"):
            assert torch.equal(model(ids).logits, own)


@pytest.mark.parametrize(("norm_topk_prob", "name"), [(True, "sigmoid_normalized"), (False, "sigmoid")])
def test_a_family_with_sigmoid_weights(norm_topk_prob, name):
    model = tiny(
        Family("cohere2_moe", changes=(("expert_selection_fn", "sigmoid"), ("norm_topk_prob", norm_topk_prob)))
    )
    ids = tokens(2, 20) % 128
    with torch.no_grad():
        own = model(ids).logits
        with RoutingPatch(model, TopK(4)) as patch:
            assert torch.equal(model(ids).logits, own)
        assert {layer.weighting for layer in patch.layers} == {name}
        with RoutingPatch(model, BH(0.1, max_k=4)) as patch:
            assert not torch.equal(model(ids).logits, own)
    assert 1 < patch.get_routing_stats()["mean_experts_per_token"] < 4
    assert [layer.weighting for layer in find_moe_layers(model)] == 2 * [name]
