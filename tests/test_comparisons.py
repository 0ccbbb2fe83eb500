"""Comparisons of rules against sums by hand, and intervals against the share of truths that they cover."""

import numpy as np
import pandas as pd
import pytest
from models import tiny_olmoe, tokens

from bhlib.comparisons import (
    matched_compute,
    matched_difference,
    paired_difference,
    resample,
    summarize,
    with_documents,
)
from bhlib.evaluation import sweep
from bhlib.rules import BH, StaticPerLayer, TopK

# -- the bootstrap -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [8, 50])
def test_intervals_cover(size):
    """A 95 % interval of the mean of normal values holds the truth in 95 % of trials, with eight of them too."""
    generator, trials = np.random.default_rng(0), 1000
    covered = 0
    for trial in range(trials):
        drawn = resample(["x"] * size, range(size), resamples=400, seed=trial)
        low, high = drawn.interval(drawn.means(generator.normal(size=size)))
        covered += low <= 0 <= high
    assert abs(covered / trials - 0.95) < 3 * np.sqrt(0.95 * 0.05 / trials)


def test_documents_are_the_units():
    """Where sequences of a document are alike, intervals over documents hold the truth, over sequences they do not."""
    generator, trials = np.random.default_rng(0), 200
    document = np.repeat(np.arange(15), 7)
    covered = {"document": 0, "sequence": 0}
    for trial in range(trials):
        values = generator.normal(size=15)[document] + generator.normal(0, 0.3, len(document))
        for name, unit in {"document": document, "sequence": np.arange(len(document))}.items():
            drawn = resample(np.full(len(document), "x"), unit, resamples=300, seed=trial)
            low, high = drawn.interval(drawn.means(values))
            covered[name] += low <= 0 <= high
    assert covered["document"] / trials > 0.9 and covered["sequence"] / trials < 0.7


def test_units_are_drawn_whole_within_domains():
    domain, unit, size = list("xxxxxyyy"), [0, 0, 1, 1, 2, 0, 0, 1], np.array([1, 2, 3, 4, 5, 6, 7, 8])
    drawn = resample(domain, unit, size=size, resamples=500)
    assert (drawn.units, drawn.freedom) == (5, 3)
    assert drawn.weights[0] == pytest.approx(size / size.sum())
    assert drawn.weights[:, :5].sum(axis=1) == pytest.approx(15 / 36)  # each domain keeps its share
    assert drawn.weights.sum(axis=1) == pytest.approx(1)
    per_size = drawn.weights / size
    for i, j in ((0, 1), (2, 3), (5, 6)):
        assert per_size[:, i] == pytest.approx(per_size[:, j])  # a document as a whole
    assert not np.allclose(per_size[1:, 0], per_size[1:, 5])  # "0" of x is not "0" of y
    times = (per_size[1:, [0, 2, 4]] > 0).sum(axis=1)
    assert set(times) == {1, 2}, "two of the three units of x are drawn"
    # The variance of a mean of n units of equal size is the sample's (with 1/(n - 1)) over n.
    values = np.random.default_rng(1).normal(size=6)
    means = resample(["x"] * 6, range(6), resamples=20_000).means(values)
    assert means[1:].var() == pytest.approx(values.var(ddof=1) / 6, rel=0.05)


def test_a_lone_unit_is_drawn_with_those_of_other_domains():
    drawn = resample(list("xxy"), [0, 1, 0])
    assert drawn.freedom == 2 and len(np.unique(drawn.weights[1:, 2])) > 1
    only = resample(["x", "x"], [0, 0])
    assert np.isnan(only.interval(only.means([1.0, 2.0]))).all()


def test_joint_intervals_hold_for_all_at_once():
    """Of 300 trials with 20 true means of 0, joint intervals hold all in 95 %; intervals one by one hardly ever do."""
    generator, trials = np.random.default_rng(0), 300
    together, one_by_one = 0, 0
    for trial in range(trials):
        drawn = resample(["x"] * 40, range(40), resamples=400, seed=trial)
        means = drawn.means(generator.normal(size=(40, 20)) * np.linspace(0.1, 10, 20))
        low, high = drawn.joint_intervals(means)
        together += ((low <= 0) & (high >= 0)).all()
        one_by_one += all(lo <= 0 <= hi for lo, hi in map(drawn.interval, means.T))
    assert abs(together / trials - 0.95) < 3 * np.sqrt(0.95 * 0.05 / trials)
    assert one_by_one / trials < 0.6


def test_joint_intervals_of_what_does_not_move_or_is_missing():
    drawn = resample(["x"] * 40, range(40))
    means = drawn.means(np.random.default_rng(0).normal(size=(40, 3)))
    means[:, 0], means[:, 1] = 0, np.nan
    low, high = drawn.joint_intervals(means)
    assert low[0] == high[0] == 0 and np.isnan([low[1], high[1]]).all()
    assert (low[2], high[2]) == pytest.approx(drawn.interval(means[:, 2]), abs=0.05)  # the only one that moves


# -- differences ---------------------------------------------------------------------------------------------------


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


def test_rules_are_compared_at_counted_cost():
    """With a compensation that costs half an expert, a rule of three experts stands where static top-3.5 does."""
    level, static = static_curve()
    frame = made_up(static | {"rule": (3, level + 1 / 3)})
    frame["cost"] = frame["mean_k"] + 0.5 * (frame["rule"] == "rule")
    (row,) = matched_compute(frame).to_dict("records")
    assert (row["mean_k"], row["cost"]) == (pytest.approx(3), pytest.approx(3.5))
    assert row["difference"] == pytest.approx(1 / 3 - (1 / 3 + 1 / 4) / 2)
    (by_experts,) = matched_compute(frame, by="mean_k").to_dict("records")
    assert by_experts["difference"] == pytest.approx(0, abs=1e-12)
    same = matched_compute(frame.assign(cost=frame["mean_k"]))
    pd.testing.assert_frame_equal(same, matched_compute(frame.drop(columns="cost")))
    near = matched_difference(frame, ["rule"], ["top-3", "top-4", "top-5"]).iloc[0]["difference"]
    assert near == pytest.approx(1 / 3 - 1 / 3.5, abs=2e-3)
    frame["accuracy"] = 0.5
    assert "cost" in summarize(frame) and "cost" not in summarize(frame.assign(cost=frame["mean_k"]))


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
    half = 2.02 * gain.std(ddof=1) / np.sqrt(40)  # at a constant mean k the interval is that of the paired differences
    assert [better["low"], better["high"]] == pytest.approx([-gain.mean() - half, -gain.mean() + half], rel=0.15)
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
    static = frame[frame["rule"].isin(["top-3", "top-4"])]
    with pytest.raises(ValueError, match="there is no rule to compare with top-3, top-4: add one to the sweep, such"):
        matched_compute(static)


def test_matching_a_real_sweep():
    rules = {f"top-{k}": TopK(k) for k in (1, 2, 3)} | {"two": StaticPerLayer((2, 2, 2)), "BH": BH(0.1, max_k=65)}
    data = {"a": tokens(3, 20, seed=1), "b": tokens(5, 20, seed=2)}
    table = matched_compute(sweep(tiny_olmoe(), rules, data))
    assert table["rule"].tolist() == ["two"]
    assert table.loc[0, ["difference", "low", "high"]].tolist() == pytest.approx([0, 0, 0], abs=1e-6)


# -- two families at the same mean -------------------------------------------------------------------------------------


def curve(k):
    """As steep at 3, and as curved, as that of the embedded model: 0.09 nats per expert there, 0.01 at 7."""
    return 1.05 * np.exp(-0.8 * k) + 0.002 * (8 - k)


def test_families_are_compared_at_the_means_that_they_gave():
    """Two families on one curve, one a hundredth of an expert short of the other: paired they differ, matched not."""
    level, _ = static_curve()
    threshold = {f"threshold {k}": (k, level + curve(k)) for k in (3.0166, 4.0347, 5.0382, 6.0293, 7.0214)}
    fitted = {f"fitted {k}": (k, level + curve(k)) for k in (3.0041, 4.0198, 5.0343, 6.0345, 7.0264)}
    frame = made_up(threshold | fitted)
    paired = paired_difference(frame, "fitted 3.0041", "threshold 3.0166")["difference"]
    assert paired > 9e-4, "what the hundredth costs"
    table = matched_difference(frame, list(fitted), list(threshold))
    assert table["rule"].tolist() == list(fitted)
    assert table["difference"].abs().max() < 1e-4
    better = made_up(threshold | {"better": (3.0041, level + curve(3.0041) - 0.005)})
    (row,) = matched_difference(better, ["better"], list(threshold)).to_dict("records")
    assert row["difference"] == pytest.approx(-0.005, abs=1e-4)


def test_each_resample_is_matched_anew():
    """A rule on the rival's curve that spends more where text is hard: the interval is as wide as its noise, 0.001."""
    level, _ = static_curve()
    rival = {f"r {k}": (k, level + curve(k)) for k in (3, 4, 5)}
    noise = np.random.default_rng(5).normal(0, 0.001 * np.sqrt(40), 40)
    given = 4 + 0.5 * (level - level.mean())
    frame = made_up(rival | {"rule": (given, level + curve(4) + 0.037 * (4 - given) + noise)})
    (row,) = matched_difference(frame, ["rule"], list(rival)).to_dict("records")
    assert row["high"] - row["low"] == pytest.approx(2 * 2.02 * 0.001, rel=0.2)


@pytest.mark.parametrize(("shift", "noise", "equal"), [(1e-4, 1e-4, True), (1e-3, 1e-4, False), (0, 1e-3, False)])
def test_equal_is_what_an_equivalence_test_says(shift, noise, equal):
    """Near and certain; near is not certain; certain but not near. An interval that holds 0 is no proof."""
    level, _ = static_curve()
    rival = {f"r {k}": (k, level + curve(k)) for k in (3, 4, 5)}
    off = np.random.default_rng(0).normal(size=40)
    off = (off - off.mean()) / off.std() * noise * np.sqrt(40) + shift
    (row,) = matched_difference(made_up(rival | {"rule": (4, level + curve(4) + off)}), ["rule"], list(rival)).to_dict(
        "records"
    )
    assert row["difference"] == pytest.approx(shift, abs=1e-9) and row["equal"] == equal
    assert (row["low"] < 0 < row["high"]) == (shift < 2 * noise)


def test_a_rival_is_a_curve():
    level, static = static_curve()
    frame = made_up(static | {"near": (8.05, level), "far": (8.2, level)})
    rival = list(static)
    table = matched_difference(frame, ["near", "far", "top-5"], rival).set_index("rule")
    assert np.isfinite(table.loc["near", "difference"]) and not table.loc["far", "equal"]
    assert table.loc["far", ["difference", "low", "high", "joint_low", "joint_high"]].isna().all()
    assert table.loc["top-5", ["difference", "low", "high"]].eq(0).all() and table.loc["top-5", "equal"]
    with pytest.raises(ValueError, match=r"two or more rules to draw a curve through, got \['top-3'\]"):
        matched_difference(frame, ["near"], ["top-3"])
    with pytest.raises(ValueError, match="'BH' is not in this table"):
        matched_difference(frame, ["BH"], rival)


# -- documents ---------------------------------------------------------------------------------------------------------


def test_intervals_over_documents_or_sequences():
    """Sequences of a document with the same difference count once; a table that tells no documents is as before."""
    level, static = static_curve(40)
    documents = {domain: np.arange(20) // 5 for domain in "xy"}
    place = [(domain, i) for i in range(20) for domain in "xy"]
    effect = dict(zip(dict.fromkeys((d, documents[d][i]) for d, i in place), np.linspace(-0.1, 0.1, 8), strict=True))
    gain = np.array([effect[domain, documents[domain][i]] for domain, i in place])
    frame = made_up(static | {"rule": (4, level + 1 / 4 + gain)})
    told = with_documents(frame, documents)
    assert told["document"].tolist() == [documents[d][i] for d, i in place * 9]
    for compare in (
        lambda frame: matched_compute(frame).iloc[0],
        lambda frame: matched_difference(frame, ["rule"], ["top-3", "top-4", "top-5"]).iloc[0],
        lambda frame: paired_difference(frame, "rule", "top-4"),
    ):
        over_sequences, over_documents = compare(frame), compare(told)
        assert over_documents["difference"] == over_sequences["difference"]
        lengths = [row["high"] - row["low"] for row in (over_sequences, over_documents)]
        assert lengths[1] > 2 * lengths[0], "five times fewer units"
    assert (matched_compute(told)["units"] == 8).all() and (matched_compute(frame)["units"] == 40).all()
    told["accuracy"] = frame["accuracy"] = 0.5
    assert (summarize(told)["units"] == 8).all() and (summarize(frame)["units"] == 40).all()
