"""How logits become weights: every convention against its definition, and what a kernel must not touch."""

from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
from families import Family, tiny
from models import tiny_olmoe, tokens

from bhlib import RoutingPatch, find_moe_layers
from bhlib.rules import BH, Replay, Threshold, TopK
from bhlib.rules.base import Rule
from bhlib.weighting import (
    KERNEL_NORMALIZED,
    KERNEL_PLAIN,
    KERNEL_SHARES,
    WEIGHTINGS,
    Weighting,
    find_weighting,
    of_model,
    of_top,
    plain,
    probabilities,
    register,
)


def logits_of(rows=20, experts=16, seed=0):
    return 2 * torch.randn(rows, experts, generator=torch.Generator().manual_seed(seed))


#: The weights of one token's kept logits, given all of its logits.
BY_HAND = {
    "softmax": lambda kept, row: kept.exp() / row.exp().sum(),
    "normalized": lambda kept, row: kept.exp() / kept.exp().sum(),
    "softmax_selected": lambda kept, row: kept.exp() / kept.exp().sum(),
    "sigmoid": lambda kept, row: 1 / (1 + (-kept).exp()),
    "sigmoid_normalized": lambda kept, row: 1 / (1 + (-kept).exp()) / (1 / (1 + (-kept).exp())).sum(),
}


@dataclass(frozen=True)
class Scattered(Rule):
    """The experts of odd rank: no prefix, and some beyond the best `max_k`."""

    def select(self, router_logits, scores, layer):
        order = scores.argsort(dim=-1, descending=True)[:, 1::2][:, : self.max_k]
        return order, 1 + torch.arange(len(scores)) % self.max_k


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


@pytest.mark.parametrize(("max_k", "expected"), [(2, of_top("normalized")), (8, "normalized")])
def test_a_rule_that_may_keep_more_than_the_model_divides_by_what_it_keeps(max_k, expected):
    """A model of two experts has no weight for a third: the sum of its own two would make three weigh more than 1."""
    assert of_model("normalized", max_k, 2) == expected


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("rule", [Threshold(0.05, min_k=0, max_k=6), Scattered(max_k=6)], ids=["prefix", "scattered"])
@pytest.mark.parametrize("name", WEIGHTINGS)
def test_of_the_top_a_weight_does_not_depend_on_what_is_kept(name, rule, temperature):
    """It is that of the definition with the best `max_k`, and beyond these on their scale."""
    logits = logits_of()
    routing = rule(logits, weighting=of_top(name), temperature=temperature)
    beyond = 0
    for row, weights, experts, count in zip(logits / temperature, *routing, strict=True):
        top, best = row.topk(6)
        whole = dict(zip(best.tolist(), BY_HAND[name](top, row), strict=True))
        score = torch.sigmoid if name.startswith("sigmoid") else torch.exp
        for expert in set(experts[:count].tolist()) - whole.keys():
            whole[expert] = whole[int(best[0])] * score(row[expert]) / score(top[0])
            beyond += 1
        expected = torch.tensor([whole[expert] for expert in experts[:count].tolist()])
        torch.testing.assert_close(weights[:count], expected)
        assert (weights[count:] == 0).all() and (experts[count:] == -1).all()
    assert (beyond > 0) == isinstance(rule, Scattered)
    renormalized = rule(logits, weighting=name, temperature=temperature).weights
    assert torch.allclose(routing.weights, renormalized) == (name in ("softmax", "sigmoid"))


@pytest.mark.parametrize("weighting", [str, of_top])
@pytest.mark.parametrize("name", WEIGHTINGS)
def test_a_token_that_keeps_nothing_has_no_weights(name, weighting):
    routing = Threshold(1.0, min_k=0)(logits_of(), weighting=weighting(name))
    assert (routing.counts == 0).all() and (routing.weights == 0).all() and (routing.experts == -1).all()


def test_unknown_names_are_an_error_that_lists_the_known():
    known = "softmax, normalized, softmax_selected, sigmoid, sigmoid_normalized"
    for route in (BH(0.05), BH(0.05).fused):
        with pytest.raises(ValueError, match=f"no weighting is called 'softmaxx'; there are: {known}"):
            route(logits_of(), weighting="softmaxx")
    with pytest.raises(ValueError, match="weights must be 'model' or one of .*'sigmoid'.*got 'softmaxx'"):
        RoutingPatch(tiny_olmoe(), BH(0.05), weights="softmaxx")
    with pytest.raises(ValueError, match="a weighting called 'softmax' is registered already"):
        register(Weighting("softmax", "another", probabilities, plain))
    assert find_weighting("softmax").kernel == find_weighting(of_top("softmax")).kernel == KERNEL_PLAIN
    assert find_weighting("normalized").kernel == KERNEL_NORMALIZED
    assert find_weighting(of_top("normalized")).kernel == KERNEL_SHARES
    with pytest.raises(ValueError, match="weights must be 'model' or one of .*got 'normalized, of the top'"):
        RoutingPatch(tiny_olmoe(), BH(0.05), weights=of_top("normalized"))


@pytest.mark.parametrize("name", [*WEIGHTINGS, *map(of_top, WEIGHTINGS)])
def test_what_a_kernel_does_not_know_it_is_not_asked(name, monkeypatch):
    """It would give its own ways for any other."""
    monkeypatch.setattr(BH, "kernel_cuts", lambda *_: pytest.fail("a kernel was asked"))
    if name.startswith("sigmoid"):
        rule, logits = BH(0.05), logits_of()
        for fused, slow in zip(rule.fused(logits, weighting=name), rule(logits, weighting=name), strict=True):
            assert torch.equal(fused, slow)
    else:
        with pytest.raises(pytest.fail.Exception, match="a kernel was asked"):
            BH(0.05).fused(logits_of(), weighting=name)


NORMALIZING = {
    "normalized": lambda: tiny_olmoe(norm_topk_prob=True),
    "softmax_selected": lambda: tiny(Family("gpt_oss")),
    "sigmoid_normalized": lambda: tiny(
        Family("cohere2_moe", changes=(("expert_selection_fn", "sigmoid"), ("norm_topk_prob", True)))
    ),
}


def routed(model, ids, rule=None, **options):
    """The first layer's weights for its experts, 0 for what is not selected, and the model's logits."""
    layer, seen = find_moe_layers(model)[0], {}

    def spy(module, args):
        _, experts, weights = args
        dense = torch.zeros(len(weights), layer.num_experts + 1)
        seen["weights"] = dense.scatter_add(1, experts, weights.float())[:, :-1]

    patch = nullcontext() if rule is None else RoutingPatch(model, rule, **options)
    with torch.no_grad(), patch:
        handle = layer.experts.register_forward_pre_hook(spy)
        logits = model(ids).logits
        handle.remove()
    return seen["weights"], logits


@pytest.mark.parametrize("name", NORMALIZING)
def test_by_default_what_is_kept_has_the_weight_that_the_model_gives_it(name):
    model = NORMALIZING[name]()
    layers, ids = find_moe_layers(model), tokens(2, 20) % 128
    assert {layer.weighting for layer in layers} == {name}
    top_k = layers[0].top_k
    own, logits = routed(model, ids)
    rule = BH(0.3, max_k=top_k)
    kept, _ = routed(model, ids, rule)
    selected = kept > 0
    assert torch.equal(kept[selected], own[selected]) and len(selected.sum(dim=1).unique()) > 1
    assert (selected.sum(dim=1) <= top_k).all() and (kept.sum(dim=1) < 0.99).any()
    again, _ = routed(model, ids, rule, weights=name)
    assert torch.equal(again > 0, selected)
    torch.testing.assert_close(again.sum(dim=1), torch.ones(len(again)))
    for whole in (TopK(top_k), BH(0.3, min_k=top_k, max_k=top_k)):
        assert torch.equal(routed(model, ids, whole)[1], logits)
    for layer in layers:
        layer.router.top_k = 2
    assert torch.equal(routed(model, ids, TopK(2))[1], model(ids).logits)


def test_a_replay_has_the_weights_of_each_pass_that_it_repeats():
    """Of the best `max_k` that the rule of that pass might have kept."""
    model, ids = NORMALIZING["normalized"](), tokens(2, 20)
    rules = BH(0.3, max_k=8), BH(0.3, max_k=4), TopK(3)
    with torch.no_grad():
        with RoutingPatch(model, rules[0]) as patch:
            expected = []
            for patch.rule in rules:
                expected.append(model(ids).logits)
        with RoutingPatch(model, Replay(patch.records)):
            assert all(torch.equal(model(ids).logits, logits) for logits in expected)


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
