"""Time on a GPU: the call of the README, and all else against the mean number of experts.

The table is what `python -m bhlib bench speed` writes.
"""

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from bhlib.figures.drawing import Picture
from bhlib.figures.registry import figure
from bhlib.looks import BLACK, BLUE, GREEN, RED, SKY

__all__ = ["draw_speed"]

#: Rows of panels: stage, sizes from left to right, and what a size counts.
ROWS = (
    ("block", (1, 512, 16_384), "token"),
    ("prefill", (512, 4096, 16_384), "token"),
    ("decode", (1, 8, 32), "sequence"),
    ("generate", (1, 8, 32), "sequence"),
)
TITLES = {
    "block": "experts of a layer",
    "prefill": "model, a prompt",
    "decode": "model, a step",
    "generate": "generate(), a step",
}
TOP_K = 8
#: Panels of the call: mode, title, and what a size counts.
CALLS = (
    ("eager", "generate(), launched from the host", "sequence"),
    ("compiled", "generate(), static cache, compiled", "sequence"),
    ("prefill", "one pass over a prompt", "token"),
)
#: Bars of the call: name in the table, colour, what the legend says.
BARS = (
    ("patched", BLUE, "patched as in the README, four experts on average"),
    ("no statistics", SKY, "the same, collect_stats=False"),
    ("no experts", GREEN, "no expert at all"),
)


@figure("speed", None, of_model=False)
def draw_speed(table: pd.DataFrame) -> Figure:
    """Time of the call as a share of the unpatched one; below, time against experts: measured, floor, ideal of k / 8.

    Parameters
    ----------
    table : pandas.DataFrame
        Columns as `bhlib.speed.results.COLUMNS` names them. Stages that it does not have are left out.

    Returns
    -------
    matplotlib.figure.Figure
        A row of panels per stage, a panel per number of tokens or sequences. On either side it shows the mode (launched
        from the host, CUDA graph, compiled) that is fastest, and says which. The call comes first, a panel per mode.
    """
    table = table[table["median_us"].notna()]
    rows = [row for row in ROWS if (table["stage"] == row[0]).any()]
    call = [mode for mode in CALLS if ((table["stage"] == "call") & (table["mode"] == mode[0])).any()]
    heights = [2.9] * (len(call) > 0) + [2.35 * len(rows) + 0.9] * (len(rows) > 0)
    fig = Picture(figsize=(8.4, sum(heights)), layout="constrained")
    parts = fig.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    if call:
        _draw_call(parts[0], table[table["stage"] == "call"], call)
    if rows:
        _draw_stages(parts[-1], table, rows)
    fig.text(0.5, -0.005, describe(table), ha="center", va="top", fontsize=7)
    return fig


def _draw_call(fig: SubFigure, table: pd.DataFrame, panels: list[tuple[str, str, str]]) -> None:
    """A panel per mode, a group of bars per number of tokens or sequences."""
    times = {mode: table[table["mode"] == mode].pivot(index="tokens", columns="name") for mode, *_ in panels}
    widths = [1 + len(times[mode]) for mode, *_ in panels]
    grid = fig.subplots(1, len(panels), width_ratios=widths, squeeze=False)[0]
    for axes, (mode, title, unit) in zip(grid, panels, strict=True):
        own = times[mode]["median_us", "unpatched"]
        axes.axhline(1, color=BLACK, lw=1, label="unpatched")
        for offset, (name, color, label) in zip((-0.27, 0, 0.27), BARS, strict=True):
            if ("median_us", name) in times[mode]:
                shares = ((times[mode][column, name] / own).to_numpy() for column in ("q1_us", "median_us", "q3_us"))
                low, middle, high = shares
                place = np.arange(len(own)) + offset
                axes.bar(place, middle, 0.25, yerr=[middle - low, high - middle], color=color, capsize=2, label=label)
        ticks = [f"{size:,} {unit}{'s' * (size > 1)}\n{us / 1e3:.3g} ms" for size, us in own.items()]
        axes.set_xticks(range(len(own)), ticks, fontsize=7)
        axes.set_title(title, fontsize=8.5)
        axes.tick_params(axis="y", labelsize=7)
        axes.grid(visible=False, axis="x")
        axes.set_axisbelow(True)
    fig.supylabel("time / unpatched", fontsize=9)
    fig.legend(*grid[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=8)


def _draw_stages(fig: SubFigure, table: pd.DataFrame, rows: list[tuple[str, tuple[int, ...], str]]) -> None:
    """A row of panels per stage, a panel per size."""
    grid = fig.subplots(len(rows), 3, squeeze=False)
    handles: dict[str, Artist] = {}
    for line, (stage, sizes, unit) in zip(grid, rows, strict=True):
        for axes, size in zip(line, sizes, strict=True):
            part = table[(table["stage"] == stage) & (table["tokens"] == size)]
            axes.set_visible(len(part) > 0)
            if len(part):
                axes.set_title(f"{TITLES[stage]}, {size:,} {unit}{'s' * (size > 1)}", fontsize=8.5)
                _draw_panel(axes, part)
                handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    fig.supxlabel("mean experts per token", fontsize=9)
    fig.supylabel("time", fontsize=9)
    fig.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=3, fontsize=8)


def _draw_panel(axes: Axes, part: pd.DataFrame) -> None:
    """One size of one stage."""
    own = part[part["by"] == "transformers"].nsmallest(1, "median_us")
    stands_in = part["name"].str.startswith("kernels, ")  # what stands in for dropped experts is in the goals
    ours = _fastest_mode(part[(part["by"] == "bhlib") & ~stands_in]).sort_values("mean_k")
    idle = part[part["by"] == "neither"].nsmallest(1, "median_us")
    factor, unit = (1e-3, "ms") if part["median_us"].max() >= 2000 else (1.0, "µs")
    notes = []
    if len(own):
        best = factor * own["median_us"].iloc[0]
        axes.plot([0, TOP_K], [0, best], ":", color=BLACK, lw=1, label="ideal: k / 8 of the fastest of transformers")
        _points(axes, own, factor, "s", BLACK, "fastest of transformers, top-8")
        notes.append(f"square: {own['name'].iloc[0]}, {own['mode'].iloc[0]}")
    if len(ours):
        axes.plot(ours["mean_k"], factor * ours["floor_us"], "--", color=RED, lw=1.2, label="floor of the hardware")
        _points(axes, ours, factor, "o-", BLUE, "skipping, by the kernels")
        notes.append(f"circles: {ours['mode'].iloc[0]}")
    if len(idle):
        _points(axes, idle, factor, "D", GREEN, "no expert at all")
    axes.text(0.03, 0.97, "\n".join(notes), transform=axes.transAxes, va="top", fontsize=6.5)
    axes.set(xlim=(-0.3, TOP_K + 0.4), ylim=(0, None), xticks=range(0, TOP_K + 1, 2))
    axes.yaxis.set_major_formatter(lambda value, place: f"{value:g} {unit}")
    axes.tick_params(labelsize=7)


def _points(axes: Axes, part: pd.DataFrame, factor: float, style: str, color: str, label: str) -> None:
    """Medians, with bars over the quartiles of the rounds."""
    middle, low, high = (factor * part[column].to_numpy() for column in ("median_us", "q1_us", "q3_us"))
    spread = np.clip([middle - low, high - middle], 0, None)
    axes.errorbar(part["mean_k"], middle, spread, fmt=style, ms=4, capsize=2, color=color, label=label)


def _fastest_mode(part: pd.DataFrame) -> pd.DataFrame:
    """The rows of the mode that is fastest among those that have the most rows."""
    if part.empty:
        return part
    modes = part.groupby("mode")["median_us"].agg(["size", "median"])
    chosen = modes[modes["size"] == modes["size"].max()]["median"].idxmin()
    return part[part["mode"] == chosen]


def describe(table: pd.DataFrame) -> str:
    """What was measured on, and how: for the foot of the figure."""
    lines = []
    for _, part in table.groupby("run", sort=False):
        facts = part.iloc[0]
        lines.append(
            f"{facts['gpu']}, {facts['clocks']}; measured at most {facts['bytes_per_second'] / 1e12:.2f} TB/s "
            f"and {facts['operations_per_second'] / 1e12:.0f} TFLOP/s\n{facts['versions']}"
        )
    rounds = table["rounds"].astype(int)
    lines = list(dict.fromkeys(lines))
    how = f"medians of {rounds.min()} to {rounds.max()} rounds or steps, bars from the first to the third quartile"
    return "\n".join([*lines, f"OLMoE-1B-7B's shapes, bfloat16; {how}"])
