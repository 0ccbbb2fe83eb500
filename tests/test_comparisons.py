"""Comparisons of rules against sums by hand, and intervals against the share of truths that they cover."""

import numpy as np
import pandas as pd
import pytest
from models import tiny_olmoe, tokens

from bhlib.comparisons import bootstrap_mean, matched_compute
from bhlib.evaluation import sweep
from bhlib.rules import BH, StaticPerLayer, TopK


def test_bootstrap_covers():
    """A 95 % interval of the mean of 50 normal values covers the truth in about 95 % of 300 trials."""
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(300):
        low, high = bootstrap_mean(rng.normal(size=50), resamples=400, seed=trial)
        covered += low <= 0 <= high
    assert 0.95 - 4 * np.sqrt(0.95 * 0.05 / 300) - 0.02 < covered / 300 <= 1  # percentile intervals are a bit short


def made_up(rules, tokens_per_sequence=None):
    """A sweep's table from {rule: (mean_k, loss)}, each a number or one per sequence."""
    size = max(np.size(part) for pair in rules.values() for part in pair)
    columns = {
        "domain": ["x", "y"] * (size // 2),
        "sequence": np.arange(size) // 2,
        "tokens": 10 if tokens_per_sequence is None else tokens_per_sequence,
        "error": "",
    }
    parts = [pd.DataFrame(columns | {"rule": r, "mean_k": k, "loss": loss}) for r, (k, loss) in rules.items()]
    return pd.concat(parts, ignore_index=True)


def static_curve(size=40, seed=0):
    """Losses of top-1 to top-8: of every sequence its own level, the same gain from each expert."""
    level = np.random.default_rng(seed).normal(3, 1, size)
    return level, {f"top-{k}": (k, level + 1 / k) for k in range(1, 9)}


def test_a_mixture_of_static_rules_is_no_gain():
    """Top-4 on some sequences and top-5 on others is what the interpolation stands for: exactly nothing is won."""
    level, static = static_curve()
    chosen = np.where(np.arange(40) % 3 == 0, 4, 5)
    (row,) = matched_compute(made_up(static | {"mixed": (chosen, level + 1 / chosen)})).to_dict("records")
    assert row["mean_k"] == pytest.approx(chosen.mean())
    assert row["loss"] == pytest.approx((level + 1 / chosen).mean())
    assert row["static"] == pytest.approx(row["loss"])
    assert [row["difference"], row["low"], row["high"]] == pytest.approx([0, 0, 0], abs=1e-12)


def test_a_known_gain_is_found():
    level, static = static_curve()
    gain = np.random.default_rng(1).normal(0.02, 0.01, 40)
    k = np.random.default_rng(2).uniform(3, 5, 40)
    rules = {"better": (4.25, level + 0.75 / 4 + 0.25 / 5 - gain), "top-p 0.4": (k, level + 0.3)}
    table = matched_compute(made_up(static | rules)).set_index("rule")
    assert table.index.tolist() == ["better", "top-p 0.4"] and (table["sequences"] == 40).all()
    better = table.loc["better"]
    assert better["difference"] == pytest.approx(-gain.mean())
    low, high = bootstrap_mean(-gain)  # at a constant mean k the interval is that of the paired differences
    assert [better["low"], better["high"]] == pytest.approx([low, high], abs=0.15 * (high - low))
    by_hand = np.interp(k.mean(), range(1, 9), [np.mean(loss) for _, loss in static.values()])
    assert table.loc["top-p 0.4", "static"] == pytest.approx(by_hand)


def test_intervals_cover_when_spending_follows_difficulty():
    """A rule without merit that gives more experts to some sequences: 0 lies in about 95 % of the intervals."""
    covered, trials = 0, 150
    for trial in range(trials):
        level, static = static_curve(40, seed=trial)
        rng = np.random.default_rng(1000 + trial)
        k = 3 + 4 * (level > 3.5)
        frame = made_up(static | {"rule": (k, level + 1 / k + rng.normal(0, 0.05, 40))})
        # What top-3 and top-7 lose in the same proportion, so that the truth is 0.
        line = 1 / 3 + (1 / 7 - 1 / 3) / 4 * (np.arange(1, 9) - 3)
        for j in range(1, 9):
            frame.loc[frame["rule"] == f"top-{j}", "loss"] = level + line[j - 1]
        (row,) = matched_compute(frame, resamples=300, seed=trial).to_dict("records")
        covered += row["low"] <= 0 <= row["high"]
    assert 0.95 - 4 * np.sqrt(0.95 * 0.05 / trials) - 0.02 < covered / trials <= 1


def test_long_sequences_weigh_more():
    level, static = static_curve(4)
    lengths = np.array([10, 10, 10, 70])
    chosen = np.array([4, 4, 4, 6])
    (row,) = matched_compute(made_up(static | {"r": (chosen, level)}, np.tile(lengths, 1))).to_dict("records")
    assert row["mean_k"] == pytest.approx(5.4)
    assert row["loss"] == pytest.approx((lengths * level).sum() / 100)
    assert row["difference"] == pytest.approx(-(0.6 / 5 + 0.4 / 6))


def test_outside_the_baseline_there_is_no_match():
    level, static = static_curve()
    table = matched_compute(made_up(static | {"r": (9.5, level), "s": (8, level)})).set_index("rule")
    assert table.loc["r", ["static", "difference", "low", "high"]].isna().all()
    assert table.loc["s", "difference"] == pytest.approx(-1 / 8)


def test_matching_needs_a_curve_and_the_same_sequences():
    level, static = static_curve()
    frame = made_up(static | {"r": (4.5, level)})
    with pytest.raises(ValueError, match=r"consecutive k, got \['top-3', 'top-5'\]"):
        matched_compute(frame[frame["rule"].isin(["top-3", "top-5", "r"])])
    with pytest.raises(ValueError, match=r"consecutive k, got \[\]"):
        matched_compute(frame, baseline="static ")
    with pytest.raises(ValueError, match="'r' has no loss for 1 of the 40 sequences"):
        matched_compute(frame.iloc[:-1])


def test_matching_a_real_sweep():
    rules = {f"top-{k}": TopK(k) for k in (1, 2, 3)} | {"two": StaticPerLayer((2, 2, 2)), "BH": BH(0.1, max_k=65)}
    data = {"a": tokens(3, 20, seed=1), "b": tokens(5, 20, seed=2)}
    table = matched_compute(sweep(tiny_olmoe(), rules, data))
    assert table["rule"].tolist() == ["two"]
    assert table.loc[0, ["difference", "low", "high"]].tolist() == pytest.approx([0, 0, 0], abs=1e-6)
