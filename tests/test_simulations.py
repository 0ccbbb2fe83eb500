"""Simulations against what is known exactly: realised error rates, closed forms of power, sharp bounds."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import norm

from bhlib.procedures import reject
from bhlib.simulations import METHODS_1995, effects_1995, simulate_fdr, simulate_power_1995

ALPHAS = (0.01, 0.05, 0.1, 0.2)


@pytest.fixture(scope="module")
def independent() -> pd.DataFrame:
    return simulate_fdr(ALPHAS, seed=1)


@pytest.fixture(scope="module")
def equicorrelated() -> pd.DataFrame:
    return simulate_fdr(ALPHAS, dependence="equicorrelated", seed=1)


@pytest.fixture(scope="module")
def power_1995() -> pd.DataFrame:
    return simulate_power_1995(repetitions=4000)


def rows_of(table: pd.DataFrame, method: str) -> pd.DataFrame:
    rows = table[table["method"] == method]
    assert len(rows) > 0
    return rows


# ------------------------------------------------------------------- false discovery rate


def test_bh_realises_exactly_the_null_fraction_times_alpha_under_independence(independent):
    bh = rows_of(independent, "bh")
    assert (abs(bh["fdr"] - 0.75 * bh["alpha"]) <= 4 * bh["fdr_se"]).all()
    assert (bh["fdr_se"] < 0.04 * bh["alpha"]).all(), "too few repetitions to tell"


def test_storey_spends_all_of_alpha_under_independence(independent):
    rows = rows_of(independent, "storey")  # exactly (1 - 0.5^48) * alpha
    assert (abs(rows["fdr"] - rows["alpha"]) <= 4 * rows["fdr_se"]).all()


@pytest.mark.parametrize("method", ["bh", "by", "storey", "tsbky", "bonferroni", "holm", "hochberg"])
def test_fdr_stays_below_alpha_under_independence(independent, method):
    rows = rows_of(independent, method)
    assert (rows["fdr"] <= rows["alpha"] + 3 * rows["fdr_se"]).all()


@pytest.mark.parametrize("method", ["bonferroni", "holm", "hochberg"])
@pytest.mark.parametrize("dependence", ["independent", "equicorrelated"])
def test_familywise_error_stays_below_alpha(method, dependence, request):
    rows = rows_of(request.getfixturevalue(dependence), method)
    assert (rows["fwer"] <= rows["alpha"] + 3 * rows["fwer_se"]).all()
    assert (rows["fwer"] > 0).all()


@pytest.mark.parametrize("method", ["bh", "by"])
def test_positive_dependence_leaves_the_guarantee(equicorrelated, method):
    rows = rows_of(equicorrelated, method)
    assert (rows["fdr"] <= 0.75 * rows["alpha"] + 3 * rows["fdr_se"]).all()


def test_the_simulation_sees_what_violates_the_level(independent, equicorrelated):
    fixed = rows_of(independent, "fixed")
    assert (fixed["fdr"] > fixed["alpha"] + 10 * fixed["fdr_se"]).all()
    whole_level_first = rows_of(independent, "tsbh").query("alpha == 0.2")
    assert (whole_level_first["fdr"] > 0.2 + 3 * whole_level_first["fdr_se"]).all()
    storey = rows_of(equicorrelated, "storey")
    assert (storey["fdr"] > storey["alpha"] + 10 * storey["fdr_se"]).all()


def test_fixed_cut_has_its_closed_forms(independent):
    rows = rows_of(independent, "fixed")
    familywise = 1 - (1 - rows["alpha"]) ** 48
    rounding = 1e-4  # at alpha = 0.2 it is all but certain, and every repetition may have an error
    assert (abs(rows["fwer"] - familywise) <= 4 * rows["fwer_se"] + rounding).all()
    assert (abs(rows["power"] - norm.sf(norm.isf(rows["alpha"]) - 3)) <= 4 * rows["power_se"]).all()


def test_bonferroni_has_its_power_in_closed_form_under_any_dependence(independent, equicorrelated):
    for table in [independent, equicorrelated]:
        rows = rows_of(table, "bonferroni")
        exact = norm.sf(norm.isf(rows["alpha"] / 64) - 3)
        assert (abs(rows["power"] - exact) <= 4 * rows["power_se"]).all()


def worst_case_pvalues(num_tests: int, alpha: float, repetitions: int) -> torch.Tensor:
    """Uniform p-values of true nulls, dependent so that Benjamini-Hochberg errs as often as it ever can.

    With probability alpha / j, exactly j tests share the interval between the critical values j - 1 and j,
    and all others are above alpha: Benjamini-Hochberg rejects these j, for each j = 1 ... m. The rest of the
    time all are above alpha. Each p-value is uniform: it is in interval j with probability alpha / j * j / m.
    """
    rng = np.random.default_rng(0)
    j = np.arange(1, num_tests + 1)
    probabilities = np.concatenate([[1 - (alpha / j).sum()], alpha / j])
    sharing = rng.choice(num_tests + 1, size=(repetitions, 1), p=probabilities)
    shared = (sharing - rng.random((repetitions, num_tests))) / num_tests * alpha
    above = alpha + (1 - alpha) * rng.random((repetitions, num_tests))
    position = rng.permuted(np.tile(np.arange(num_tests), (repetitions, 1)), axis=1)
    return torch.from_numpy(np.where(position < sharing, shared, above))


def test_under_the_worst_dependence_bh_fails_by_the_harmonic_number_and_by_holds_exactly():
    num_tests, alpha, repetitions = 20, 0.1, 100_000
    harmonic = (1 / np.arange(1, num_tests + 1)).sum()
    standard_error = 0.5 / repetitions**0.5

    pvals = worst_case_pvalues(num_tests, alpha, repetitions)
    assert abs((pvals <= 0.3).double().mean().item() - 0.3) < 4 * standard_error, "not uniform"
    any_rejection = reject(pvals, alpha, "bh").any(dim=-1).double().mean().item()  # all nulls: it is the FDR
    assert abs(any_rejection - alpha * harmonic) < 4 * standard_error
    assert any_rejection > 3 * alpha

    worst_for_by = worst_case_pvalues(num_tests, alpha / harmonic, repetitions)
    any_rejection = reject(worst_for_by, alpha, "by").any(dim=-1).double().mean().item()
    assert abs(any_rejection - alpha) < 4 * standard_error


def test_a_given_correlation_with_negative_entries():
    signs = np.where(np.arange(32) % 2 == 0, 1.0, -1.0)
    opposed = 0.8 * np.outer(signs, signs) + 0.2 * np.eye(32)
    table = simulate_fdr(ALPHAS, ["by", "bonferroni"], "opposed", num_tests=32, num_null=24, correlation=opposed)
    assert set(table["dependence"]) == {"opposed"}
    assert (table["fdr"] <= 0.75 * table["alpha"] + 3 * table["fdr_se"]).all()
    exact = norm.sf(norm.isf(table["alpha"] / 32) - 3)
    bonferroni = table["method"] == "bonferroni"
    assert (abs(table["power"] - exact) <= 4 * table["power_se"])[bonferroni].all()


def test_a_given_matrix_is_what_equicorrelated_means():
    small = {"alphas": [0.1], "num_tests": 8, "num_null": 6, "repetitions": 500}
    matrix = np.full((8, 8), 0.3) + 0.7 * np.eye(8)
    named = simulate_fdr(dependence="equicorrelated", rho=0.3, **small)
    given = simulate_fdr(dependence="mine", correlation=matrix, **small)
    pd.testing.assert_frame_equal(named.drop(columns="dependence"), given.drop(columns="dependence"))
    independent = simulate_fdr(**small)
    assert not np.allclose(named["power_se"], independent["power_se"], rtol=0.01)


def test_perfectly_correlated_nulls_are_one_test():
    table = simulate_fdr([0.1], ["bh", "bonferroni"], "equicorrelated", rho=1.0, num_tests=10, num_null=10)
    table = table.set_index("method")
    assert abs(table.loc["bh", "fdr"] - 0.1) <= 4 * table.loc["bh", "fdr_se"]
    assert abs(table.loc["bonferroni", "fwer"] - 0.01) <= 4 * table.loc["bonferroni", "fwer_se"]
    assert table["power"].isna().all(), "there is nothing to find"


def test_standard_errors_are_those_of_a_proportion(independent):
    fwer = independent["fwer"]
    expected = np.sqrt(fwer * (1 - fwer) / 10_000)
    np.testing.assert_allclose(independent["fwer_se"], expected, rtol=1e-3, atol=1e-9)


def test_tables_are_tidy_and_reproducible(independent):
    assert len(independent) == len(ALPHAS) * independent["method"].nunique()
    assert not independent.duplicated(["dependence", "method", "alpha"]).any()
    again = simulate_fdr([0.05], ["fdr_bh"], seed=1)
    assert again["method"].item() == "bh"
    bh = rows_of(independent, "bh")
    assert again["fdr"].item() == bh.loc[bh["alpha"] == 0.05, "fdr"].item()
    assert simulate_fdr([0.05], ["bh"], seed=2)["fdr"].item() != again["fdr"].item()


# ------------------------------------------------------------------- power, 1995


def test_settings_of_the_1995_study(power_1995):
    assert len(power_1995) == 5 * 4 * 3 * len(METHODS_1995)
    assert not power_1995.duplicated(["num_tests", "null_fraction", "configuration", "method"]).any()
    assert (power_1995["num_null"] == power_1995["num_tests"] * power_1995["null_fraction"]).all()
    assert (power_1995["power_se"] > 0).all() and (power_1995["power_se"] < 0.01).all()


def test_bonferroni_has_its_power_in_closed_form_in_every_setting(power_1995):
    weights = {"D": [0.4, 0.3, 0.2, 0.1], "E": [0.25] * 4, "I": [0.1, 0.2, 0.3, 0.4]}
    for row in rows_of(power_1995, "bonferroni").itertuples():
        threshold = norm.isf(0.05 / row.num_tests)
        exact = np.dot(weights[row.configuration], norm.sf(threshold - 5 * np.arange(1, 5) / 4))
        assert abs(row.power - exact) <= 4 * row.power_se


def test_shape_of_the_1995_figure(power_1995):
    settings = ["null_fraction", "configuration", "num_tests"]
    power = power_1995.pivot(index=settings, columns="method", values="power").sort_index()
    # The procedures nest, on the same scores: no Monte-Carlo error in these.
    assert (power["bonferroni"] <= power["hochberg"]).all() and (power["hochberg"] <= power["bh"]).all()
    assert (power["by"] <= power["bh"]).all()
    # The power of Bonferroni falls as tests are added, that of BH falls less: the gain grows with m.
    for _, curve in power.groupby(level=["null_fraction", "configuration"]):
        assert curve["bonferroni"].is_monotonic_decreasing
        gain = curve["bh"] - curve["bonferroni"]
        assert gain.is_monotonic_increasing
        loss = curve.iloc[0] - curve.iloc[-1]
        assert 0 < loss["bh"] < loss["bonferroni"] / 2
    # At m = 64: the gain grows with the number of false nulls, and power grows from D to E to I.
    at_64 = power.xs(64, level="num_tests")
    gain = (at_64["bh"] - at_64["bonferroni"]).unstack("configuration")
    assert (gain.diff().dropna() < 0).all(axis=None)
    for method in METHODS_1995:
        by_configuration = at_64[method].unstack("configuration")
        assert (by_configuration["D"] < by_configuration["E"]).all()
        assert (by_configuration["E"] < by_configuration["I"]).all()


def test_fdr_of_the_1995_study(power_1995):
    bh = rows_of(power_1995, "bh")
    assert (abs(bh["fdr"] - bh["null_fraction"] * 0.05) <= 4 * bh["fdr_se"]).all()


@pytest.mark.parametrize(
    ("num_false", "configuration", "counts"),
    [(8, "E", [2, 2, 2, 2]), (10, "D", [4, 3, 2, 1]), (20, "I", [2, 4, 6, 8]), (64, "E", [16, 16, 16, 16])],
)
def test_false_nulls_are_divided_as_prescribed(num_false, configuration, counts):
    effects = effects_1995(num_false, configuration, largest_effect=10.0)
    assert effects.tolist() == np.repeat([2.5, 5.0, 7.5, 10.0], counts).tolist()


@pytest.mark.parametrize("num_false", [1, 2, 3, 6])
def test_a_few_false_nulls_are_divided_as_prescribed_on_average(num_false):
    start = (np.arange(1000) + 0.5) / 1000
    effects = effects_1995(num_false, "D", 4.0, start)
    assert effects.shape == (1000, num_false)
    at_each = np.stack([(effects == effect).sum(axis=1) for effect in [1, 2, 3, 4]], axis=1)
    expected = num_false * np.array([0.4, 0.3, 0.2, 0.1])
    np.testing.assert_allclose(at_each.mean(axis=0), expected, atol=0.01)
    assert (abs(at_each - expected) < 1).all()


# ------------------------------------------------------------------- refused input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dependence": "chain"}, "dependence='chain' is unknown; choose 'independent' or 'equicorrelated'"),
        ({"correlation": np.eye(64)}, "dependence='independent' has a correlation of its own; give yours"),
        ({"dependence": "x", "correlation": np.eye(3)}, r"shape \(3, 3\); with num_tests=64 it must be \(64"),
        ({"dependence": "x", "correlation": 2 * np.eye(64)}, "has 2 on its diagonal, which must be 1;"),
        ({"dependence": "x", "correlation": np.tri(64)}, "is not symmetric; use"),
        ({"dependence": "equicorrelated", "rho": -0.5}, "negative eigenvalue -30.5.*keep rho between"),
        ({"num_null": 65}, "num_null=65 must lie between 0 and num_tests=64"),
        ({"num_tests": 0, "num_null": 0}, "num_tests=0 must be at least 1"),
        ({"repetitions": 1}, "repetitions=1 must be at least 2, for a standard error"),
        ({"alphas": [0.05, 1.0]}, "alpha=1.0 must lie strictly between 0 and 1"),
        ({"methods": ["bh", "sidak"]}, "method='sidak' is not a procedure"),
    ],
)
def test_simulate_fdr_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        simulate_fdr(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"configurations": ["F"]}, "configuration='F' is unknown; choose one of 'D', 'E', 'I'"),
        ({"num_tests": [6]}, "null_fraction=0.75 of num_tests=6 is 4.5 true nulls; it must be a whole"),
        ({"null_fractions": [1.0]}, "null_fraction=1.0 of num_tests=4 is 4 true nulls"),
        ({"repetitions": 1}, "repetitions=1 must be at least 2"),
        ({"alpha": 0.0}, "alpha=0.0 must lie strictly between 0 and 1"),
    ],
)
def test_simulate_power_1995_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        simulate_power_1995(**arguments)
