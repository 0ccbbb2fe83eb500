"""The figure of measures beyond the mean loss, rule by rule, on every model."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bhlib.figures.drawing import Picture, error_bars, sizes_caption
from bhlib.figures.registry import figure
from bhlib.looks import BLACK, BLUE, GREEN, ORANGE, RED
from bhlib.measures import MEASURES

__all__ = ["draw_beyond_loss"]

FAMILIES = {
    "BH": RED,
    "threshold": BLACK,
    "BH, fitted null": BLUE,
    "threshold, norms": ORANGE,
    "threshold, norms, compensated": GREEN,
}

#: Measures of which more is better.
MORE_IS_BETTER = ("accuracy", "agreement")

UNITS = {"accuracy": "points", "agreement": "points", "ece": "points"}  # of a hundred; all others in nats / 1000


@figure("beyond_loss", None, of_model=False)
def draw_beyond_loss(table: pd.DataFrame) -> Figure:
    """A panel per measure: each rule minus static top-k at the same number of experts, a row per model."""
    part = table.dropna(subset=["difference"])
    part = part[part["family"].isin(FAMILIES) & (part["wanted"] == part["wanted"].min())]
    models = list(dict.fromkeys(part["model"]))
    fig = Picture(figsize=(11.5, 2.4 + 0.6 * len(models)), layout="constrained")
    grid = fig.subplots(2, 4, sharey=True)
    for axes, measure in zip(grid.flat, MEASURES, strict=True):
        _draw_measure(axes, part[part["measure"] == measure], models, measure)
    for family in (name for name in FAMILIES if (part["family"] == name).any()):
        grid.flat[0].plot([], [], "o", color=FAMILIES[family], label=family)
    fig.legend(loc="outside lower center", ncols=len(FAMILIES), fontsize=8)
    fig.suptitle(
        f"difference from static top-{part['wanted'].iloc[0]:g} at a cost that is the same on calibration text; "
        f"test split, {sizes_caption(part)}\n"
        "bars: 95 % bootstrap over documents, each by itself; shaded: the better side",
        fontsize=8,
    )
    return fig


def _draw_measure(axes: Axes, part: pd.DataFrame, models: list[str], measure: str) -> None:
    scale = 100 if measure in UNITS else 1000
    for number, (family, color) in enumerate(FAMILIES.items()):
        rows = part[part["family"] == family]
        place = rows["model"].map(models.index) + 0.15 * (number - (len(FAMILIES) - 1) / 2)
        middle, reach = error_bars(rows, "difference", "difference_low", "difference_high", scale)
        axes.errorbar(middle, place, xerr=reach, fmt="o", color=color, markersize=3, linewidth=1)
    axes.axvline(0, color=BLACK, linewidth=0.8)
    left, right = axes.get_xlim()
    axes.axvspan(*((0, max(right, 0)) if measure in MORE_IS_BETTER else (min(left, 0), 0)), color=GREEN, alpha=0.07)
    axes.set_xlim(left, right)
    axes.set_yticks(range(len(models)), [model.replace(", ", ",\n", 1) for model in models], fontsize=7.5)
    axes.set_ylim(len(models) - 0.5, -0.5)
    axes.set_xlabel(f"{measure} ({UNITS.get(measure, 'nats / 1000')})", fontsize=8)
