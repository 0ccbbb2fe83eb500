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

#: Ends the names of families that leave weights as the model gave them (`bhlib.replication.subject`).
SHARES_OF_TOP = ", shares of the top"

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

    A model that was not measured at half is drawn open at its nearest share, and not pooled. With
    `bhlib.pooling.FEWEST` models or more the middle shows their means; with more, the lowest row is drawn, up to the
    size of OLMoE. Where a table has models that divide weights by their sum, the middle has a panel of these by
    themselves, with the weights that the model gave.
    """
    families = [name for name in FAMILIES if (table["family"] == name).any()]
    models = list(dict.fromkeys(table["model"]))
    static = table[table["against"] == STATIC]
    at_half = static[np.isclose(static["share"], SHARE)]
    near = _nearest(static[~static["model"].isin(at_half["model"])])
    alike = table[table["model"].isin(at_half["model"])]
    pooled, pools = pool_models(alike), alike["model"].nunique() >= FEWEST
    lines = alike["model"].nunique() > FEWEST and at_half["parameters"].nunique() > 1
    heights = [1.6 + 0.18 * (len(models) + pools), 3.2] + [3.2] * lines
    fig = Picture(figsize=(11.5, 0.9 + sum(heights)), layout="constrained")
    forest, middle, *below = fig.subfigures(len(heights), 1, height_ratios=heights)
    labels = [_label(name, near) for name in models]
    for axes, family in zip(forest.subplots(1, len(families), sharey=True, sharex=True), families, strict=True):
        means = pooled[(pooled["against"] == STATIC) & np.isclose(pooled["share"], SHARE)]
        rows = pd.concat([part[part["family"] == family] for part in (at_half, near)])
        _draw_forest(axes, rows, means[means["family"] == family], models, family)
        axes.set_yticks([*range(len(models)), len(models) + 0.4][: len(models) + pools],
                        [*labels, "pooled"][: len(models) + pools], fontsize=7.5)  # fmt: skip
    forest.supxlabel("loss minus that of static top-k at half of the model's own experts (nats / 1000)", fontsize=8)
    shared = static[static["family"].str.endswith(SHARES_OF_TOP)]
    first, second, *third = middle.subplots(1, 2 + (len(shared) > 0))
    for axes, rival in ((first, STATIC), (second, THRESHOLD)):
        part = pooled if pools else alike.rename(columns={"difference": "mean"})
        _draw_shares(axes, part[part["against"] == rival], families, rival)
        axes.set_ylabel(f"loss minus that of {rival}\n(nats / 1000{', mean of models' * pools})", fontsize=8)
    for axes in third:
        _draw_given_weights(axes, shared)
    said = [f"{len(models)} models trained by the repository's script; test split, {sizes_caption(table)}"]
    said += [_ALONE + _OPEN * (len(near) > 0) + _POOLED * pools]
    if pools:
        said += [f"Middle: means of the {alike['model'].nunique()} models that were measured at half"
                 + _GIVEN * len(third)]  # fmt: skip
    if lines:
        said += [_EXTRAPOLATED]
        panels = below[0].subplots(1, len(COVARIATES), sharey=True, width_ratios=(2, 1.2, 1))
        for axes, (covariate, label) in zip(panels, COVARIATES.items(), strict=True):
            _draw_line(axes, at_half, covariate, label)
        panels[0].set_ylabel("loss minus that of static top-k\nat half of the experts (nats / 1000)", fontsize=8)
        panels[1].legend(fontsize=7)
    fig.suptitle("\n".join(said), fontsize=8)
    return fig


_ALONE = "Above: 95 % bootstrap over documents of one model, each by itself"
_OPEN = "; open: at the nearest share that was measured, not pooled"
_POOLED = "\nDiamonds: mean of the models with its 95 % interval, the thin line holds the next model"
_GIVEN = (
    ", weights of the kept divided by their sum anew where a model divides; right: two such models, not divided anew"
)
_EXTRAPOLATED = (
    "Below: straight lines through the models in the logarithm, with 95 % bands; nothing was measured in the grey "
    "part, and nothing says that a line goes on"
)


def _nearest(part: pd.DataFrame) -> pd.DataFrame:
    """Rows of each model at the share nearest to half."""
    far = (part["share"] - SHARE).abs()
    return part[far == far.groupby(part["model"]).transform("min")]


def _label(model: str, near: pd.DataFrame) -> str:
    """A model's name in two lines if it is long, and at which share it is shown if not at half."""
    shares = near.loc[near["model"] == model, "share"]
    text = f"{model}, at {8 * shares.iloc[0]:g}/8" if len(shares) else model
    return text.replace(", ", ",\n", 1)


def _draw_given_weights(axes: Axes, part: pd.DataFrame) -> None:
    """Rules with the weights that the model gave, against static top-k with weights divided anew: a line per model."""
    colors = {STATIC: PINK, THRESHOLD: BLACK, "BH": RED}
    for line, (model, one) in zip(LINES, part.groupby("model", sort=False), strict=False):
        for number, (family, color) in enumerate(colors.items()):
            rows = one[one["family"] == family + SHARES_OF_TOP].sort_values("share")
            x = rows["share"] + 0.006 * (number - 1)
            look = {"color": color, "marker": "o", "linestyle": line, "linewidth": 1, "markersize": 3.5}
            axes.errorbar(x, *error_bars(rows, "difference", scale=1000), **look, capsize=1.5)
        axes.plot([], [], color="0.5", linestyle=line, linewidth=1, label=model)
    for family, color in colors.items():
        axes.plot([], [], "o", color=color, markersize=3.5, label=family)
    axes.axhline(0, color=BLACK, linewidth=0.8)
    axes.set_xlabel("experts per token and layer, share of the model's own", fontsize=8)
    axes.set_ylabel("with the weights that the model gave,\nminus static top-k divided anew (nats / 1000)", fontsize=8)
    axes.legend(fontsize=6.5)


def _draw_forest(axes: Axes, part: pd.DataFrame, pooled: pd.DataFrame, models: list[str], family: str) -> None:
    """A model per row, and the mean of them below."""
    part = part.assign(row=part["model"].map(models.index))
    for open_, rows in part.groupby(~np.isclose(part["share"], SHARE)):
        middle, reach = error_bars(rows, "difference", scale=1000)
        axes.errorbar(middle, rows["row"], xerr=reach, fmt="o", color=FAMILIES[family], markersize=2.5, capsize=1.5,
                      markerfacecolor="white" if open_ else FAMILIES[family])  # fmt: skip
    place = len(models) + 0.4
    for _, row in pooled.dropna(subset=["mean"]).iterrows():
        axes.plot([1000 * row["next_low"], 1000 * row["next_high"]], [place] * 2, color=BLACK, linewidth=0.8)
        axes.plot([1000 * row["low"], 1000 * row["high"]], [place] * 2, color=BLACK, linewidth=3)
        axes.plot(1000 * row["mean"], place, "D", color=FAMILIES[family], markeredgecolor=BLACK, markersize=6)
    axes.axvline(0, color=BLACK, linewidth=0.8)
    axes.set_ylim(len(models) - 0.4 + 1.2 * (len(pooled) > 0), -0.6)
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
    if covariate == "parameters":
        axes.axvspan(1.3 * ends[1], 1.2 * far, color="0.9", zorder=0)
        axes.axvline(OLMOE, color=BLACK, linestyle=":", linewidth=1)
        axes.set_xlim(0.8 * ends[0], 1.2 * far)
        axes.text(np.sqrt(1.3 * ends[1] * far), 0.98, "extrapolated to OLMoE's size:\nsays next to nothing", va="top",
                  ha="center", fontsize=7.5, transform=axes.get_xaxis_transform())  # fmt: skip
    else:
        axes.set_xlim(0.8 * ends[0], 1.25 * ends[1])
        ticks = _apart(sorted(part[covariate].unique()))
        axes.set_xticks(ticks, [f"{tick:,.0f}" if tick < 1e6 else f"{tick / 1e6:.0f} M" for tick in ticks], fontsize=7)
        axes.set_xticks([], minor=True)


def _apart(values: list[float]) -> list[float]:
    """Of ascending values those whose labels have room beside each other on a logarithmic axis."""
    kept = values[:1]
    for value in values[1:]:
        if value > 1.25 * kept[-1]:
            kept.append(value)
    return kept
