"""Comparisons of rules, from the tidy table of a sweep: means, paired differences, differences at the same cost.

Sequences are the independent units of every interval, and two rules are always compared on the same ones.
"""

import re

import numpy as np
import pandas as pd


def bootstrap_mean(
    values: np.ndarray, *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean over independent units (rows of `values`)."""
    values = np.asarray(values, dtype=float)
    draws = np.random.default_rng(seed).integers(0, len(values), size=(resamples, len(values)))
    tail = (1 - level) / 2
    low, high = np.quantile(values[draws].mean(axis=1), [tail, 1 - tail])
    return float(low), float(high)


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
    differences = (wide[rule] - wide[baseline]).to_numpy()
    low, high = bootstrap_mean(differences)
    return {"difference": float(differences.mean()), "low": low, "high": high, "sequences": len(differences)}


def matched_compute(
    frame: pd.DataFrame,
    baseline: str = "top-",
    column: str = "loss",
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Each rule against static top-k at the same mean number of experts, with bootstrap intervals.

    Static top-k exists at integer k only. Between them its loss is interpolated linearly, at the mean number of
    experts of the rule over all tokens, layers and sequences: what a mixture of top-k and top-(k+1) would lose that
    decides at random, so a cost that can be had without looking at the token. All means are over tokens.

    Parameters
    ----------
    frame : pandas.DataFrame
        As `sweep` returns it, all rules on the same sequences.
    baseline : str
        Prefix of the static rules: with ``"top-"``, those called ``top-1``, ``top-2``, ... Every integer between the
        smallest and the largest has to be there, since a longer chord of a convex curve flatters the rule.
    column : str
        What to compare: ``loss``, ``accuracy``, ``kl``.
    level, resamples, seed
        Of the percentile bootstrap over sequences. Each resample draws whole sequences, with all rules' results on
        them, and repeats everything: the rule's mean k, the interpolation, the difference. So a rule that gives more
        experts to some sequences is compared at what it spends on those that were drawn.

    Returns
    -------
    pandas.DataFrame
        One row per rule that is no baseline: ``rule``, ``mean_k``, the `column`, ``static`` (that of static top-k at
        the same mean k), ``difference`` (rule minus static), ``low``, ``high``, ``sequences``. ``static`` and the
        difference are NaN for a rule whose mean k lies outside the baseline's. Rules that failed are left out.

    Raises
    ------
    ValueError
        If there are fewer than two baselines, one is missing in between, or rules differ in their sequences.
    """
    values, experts = _wide(frame, column), _wide(frame, "mean_k")
    weight = _wide(frame, "tokens").iloc[:, 0].to_numpy(dtype=float)
    static = sorted(int(name[len(baseline) :]) for name in values if re.fullmatch(re.escape(baseline) + r"\d+", name))
    if len(static) < 2 or static != list(range(static[0], static[-1] + 1)):
        raise ValueError(
            f"static top-k is needed at two or more consecutive k, got {[f'{baseline}{k}' for k in static]}: "
            f'add {{f"{baseline}{{k}}": TopK(k) for k in range(1, 9)}} to the rules of the sweep.'
        )
    names = [f"{baseline}{k}" for k in static]
    # Row 0 weighs every sequence once; each further row is a resample.
    draws = np.random.default_rng(seed).multinomial(len(weight), np.full(len(weight), 1 / len(weight)), size=resamples)
    weights = np.vstack([np.ones(len(weight)), draws]) * weight
    weights /= weights.sum(axis=1, keepdims=True)
    curve = weights @ values[names].to_numpy()
    tail = (1 - level) / 2
    rows = []
    for rule in values.columns.drop(names):
        mean_k, quality = weights @ experts[rule].to_numpy(), weights @ values[rule].to_numpy()
        matched = _interpolate(curve, mean_k - static[0])
        inside = static[0] <= round(mean_k[0], 6) <= static[-1]
        difference = quality - matched if inside else np.full(len(quality), np.nan)
        low, high = np.quantile(difference[1:], [tail, 1 - tail])
        rows.append(
            {
                "rule": rule,
                "mean_k": mean_k[0],
                column: quality[0],
                "static": matched[0] if inside else np.nan,
                "difference": difference[0],
                "low": low,
                "high": high,
                "sequences": len(weight),
            }
        )
    columns = ["rule", "mean_k", column, "static", "difference", "low", "high", "sequences"]
    return pd.DataFrame(rows, columns=columns)


def _interpolate(curves: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Each row of `curves` [rows, points] at its own position in 0..points - 1; beyond that, its end."""
    positions = positions.clip(0, curves.shape[1] - 1)
    left = np.minimum(positions.astype(int), curves.shape[1] - 2)
    share, row = positions - left, np.arange(len(curves))
    return (1 - share) * curves[row, left] + share * curves[row, left + 1]


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
    """Quality and cost per rule, with a 95 % bootstrap interval of the mean loss over sequences.

    Parameters
    ----------
    frame : pandas.DataFrame
        As `sweep` returns it. Rules that failed are left out.
    by : list of str, optional
        Columns to group by, ``["rule"]`` by default; add ``"domain"`` for a row per domain.

    Returns
    -------
    pandas.DataFrame
        The columns of `by`, ``mean_k``, ``loss``, ``loss_low``, ``loss_high``, ``perplexity`` (exponential of the
        mean loss), ``accuracy``, where measured ``kl`` and ``top1_agreement``, ``load_entropy`` (means over sequences),
        ``sequences``, and the sums ``tokens``, ``rows``, ``seconds``.
    """
    rows = []
    for key, part in _measured(frame).groupby(by or ["rule"], sort=False):
        low, high = bootstrap_mean(part["loss"].to_numpy())
        rows.append(
            dict(zip(by or ["rule"], key, strict=True))
            | {
                "mean_k": part["mean_k"].mean(),
                "loss": part["loss"].mean(),
                "loss_low": low,
                "loss_high": high,
                "perplexity": float(np.exp(part["loss"].mean())),
                "accuracy": part["accuracy"].mean(),
            }
            | {column: part[column].mean() for column in ("kl", "top1_agreement", "load_entropy") if column in part}
            | {"sequences": len(part), "tokens": int(part["tokens"].sum())}
            | {column: part[column].sum() for column in ("rows", "seconds") if column in part}
        )
    return pd.DataFrame(rows)
