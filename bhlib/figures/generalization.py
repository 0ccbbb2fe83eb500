"""The figure of what holds for other models: differences at equal cost, model by model, pooled, and against size.

The table is of models that were trained with `bhlib/demo/train.py` on a GPU (`bhlib.replication`); their weights are
in no repository.
"""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bhlib.figures.drawing import Picture, error_bars, sizes_caption
from bhlib.figures.registry import figure
from bhlib.looks import BLACK, BLUE, GREEN, LINES, ORANGE, PINK, RED
from bhlib.pooling import FEWEST, extrapolate, pool

__all__ = ["draw_generalization", "pool_models"]

STATIC, THRESHOLD = "static top-k", "threshold"

#: Families that are drawn, and their colours.
FAMILIES = {
    "BH": RED,
    "threshold": BLACK,
    "BH, fitted null": BLUE,
    "fixed cut, fitted null": PINK,
    "threshold, norms": ORANGE,
    "threshold, norms, compensated": GREEN,
}

#: The share of the model's own experts at which models are set side by side.
SHARE = 0.5

#: Parameters of OLMoE-1B-7B.
OLMOE = 6.92e9

#: What lines are drawn against, and the label of the axis.
COVARIATES = {"parameters": "parameters", "tokens": "training tokens", "layers": "layers"}


def pool_models(table: pd.DataFrame) -> pd.DataFrame:
    """Differences of families at each share of the model's own experts, pooled over models (`bhlib.pooling.pool`).

    Parameters
    ----------
    table : pandas.DataFrame
        ``generalization.csv``.

    Returns
    -------
    pandas.DataFrame
        A row per ``against``, ``family`` and ``share``; nats per token.
    """
    return pool(table[table["against"].isin([STATIC, THRESHOLD])], ["against", "family", "share"])


@figure("generalization", None, of_model=False)
def draw_generalization(table: pd.DataFrame) -> Figure:
    """Above, every model by itself at half of its experts; in the middle, against experts; below, against size.

    With `bhlib.pooling.FEWEST` models or more the middle shows their means; with more, the lowest row is drawn, up to
    the size of OLMoE.
    """
    families = [name for name in FAMILIES if (table["family"] == name).any()]
    models = list(dict.fromkeys(table["model"]))
    at_half = table[(table["against"] == STATIC) & np.isclose(table["share"], SHARE)]
    pooled, pools = pool_models(table), len(models) >= FEWEST
    lines = len(models) > FEWEST and at_half["parameters"].nunique() > 1
    heights = [1.6 + 0.18 * (len(models) + pools), 3.2] + [3.2] * lines
    fig = Picture(figsize=(11.5, 0.6 + sum(heights)), layout="constrained")
    forest, middle, *below = fig.subfigures(len(heights), 1, height_ratios=heights)
    for axes, family in zip(forest.subplots(1, len(families), sharey=True, sharex=True), families, strict=True):
        means = pooled[(pooled["against"] == STATIC) & np.isclose(pooled["share"], SHARE)]
        _draw_forest(axes, at_half[at_half["family"] == family], means[means["family"] == family], models, family)
    forest.supxlabel("loss minus that of static top-k at half of the model's own experts (nats / 1000)", fontsize=8)
    for axes, rival in zip(middle.subplots(1, 2), (STATIC, THRESHOLD), strict=True):
        part = pooled if pools else table.rename(columns={"difference": "mean"})
        _draw_shares(axes, part[part["against"] == rival], families, rival)
        axes.set_ylabel(f"loss minus that of {rival}\n(nats / 1000{', mean of models' * pools})", fontsize=8)
    said = [f"{len(models)} models trained by the repository's script; test split, {sizes_caption(table)}"]
    said += ["Above: 95 % bootstrap over documents of one model, each by itself" + _POOLED * pools]
    if lines:
        said += [_EXTRAPOLATED]
        panels = below[0].subplots(1, len(COVARIATES), sharey=True, width_ratios=(2, 1.2, 1))
        for axes, (covariate, label) in zip(panels, COVARIATES.items(), strict=True):
            _draw_line(axes, at_half, covariate, label)
        panels[0].set_ylabel("loss minus that of static top-k\nat half of the experts (nats / 1000)", fontsize=8)
    fig.suptitle("\n".join(said), fontsize=8)
    return fig


_POOLED = "; diamonds: mean of the models with its 95 % interval, the thin line holds the next model. Middle: means"
_EXTRAPOLATED = (
    "Below: straight lines through the models in the logarithm, with 95 % bands; nothing was measured in the grey "
    "part, and nothing says that a line goes on"
)


def _draw_forest(axes: Axes, part: pd.DataFrame, pooled: pd.DataFrame, models: list[str], family: str) -> None:
    """A model per row, and the mean of them below."""
    part = part.assign(row=part["model"].map(models.index))
    middle, reach = error_bars(part, "difference", scale=1000)
    axes.errorbar(middle, part["row"], xerr=reach, fmt="o", color=FAMILIES[family], markersize=3.5, capsize=1.5)
    place = len(models) + 0.4
    for _, row in pooled.dropna(subset=["mean"]).iterrows():
        axes.plot([1000 * row["next_low"], 1000 * row["next_high"]], [place] * 2, color=BLACK, linewidth=0.8)
        axes.plot([1000 * row["low"], 1000 * row["high"]], [place] * 2, color=BLACK, linewidth=3)
        axes.plot(1000 * row["mean"], place, "D", color=FAMILIES[family], markeredgecolor=BLACK, markersize=6)
    axes.axvline(0, color=BLACK, linewidth=0.8)
    pools = len(models) >= FEWEST
    axes.set_yticks([*range(len(models)), place][: len(models) + pools], [*models, "pooled"][: len(models) + pools],
                    fontsize=7.5)  # fmt: skip
    axes.set_ylim(len(models) - 0.4 + 1.2 * pools, -0.6)
    axes.set_title(family.replace(", norms", ",\nnorms").replace(", fitted", ",\nfitted"), fontsize=8)


def _draw_shares(axes: Axes, part: pd.DataFrame, families: list[str], rival: str) -> None:
    """Differences against the share of experts: pooled ones, or a line for each model."""
    models = list(dict.fromkeys(part["model"])) if "model" in part else [None]
    for number, family in enumerate(families):
        for model, line in zip(models, LINES, strict=False):
            rows = part[(part["family"] == family) & ((part["model"] == model) if model else True)]
            rows = rows.dropna(subset=["mean"]).sort_values("share")
            if len(rows):
                x = rows["share"] + 0.006 * (number - len(families) / 2)
                look = {"color": FAMILIES[family], "marker": "o", "linestyle": line, "linewidth": 1, "markersize": 3.5}
                name = family if model is None else f"{family}: {model}"
                axes.errorbar(x, *error_bars(rows, "mean", scale=1000), **look, capsize=1.5, label=name)
    axes.axhline(0, color=BLACK, linewidth=0.8)
    axes.set_xlabel("experts per token and layer, share of the model's own", fontsize=8)
    axes.legend(fontsize=6.5, ncols=2 if len(models) > 1 else 1)


def _draw_line(axes: Axes, part: pd.DataFrame, covariate: str, label: str) -> None:
    """Models against one of their sizes, and the line through them."""
    ends = np.array([part[covariate].min(), part[covariate].max()], dtype=float)
    far = OLMOE if covariate == "parameters" else 1.15 * ends[1]
    grid = np.geomspace(0.9 * ends[0], far, 40)
    lines = extrapolate(part, ["family"], covariate, grid)
    for family in ("BH", "BH, fitted null", "threshold, norms"):
        points = part[part["family"] == family]
        axes.plot(points[covariate], 1000 * points["difference"], "o", color=FAMILIES[family], markersize=4)
        line = lines[lines["family"] == family] if len(lines) else lines
        if len(line):
            axes.plot(line[covariate], 1000 * line["difference"], color=FAMILIES[family], linewidth=1, label=family)
            axes.fill_between(
                line[covariate], 1000 * line["low"], 1000 * line["high"], color=FAMILIES[family], alpha=0.12
            )
    axes.axhline(0, color=BLACK, linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlabel(label, fontsize=8)
    shown = 1000 * part.loc[part["family"].isin(FAMILIES), "difference"]
    axes.set_ylim(1.6 * min(shown.min(), -1), max(0.8 * shown.abs().max(), 5))
    if covariate == "parameters":
        axes.axvspan(1.3 * ends[1], 1.2 * far, color="0.9", zorder=0)
        axes.axvline(OLMOE, color=BLACK, linestyle=":", linewidth=1)
        axes.set_xlim(0.8 * ends[0], 1.2 * far)
        place = np.sqrt(1.3 * ends[1] * far), axes.get_ylim()[1]
        axes.text(*place, "extrapolated\nto OLMoE's size", va="top", ha="center", fontsize=7.5)
    else:
        axes.set_xlim(0.8 * ends[0], 1.25 * ends[1])
        ticks = sorted(part[covariate].unique())
        axes.set_xticks(ticks, [f"{tick:,.0f}" if tick < 1e6 else f"{tick / 1e6:.0f} M" for tick in ticks], fontsize=7)
        axes.set_xticks([], minor=True)
