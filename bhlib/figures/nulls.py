"""Figures of the p-values: what cannot work, and what is uniform under its null."""

import matplotlib
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bhlib import evidence
from bhlib.discovery import find_moe_layers
from bhlib.figures.about import about_of
from bhlib.figures.drawing import Picture, heat_map
from bhlib.figures.registry import figure
from bhlib.figures.study import Study
from bhlib.looks import BLACK, BLUE, GREEN, ORANGE, RED
from bhlib.pvalues import null_looks

__all__ = [
    "compute_null_calibration",
    "compute_softmax_theorem",
    "draw_null_calibration",
    "draw_softmax_theorem",
]


def compute_softmax_theorem(study: Study) -> pd.DataFrame:
    """The k-th largest of a token's probabilities, its bound 1/k, and what BH on 1 - softmax would need it to be."""
    probabilities = torch.softmax(study.validation_logits, dim=-1).sort(dim=-1, descending=True).values.flatten(0, 1)
    num_tests = probabilities.shape[-1]
    rank = np.arange(1, num_tests + 1)
    seen = {"largest": probabilities.amax(dim=0), "median": probabilities.median(dim=0).values}
    needed = {f"needed_{alpha}": 1 - alpha * rank / num_tests for alpha in SOFTMAX_ALPHAS}
    layers, tokens, _ = study.validation_logits.shape
    return pd.DataFrame({"k": rank, "bound": 1 / rank} | seen | needed).assign(tokens=tokens, layers=layers)


SOFTMAX_ALPHAS = (0.05, 0.5, 0.95)


@figure("softmax_theorem", compute_softmax_theorem)
def draw_softmax_theorem(table: pd.DataFrame) -> Figure:
    """Why 1 - softmax can never reject two: the k-th probability is at most 1/k, and BH needs nearly 1."""
    fig = Picture(figsize=(6.6, 3.8), layout="constrained")
    axes = fig.subplots()
    k, num_tests, name = table["k"], len(table), about_of(table).name
    axes.fill_between(k, table["bound"], 2, color=BLACK, alpha=0.07, linewidth=0)
    axes.plot(k, table["bound"], color=BLACK, label="bound: k probabilities sum to at most 1")
    for alpha, color in zip(SOFTMAX_ALPHAS, (BLUE, GREEN, ORANGE), strict=True):
        axes.plot(k, table[f"needed_{alpha}"], color=color, label=f"needed to reject k at α = {alpha}: 1 − αk/N")
    axes.plot(k, table["largest"], color=RED, linestyle="--", label=f"{name}: the largest k-th probability seen")
    axes.plot(k, table["median"], color=RED, linestyle=":", label=f"{name}: median k-th probability")
    axes.annotate(
        "impossible", (0.53, 0.2), xycoords=("axes fraction", "data"), color="#555555", fontsize=9, style="italic"
    )
    ticks = [2**i for i in range(num_tests.bit_length())]
    axes.set(xscale="log", yscale="log", xlim=(1, num_tests), ylim=(5e-4, 1.3), xlabel="rank k among the N experts")
    axes.set_xticks(ticks, ticks, minor=False)
    axes.set_xticks([], minor=True)
    axes.set(ylabel="k-th largest probability")
    axes.set_title(
        f"N = {num_tests}; {name}, validation split: {table['tokens'].iloc[0]:,} tokens × "
        f"{table['layers'].iloc[0]} layers",
        fontsize=8,
    )
    axes.legend(fontsize=7.5, loc="lower left")
    return fig


def compute_null_calibration(study: Study) -> pd.DataFrame:
    """Held-out p-values of null experts, for every null: a row per layer (``ks``) and per level (``curve``)."""
    logits, top_k = study.calibration_logits, find_moe_layers(study.model)[0].top_k
    parts = []
    for name, maker in evidence.candidate_nulls(logits, study.name, top_k).items():
        settings = {"sequence_length": study.window, "exclude_top": top_k}
        layers = evidence.uniformity(maker, study.validation_logits, **settings)
        parts.append(layers.assign(kind="ks", null=name, calibration_tokens=logits.shape[1]))
        if name in null_looks():
            curve = evidence.level_curve(maker, study.validation_logits, **settings)
            parts.append(curve.assign(kind="curve", null=name))
    whole = dict.fromkeys(["layer", "tokens", "sequences", "values", "calibration_tokens"], "Int64")
    return pd.concat(parts, ignore_index=True).astype(whole)  # whole numbers, also where some are missing


_TAILS = {"tail_01": 0.01, "tail_001": 0.02, "tail_01_reference": 0.01, "tail_001_reference": 0.02}


@figure("null_calibration", compute_null_calibration, tolerance=_TAILS)
def draw_null_calibration(table: pd.DataFrame) -> Figure:
    """Distance from uniform per null and layer; QQ plot and histogram of some."""
    fig = Picture(figsize=(10.4, 5.6), layout="constrained")
    grid = fig.add_gridspec(2, 2, width_ratios=(1.3, 1))
    _draw_ks(fig.add_subplot(grid[:, 0]), table[table["kind"] == "ks"])
    curves = table[table["kind"] == "curve"]
    quantiles = fig.add_subplot(grid[0, 1])
    _draw_qq(quantiles, curves, table[table["kind"] == "ks"])
    _draw_histogram(fig.add_subplot(grid[1, 1]), curves)
    names = quantiles.get_legend_handles_labels()
    fig.legend(*names, fontsize=8, loc="outside lower center", ncols=len(names[0]))
    return fig


def _draw_ks(axes: Axes, layers: pd.DataFrame) -> None:
    """Heat map of the Kolmogorov-Smirnov distance, with its numbers."""
    wide = layers.pivot(index="null", columns="layer", values="ks").loc[layers["null"].unique()]
    wide.columns = wide.columns.astype(int)
    heat_map(
        axes, wide, (1000 * wide).map("{:.0f}".format), cmap="cividis_r", norm=matplotlib.colors.LogNorm(0.002, 0.5),
        cbar_kws={"fraction": 0.03, "ticks": [0.002, 0.01, 0.05, 0.2], "format": "%g", "label": "KS distance"},
    )  # fmt: skip
    for text, is_worst in zip(axes.texts, wide.eq(wide.max(axis=1), axis=0).to_numpy().flat, strict=True):
        text.set_weight("bold" if is_worst else "normal")
    first = layers.iloc[0]
    half = ((layers["ks_high"] - layers["ks_low"]) / 2).median()
    axes.set_xlabel("layer")
    axes.set_title(
        "Kolmogorov-Smirnov distance of held-out null p-values × 1000 (bold: worst layer)\n"
        f"fitted on {first['calibration_tokens']:,.0f} tokens, tested on {first['tokens']:,.0f} others, "
        f"{first['values'] / 1e6:.2f} million values per layer\n"
        f"95 % intervals over {first['sequences']:.0f} sequences: ± {1000 * half:.1f} in the median",
        fontsize=8, loc="right",
    )  # fmt: skip


def _looks(curves: pd.DataFrame) -> dict[str, tuple[str, str]]:
    """Those of the nulls with a look that the table holds: one that was entered later is in a table made later."""
    return {name: look for name, look in null_looks().items() if name in set(curves["null"])}


def _draw_qq(axes: Axes, curves: pd.DataFrame, layers: pd.DataFrame) -> None:
    """Fraction of null p-values up to a level, over the level; rings at what a true null gives, by simulation."""
    for name, (color, style) in _looks(curves).items():
        part = curves[curves["null"] == name]
        level = part["level"]
        axes.plot(level, part["fraction"], color=color, linestyle=style, label=name)
        axes.fill_between(level, part["low"], part["high"], color=color, alpha=0.25, linewidth=0)
        reference = layers[layers["null"] == name].iloc[0]
        for at, tail in ((0.01, "tail_01_reference"), (0.001, "tail_001_reference")):
            axes.plot(at, at * reference[tail], "o", color=color, markerfacecolor="none", markersize=5)
    axes.plot([1e-4, 1], [1e-4, 1], color=BLACK, linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlim=(1e-4, 1), ylim=(1e-5, 1))
    axes.set(xlabel="level", ylabel="null p-values up to it")
    axes.annotate("too many small p-values", (1.3e-4, 2.5e-2), fontsize=7, color="#555555")
    axes.annotate("too few: cautious", (2e-2, 2e-5), fontsize=7, color="#555555")
    axes.set_title("QQ plot, all layers, 95 % bands\nrings: where the null is true", fontsize=8)


def _draw_histogram(axes: Axes, curves: pd.DataFrame) -> None:
    for name, (color, style) in _looks(curves).items():
        part = curves[(curves["null"] == name) & (curves["level"] * 32 % 1 == 0)]
        density = np.diff(part["fraction"], prepend=0) * 32
        edges = np.append(0, part["level"])
        axes.stairs(density, edges, baseline=None, color=color, linestyle=style, linewidth=1.4)
    axes.axhline(1, color=BLACK, linewidth=0.8)
    axes.set(xlim=(0, 1), ylim=(0, 2.2), xlabel="null p-value", ylabel="density")
    axes.set_title("histogram, all layers, bins of 1/32", fontsize=8)
