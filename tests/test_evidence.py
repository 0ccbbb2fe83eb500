"""Evidence: the measurements find what was put there, and agree with scipy and with loops."""

import numpy as np
import pytest
import torch
from models import tiny_olmoe, tokens
from scipy import stats

from bhlib.calibration import collect_router_logits, fit_null
from bhlib.contributions import measure_contributions, one_changed
from bhlib.evaluation import evaluate
from bhlib.evidence import (
    candidate_nulls,
    compare_at_equal_cost,
    kept_mass,
    level_curve,
    lower_order_cdf,
    normal_scores_correlation,
    realised,
    realised_by_effect,
    strongest_dependence,
    true_null_reference,
    uniformity,
)
from bhlib.levels import alpha_for_mean_experts, level_for_mean_experts, mean_experts
from bhlib.pvalues import STATISTICS, DirichletNull, TokenGaussian
from bhlib.rules import BH, Threshold, TopK


def noise(layers, num_tokens, num_experts=64, seed=0):
    return torch.randn(layers, num_tokens, num_experts, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def null():
    """A null fitted on independent standard normal logits, all experts counted."""
    return fit_null(noise(1, 4000), model_name="noise", null="conformal", statistic="logit", exclude_top=0)


# -- uniformity ----------------------------------------------------------------------------------------------


def test_true_nulls_are_uniform_and_independent(null):
    row = uniformity(null, noise(1, 8000, seed=1), sequence_length=100, exclude_top=0).iloc[0]
    assert row["ks"] < 0.01 and row["ks_low"] <= row["ks"] <= row["ks_high"]
    assert row["tail_01"] == pytest.approx(1, abs=0.1) and row["tail_001"] == pytest.approx(1, abs=0.3)
    assert row["inflation"] == pytest.approx(1, abs=0.1)
    assert row["inflation_reference"] == pytest.approx(1, abs=0.05)
    assert (row["values"], row["tokens"], row["sequences"]) == (8000 * 64, 8000, 80)


def test_a_shift_is_measured(null):
    """The largest gap between N(0, 1) and N(0.5, 1) is 2 Phi(0.25) - 1."""
    row = uniformity(null, 0.5 + noise(1, 4000, seed=1), sequence_length=100, exclude_top=0).iloc[0]
    assert row["ks"] == pytest.approx(2 * stats.norm.cdf(0.25) - 1, abs=0.01)
    assert row["tail_01"] == pytest.approx(100 * stats.norm.sf(stats.norm.isf(0.01) - 0.5), rel=0.1)


def test_ks_is_that_of_scipy_and_experts_are_left_out(null):
    logits = noise(1, 200, seed=2)
    pvals = null(logits[0]).numpy()
    kept = [row[np.argsort(x)[: 64 - 8]] for row, x in zip(pvals, logits[0].numpy(), strict=True)]
    exact = stats.kstest(np.concatenate(kept), "uniform").statistic
    found = uniformity(null, logits, sequence_length=20, exclude_top=8).iloc[0]
    assert exact - 1 / 4096 <= found["ks"] <= exact + 1e-6
    means = np.array(kept).mean(axis=1)
    assert found["inflation"] == pytest.approx(means.var() * 12 * 56, rel=1e-3)


def test_what_tokens_share_inflates_the_variance_of_their_means(null):
    shared = noise(1, 4000, num_experts=1, seed=3)
    logits = (noise(1, 4000, seed=4) + shared) / 2**0.5  # still standard normal, each on its own
    row = uniformity(null, logits, sequence_length=100, exclude_top=0).iloc[0]
    # Normal scores with correlation 1/2 have p-values with correlation (6/pi) arcsin(1/4).
    correlation = 6 / np.pi * np.arcsin(0.25)
    assert row["inflation"] == pytest.approx(1 + 63 * correlation, rel=0.1)
    assert row["ks"] < 0.05


def test_level_curve_is_the_distribution_function(null):
    logits = 0.3 + noise(2, 400, seed=5)
    two_layers = fit_null(noise(2, 1000), model_name="noise", null="conformal", statistic="logit", exclude_top=0)
    curve = level_curve(two_layers, logits, sequence_length=20, exclude_top=0)
    pvals = torch.stack([two_layers(layer, i) for i, layer in enumerate(logits)]).flatten().numpy()
    for row in curve.itertuples():
        assert row.fraction == pytest.approx((pvals <= np.float32(row.level)).mean(), abs=1e-9)
        assert row.low <= row.high
    assert curve["level"].is_monotonic_increasing and curve["level"].iloc[-1] == 1 and curve["level"].iloc[0] < 1.01e-4


@pytest.mark.parametrize("maker", [DirichletNull(1), TokenGaussian(estimator="truncated")], ids=lambda m: m.name)
def test_nulls_about_whole_tokens_are_compared_with_what_the_lower_experts_should_show(maker):
    """Under its own hypothesis such a null is nearly uniform, although the selected experts are left out."""
    logits = noise(1, 4000)
    if isinstance(maker, DirichletNull):  # exponential variables, divided by their sum, divide one at random
        logits = torch.special.ndtr(-logits).log().neg().log()
    row = uniformity(maker, logits, sequence_length=100).iloc[0]
    assert row["ks"] < 0.015, "the tests of a token are not quite independent, so it is not 0"


def tokens_of_the_null(kind, num_tokens=20_000):
    """Logits [1, tokens, 64] for which a null is true, by other draws than those of the reference."""
    logits = noise(1, num_tokens, seed=11)
    if kind.startswith("Dirichlet"):
        shares = torch.distributions.Dirichlet(torch.full((64,), float(kind[-1]), dtype=torch.float64))
        return shares.sample((1, num_tokens)).log().float()
    if kind == "trimmed":
        logits[..., -8:] += 30
    return logits


@pytest.mark.parametrize("kind", ["Dirichlet 1", "Dirichlet 4", "trimmed", "truncated", *STATISTICS])
def test_where_the_null_is_true_tails_and_inflation_are_those_of_the_reference(kind):
    """And not 1: not the inflation of any null here, nor the tails of those that need no calibration."""
    if kind in STATISTICS:
        maker = fit_null(noise(1, 20_000), model_name="n", null="conformal", statistic=kind, max_values=20_000 * 56)
    else:
        maker = DirichletNull(int(kind[-1])) if kind.startswith("Dirichlet") else TokenGaussian(estimator=kind)
    row = uniformity(maker, tokens_of_the_null(kind), sequence_length=100).iloc[0]
    reference = true_null_reference(maker, 64)
    assert row["tail_01"] == pytest.approx(reference["tail_01"], abs=0.06)
    assert row["tail_001"] == pytest.approx(reference["tail_001"], abs=0.15)
    assert row["inflation"] == pytest.approx(reference["inflation"], rel=0.06)
    assert {name: row[f"{name}_reference"] for name in reference} == reference
    assert abs(reference["inflation"] - 1) > 0.15
    assert (abs(reference["tail_01"] - 1) > 0.1) == (kind not in STATISTICS)


def test_lower_order_cdf_is_that_of_a_simulation():
    ordered = np.sort(np.random.default_rng(0).random((20_000, 16)), axis=1)[:, 5:]
    levels = np.array([0.05, 0.2, 0.4, 0.7, 1.0])
    simulated = (ordered[..., None] <= levels).mean(axis=(0, 1))
    np.testing.assert_allclose(lower_order_cdf(levels, 16, 5), simulated, atol=0.005)
    np.testing.assert_allclose(lower_order_cdf(levels, 16, 0), levels)


def test_tokens_must_fill_sequences(null):
    with pytest.raises(ValueError, match="150 tokens, which is no multiple of sequence_length=100"):
        uniformity(null, noise(1, 150), sequence_length=100)


def test_candidates_cover_every_statistic_and_take_few_values_of_a_token():
    makers = candidate_nulls(noise(2, 640), "noise")
    assert len(makers) == 13 and all(name in makers for name in ("Dirichlet", "KDE, logit", "conformal, centered"))
    assert makers["KDE, log_prob"].header["sample_sizes"] == [1280, 1280]
    assert makers["conformal, standardized, per expert"].header["sample_sizes"] == [[40] * 64] * 2


# -- dependence ----------------------------------------------------------------------------------------------


def test_normal_scores_recover_the_correlation_of_a_copula():
    mixed = noise(1, 20_000, num_experts=3)[0]
    mixed[:, 1] = 0.8 * mixed[:, 0] + 0.6 * mixed[:, 1]
    correlation = normal_scores_correlation(mixed)
    np.testing.assert_allclose(correlation, [[1, 0.8, 0], [0.8, 1, 0], [0, 0, 1]], atol=0.02)
    np.testing.assert_allclose(normal_scores_correlation(mixed.double().exp()), correlation, atol=1e-6)
    assert np.linalg.eigvalsh(correlation).min() > 0


def test_the_most_dependent_layer_is_found():
    logits = noise(3, 2000, num_experts=16)
    logits[1] += 2 * noise(1, 2000, num_experts=1, seed=1)[0]
    layer, correlation = strongest_dependence(logits, "logit", exclude_top=2)
    assert layer == 1 and correlation[0, 1] == pytest.approx(0.8, abs=0.05)


# -- does it matter? -----------------------------------------------------------------------------------------


def test_equal_cost_comparison_by_hand():
    model = tiny_olmoe()
    data = {"a": tokens(4, 24), "b": tokens(3, 24, seed=1)}
    logits = collect_router_logits(model, tokens(6, 24, seed=2), progress=False)
    maker = TokenGaussian()
    table = compare_at_equal_cost(model, {"gaussian": maker}, logits, data, mean_experts=(3.5,), static_k=(2, 3, 4, 5))
    row = table.iloc[0]
    assert row["alpha"] == alpha_for_mean_experts(maker, logits, 3.5)
    frame = evaluate(model, data, BH(row["alpha"], maker))
    assert row["loss"] == pytest.approx(frame["loss"].mean()) and row["mean_k"] == pytest.approx(frame["mean_k"].mean())
    assert 3 < row["mean_k"] < 4, "the next lines interpolate between 3 and 4"
    three, four = (evaluate(model, data, TopK(k))["loss"] for k in (3, 4))
    between = three + (row["mean_k"] - 3) * (four - three)
    assert row["static_loss"] == pytest.approx(between.mean(), rel=1e-6)
    assert row["difference"] == pytest.approx((frame["loss"] - between).mean(), abs=1e-6)
    assert row["low"] <= row["difference"] <= row["high"] and (row["sequences"], row["tokens"]) == (7, 7 * 23)
    outside = compare_at_equal_cost(model, {"g": maker}, logits, data, mean_experts=(3.5,), static_k=(5, 6)).iloc[0]
    assert np.isnan(outside["static_loss"]) and np.isnan(outside["difference"])


@pytest.fixture(scope="module")
def measured():
    """Contributions of a tiny model on two texts, whose sequences are of three documents and of two."""
    model = tiny_olmoe()
    text = {"a": tokens(4, 9, seed=1), "b": tokens(3, 9, seed=2)}
    documents = {"a": np.array([0, 0, 1, 2]), "b": np.array([0, 1, 1])}
    return model, text, documents, measure_contributions(model, text, documents=documents, progress=False)


def test_realised_counts_documents_alike(measured):
    *_, found = measured
    rule, largest = Threshold(0.1, max_k=4), float(found.r[found.selected].median())
    table = realised(found, {"threshold": rule}, largest).set_index("part")
    assert [*table.index] == ["all", *(f"layer {layer}" for layer in range(len(found.r))), "a", "b"]
    by_document: dict = {}
    for index in range(found.r.shape[1]):
        for layer, logits in enumerate(found.logits[:, index]):
            kept = [e for e in rule(logits[None], layer).experts[0].tolist() if e >= 0]
            useful = found.r[layer, index] > largest
            hits = sum(bool(useful[e]) for e in kept)
            row = (1 - hits / len(kept), hits, int(useful.sum()), len(kept))
            by_document.setdefault((found.domains[index], found.documents[index]), []).append(row)
    means = {name: np.mean(rows, axis=0) for name, rows in by_document.items()}
    for part in ("all", "a", "b"):
        inside = [row for (domain, _), row in means.items() if part in ("all", domain)]
        fdp, hits, useful, mean_k = np.mean(inside, axis=0)
        row = table.loc[part]
        assert row[["fdp", "power", "mean_k"]].tolist() == pytest.approx([fdp, hits / useful, mean_k]), part
        assert row["low"] < row["fdp"] < row["high"]
        assert (row["documents"], row["tokens"]) == (len(inside), 9 * {"all": 7, "a": 4, "b": 3}[part])


def test_realised_by_effect_asks_what_the_model_says_without_an_expert(measured):
    model, text, documents, found = measured
    effects = one_changed(model, text, num_tokens=12, documents=documents, progress=False)
    smallest, rules = effects["kl"].median(), {f"top-{k}": TopK(k) for k in (1, 2)}
    table = realised_by_effect(effects, found, rules, smallest).set_index("rule")
    for k in (1, 2):
        kept = effects[effects["rank"] <= k]
        useful = kept["kl"] >= smallest
        row = table.loc[f"top-{k}"]
        assert row["fdp"] == pytest.approx(1 - useful.mean())
        assert row["power"] == pytest.approx(useful.sum() / (effects["kl"] >= smallest).sum())
        assert (row["mean_k"], row["tokens"]) == (k, 12)


def test_kept_mass_by_hand():
    logits = noise(2, 50)
    logits[1] *= 3
    kept, whole = [], []
    for row in logits.flatten(0, 1):
        probabilities = torch.softmax(row, dim=-1).sort(descending=True).values
        kept.append(probabilities[:3].sum().item())
        whole.append(probabilities[:8].sum().item())
    found = kept_mass(TopK(3), logits)
    assert found["share"] == pytest.approx(np.sum(kept) / np.sum(whole), rel=1e-5)
    assert found["worst_5_percent"] == pytest.approx(np.quantile(np.divide(kept, whole), 0.05), rel=1e-5)
    assert kept_mass(TopK(8), logits) == {"share": pytest.approx(1), "worst_5_percent": pytest.approx(1)}


def test_one_threshold_for_all_keeps_the_most_mass():
    """More than BH, and than a cut on a null fitted to each layer, which is a threshold of its own in each."""
    logits = torch.stack([spread * layer for spread, layer in zip((1.0, 1.5, 2.0), noise(3, 2000), strict=True)])
    null = fit_null(logits, model_name="noise", null="kde", max_values=5000)
    threshold = Threshold(level_for_mean_experts(Threshold, logits, 4.0))
    most = kept_mass(threshold, logits)["share"]
    one = DirichletNull()
    rivals = {"BH": (one, "bh"), "BH, null per layer": (null, "bh"), "fixed cut, null per layer": (null, "fixed")}
    for name, (maker, method) in rivals.items():
        rule = BH(alpha_for_mean_experts(maker, logits, 4.0, method=method), maker, method=method)
        assert mean_experts(rule, logits) == pytest.approx(mean_experts(threshold, logits), abs=0.005)
        assert kept_mass(rule, logits)["share"] < most - 2e-4, name
    fixed = BH(alpha_for_mean_experts(one, logits, 4.0, method="fixed"), one, method="fixed")
    assert kept_mass(fixed, logits)["share"] == pytest.approx(most, abs=1e-3), "the same rule"
