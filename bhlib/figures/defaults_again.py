"""The figure of the default chosen again: concentration, statistic and layer weights, on every model."""

from collections.abc import Mapping
from itertools import product

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bhlib.figures.drawing import Picture, error_bars, signed_ticks, sizes_caption
from bhlib.figures.registry import figure
from bhlib.looks import BLACK, BLUE, COLORS, LINES, RED

__all__ = ["draw_defaults_again", "regret_of_defaults"]

#: What is default today.
DEFAULT = {"concentration": "BH, Dirichlet 4", "statistic": "BH, KDE of log_prob"}


def regret_of_defaults(table: pd.DataFrame) -> pd.DataFrame:
    """By how much each variant loses against the best of its kind, on average over models and at worst.

    Parameters
    ----------
    table : pandas.DataFrame
        ``defaults_again.csv``.

    Returns
    -------
    pandas.DataFrame
        A row per ``choice``, ``variant`` and ``share``: ``models``, ``mean`` difference from static top-k; ``regret``,
        the mean over models of the loss above that of the best variant of the model, ``worst`` its largest; ``best``,
        how many models it is the best for. Nats per token, validation split.
    """
    tried = table[table["choice"].isin(DEFAULT)].copy()
    by = ["choice", "share"]
    tried["above"] = tried["difference"] - tried.groupby([*by, "model"])["difference"].transform("min")
    grouped = tried.groupby(["choice", "variant", "share"], sort=False)
    return pd.DataFrame(
        {
            "models": grouped.size(),
            "mean": grouped["difference"].mean(),
            "regret": grouped["above"].mean(),
            "worst": grouped["above"].max(),
            "best": grouped["above"].agg(lambda above: int((above == 0).sum())),
        }
    ).reset_index()


@figure("defaults_again", None, of_model=False)
def draw_defaults_again(table: pd.DataFrame) -> Figure:
    """Left, what each choice is worth on validation text, a line per model; right, layer weights on the test split."""
    fig = Picture(figsize=(11, 5), layout="constrained")
    left, middle, right = fig.subplots(1, 3, width_ratios=(1, 1, 1.1))
    looks = dict(zip(dict.fromkeys(table["model"]), product(LINES, COLORS[:6]), strict=False))
    for axes, choice in ((left, "concentration"), (middle, "statistic")):
        _draw_choice(axes, table, choice, looks)
    fig.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=7.5)
    left.set_ylabel("loss minus that of static top-k\n(nats / 1000, validation split)", fontsize=8)
    _draw_weights(right, table[table["choice"] == "layer weights"])
    told = table.groupby("model", sort=False)["units"].count() > 0
    untold = f" ({', '.join(told.index[~told])}: not recorded)" * (not told.all())
    fig.suptitle(
        f"{len(told)} models, at half of the model's own experts or the nearest share that was measured; red: the "
        f"default today, black: mean of the models\nLeft: {sizes_caption(table)}{untold}; right: every second sequence "
        "of the test split, filled where the tuner took the weights, open where it fell back\n"
        "Bars: 95 % bootstrap over documents of one model",
        fontsize=8,
    )
    return fig


def _draw_choice(axes: Axes, table: pd.DataFrame, choice: str, looks: Mapping[str, tuple[str, str]]) -> None:
    """A line per model over the variants of one choice."""
    part = table[table["choice"] == choice]
    near = (part["share"] - 0.5).abs()
    part = part[near == near.groupby(part["model"]).transform("min")]
    variants = list(dict.fromkeys(part["variant"]))
    for model, one in part.groupby("model", sort=False):
        line, color = looks[model]
        place = np.array([variants.index(variant) for variant in one["variant"]])
        axes.errorbar(place, *error_bars(one, "difference", scale=1000), color=color, linestyle=line, linewidth=0.9,
                      marker=".", elinewidth=0.7, label=model)  # fmt: skip
    wide = 1000 * part.pivot(index="model", columns="variant", values="difference")[variants]
    mean, place = wide.mean(), np.arange(wide.shape[1])
    axes.plot(place, mean, color=BLACK, marker="o", linewidth=1.8)
    axes.plot(variants.index(DEFAULT[choice]), mean[DEFAULT[choice]], "o", color=RED, markersize=9, zorder=5)
    axes.axhline(0, color=BLACK, linewidth=0.8)
    if np.ptp(wide.to_numpy()) > 60:  # one variant would hide the others
        axes.set_yscale("symlog", linthresh=20)
        signed_ticks(axes, [-40, -20, -10, 0, 10, 20, 50, 100, 200])
    axes.set_xticks(place, [name.rpartition(" ")[2] for name in variants], rotation=15)
    axes.set_xlabel({"concentration": "concentration of the Dirichlet null", "statistic": "statistic of a fitted null"}
                    [choice], fontsize=8)  # fmt: skip


def _draw_weights(axes: Axes, part: pd.DataFrame) -> None:
    """A model per row: what weights of the layers do to BH and to the threshold."""
    models = list(dict.fromkeys(part["model"]))
    for number, (variant, color) in enumerate((("BH", RED), ("threshold", BLUE))):
        rows = part[part["variant"] == variant]
        place = rows["model"].map(models.index) + 0.24 * (number - 0.5)
        middle, reach = error_bars(rows, "difference", scale=1000)
        axes.errorbar(middle, place, xerr=reach, fmt="none", ecolor=color, capsize=1.5, linewidth=1)
        for x, y, chosen in zip(middle, place, rows["chosen"], strict=True):
            axes.plot(x, y, "o", color=color, markerfacecolor=color if chosen else "white", markersize=4.5)
        axes.plot([], [], "o", color=color, label=variant)
    axes.axvline(0, color=BLACK, linewidth=0.8)
    axes.set_yticks(range(len(models)), models, fontsize=7.5)
    axes.set_ylim(len(models) - 0.5, -0.5)
    axes.set_xlabel("loss with weights of the layers minus loss without\n(nats / 1000, test split)", fontsize=8)
    axes.legend(fontsize=7.5)
