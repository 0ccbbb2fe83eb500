"""The figure of who gets many experts and who few: classes of tokens, domains, places in a sequence."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bhlib.figures.drawing import Picture, error_bars
from bhlib.figures.registry import figure
from bhlib.looks import BLACK, BLUE, GREEN, MARKERS, RED

__all__ = ["draw_who_gets_many"]

TITLES = {"kind": "class of the token", "domain": "domain", "position": "eighth of a sequence"}


@figure("who_gets_many", None, of_model=False)
def draw_who_gets_many(table: pd.DataFrame) -> Figure:
    """A panel per factor, a row per value: by how much its tokens lie above the mean of all, the others held fixed."""
    sizes = [table.loc[table["factor"] == factor, "value"].nunique() for factor in TITLES]
    fig = Picture(figsize=(11, 1.6 + 0.45 * max(sizes)), layout="constrained")
    kinds = table[(table["factor"] == "kind") & (table["rule"] == table["rule"].iloc[0])]
    tokens = kinds.groupby("model", sort=False)["tokens"].sum()
    measured = ", ".join(f"{model}: {count:,} tokens" for model, count in tokens.items())
    rules = dict(zip(dict.fromkeys(table["rule"]), (RED, BLUE, GREEN), strict=False))
    for axes, (factor, title) in zip(fig.subplots(1, len(TITLES)), TITLES.items(), strict=True):
        _draw_factor(axes, table[table["factor"] == factor], rules)
        axes.set_title(title, fontsize=8)
        axes.set_xlabel("experts above the mean of all tokens", fontsize=8)
    fig.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=8, fontsize=7.5)
    fig.suptitle(
        f"{measured} of the test split\na colour per rule, a point per model with its 95 % interval of a mixed model, "
        "documents as random effects",
        fontsize=8,
    )
    return fig


def _draw_factor(axes: Axes, part: pd.DataFrame, rules: dict[str, str]) -> None:
    order = part.groupby("value")["effect"].mean().sort_values(ascending=False).index
    values = sorted(order, key=int) if part["factor"].iloc[0] == "position" else list(order)
    models = list(dict.fromkeys(part["model"]))
    for number, (rule, color) in enumerate(rules.items()):
        for model, marker in zip(models, MARKERS, strict=False):
            rows = part[(part["rule"] == rule) & (part["model"] == model)]
            shift = 0.26 * (number - (len(rules) - 1) / 2) + 0.08 * (models.index(model) - (len(models) - 1) / 2)
            middle, reach = error_bars(rows, "effect")
            axes.errorbar(middle, rows["value"].map(values.index) + shift, xerr=reach, fmt=marker, color=color,
                          markersize=2.8, linewidth=0.9)  # fmt: skip
        axes.plot([], [], "-", color=color, label=rule)
    for model, marker in zip(models, MARKERS, strict=False):
        axes.plot([], [], marker, color="0.5", markersize=4, label=model)
    axes.axvline(0, color=BLACK, linewidth=0.8)
    names = [str(int(value) + 1) for value in values] if part["factor"].iloc[0] == "position" else values
    axes.set_yticks(range(len(values)), names, fontsize=7.5)
    axes.set_ylim(len(values) - 0.5, -0.5)
