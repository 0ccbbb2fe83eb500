"""Comparisons of rules, from the tidy table of a sweep: means, paired differences, differences at the same cost.

Two rules are always compared on the same sequences. The independent units of every interval are documents, where the
table says of which document each sequence is (`with_documents`), and sequences where it does not. Intervals come in
two kinds: ``low`` and ``high`` hold for a row by itself, ``joint_low`` and ``joint_high`` for all rows of a table at
once.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import stats
from scipy.interpolate import CubicSpline

#: Two losses are called equal if they differ by less than this many nats per token: 0.02 % of the demo's loss.
EQUAL = 4e-4

# -- the bootstrap ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Resamples:
    """Weights of sequences in a sample and in bootstrap resamples of its units, and what is made of them.

    Attributes
    ----------
    weights : ndarray [1 + resamples, sequences], float64
        Row 0 is the sample itself; each row sums to 1.
    units, freedom : int
        How many units there are, and the degrees of freedom of an interval: units less strata.
    """

    weights: np.ndarray
    units: int
    freedom: int

    def means(self, values: ArrayLike) -> np.ndarray:
        """Means [1 + resamples, ...] of `values` [sequences, ...]; statistics are computed from each row of them."""
        return np.tensordot(self.weights, np.asarray(values, dtype=float), axes=1)

    def interval(self, statistic: np.ndarray, level: float = 0.95) -> tuple[float, float]:
        """Interval of a statistic [1 + resamples]: its bootstrap standard error times the quantile of Student's t.

        Where units are few, quantiles of the resamples themselves give intervals that are too short: of eight normal
        values, 95 % intervals cover their mean in 89 % of samples; this one covers it in 95 %. Without a degree of
        freedom it is NaN.
        """
        reach = self._quantile(level) * _spread(statistic)
        return float(statistic[0] - reach), float(statistic[0] + reach)

    def joint_intervals(self, statistics: np.ndarray, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
        """Intervals of n statistics [1 + resamples, n] that hold for all of them at once, with probability `level`.

        Each is as many standard errors long as the largest of the n deviations is in a share `level` of the resamples
        (single-step max-t, Westfall & Young 1993), and no shorter than `interval`. NaN for statistics that are NaN.
        """
        error = _spread(statistics)
        with np.errstate(invalid="ignore"):  # nothing moves: 0 / 0
            deviations = np.abs(statistics[1:] - statistics[0]) / error
        largest = np.quantile(np.fmax.reduce(deviations, axis=1, initial=0), level)
        one = self._quantile(level)
        # The resamples stand for a normal law; as for one interval, its quantile is replaced by that of Student's t.
        reach = np.maximum(one, largest * one / stats.norm.ppf((1 + level) / 2)) * error
        return statistics[0] - reach, statistics[0] + reach

    def _quantile(self, level: float) -> float:
        return stats.t.ppf((1 + level) / 2, self.freedom) if self.freedom else np.nan


def _spread(statistics: np.ndarray) -> np.ndarray:
    """Standard deviation over resamples, those without a value left out."""
    return pd.DataFrame(statistics[1:]).std(ddof=0).to_numpy().reshape(statistics.shape[1:])


def resample(
    domain: ArrayLike,
    unit: ArrayLike,
    *,
    size: ArrayLike | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> Resamples:
    """Bootstrap of units within domains: the one behind every interval of a mean, a difference or a ratio.

    A resample draws whole units, with all sequences that belong to them, so that it does not matter how alike the
    sequences of a document are. Domains are strata: each keeps its share, and of its n units n - 1 are drawn, which
    makes the variance of a mean unbiased (McCarthy & Snowden 1985; with n draws it is too small by a factor of
    (n - 1) / n, which counts where a domain has nine documents). If a domain has only one unit, nothing can be drawn
    within it, and units are drawn from all domains together.

    Parameters
    ----------
    domain, unit : array_like [sequences]
        Where each sequence belongs. Units of the same name in two domains are two units.
    size : array_like [sequences], optional
        What a sequence weighs, for instance its tokens; by default all weigh the same.
    resamples, seed : int
        The same seed gives the same resamples of the same units, so that results of several calls are paired.
    """
    size = np.ones(np.shape(domain)) if size is None else np.asarray(size, dtype=float)
    stratum, unit = (np.unique(np.asarray(names), return_inverse=True)[1] for names in (domain, unit))
    places, unit = np.unique(np.stack([stratum, unit]), axis=1, return_inverse=True)
    if np.bincount(places[0]).min() == 1:
        stratum = np.zeros_like(stratum)
    generator = np.random.default_rng(seed)
    weights = np.tile(size, (1 + resamples, 1))
    for number in np.unique(stratum):
        inside = stratum == number
        units, member = np.unique(unit[inside], return_inverse=True)
        if len(units) > 1:
            drawn = generator.multinomial(len(units) - 1, np.full(len(units), 1 / len(units)), size=resamples)
            part = drawn[:, member] * size[inside]
            weights[1:, inside] = part * (size[inside].sum() / part.sum(axis=1, keepdims=True))
    units = places.shape[1]
    return Resamples(weights / size.sum(), units, units - len(np.unique(stratum)))


def with_documents(frame: pd.DataFrame, documents: Mapping[str, Sequence | np.ndarray]) -> pd.DataFrame:
    """The table of a sweep with a column ``document``, which makes documents the units of all intervals.

    Parameters
    ----------
    frame : pandas.DataFrame
        As `sweep` returns it.
    documents : mapping of str to array_like [sequences]
        The document of each sequence by domain, as `bhlib.loading.heldout_sequence_documents` returns them for the
        held-out text.
    """
    place = zip(frame["domain"], frame["sequence"], strict=True)
    # A rule that failed has one row, without a domain.
    return frame.assign(document=[documents[d][int(i)] if d in documents else np.nan for d, i in place])


def _resample(frame: pd.DataFrame, index: pd.MultiIndex, **options) -> Resamples:
    """Resamples of the sequences of `index` (domain, sequence), by document if `frame` tells it."""
    unit = index.get_level_values("sequence")
    if "document" in frame:
        unit = _measured(frame).groupby(["domain", "sequence"])["document"].first().loc[index]
    return resample(index.get_level_values("domain"), unit, **options)


# -- differences -----------------------------------------------------------------------------------------------


def paired_difference(frame: pd.DataFrame, rule: str, baseline: str, column: str = "loss") -> dict[str, float]:
    """Mean difference of two rules on the same sequences, with its 95 % bootstrap interval.

    Parameters
    ----------
    frame : pandas.DataFrame
        As `sweep` returns it.
    rule, baseline : str
        Names in its column ``rule``.
    column : str
        What to compare.

    Returns
    -------
    dict
        ``difference`` (rule minus baseline), ``low``, ``high``, ``sequences``.

    Raises
    ------
    ValueError
        If a rule is not in the table, has failed, or was measured on other sequences.
    """
    wide = _wide(frame[frame["rule"].isin([rule, baseline])], column)
    for name in (rule, baseline):
        _check_measured(frame, name, wide.columns)
    drawn = _resample(frame, wide.index)
    differences = drawn.means(wide[rule] - wide[baseline])
    low, high = drawn.interval(differences)
    return {"difference": float(differences[0]), "low": low, "high": high, "sequences": len(wide)}


def matched_compute(
    frame: pd.DataFrame,
    baseline: str = "top-",
    column: str = "loss",
    *,
    by: str | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Each rule against static top-k at the same cost, with bootstrap intervals.

    The cost is the mean number of experts, and what stands in for dropped ones, if anything does. Static top-k exists
    at integer k only. Between them its loss is interpolated linearly, at the cost of the rule over all tokens, layers
    and sequences: what is lost by choosing between top-k and top-(k+1) at random, which can be done without looking at
    the token. All means are over tokens.

    Parameters
    ----------
    frame : pandas.DataFrame
        As `sweep` returns it, all rules on the same sequences.
    baseline : str
        Prefix of the static rules: with ``"top-"``, those called ``top-1``, ``top-2``, ... Every integer between the
        smallest and the largest has to be there, since a longer chord of a convex curve flatters the rule.
    column : str
        What to compare: ``loss``, ``accuracy``, ``kl``.
    by : str, optional
        The column that is the cost, ``"cost"`` or ``"mean_k"``. By default the counted cost, where the table has it;
        without compensation the two are the same.
    level, resamples, seed
        Of the bootstrap (`resample`). Each resample draws whole units, with all rules' results on them, and repeats
        everything: the rule's mean k, the interpolation, the difference. So a rule that gives more experts to some
        sequences is compared at what it spends on those that were drawn.

    Returns
    -------
    pandas.DataFrame
        One row per rule that is no baseline: ``rule``, ``mean_k``, ``cost`` if it is another number, the `column`,
        ``static`` (that of static top-k at the same cost), ``difference`` (rule minus static), ``low``, ``high`` (for
        this row by itself), ``joint_low``, ``joint_high`` (for all rows at once), ``sequences``, ``units`` (documents,
        or sequences if the frame tells none). ``static`` and the difference are NaN for a rule whose cost lies outside
        the baseline's.
        Rules that failed are left out.

    Raises
    ------
    ValueError
        If there are fewer than two baselines, one is missing in between, there is no other rule, or rules differ in
        their sequences.
    """
    values, costs, drawn = _measure(frame, column, by, resamples=resamples, seed=seed)
    static = sorted(int(name[len(baseline) :]) for name in values if re.fullmatch(re.escape(baseline) + r"\d+", name))
    if len(static) < 2 or static != list(range(static[0], static[-1] + 1)):
        raise ValueError(
            f"static top-k is needed at two or more consecutive k, got {[f'{baseline}{k}' for k in static]}: "
            f'add {{f"{baseline}{{k}}": TopK(k) for k in range(1, 9)}} to the rules of the sweep.'
        )
    names = [f"{baseline}{k}" for k in static]
    rules = values.columns.drop(names)
    if rules.empty:
        raise ValueError(f"there is no rule to compare with {', '.join(names)}: add one to the sweep, such as BH.")
    cost, nodes, quality = costs[rules].to_numpy(), costs[names].to_numpy(), values[rules].to_numpy()
    rows = zip(cost, nodes, values[names].to_numpy(), strict=True)
    matched = np.stack([np.interp(at, k, loss) for at, k, loss in rows])
    outside = (cost[0].round(6) < nodes[0, 0].round(6)) | (cost[0].round(6) > nodes[0, -1].round(6))
    matched[:, outside] = np.nan
    return pd.DataFrame(
        {"rule": rules}
        | _spent(frame, rules, drawn)
        | {column: quality[0], "static": matched[0]}
        | _differences(quality - matched, drawn, level)
        | {"sequences": drawn.weights.shape[1], "units": drawn.units}
    )


def matched_difference(
    frame: pd.DataFrame,
    rules: Sequence[str],
    rival: Sequence[str],
    column: str = "loss",
    *,
    by: str | None = None,
    margin: float = EQUAL,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Each rule against another *family* at the same mean number of experts, with bootstrap intervals.

    Two families whose levels were chosen for the same mean on one text give somewhat different means on another:
    near three experts a hundredth of an expert is worth a thousandth of a nat, as much as what is to be measured. So
    the rival's loss is read from its curve, through its rules at several means, at the mean that the rule really gave.

    Parameters
    ----------
    frame : pandas.DataFrame
        As `sweep` returns it, all rules on the same sequences.
    rules : sequence of str
        Names in its column ``rule``.
    rival : sequence of str
        Two or more rules of one family, with different means. The curve through them is a cubic spline in the
        logarithm of the mean, continued by up to a tenth of an expert beyond its ends.
    column : str
        What to compare.
    by : str, optional
        The column that is the cost, as for `matched_compute`.
    margin : float
        Differences smaller than this count as none.
    level, resamples, seed
        As for `matched_compute`: each resample repeats everything, the curve through the rival's means too.

    Returns
    -------
    pandas.DataFrame
        One row per rule: ``rule``, ``difference`` (rule minus rival), ``low``, ``high`` (for this row by itself),
        ``joint_low``, ``joint_high`` (for all rows at once), and ``equal``: whether two one-sided tests at 5 % each
        find the difference to be within ± `margin` (that is, whether its 90 % interval, by itself, lies inside). Not
        to be told from 0 is not equal: that takes the test. NaN where a rule's mean lies beyond the curve; exactly 0
        for the rival's own rules.

    Raises
    ------
    ValueError
        If a rule is not in the table or has failed, or the rival has fewer than two rules.
    """
    values, experts, drawn = _measure(frame, column, by, resamples=resamples, seed=seed)
    for name in (*rules, *rival):
        _check_measured(frame, name, values.columns)
    if len(rival) < 2:
        raise ValueError(f"a rival needs two or more rules to draw a curve through, got {list(rival)}.")
    rival = experts[list(rival)].iloc[0].sort_values().index
    mean_k, nodes = experts[list(rules)].to_numpy(), experts[rival].to_numpy()
    curves = values[rival].to_numpy()
    rows = zip(np.log(nodes), curves, np.log(mean_k), strict=True)
    matched = np.stack([CubicSpline(k, loss)(at) for k, loss, at in rows])
    matched[:, (mean_k[0] < nodes[0, 0] - 0.1) | (mean_k[0] > nodes[0, -1] + 0.1)] = np.nan
    difference = values[list(rules)].to_numpy() - matched
    difference[:, [rule in rival for rule in rules]] = 0
    inside = [max(np.abs(drawn.interval(part, 0.9))) < margin for part in difference.T]
    return pd.DataFrame({"rule": list(rules)} | _differences(difference, drawn, level) | {"equal": inside})


def percent_at_cost(
    frame: pd.DataFrame,
    families: Mapping[str, Sequence[str]],
    own: str,
    costs: Sequence[float],
    *,
    within: float = 0.5,
    by: str | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """What families lose at the same costs, in per cent of the model's own loss; and the cost at which that is little.

    Parameters
    ----------
    frame : pandas.DataFrame
        As `sweep` returns it, all rules on the same sequences.
    families : mapping of str to sequence of str
        By name, two or more rules with different costs each. The curve through them is as in `matched_difference`: a
        cubic spline in the logarithm of the cost, continued by up to a tenth of an expert beyond its ends.
    own : str
        The rule that loses nothing: the model's own routing.
    costs : sequence of float
        Where the curves are read.
    within : float
        Per cent that count as little.
    by, level, resamples, seed
        As for `matched_compute`: each resample repeats everything.

    Returns
    -------
    pandas.DataFrame
        ``family``; ``kind``; ``cost``; ``percent`` (loss above that of `own`, in per cent of it); ``low``, ``high``
        (of ``percent``, for the row by itself); ``sequences``; ``units``. A row for each rule (``kind`` is its name),
        one for each of `costs` ("at cost"), and one with the least cost at which the curve falls to `within`
        ("within"), where ``low`` and ``high`` are of that cost. NaN where a curve does not reach.

    Raises
    ------
    ValueError
        If a rule is not in the table or has failed, or a family has fewer than two rules.
    """
    values, spent, drawn = _measure(frame, "loss", by, resamples=resamples, seed=seed)
    for name in (own, *(rule for rules in families.values() for rule in rules)):
        _check_measured(frame, name, values.columns)
    percent = 100 * (values.div(values[own], axis=0) - 1)
    rows = []
    for family, rules in families.items():
        if len(rules) < 2:
            raise ValueError(
                f"the family {family!r} needs two or more rules to draw a curve through, got {list(rules)}."
            )
        order = spent[list(rules)].iloc[0].sort_values().index
        nodes, curve = spent[order].to_numpy(), percent[order].to_numpy()
        ends = nodes[0, 0] - 0.1, nodes[0, -1] + 0.1
        fine = np.arange(*ends, 0.01)
        at = np.concatenate([np.asarray(costs, dtype=float), fine])
        pairs = zip(np.log(nodes), curve, strict=True)
        read = np.stack([CubicSpline(k, loss)(np.log(at)) for k, loss in pairs])
        read[:, : len(costs)][:, (at[: len(costs)] < ends[0]) | (at[: len(costs)] > ends[1])] = np.nan
        for i, rule in enumerate(order):
            rows.append((family, rule, nodes[0, i], curve[0, i], *drawn.interval(curve[:, i], level)))
        for i, cost in enumerate(costs):
            rows.append((family, "at cost", cost, read[0, i], *drawn.interval(read[:, i], level)))
        small = read[:, len(costs) :] <= within
        least = np.where(small.any(axis=1), fine[small.argmax(axis=1)], np.nan)
        least[small[:, 0]] = np.nan  # it falls to that before the curve begins
        rows.append((family, "within", least[0], within, *drawn.interval(least, level)))
    table = pd.DataFrame(rows, columns=["family", "kind", "cost", "percent", "low", "high"])
    return table.assign(sequences=drawn.weights.shape[1], units=drawn.units)


def _measure(
    frame: pd.DataFrame, column: str, by: str | None = None, **options
) -> tuple[pd.DataFrame, pd.DataFrame, Resamples]:
    """Means over tokens of a column and of the cost, a row per resample and a column per rule; and the resamples."""
    values = _wide(frame, column)
    costs = _wide(frame, by or ("cost" if "cost" in frame else "mean_k"))
    drawn = _resample(frame, values.index, size=_wide(frame, "tokens").iloc[:, 0], **options)
    return *(pd.DataFrame(drawn.means(wide), columns=wide.columns) for wide in (values, costs)), drawn


def _spent(frame: pd.DataFrame, rules: pd.Index, drawn: Resamples) -> dict[str, np.ndarray]:
    """Mean number of experts of rules, and their counted cost where it is another number."""
    names = ["mean_k"] + ["cost"] * ("cost" in frame and not frame["cost"].equals(frame["mean_k"]))
    return {name: drawn.means(_wide(frame, name)[rules])[0] for name in names}


def _differences(differences: np.ndarray, drawn: Resamples, level: float) -> dict[str, np.ndarray]:
    """The sample's values of `differences` [1 + resamples, rules] and their intervals, as columns."""
    low, high = np.transpose([drawn.interval(part, level) for part in differences.T])
    joint_low, joint_high = drawn.joint_intervals(differences, level)
    return {
        "difference": differences[0], "low": low, "high": high, "joint_low": joint_low, "joint_high": joint_high
    }  # fmt: skip


def _measured(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows that hold numbers."""
    return frame[frame["error"] == ""] if "error" in frame else frame


def _check_measured(frame: pd.DataFrame, rule: str, measured: pd.Index) -> None:
    if rule not in measured:
        failed = frame.loc[frame["rule"] == rule, "error"].tolist() if "error" in frame else []
        why = f"failed in this sweep: {failed[0]}" if failed else "is not in this table"
        raise ValueError(f"the rule {rule!r} {why}. Measured: {', '.join(_measured(frame)['rule'].unique())}.")


def _wide(frame: pd.DataFrame, column: str) -> pd.DataFrame:
    """One row per sequence, one column per rule in the table's order."""
    frame = _measured(frame)
    wide = frame.pivot(index=["domain", "sequence"], columns="rule", values=column)[frame["rule"].unique()]
    if wide.isna().any(axis=None):
        rule = wide.columns[wide.isna().any()][0]
        raise ValueError(
            f"{rule!r} has no {column} for {int(wide[rule].isna().sum())} of the {len(wide)} sequences: compare rules "
            f"that were measured on the same ones, by one sweep."
        )
    return wide


def summarize(frame: pd.DataFrame, by: list[str] | None = None) -> pd.DataFrame:
    """Quality and cost per rule, with a 95 % bootstrap interval of the mean loss (`resample`), each row's by itself.

    Parameters
    ----------
    frame : pandas.DataFrame
        As `sweep` returns it. Rules that failed are left out.
    by : list of str, optional
        Columns to group by, ``["rule"]`` by default; add ``"domain"`` for a row per domain.

    Returns
    -------
    pandas.DataFrame
        The columns of `by`, ``mean_k``, ``cost`` if it is another number, ``loss``, ``loss_low``, ``loss_high``,
        ``perplexity`` (exponential of the mean loss), ``accuracy``, where measured ``kl`` and ``top1_agreement``,
        ``load_entropy`` (means over sequences), ``sequences``, ``units`` (documents, or sequences if the frame tells
        none), and the sums ``tokens``, ``rows``, ``seconds``.
    """
    rows, frame = [], _measured(frame)
    counted = ["cost"] if "cost" in frame and not frame["cost"].equals(frame["mean_k"]) else []
    for key, part in frame.groupby(by or ["rule"], sort=False):
        drawn = resample(part["domain"], part["document" if "document" in part else "sequence"])
        low, high = drawn.interval(drawn.means(part["loss"]))
        rows.append(
            dict(zip(by or ["rule"], key, strict=True))
            | {
                "mean_k": part["mean_k"].mean(),
            }
            | {column: part[column].mean() for column in counted}
            | {
                "loss": part["loss"].mean(),
                "loss_low": low,
                "loss_high": high,
                "perplexity": float(np.exp(part["loss"].mean())),
                "accuracy": part["accuracy"].mean(),
            }
            | {column: part[column].mean() for column in ("kl", "top1_agreement", "load_entropy") if column in part}
            | {"sequences": len(part), "units": drawn.units, "tokens": int(part["tokens"].sum())}
            | {column: part[column].sum() for column in ("rows", "seconds") if column in part}
        )
    return pd.DataFrame(rows)
