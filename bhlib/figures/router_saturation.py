"""The figure of router saturation: how early in training a router selects what it selects in the end."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from bhlib.figures.drawing import Picture
from bhlib.figures.registry import figure
from bhlib.looks import BLACK, BLUE, COLORS, GREEN, RED

__all__ = ["draw_router_saturation"]

#: Tokens of each domain that routers are asked about (`bhlib/demo/snapshots.py`).
WINDOW = 1024


@figure("router_saturation", None, of_model=False)
def draw_router_saturation(table: pd.DataFrame) -> Figure:
    """Share of a token's final experts that are selected already: left, the mean of the layers; right, the layers.

    The first rule is the model's own top-k. Chance is what as many experts at random would have.
    """
    rules = list(dict.fromkeys(table["rule"]))
    colors = dict(zip(rules, (BLACK, RED, BLUE, GREEN, *COLORS), strict=False))
    fig = Picture(figsize=(11, 4.2), layout="constrained")
    left, *others = fig.subplots(1, 3, sharey=True)
    table = table.assign(percent=100 * table["step"] / table["step"].max())
    for rule, color in colors.items():
        mean = table[table["rule"] == rule].groupby("percent")[["saturation", "low", "high", "chance"]].mean()
        left.plot(mean.index, mean["saturation"], color=color, marker="o", markersize=3.5, label=rule)
        left.fill_between(mean.index, mean["low"], mean["high"], color=color, alpha=0.12)
        left.plot(mean.index, mean["chance"], color=color, linestyle=":", linewidth=1)
    left.plot([], [], color=BLACK, linestyle=":", linewidth=1, label="chance")
    left.set_title("mean of the layers", fontsize=8)
    left.legend(fontsize=7.5, loc="lower right", bbox_to_anchor=(1, 0.16))
    layers = sorted(table["layer"].unique())
    shown = list(dict.fromkeys((layers[0], layers[len(layers) // 2], layers[-1])))
    for axes, rule in zip(others, (rules[0], rules[-2] if len(rules) > 2 else rules[-1]), strict=True):
        _draw_layers(axes, table[table["rule"] == rule], shown)
        axes.set_title(f"{rule}, layer by layer", fontsize=8)
    for axes in (left, *others):
        axes.set_xscale("log")
        ticks = [1, 2, 5, 10, 20, 40, 100]
        axes.set_xticks(ticks, [f"{tick} %" for tick in ticks])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("of the training", fontsize=8)
        axes.set_ylim(0, 1.02)
    left.set_ylabel("share of the final experts that are selected already", fontsize=8)
    domains, models = table["domains"].iloc[0], ", ".join(dict.fromkeys(table["model"]))
    fig.suptitle(
        f"{models}: {domains} domains of the validation split, {WINDOW:,} tokens each\n"
        f"bands: 95 % of Student's t over the {domains} domains, left their mean over layers; thin lines: other layers",
        fontsize=8,
    )
    return fig


def _draw_layers(axes: Axes, part: pd.DataFrame, shown: list[int]) -> None:
    """Each layer a line, three of them with colours and bands."""
    colors = dict(zip(shown, (BLUE, RED, GREEN), strict=False))
    for layer, one in part.groupby("layer"):
        if layer not in colors:
            axes.plot(one["percent"], one["saturation"], color="0.7", linewidth=0.8)
            continue
        axes.plot(one["percent"], one["saturation"], color=colors[layer], linewidth=1.2, label=f"layer {layer}")
        axes.fill_between(one["percent"], one["low"], one["high"], color=colors[layer], alpha=0.12)
    chance = part.groupby("percent")["chance"].mean()
    axes.plot(chance.index, chance, color=BLACK, linestyle=":", linewidth=1, label="chance")
    axes.legend(fontsize=7.5, loc="lower right", bbox_to_anchor=(1, 0.16))
