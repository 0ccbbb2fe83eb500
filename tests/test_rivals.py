"""Rival rules, each against a loop over one token's probabilities that anyone can read."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import tiny_olmoe, tokens

from bhlib import find_moe_layers
from bhlib.compensation import Compensation, LayerCompensation
from bhlib.discovery import name_of
from bhlib.layer_passes import expert_output, watch_layers
from bhlib.patching import RoutingPatch
from bhlib.procedures import higher_criticism
from bhlib.pvalues import DirichletNull
from bhlib.rival_fits import allocate_layers, expert_gains, fit_alignment, fit_folding, layer_importance, least_sums
from bhlib.rules import (
    ACE,
    BH,
    AllocMoE,
    EntropyK,
    ExFold,
    Halving,
    KeepMass,
    MinP,
    MoDES,
    SeqTopK,
    StaticPerLayer,
    Threshold,
    TopK,
    TopP,
    WeightRatio,
)


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


# -- one budget for several tokens -----------------------------------------------------------------------------


def shared_by_hand(logits, budget, min_k, max_k, valid=None):
    """Counts of tokens that share a budget: the most probable pair of all that are left, again and again."""
    probs = [probabilities(row) for row in logits]
    real = [True] * len(probs) if valid is None else valid
    counts = [min_k] * len(probs)
    for _ in range(budget - min_k * sum(real)):
        open_ones = [t for t in range(len(probs)) if real[t] and counts[t] < max_k]
        best = max(open_ones, key=lambda t: probs[t][counts[t]])
        counts[best] += 1
    return counts


@pytest.mark.parametrize("k", [1, 3, 4.3, 6])
@pytest.mark.parametrize(("min_k", "max_k"), [(1, 8), (0, 6)])
def test_a_budget_goes_to_the_most_probable_pairs(k, min_k, max_k):
    logits = logits_of(seed=5, rows=40)
    wanted = shared_by_hand(logits, round(40 * k), min_k, max_k)
    for rule in (SeqTopK(k, min_k=min_k, max_k=max_k), AllocMoE(k, min_k=min_k, max_k=max_k)):
        routing = rule(logits)
        assert routing.counts.tolist() == wanted
        best = logits.argsort(dim=-1, descending=True)[:, :max_k]
        kept = torch.arange(max_k) < routing.counts[:, None]
        assert torch.equal(routing.experts, best.masked_fill(~kept, -1))


def test_each_layer_has_its_own_budget():
    logits = logits_of(seed=5, rows=30)
    rule = AllocMoE((2, 5.5))
    assert [rule(logits, layer).counts.sum() for layer in (0, 1)] == [60, 165]


def counts_in(model, rule, ids, mask=None):
    """Counts [batch, length, layers] of a patched pass, and each layer's logits [batch, length, experts]."""
    logits = {}
    layers = find_moe_layers(model)
    with RoutingPatch(model, rule, record_logits=True) as patch, torch.no_grad():
        with watch_layers(layers, lambda layer, seen: logits.update({layer.index: seen.logits.view(*ids.shape, -1)})):
            model(input_ids=ids, attention_mask=mask)
    routings = patch.records.passes[0].routings
    return torch.stack([routings[layer.index].counts.view(ids.shape) for layer in layers], dim=-1), logits


def test_a_sequence_is_a_row_of_the_batch_and_padding_takes_nothing():
    model, ids = tiny_olmoe(), tokens(3, 12)
    mask = torch.ones_like(ids)
    mask[0, 7:], mask[1, :3] = 0, 0
    seen, logits = counts_in(model, SeqTopK(3.5, max_k=6), ids, mask)
    pooled, pooled_logits = counts_in(model, AllocMoE(3.5), ids, mask)
    for layer in range(3):
        for row in range(3):
            real = mask[row].bool().tolist()
            wanted = shared_by_hand(logits[layer][row], round(3.5 * sum(real)), 1, 6, real)
            assert seen[row, :, layer].tolist() == wanted
        real = mask.bool().flatten().tolist()
        wanted = shared_by_hand(pooled_logits[layer].flatten(0, 1), round(3.5 * sum(real)), 1, 8, real)
        assert pooled[..., layer].flatten().tolist() == wanted


def test_a_padded_sequence_is_routed_as_it_would_be_alone():
    model, ids = tiny_olmoe(), tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    together, _ = counts_in(model, SeqTopK(4), ids, mask)
    for row, length in ((0, 7), (1, 12)):
        alone, _ = counts_in(model, SeqTopK(4), ids[row : row + 1, :length])
        assert torch.equal(together[row, :length], alone[0])


def test_decoding_is_refused_by_one_and_shared_by_the_batch_under_the_other():
    model, ids = tiny_olmoe(), tokens(2, 5)
    with (
        RoutingPatch(model, SeqTopK(4)),
        pytest.raises(ValueError, match="this pass goes on with one, as decoding does"),
    ):
        model.generate(ids, max_new_tokens=3, do_sample=False)
    with RoutingPatch(model, AllocMoE(3)) as patch:
        model.generate(ids, max_new_tokens=4, do_sample=False)
    steps = [one.routings[0].counts for one in patch.records.passes]
    assert [len(counts) for counts in steps] == [10, 2, 2, 2] and [int(counts.sum()) for counts in steps] == [
        30,
        6,
        6,
        6,
    ]
    packed = {"cu_seq_lens_q": torch.tensor([0, 3, 5]), "position_ids": torch.tensor([[0, 1, 2, 0, 1]])}
    with RoutingPatch(model, SeqTopK(4)), pytest.raises(ValueError, match="cannot tell the sequences of a packed pass"):
        model(input_ids=ids[:1], **packed)


# -- rules that know more than the router ------------------------------------------------------------------------


def test_modes_weighs_layers():
    logits = logits_of(seed=6)
    rule = MoDES(0.05, (1.0, 0.4))
    for layer, factor in enumerate(rule.importance):
        wanted = [min(max(sum(factor * p >= 0.05 for p in probabilities(row)), 1), 8) for row in logits]
        assert rule(logits, layer).counts.tolist() == wanted


def gains_of(seed, layers=2, experts=64):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(layers, experts, generator=generator) + 0.5 for name in ("amplification", "along_router")}


@pytest.mark.parametrize("refinement", [0.1, 1.0])
def test_ace_keeps_the_best_and_what_a_view_wants(refinement):
    logits, tables = logits_of(seed=8, rows=60).float(), gains_of(1)
    rule = ACE(0.12, refinement=refinement, **tables)
    for layer in (0, 1):
        routing, not_prefix = rule(logits, layer), 0
        for row, experts, count in zip(logits, routing.experts, routing.counts, strict=True):
            gate, own = row.softmax(-1).topk(8)
            views = [gate * table[layer][own] for table in tables.values()]
            view = torch.maximum(views[0] / views[0].sum(), refinement * views[1] / views[1].sum())
            kept = {own[0].item()} | {
                expert for expert, one in zip(own.tolist(), view.tolist(), strict=True) if one >= 0.12
            }
            assert {*experts[:count].tolist()} == kept
            not_prefix += kept != {*own[:count].tolist()}
        assert not_prefix and routing.counts.double().std() > 0


def test_halving_divides_by_the_sum_of_more_or_fewer():
    logits = logits_of(seed=9)
    probs = logits.softmax(-1).sort(descending=True).values
    # of a model that divides its weights by the sum of its top 8, as published: p_i / (p_1 + ... + p_16)
    published = Halving(TopK(4), 8, 16)(logits, weighting="normalized").weights
    torch.testing.assert_close(published, probs[:, :4] / probs[:, :16].sum(-1, keepdim=True))
    ratio = probs[:, :8].sum(-1, keepdim=True) / probs[:, :16].sum(-1, keepdim=True)
    torch.testing.assert_close(Halving(TopK(4), 8, 16)(logits).weights, probs[:, :4] * ratio)
    torch.testing.assert_close(Halving(TopK(4), 8, 8)(logits).weights, TopK(4)(logits).weights)


@pytest.mark.parametrize(
    "rule", [TopK(3), Threshold(0.08), ACE(0.12, **gains_of(2))], ids=["top-3", "threshold", "ACE"]
)
@pytest.mark.parametrize("weighting", ["softmax", "normalized"])
def test_exfold_moves_weights_to_the_likest_of_those_kept(rule, weighting):
    logits = logits_of(seed=10, rows=40).float()
    generator = torch.Generator().manual_seed(3)
    scales, losses = torch.randn(2, 64, 64, generator=generator), torch.rand(2, 64, 64, generator=generator)
    losses[:, :, ::5] = torch.inf  # never seen together
    routing = ExFold(rule, 8, scales, losses)(logits, 1, weighting=weighting)
    kept = rule(logits, 1).experts
    own, own_weights = TopK(8)(logits, weighting=weighting).experts, TopK(8)(logits, weighting=weighting).weights
    for token in range(40):
        weights = {
            e: own_weights[token, (own[token] == e).nonzero()[0, 0]].item() for e in kept[token].tolist() if e >= 0
        }
        folded = dict(weights)
        for expert, weight in zip(own[token].tolist(), own_weights[token].tolist(), strict=True):
            targets = [e for e in weights if losses[1, expert, e].isfinite()]
            if expert not in weights and targets:
                target = min(targets, key=lambda e: losses[1, expert, e].item())
                folded[target] += weight * scales[1, expert, target].item()
        count = routing.counts[token]
        found = dict(zip(routing.experts[token, :count].tolist(), routing.weights[token, :count].tolist(), strict=True))
        assert found == pytest.approx(folded, abs=1e-6)


# -- what they are fitted with -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return tiny_olmoe(num_experts=16, num_experts_per_tok=4)


def test_importance_is_the_divergence_without_a_layer(model):
    model, ids = copy.deepcopy(model).double(), tokens(3, 9)  # in float32 so small a divergence is rounding
    model.config._experts_implementation = "eager"  # others know no float64
    with torch.no_grad():
        own, moved = model(ids).logits.log_softmax(-1), []
        for layer in model.model.layers:
            handle = layer.mlp.experts.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
            without = model(ids).logits.log_softmax(-1)
            handle.remove()
            moved.append(torch.nn.functional.kl_div(without, own, log_target=True, reduction="sum").item())
    assert layer_importance(model, ids, batch_size=2) == pytest.approx([one / max(moved) for one in moved], rel=1e-4)


def test_the_least_sum_is_that_of_trying_all():
    costs = torch.rand(3, 4, generator=torch.Generator().manual_seed(0)).double().numpy()
    found = least_sums(costs)
    tried = {}
    for ks in torch.cartesian_prod(*[torch.arange(1, 5)] * 3).tolist():
        cost = sum(costs[row, k - 1] for row, k in enumerate(ks))
        tried[sum(ks)] = min(tried.get(sum(ks), (math.inf, ())), (cost, tuple(ks)))
    assert found == {total: ks for total, (_, ks) in tried.items()}


def test_layers_are_given_budgets(model):
    found = allocate_layers(model, {"a": tokens(2, 8)}, (1, 2.4, 4))
    assert {mean: sum(rule.ks) for mean, rule in found.items()} == {1: 3, 2.4: 7, 4: 12} and found[1].max_k == 4


def test_gains_are_norms_of_the_experts_matrices(model):
    tables = expert_gains(model)
    for index, layer in enumerate(model.model.layers):
        experts, scale = layer.mlp.experts, layer.post_attention_layernorm.weight.diag()
        router = layer.mlp.gate.weight - layer.mlp.gate.weight.mean(0)
        spectral, routed = [], []
        for e in range(16):
            gate, up = experts.gate_up_proj[e].chunk(2)
            down = experts.down_proj[e]
            one = (scale @ up.T).norm() * (scale @ gate.T @ down.T).norm()
            other = (scale @ gate.T).norm() * (scale @ up.T @ down.T).norm()
            spectral.append((one * other).sqrt())
            row = router[e] / router[e].square().mean().sqrt()
            routed.append((down @ (torch.nn.functional.silu(gate @ row) * (up @ row))).norm() / row.norm())
        for name, values in (("amplification", spectral), ("along_router", routed)):
            values = torch.stack(values).detach()
            torch.testing.assert_close(tables[name][index], values / values.mean(), rtol=1e-4, atol=1e-5)


def seen_by(model, ids):
    """What each layer's experts were given and gave, in the model itself."""
    seen = {}
    with torch.no_grad(), watch_layers(find_moe_layers(model), lambda layer, what: seen.update({layer.index: what})):
        model(ids)
    return seen


def test_folding_is_weighted_least_squares_of_pairs(model):
    ids = tokens(4, 20)
    found, layer, seen = fit_folding(model, ids, batch_size=3), find_moe_layers(model)[1], seen_by(model, ids)[1]
    with torch.no_grad():
        outputs = torch.stack([expert_output(layer, seen.hidden, e) for e in range(16)]).double()
    given = torch.stack([(seen.experts == e).any(dim=1) for e in range(16)])
    for i in range(16):
        for j in range(16):
            both = given[i] & given[j]
            if i == j or not both.any():
                assert found["losses"][1, i, j] == torch.inf
                continue
            u, v = outputs[i, both], outputs[j, both]
            weight = u.norm(dim=1)
            scale = ((u * v).sum(1) @ weight / (v.square().sum(1) @ weight + 1e-3)).clamp(-4, 4)
            loss = ((u - scale * v).square().sum(1) @ weight) / (u.square().sum(1) @ weight)
            torch.testing.assert_close(found["scales"][1, i, j].double(), scale, rtol=1e-3, atol=1e-6)
            torch.testing.assert_close(found["losses"][1, i, j].double(), loss, rtol=1e-3, atol=1e-6)


def test_an_alignment_gives_mean_and_deviation_back(model):
    ids, rule = tokens(6, 30), Threshold(0.1, max_k=4)
    seen = seen_by(model, ids)
    alignment = fit_alignment(model, ids, {"threshold": rule}, batch_size=4)["threshold"]
    with torch.no_grad():
        own = model(ids).logits
        with RoutingPatch(model, Threshold(0.0, max_k=4), compensation=alignment):
            assert torch.equal(model(ids).logits, own)  # nothing is dropped, and nothing corrected
    outputs = {}
    with RoutingPatch(model, rule, compensation=alignment, kernels=False), torch.no_grad():
        with watch_layers(find_moe_layers(model)[:1], lambda layer, what: outputs.update({0: what.output})):
            model(ids)
    kept = rule(seen[0].logits, 0).counts
    drops = kept < 4
    assert 0 < drops.sum() < len(drops)
    corrected, wanted = outputs[0], seen[0].output  # the first layer is given what it is given in the model itself
    assert torch.equal(corrected[~drops], wanted[~drops])
    torch.testing.assert_close(corrected[drops].mean(0), wanted[drops].mean(0), atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(corrected[drops].std(0), wanted[drops].std(0), atol=1e-5, rtol=1e-2)
    assert alignment.cost(2.0, 4, 32) == pytest.approx(1 / 96) and "3 layers of 64" in repr(alignment)


# -- bad inputs --------------------------------------------------------------------------------------------------


def stand_in(model):
    """A compensation of zeros."""
    layers = find_moe_layers(model)
    zeros = LayerCompensation(torch.zeros(1 + layers[0].num_experts, 64), torch.zeros(0, 64), torch.zeros(64, 0))
    return Compensation([zeros] * len(layers), name_of(model))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SeqTopK(0.5), "k must lie between min_k=1 and max_k=8, since it is a mean .* got 0.5"),
        (lambda: SeqTopK(9), "k must lie between min_k=1 and max_k=8"),
        (lambda: AllocMoE((4, "a")), "ks must lie between min_k=1 and max_k=8.* got 'a'"),
        (lambda: AllocMoE(()), "ks must be one number, or one for each MoE layer"),
        (lambda: AllocMoE((2, 3)).check_model(8, 64), "ks has 2 entries for a model of 8 MoE layers"),
        (lambda: AllocMoE((2, 3))(logits_of(0), 2), r"layer must lie in 0..1 for ks=\(2, 3\), got 2"),
        (lambda: MoDES(0.1), r"importance must hold one number above 0 per MoE layer, got \(\)"),
        (lambda: MoDES(0.1, (1.0, 0.0)), r"importance must hold one number above 0 per MoE layer, got \(1.0, 0.0\)"),
        (lambda: MoDES(2, (1.0,)), r"threshold must be a number in \[0, 1\], got 2"),
        (lambda: MoDES(0.1, (1.0,)).check_model(8, 64), "importance has 1 entries for a model of 8"),
        (lambda: MoDES(0.1, (1.0,))(logits_of(0)), "layer must lie in 0..0, since the rule differs by layer, got None"),
        (lambda: ACE(0.1), "amplification must be a Tensor .* got None"),
        (lambda: ACE(0.1, **gains_of(0)).check_model(3, 64), r"amplification is of \(2, 64\) layers and experts"),
        (lambda: Halving(TopK(4), 8, 0), "reference must be an int of 1 or more, got 0"),
        (
            lambda: Halving(TopK(4), 8, 65).check_model(8, 64),
            "reference must not exceed the number of experts, 64, got 65",
        ),
        (lambda: ExFold(TopK(4), 8), r"scales must be a Tensor \[layers, experts, experts\] .* got None"),
        (
            lambda: ExFold(TopK(4), 8, *[torch.ones(2, 64, 64)] * 2).check_model(3, 64),
            r"scales are of \(2, 64\) layers and experts, but the model has 3 and 64",
        ),
        (
            lambda: ExFold(TopK(4), 8, *[torch.ones(2, 64, 64)] * 2)(logits_of(0)),
            "layer must lie in 0..1, since scales",
        ),
        (lambda: KeepMass(SeqTopK(4)), "has to be told of passes, and cannot stand inside KeepMass"),
        (lambda: ExFold(AllocMoE(4), 8), "has to be told of passes, and cannot stand inside ExFold"),
        (
            lambda: allocate_layers(tiny_olmoe(), {"a": tokens(1, 4)}, (9,)),
            "mean_ks must lie between 1 and 8, .* got 9",
        ),
    ],
)
def test_bad_arguments_of_recent_rules_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_who_makes_up_by_weights_takes_no_compensation(model):
    rule = Halving(TopK(2), 4, 6)
    with RoutingPatch(model, rule, compensation=stand_in(model)), torch.no_grad():
        with pytest.raises(
            ValueError, match="Halving makes up for dropped experts by other weights, and a compensation"
        ):
            model(tokens(1, 4))


def test_an_alignment_has_no_file(model, tmp_path):
    alignment = fit_alignment(model, tokens(2, 8), {"top-2": TopK(2)})["top-2"]
    with pytest.raises(NotImplementedError, match="belongs to one rule at one level, and has no file"):
        alignment.save(tmp_path / "a.safetensors")
