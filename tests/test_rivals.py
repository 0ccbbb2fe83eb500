"""Rival rules, each against a loop over one token's probabilities that anyone can read."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import tiny_olmoe, tokens

from bhlib.patching import RoutingPatch
from bhlib.procedures import higher_criticism
from bhlib.pvalues import DirichletNull
from bhlib.rules import BH, EntropyK, MinP, StaticPerLayer, Threshold, TopK, TopP, WeightRatio


def logits_of(seed, spread=2.0, rows=300):
    return spread * torch.randn(rows, 64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def probabilities(row):
    """Softmax of one token's logits, largest first."""
    exponentials = [math.exp(value) for value in row.tolist()]
    return sorted((value / sum(exponentials) for value in exponentials), reverse=True)


def threshold_by_hand(probs, level):
    return sum(p >= level for p in probs)


def top_p_by_hand(probs, level):
    count, mass = 0, 0.0
    while mass < level and count < len(probs):
        mass += probs[count]
        count += 1
    return count


def min_p_by_hand(probs, level):
    return sum(p > level * probs[0] for p in probs)


def weight_ratio_by_hand(probs, level):
    count = 1
    while count < len(probs) and probs[count] >= level * sum(probs[:count]):
        count += 1
    return count


def entropy_by_hand(probs, level):
    entropy = -sum(p * math.log(p) for p in probs)
    return 2 if entropy <= level else 5 if entropy <= level + 0.3 else 8


RIVALS = {
    "threshold": (lambda level, **k: Threshold(level, **k), threshold_by_hand, (0.02, 0.05, 0.1)),
    "top-p": (lambda level, **k: TopP(level, **k), top_p_by_hand, (0.3, 0.5, 0.7)),
    "min-p": (lambda level, **k: MinP(level, **k), min_p_by_hand, (0.1, 0.3, 0.6)),
    "weight ratio": (lambda level, **k: WeightRatio(level, **k), weight_ratio_by_hand, (0.05, 0.1, 0.3)),
    "entropy": (lambda level, **k: EntropyK((level, level + 0.3), (2, 5, 8)), entropy_by_hand, (1.8, 2.2, 2.6)),
}
CASES = [(name, level) for name, (_, _, levels) in RIVALS.items() for level in levels]


@pytest.mark.parametrize(("name", "level"), CASES)
@pytest.mark.parametrize(("min_k", "max_k"), [(1, 8), (2, 6), (1, 64)])
def test_counts_are_those_of_the_loop(name, level, min_k, max_k):
    make, by_hand, _ = RIVALS[name]
    rule = make(level, min_k=min_k, max_k=max_k)
    logits = logits_of(seed=7)
    routing = rule(logits)
    wanted = [min(max(by_hand(probabilities(row), level), rule.min_k), rule.max_k) for row in logits]
    assert routing.counts.tolist() == wanted
    assert routing.counts.double().std() > 0
    for row, experts, count in zip(logits, routing.experts, wanted, strict=True):
        assert experts[:count].tolist() == row.argsort(descending=True)[:count].tolist()
        assert (experts[count:] == -1).all()


@pytest.mark.parametrize(("name", "level"), CASES)
@given(spread=st.floats(0.0, 8.0), seed=st.integers(0, 10**6), temperature=st.sampled_from([0.5, 2.0]))
def test_temperature_and_weighting_change_weights_and_no_count(name, level, spread, seed, temperature):
    rule = RIVALS[name][0](level)
    logits = logits_of(seed, spread, rows=20)
    counts = rule(logits).counts
    assert ((counts >= 1) & (counts <= 8)).all()
    assert torch.equal(rule(logits, temperature=temperature).counts, counts)
    assert torch.equal(rule(logits, weighting="softmax_selected").counts, counts)
    assert torch.equal(rule(logits + 2.5, weighting="normalized").counts, counts)


@pytest.mark.parametrize("name", ["threshold", "min-p", "weight ratio", "top-p"])
def test_the_level_is_a_dial(name):
    """Stricter levels keep fewer experts of every token; top-p keeps more as p rises."""
    make, _, _ = RIVALS[name]
    logits = logits_of(seed=3)
    counts = torch.stack([make(level, max_k=64)(logits).counts for level in torch.linspace(0.01, 0.99, 20).tolist()])
    steps = counts.diff(dim=0) * (1 if name == "top-p" else -1)
    assert (steps >= 0).all() and (counts[0] != counts[-1]).any()


def test_two_experts_are_dropped_as_in_naee():
    """With two experts the rule is the published one: the second is skipped if w_2 < beta w_1."""
    logits = logits_of(seed=1)[:, :2]
    ratio = torch.exp(logits.min(-1).values - logits.max(-1).values)
    assert torch.equal(WeightRatio(0.5, max_k=2)(logits).counts, 1 + (ratio >= 0.5).long())


def test_threshold_is_a_fixed_cut_of_dirichlet_pvalues():
    logits = logits_of(seed=2)
    cut = BH((1 - 0.05) ** 63, pvalues=DirichletNull(1), method="fixed")
    assert torch.equal(Threshold(0.05)(logits).counts, cut(logits).counts)


def test_higher_criticism_routes():
    logits = logits_of(seed=4)
    wanted = higher_criticism(DirichletNull()(logits), 0.2).sum(-1).clamp(1, 8)
    counts = BH(0.2, method="hc")(logits).counts
    assert torch.equal(counts, wanted) and counts.double().std() > 0


def test_static_per_layer_gives_each_layer_its_own():
    model, ids = tiny_olmoe(), tokens(2, 10)
    with RoutingPatch(model, StaticPerLayer([2, 8, 5])) as patch, torch.no_grad():
        logits = model(ids).logits
    assert patch.get_routing_stats()["mean_experts_per_layer"] == [2, 8, 5]
    with RoutingPatch(model, TopK(8)), torch.no_grad():
        own = model(ids).logits
    with RoutingPatch(model, StaticPerLayer((8, 8, 8))), torch.no_grad():
        assert torch.equal(model(ids).logits, own)
    assert not torch.equal(logits, own)


@pytest.mark.parametrize("rule", [Threshold(0.05), TopP(0.3), MinP(0.3), WeightRatio(0.15), EntropyK()], ids=repr)
def test_rivals_patch_a_model_and_are_recorded(rule):
    with RoutingPatch(tiny_olmoe(), rule) as patch, torch.no_grad():
        patch.model(tokens(2, 30))
    stats = patch.get_routing_stats()
    assert stats["total_tokens"] == 60
    assert 1 <= stats["mean_experts_per_token"] <= 8 and stats["std_experts_per_token"] > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Threshold(1.5), r"threshold must be a number in \[0, 1\], got 1.5"),
        (lambda: TopP(-0.1), r"p must be a number in \[0, 1\], got -0.1"),
        (lambda: MinP("a"), r"ratio must be a number in \[0, 1\], got 'a'"),
        (lambda: WeightRatio(True), r"beta must be a number in \[0, 1\], got True"),
        (lambda: EntropyK((1.0,), (2, 4, 8)), "one entry more than thresholds, got 3 and 1"),
        (lambda: EntropyK((2.0, 1.0), (2, 4, 8)), r"thresholds must be increasing, got \(2.0, 1.0\)"),
        (lambda: EntropyK((1.0, 2.0), (0, 4, 8)), r"ks must hold ints of 1 or more, got \(0, 4, 8\)"),
        (lambda: StaticPerLayer(()), r"one int of 1 or more per MoE layer, got \(\)"),
        (lambda: StaticPerLayer((2, 0)), r"one int of 1 or more per MoE layer, got \(2, 0\)"),
        (lambda: StaticPerLayer((2, 3))(logits_of(0), None), r"layer must lie in 0..1 for ks=\(2, 3\), got None"),
        (lambda: StaticPerLayer((2, 3)).check_model(8, 64), "ks has 2 entries for a model of 8 MoE layers"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
