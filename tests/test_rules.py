"""Rules: from logits to experts and weights."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from models import tiny_olmoe, tokens
from torch._dynamo.testing import CompileCounterWithBackend

from bhlib import BHRoutingIntegration, benjamini_hochberg_routing, topk_routing
from bhlib.procedures import PROCEDURES, critical_values, reject
from bhlib.pvalues import ConformalNull, DirichletNull, KDENull, TokenGaussian
from bhlib.rules import (
    BH,
    FAMILIES,
    EntropyK,
    KeepMass,
    MinP,
    StaticPerLayer,
    Threshold,
    TopK,
    TopP,
    WeightRatio,
    compare_max_k,
)


def random_logits(*shape, seed=0, spread=2.0):
    return spread * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bh_by_hand(logits, alpha, min_k, max_k):
    """One token, p-values by the maker, the step-up rule as in the paper, then the bounds: a list of experts."""
    pvals = DirichletNull()(logits[None])[0].tolist()
    order = sorted(range(len(pvals)), key=lambda i: pvals[i])
    passed = [k for k in range(1, len(pvals) + 1) if pvals[order[k - 1]] <= alpha * k / len(pvals)]
    return order[: min(max(max(passed, default=0), min_k), max_k)]


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.3])
@pytest.mark.parametrize(("min_k", "max_k"), [(1, 8), (2, 4), (1, 64)])
def test_bh_routing_is_the_step_up_rule(alpha, min_k, max_k):
    logits = random_logits(200, 64)
    weights, experts, counts = benjamini_hochberg_routing(logits, alpha, min_k=min_k, max_k=max_k)
    for token in range(len(logits)):
        expected = bh_by_hand(logits[token], alpha, min_k, max_k)
        assert counts[token] == len(expected)
        assert experts[token, : counts[token]].tolist() == expected
        assert (experts[token, counts[token] :] == -1).all()
        assert weights[token].nonzero().flatten().tolist() == sorted(expected)


def test_weights_are_the_softmax_of_the_kept_experts():
    logits = random_logits(50, 64)
    weights, experts, counts = benjamini_hochberg_routing(logits, alpha=0.2, temperature=0.7)
    for token in range(50):
        kept = experts[token, : counts[token]]
        expected = torch.softmax(logits[token, kept] / 0.7, dim=-1)
        torch.testing.assert_close(weights[token, kept], expected)
    torch.testing.assert_close(weights.sum(-1), torch.ones(50))
    assert (weights >= 0).all()


@pytest.mark.parametrize("maker", [DirichletNull(), TokenGaussian()], ids=repr)
@pytest.mark.parametrize("method", sorted(PROCEDURES))
def test_every_procedure_decides_as_on_the_pvalues(method, maker):
    """The critical statistics of the hot path give the decisions of the p-values themselves."""
    logits = random_logits(5000, 64)
    rule = BH(alpha=0.1, pvalues=maker, method=method, min_k=1, max_k=64)
    expected = reject(maker(logits), 0.1, method).sum(-1).clamp(min=1)
    assert torch.equal(rule(logits).counts, expected)
    assert expected.float().std() > 0


def test_counts_grow_with_alpha_and_stay_in_bounds():
    logits = random_logits(2000, 64)
    previous = torch.zeros(2000, dtype=torch.int64)
    for alpha in (0.001, 0.01, 0.05, 0.1, 0.3, 0.6, 0.9):
        _, _, counts = benjamini_hochberg_routing(logits, alpha, min_k=2, max_k=6)
        assert (counts >= previous).all() and counts.min() >= 2 and counts.max() <= 6
        previous = counts
    assert previous.float().mean() > 2


def test_shapes_with_batch_and_sequence():
    logits = random_logits(2, 5, 64)
    weights, experts, counts = benjamini_hochberg_routing(logits, max_k=6)
    assert weights.shape == (2, 5, 64) and experts.shape == (2, 5, 6) and counts.shape == (2, 5)
    flat = benjamini_hochberg_routing(logits.view(10, 64), max_k=6)
    assert torch.equal(weights.view(10, 64), flat[0]) and torch.equal(experts.view(10, 6), flat[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_decisions_are_those_of_the_same_logits_in_float64(dtype):
    logits = random_logits(2000, 64).to(dtype)
    counts = benjamini_hochberg_routing(logits)[2]
    wide = benjamini_hochberg_routing(logits.double())[2]
    # float32 arithmetic may fall on the other side of a critical value, once in a long while.
    assert (counts != wide).float().mean() <= 0.001
    assert 1 < counts.float().mean() < 8


def test_shifting_the_logits_changes_nothing():
    logits = random_logits(500, 64)
    assert torch.equal(benjamini_hochberg_routing(logits)[2], benjamini_hochberg_routing(logits + 3.0)[2])


def test_topk_routing():
    logits = random_logits(100, 64)
    weights, experts, counts = topk_routing(logits, k=8)
    top = torch.softmax(logits, -1).topk(8)
    assert torch.equal(experts, top.indices) and (counts == 8).all()
    torch.testing.assert_close(weights.gather(-1, experts), top.values / top.values.sum(-1, keepdim=True))


def test_empty_slots_at_min_k_zero():
    logits = torch.zeros(3, 64)  # nothing stands out
    weights, experts, counts = benjamini_hochberg_routing(logits, min_k=0)
    assert (counts == 0).all() and (experts == -1).all() and (weights == 0).all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"alpha": 0.0}, ValueError, "alpha=0.0 must lie strictly between 0 and 1"),
        ({"alpha": 1.0}, ValueError, "alpha=1.0"),
        ({"temperature": 0.0}, ValueError, "temperature must be a finite number above 0, got 0.0"),
        ({"temperature": -1.0}, ValueError, "got -1.0"),
        ({"min_k": 5, "max_k": 4}, ValueError, "min_k=5 and max_k=4: lower min_k or raise max_k"),
        ({"min_k": -1}, ValueError, "min_k must be 0 or more, got -1"),
        ({"max_k": 0}, ValueError, "max_k must be 1 or more, got 0"),
        ({"max_k": 65}, ValueError, "max_k=65 for 64 experts: use max_k=64"),
        ({"max_k": 2.5}, TypeError, "max_k must be an int, got 2.5"),
        ({"max_k": True}, TypeError, "max_k must be an int, got True"),
        ({"temperature": "1"}, TypeError, "temperature must be a number, got '1' of type str"),
        ({"temperature": True}, TypeError, "temperature must be a number, got True of type bool"),
        ({"method": "magic"}, ValueError, "magic"),
        ({"pvalues": "magic"}, ValueError, "magic"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message.replace("(", r"\(")):
        benjamini_hochberg_routing(random_logits(4, 64), **arguments)


def test_bad_logits_are_named():
    with pytest.raises(TypeError, match="int64"):
        benjamini_hochberg_routing(torch.zeros(4, 64, dtype=torch.int64))
    logits = random_logits(4, 64)
    logits[2, 5] = float("nan")
    with pytest.raises(ValueError, match=r"(?i)nan"):
        benjamini_hochberg_routing(logits)
    with pytest.raises(ValueError, match="k must be an int of 1 or more, got 0"):
        TopK(0)


def test_the_default_is_constants_on_the_ordered_probabilities():
    """At 0.05: the best expert needs 0.0514, the second 0.0481, the eighth 0.0413, and the last that passes counts."""
    null = DirichletNull()
    constants = null.probability(null.critical_statistics(critical_values(64, 0.05)), 64)
    shown = [0.0514, 0.0481, 0.0461, 0.0447, 0.0436, 0.0427, 0.0419, 0.0413]
    assert constants[:8].tolist() == pytest.approx(shown, abs=6e-5)
    logits = 1.5 * torch.randn(20_000, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ordered = torch.softmax(logits, -1).sort(dim=-1, descending=True).values
    passes = (ordered >= constants) * torch.arange(1, 65)
    counts = BH(0.05)(logits).counts
    assert torch.equal(passes.amax(-1).clamp(1, 8), counts)
    assert (passes[:, :8].amax(-1).clamp(1, 8) == counts).double().mean() > 0.99, "eight of them nearly always decide"


# -- no tokens, numbers of numpy -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 64), (0, 7, 64), (3, 0, 64)])
def test_no_tokens_are_routed_to_nothing(shape):
    logits = torch.zeros(shape)
    for weights, experts, counts in (benjamini_hochberg_routing(logits, max_k=6), topk_routing(logits, k=6)):
        assert weights.shape == shape and experts.shape == (*shape[:-1], 6) and counts.shape == shape[:-1]


def test_numbers_of_numpy_are_numbers():
    logits = random_logits(50, 64)
    expected = benjamini_hochberg_routing(logits, 0.1, 0.5, min_k=2, max_k=4)
    numbers = {"min_k": np.int64(2), "max_k": np.int32(4), "pvalues": DirichletNull(np.int8(4))}
    found = benjamini_hochberg_routing(logits, np.float64(0.1), np.float32(0.5), **numbers)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert TopK(np.int64(4)) == TopK(4) and type(TopK(np.int64(4)).max_k) is int
    assert StaticPerLayer(np.array([2, 4])) == StaticPerLayer((2, 4))
    assert EntropyK((1.0,), np.array([2, 4])) == EntropyK((1.0,), (2, 4))
    assert Threshold(np.float32(0.25)) == Threshold(0.25)
    assert json.dumps([TopK(np.int64(4)).k, BH(np.float32(0.25), max_k=np.int64(4)).alpha]) == "[4, 0.25]"


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (TopK(65), "k must not exceed the number of experts, got k=65 for 64 experts: use k=64 to allow them all"),
        (StaticPerLayer((2, 65)), r"ks must not .* experts, got ks=\(2, 65\) for 64 experts: use 64 at most"),
        (EntropyK((1.0,), (2, 65)), r"ks must not .* experts, got ks=\(2, 65\) for 64 experts: use 64 at most"),
    ],
)
def test_too_many_experts_are_named_as_the_user_named_them(rule, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        rule(random_logits(4, 64), layer=0)


@pytest.mark.parametrize("wrong", [2.0, True, "2", None])
def test_a_number_of_experts_is_whole(wrong):
    for make in (TopK, lambda k: StaticPerLayer((1, k)), lambda k: EntropyK((1.0,), (1, k))):
        with pytest.raises(ValueError, match=rf"int.* of 1 or more.*, got .*{wrong!r}"):
            make(wrong)


# -- p-values that a model cannot have -----------------------------------------------------------------------------


@pytest.mark.parametrize("num_experts", [4, 8, 9])
def test_a_gaussian_that_leaves_no_expert_is_refused_when_it_is_made(num_experts):
    model = tiny_olmoe(num_experts=num_experts, num_experts_per_tok=2)
    mend = rf"^pvalues=TokenGaussian\(exclude_top=8\) .* {num_experts} experts.*TokenGaussian\(exclude_top=2\)"
    with pytest.raises(ValueError, match=mend):
        BHRoutingIntegration(model, pvalues="gaussian", max_k=4)
    with pytest.raises(ValueError, match=mend):
        benjamini_hochberg_routing(random_logits(3, num_experts), pvalues="gaussian", max_k=4)
    with BHRoutingIntegration(model, pvalues=TokenGaussian(exclude_top=2), max_k=4), torch.no_grad():
        model(input_ids=tokens(1, 5))


# -- statistics of the routing function ----------------------------------------------------------------------------


def test_statistics_of_the_routing_function_are_those_of_its_counts():
    logits = random_logits(3, 100, 64)
    options = dict(alpha=0.1, temperature=0.7, min_k=2, max_k=6)
    *routing, stats = benjamini_hochberg_routing(logits, **options, return_stats=True)
    plain = benjamini_hochberg_routing(logits, **options)
    assert all(torch.equal(one, other) for one, other in zip(routing, plain, strict=True))
    counts = plain[2].double().numpy()
    assert stats == options | {
        "total_tokens": 300,
        "mean_experts_per_token": pytest.approx(counts.mean()),
        "std_experts_per_token": pytest.approx(counts.std()),
        "min_experts_per_token": 2,
        "max_experts_per_token": 6,
        "sparsity_gain": pytest.approx(1 - counts.mean() / 6),
        "share_at_min_k": pytest.approx((counts == 2).mean()),
        "share_at_max_k": pytest.approx((counts == 6).mean()),
    }
    assert 0 < stats["share_at_min_k"] < 1 and 0 < stats["share_at_max_k"] < 1
    assert json.loads(json.dumps(stats)) == stats


def test_statistics_of_no_tokens():
    stats = benjamini_hochberg_routing(torch.zeros(0, 64), return_stats=True)[3]
    assert stats["total_tokens"] == 0 and np.isnan(stats["mean_experts_per_token"])
    assert stats["min_experts_per_token"] is None and np.isnan(stats["share_at_max_k"])


def test_comparison_of_bounds():
    logits = random_logits(300, 64)
    table = compare_max_k(logits, (2, 4, 64), alpha=0.1, min_k=0)
    counts = benjamini_hochberg_routing(logits, 0.1, min_k=0, max_k=64)[2]
    assert table.index.tolist() == [2, 4, 64] and table.index.name == "max_k"
    for max_k, row in table.iterrows():
        assert row["mean_experts_per_token"] == pytest.approx(counts.clamp(max=max_k).double().mean().item())
        assert row["share_at_max_k"] == pytest.approx((counts >= max_k).double().mean().item())
    with pytest.raises(ValueError, match="max_k=65 for 64 experts"):
        compare_max_k(logits, (2, 65))


# -- a level that is moved, or differs by sequence -----------------------------------------------------------------


def fitted_null(maker, **options):
    """A null for each of three layers, the noise of each more spread than that of the one before."""
    draw = np.random.default_rng(0)
    shape = (64, 200) if options else (1000,)
    samples = [(1 + 0.3 * layer) * draw.normal(size=shape) for layer in range(3)]
    return maker.fit(samples, model_name="noise", num_experts=64, statistic="logit", **options)


#: The rules of each family, or those that stand for it, and two levels.
MOVED = {
    "threshold": (Threshold(), (0.02, 0.06)),
    "top-p": (TopP(), (0.2, 0.7)),
    "min-p": (MinP(), (0.1, 0.6)),
    "weight ratio": (WeightRatio(), (0.05, 0.3)),
    "entropy": (EntropyK(), (1.8, 2.9)),
    "BH": (BH(), (0.001, 0.2)),
    "BH, layer weights": (BH(layer_weights=(1.0, 4.0, 0.5)), (0.001, 0.2)),
    "BH, fitted null": (BH(pvalues=fitted_null(KDENull)), (0.05, 0.4)),
    "fixed cut, fitted null": (BH(pvalues=fitted_null(KDENull), method="fixed"), (0.01, 0.1)),
    "threshold, layer weights": (BH(method="fixed", layer_weights=(1.0, 4.0, 0.5)), (0.001, 0.05)),
    "null per expert": (BH(pvalues=fitted_null(ConformalNull, per_expert=True)), (0.1, 0.5)),
    "keep mass": (KeepMass(TopP()), (0.2, 0.7)),
} | {f"BH by {method}": (BH(method=method, max_k=64), (0.01, 0.3)) for method in sorted(PROCEDURES)}


#: Families whose tokens share their experts, and so their level (`bhlib.rules.batch`).
OF_A_BATCH = {"OEA", "BH, batch weights", "BH, free experts", "batch threshold"}


def test_every_family_with_a_level_is_moved():
    not_moved = {"static top-k", "static per layer"} | OF_A_BATCH
    not_moved |= {"SeqTopK", "Alloc-MoE", "MoDES", "ACE", "halving", "ExFold", "LDA"}  # tests/test_rivals.py
    assert set(FAMILIES) - set(MOVED) == not_moved
    for name, (rule, levels) in MOVED.items():
        assert rule.at(levels[0]).level == levels[0] and rule.at(rule.level) == rule
        assert name not in FAMILIES or FAMILIES[name].level_of(rule) == rule.level


@pytest.mark.filterwarnings("ignore::bhlib.pvalues.ResolutionWarning")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", MOVED)
def test_each_sequence_is_routed_as_it_would_be_alone(name, dtype):
    rule, levels = MOVED[name]
    logits = random_logits(4, 30, 64).to(dtype)  # four sequences; the first level is for two of them
    both = rule.at(levels)(logits.flatten(0, 1), 1, weighting="normalized")
    of_each = (levels[0], levels[0], levels[1], levels[1])
    alone = [rule.at(level)(one, 1, weighting="normalized") for level, one in zip(of_each, logits, strict=True)]
    for found, expected in zip(both, zip(*alone, strict=True), strict=True):
        assert torch.equal(found, torch.cat(expected))
    assert both.counts[:60].double().mean() != both.counts[60:].double().mean()


def test_levels_of_many_tokens_and_of_none():
    """More tokens than are decided in one piece on a CPU."""
    logits = random_logits(9000, 64)
    for method in ("bh", "storey"):
        rule = BH(method=method)
        alone = [rule.at(level)(part).counts for level, part in zip((0.3, 0.01), logits.split(4500), strict=True)]
        assert torch.equal(rule.at((0.3, 0.01))(logits).counts, torch.cat(alone))
        assert rule.at((0.3, 0.01))(logits[:0]).counts.shape == (0,)
    per_expert, _ = MOVED["null per expert"]
    assert per_expert.at((0.3, 0.01))(logits[:0], 1).counts.shape == (0,)


def test_the_routing_function_takes_a_level_for_each_sequence():
    logits = random_logits(2, 50, 64)
    weights, experts, counts, stats = benjamini_hochberg_routing(logits, alpha=[0.01, 0.3], return_stats=True)
    for row, alpha in enumerate((0.01, 0.3)):
        alone = benjamini_hochberg_routing(logits[row], alpha)
        assert torch.equal(weights[row], alone[0])
        assert torch.equal(experts[row], alone[1])
        assert torch.equal(counts[row], alone[2])
    assert stats["alpha"] == (0.01, 0.3)


@pytest.mark.parametrize("name", MOVED)
def test_tokens_that_cannot_be_divided_are_refused(name):
    rule, levels = MOVED[name]
    with pytest.raises(ValueError, match="7 tokens cannot be divided among 2 levels: give one level for each sequence"):
        rule.at(levels)(random_logits(7, 64), 1)


@pytest.mark.parametrize("make", [tuple, list, np.array, torch.tensor])
def test_levels_are_kept_as_numbers(make):
    null = DirichletNull()
    assert BH(make([0.25, 0.5]), null) == BH((0.25, 0.5), null) and isinstance(hash(BH(make([0.25, 0.5]))), int)
    assert TopP().at(make([0.25, 0.5])).p == (0.25, 0.5) == TopP((0.25, 0.5)).level
    assert repr(Threshold(make([0.25, 0.5]))) == "Threshold(min_k=1, max_k=8, threshold=(0.25, 0.5))"
    assert EntropyK((1.0, 1.5)).at(make([0.25, 0.5])).thresholds == ((0.25, 0.75), (0.5, 1.0))


def test_moving_a_level_keeps_all_else():
    rule = BH(0.05, TokenGaussian(), "by", (1.0, 2.0), min_k=2, max_k=5)
    moved = rule.at(0.1)
    assert moved == BH(0.1, rule.pvalues, "by", (1.0, 2.0), min_k=2, max_k=5) and moved.pvalues is rule.pvalues
    assert EntropyK((1.0, 1.5, 2.5), (1, 2, 3, 4)).at(2.0) == EntropyK((2.0, 2.5, 3.5), (1, 2, 3, 4))
    assert EntropyK(((1.0, 1.5), (2.0, 2.5))).at(0.5) == EntropyK((0.5, 1.0))
    assert KeepMass(TopP(0.4), 4).at(0.5) == KeepMass(TopP(0.5), 4) and KeepMass(TopP(0.4)).level_name == "p"


@pytest.mark.parametrize(
    ("move", "error", "message"),
    [
        (lambda: TopK(4).at(0.5), TypeError, r"TopK\(.*k=4\) has no level to move: make another TopK"),
        (lambda: KeepMass(TopK(4)).at(0.5), TypeError, "has no level to move"),
        (lambda: BH().at(1.5), ValueError, "alpha=1.5 must lie strictly between 0 and 1"),
        (lambda: BH().at([0.1, 1.5]), ValueError, "alpha=1.5 must lie strictly between 0 and 1"),
        (lambda: BH().at("0.1"), TypeError, "alpha must be a number, not str"),
        (lambda: BH().at([0.1, None]), TypeError, "alpha must be a number, not NoneType"),
        (lambda: BH().at([]), ValueError, r"alpha must be one number, or one for each sequence of a batch, got \[\]"),
        (lambda: TopP().at((0.1, -1.0)), ValueError, r"p must be a number in \[0, 1\], got -1.0"),
        (lambda: Threshold([[0.1]]), ValueError, r"threshold must be a number in \[0, 1\], got \[0.1\]"),
        (lambda: EntropyK().at([]), ValueError, r"first_threshold must be one number, or one for each sequence"),
        (lambda: EntropyK().at("1"), TypeError, "first_threshold must be a number, got '1' of type str"),
        (lambda: EntropyK().at([1.0, None]), TypeError, "first_threshold must be a number, got None"),
    ],
)
def test_a_level_that_cannot_be_is_refused(move, error, message):
    with pytest.raises(error, match=message):
        move()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", ["BH", "BH, layer weights", "threshold", "top-p", "min-p", "weight ratio", "entropy"])
def test_compiled_code_takes_a_moved_level_as_it_is(name, backend):
    """One graph, whatever the level; and the level of the moment decides."""
    rule, levels = MOVED[name]
    rule.prepare(64, 1, torch.device("cpu"))
    holder = SimpleNamespace(rule=rule)
    counter = CompileCounterWithBackend(backend)
    torch._dynamo.reset()
    compiled = torch.compile(lambda logits: holder.rule(logits, 1), backend=counter, fullgraph=True)
    logits = random_logits(40, 64)
    for level in (rule.level, *levels, rule.level):
        holder.rule = rule.at(level)
        assert all(torch.equal(one, other) for one, other in zip(compiled(logits), holder.rule(logits, 1), strict=True))
    assert counter.frame_count == 1
    for several in (levels, levels[::-1]):
        holder.rule = rule.at(several)
        assert all(torch.equal(one, other) for one, other in zip(compiled(logits), holder.rule(logits, 1), strict=True))
    assert counter.frame_count == 2, "once more for a level that differs by sequence"


def test_what_compiled_code_finds_unprepared_is_right_too():
    holder, logits = SimpleNamespace(rule=TopP(0.4)), random_logits(40, 64)
    torch._dynamo.reset()
    compiled = torch.compile(lambda logits: holder.rule(logits), backend="eager", fullgraph=True)
    for level in (0.4, 0.2, 0.7):
        holder.rule = TopP(level)
        assert torch.equal(compiled(logits).counts, TopP(level)(logits).counts)


def test_a_level_read_in_inference_is_good_for_training():
    rule, logits = MinP(), random_logits(10, 64)
    with torch.inference_mode():
        rule(logits)
    rule(logits.requires_grad_()).weights.sum().backward()
    assert logits.grad.isfinite().all()


# -- the forms in which a model and its records take a routing -----------------------------------------------------


@pytest.mark.parametrize(
    "rule", [BH(max_k=5), TopP(max_k=5), KeepMass(TopP(max_k=5))], ids=lambda rule: type(rule).__name__
)
def test_forms_for_a_model_and_its_records(rule):
    logits = random_logits(20, 16).to(torch.bfloat16)
    weights, experts, counts = rule(logits, weighting="normalized")
    forms = rule.forms(logits, weighting="normalized", dtype=torch.bfloat16, fused=True)
    assert torch.equal(forms.weights, weights.to(torch.bfloat16)) and torch.equal(forms.counts, counts)
    assert torch.equal(forms.experts, torch.where(experts < 0, 16, experts)) and (forms.experts == 16).any()
    assert forms.exact is None
    exact = rule.forms(logits, weighting="normalized", dtype=torch.bfloat16, exact=True, fused=True).exact
    assert torch.equal(exact, weights)
