"""Several models as a sample: pooled differences, and lines through them."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from bhlib.pooling import extrapolate, pool


def models(differences, se, **more):
    half = 1.96 * np.asarray(se)
    low, high = np.asarray(differences) - half, np.asarray(differences) + half
    return pd.DataFrame({"family": "BH", "difference": differences, "se": se, "low": low, "high": high} | more)


def test_equal_errors_give_the_interval_of_a_mean_of_models():
    """With one standard error for all, the pooled mean is that of the models, with Student's interval over them."""
    values = np.array([-0.010, -0.020, -0.015, -0.030])
    (row,) = pool(models(values, 1e-3), ["family"]).to_dict("records")
    interval = stats.ttest_1samp(values, 0).confidence_interval()
    assert row["mean"] == pytest.approx(values.mean(), rel=1e-6)
    assert (row["low"], row["high"]) == pytest.approx((interval.low, interval.high), rel=1e-4)
    assert row["tau"] ** 2 == pytest.approx(values.var(ddof=1) - 1e-6, rel=1e-4)
    assert row["next_low"] < row["low"] and row["high"] < row["next_high"]
    assert (row["better"], row["worse"], row["models"]) == (4, 0, 4) and row["q_pvalue"] < 1e-6 and row["i2"] > 0.9


def test_the_pooled_interval_covers_the_mean_of_all_models_and_the_next_one():
    rng = np.random.default_rng(0)
    covered, next_covered = [], []
    for _ in range(300):
        se = rng.uniform(0.5, 2, size=6)
        measured = rng.normal(rng.normal(-3, 1.5, size=7), np.append(se, 1))
        (row,) = pool(models(measured[:6], se), ["family"]).to_dict("records")
        covered.append(row["low"] <= -3 <= row["high"])
        next_covered.append(row["next_low"] <= measured[6] <= row["next_high"])
    assert 0.91 <= np.mean(covered) <= 0.99  # 95 %, at two standard errors of 300 draws
    assert 0.91 <= np.mean(next_covered) <= 0.99


def test_two_models_have_counts_but_no_spread():
    (row,) = pool(models([-0.01, 0.02], [1e-3, 1e-3]), ["family"]).to_dict("records")
    assert (row["models"], row["better"], row["worse"]) == (2, 1, 1)
    assert np.isnan(row["mean"]) and np.isnan(row["tau"])


def test_a_line_is_drawn_on_and_its_interval_widens():
    sizes = np.array([1e6, 1e7, 1e8, 1e7, 1e6])
    table = models(-0.01 + 0.002 * np.log10(sizes) + [1e-4, 0, -1e-4, 1e-4, -1e-4], 1e-3, parameters=sizes)
    found = extrapolate(table, ["family"], "parameters", [1e7, 6.9e9])
    inside, outside = found.to_dict("records")
    assert found["slope"].iloc[0] == pytest.approx(0.002, abs=1e-4)
    assert outside["difference"] == pytest.approx(-0.01 + 0.002 * np.log10(6.9e9), abs=4e-4)
    assert outside["high"] - outside["low"] > 2 * (inside["high"] - inside["low"])
    assert outside["next_low"] <= outside["low"] and outside["high"] <= outside["next_high"]


def test_models_that_are_alike_have_no_line():
    assert extrapolate(models([-0.01] * 5, 1e-3, layers=8), ["family"], "layers", [16]).empty
