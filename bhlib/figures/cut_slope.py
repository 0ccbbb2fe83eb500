"""The figure of why the step-up does not help: what if the cut falls, or rises, with the number of experts kept."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from bhlib.comparisons import matched_difference, with_documents
from bhlib.evaluation import sweep
from bhlib.figures.drawing import ALL, Picture, interval_caption, joint_bars, sample_caption, signed_ticks
from bhlib.figures.families import bh, by_level
from bhlib.figures.ingredients import DEFAULT
from bhlib.figures.registry import figure
from bhlib.figures.study import Study
from bhlib.looks import BLACK, COLORS, SKY
from bhlib.rules import ProbabilityRule, Rule

__all__ = ["compute_cut_slope", "draw_cut_slope"]

#: Slopes of the logarithm of the cut; 0 is the threshold.
SLOPES = (-0.5, -0.25, -0.1, 0.0, 0.1, 0.25, 0.5, 1.0)


@dataclass(frozen=True)
class SlopedCut(ProbabilityRule):
    """Keep the most experts k of which the k-th best still has a probability of ``cut * k ** -slope`` or more.

    For ``slope > 0`` this is BH on the p-values ``probability ** (-1 / slope)``, up to a factor that the level takes
    in; for 0 it is `Threshold`. No p-values give a negative slope.

    Parameters
    ----------
    cut : float
        In (0, 1).
    slope : float
    """

    cut: float = 0.05
    slope: float = 0.0

    level_name = "cut"

    def count(self, top: Tensor, probs: Tensor, layer: int | None) -> Tensor:
        ks = torch.arange(1, top.shape[-1] + 1, device=top.device)
        reached = top >= self.cut * ks.to(top.dtype) ** -self.slope
        return (reached * ks).amax(dim=-1)


def compute_cut_slope(study: Study) -> pd.DataFrame:
    """Loss minus that of the threshold at the same mean number of experts, by the slope of the cut, on the test split.

    Returns
    -------
    pandas.DataFrame
        A row per ``slope`` of `SLOPES` but 0, and for the default `BH` (NaN), and per ``wanted_k``: ``rule``,
        ``level``, ``mean_k``, ``loss``, and from `matched_difference` ``difference``, ``low``, ``high``, ``joint_low``
        and ``joint_high`` (for all rows at once); ``sequences``, ``units``, ``tokens``.
    """
    facts: dict[str, dict] = {}
    rules: dict[str, Rule] = {}
    for slope in (*SLOPES, np.nan):
        make = bh(study) if np.isnan(slope) else by_level(lambda cut, slope=slope: SlopedCut(cut, slope), study)
        for k in study.mean_ks:
            name = f"{DEFAULT if np.isnan(slope) else f'slope {slope:g}'}, k = {k:g}"
            rules[name] = make(study.thin_logits, k)
            facts[name] = {"slope": slope, "wanted_k": k, "level": rules[name].level}
    frame = sweep(
        study.model, rules, study.whole_test, cache=study.cache, batch_size=2 * study.batch_size(study.length)
    )
    frame = with_documents(frame, study.whole_test_documents)
    known = pd.DataFrame.from_dict(facts, orient="index")
    threshold = list(known.index[known["slope"] == 0])
    found = matched_difference(frame, [name for name in rules if name not in threshold], threshold)
    means = frame.groupby("rule")[["mean_k", "loss"]].mean()
    tokens = int(frame.loc[frame["rule"] == threshold[0], "tokens"].sum())
    table = found.drop(columns="equal").join(known, on="rule").join(means, on="rule")
    sequences = int((frame["rule"] == threshold[0]).sum())
    return table.assign(sequences=sequences, units=frame.groupby(["domain", "document"]).ngroups, tokens=tokens)


@figure("cut_slope", compute_cut_slope, slow=True)
def draw_cut_slope(table: pd.DataFrame) -> Figure:
    """Loss minus that of the threshold, against the slope of the cut: a line per number of experts."""
    fig = Picture(figsize=(7.2, 4.2), layout="constrained")
    axes = fig.subplots()
    ks = sorted(table["wanted_k"].unique())
    for k, color in zip(ks, COLORS, strict=False):
        rows = table[(table["wanted_k"] == k) & table["slope"].notna()]
        zero = pd.DataFrame({"slope": [0.0], "difference": [0.0], "joint_low": [0.0], "joint_high": [0.0]})
        rows = pd.concat([rows, zero]).sort_values("slope")
        shift = 0.008 * (ks.index(k) - len(ks) / 2)
        axes.errorbar(rows["slope"] + shift, *joint_bars(rows), color=color, marker="o", markersize=3, capsize=1.5,
                      linewidth=1, label=f"k = {k:g}")  # fmt: skip
        default = table[(table["wanted_k"] == k) & table["slope"].isna()]
        axes.axhline(1000 * default["difference"].iloc[0], xmin=0.96, color=color, linewidth=2)
    axes.axhline(0, color=BLACK, linewidth=0.8)
    axes.set_yscale("symlog", linthresh=3, linscale=1.5)
    signed_ticks(axes, [-3, -2, -1, 0, 1, 2, 3, 10, 30, 100])
    axes.axvspan(0, table["slope"].max() + 0.05, color=SKY, alpha=0.12, label="what BH can do")
    axes.set_xlim(table["slope"].min() - 0.05, table["slope"].max() + 0.05)
    axes.set(
        xlabel="slope: the cut is proportional to k to the power of minus this",
        ylabel="loss minus that of the threshold\nat the same mean number of experts (nats / 1000)",
    )
    axes.set_title(
        f"{sample_caption(table, 'test')}\n{interval_caption(table, ALL)}; at the right edge: the default BH",
        fontsize=8,
    )
    axes.legend(fontsize=8, ncols=2)
    return fig
