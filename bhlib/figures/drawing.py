"""One style for all figures, a Figure that notebooks show, and the parts that several figures have in common."""

from collections.abc import Iterable, Sequence
from io import BytesIO

import matplotlib
import numpy as np
import pandas as pd
import seaborn
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bhlib.figures.about import about_of
from bhlib.looks import BLACK, COLORS

__all__ = ["STYLE", "Picture"]

STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "figure.dpi": 110,
    "savefig.dpi": 200,
    "pdf.fonttype": 42,
    "axes.prop_cycle": matplotlib.cycler(color=COLORS),
}


class Picture(Figure):
    """A Figure that a notebook shows, whatever backend is chosen, and that nobody has to close."""

    def _repr_png_(self) -> bytes:
        buffer = BytesIO()
        with matplotlib.rc_context(STYLE):
            self.savefig(buffer, format="png", dpi=110, bbox_inches="tight", metadata={"Software": None})
        return buffer.getvalue()


def error_bars(
    part: pd.DataFrame, value: str = "value", low: str = "low", high: str = "high", scale: float = 1
) -> tuple[pd.Series, np.ndarray]:
    """Values and the lengths [2, rows] of their bars, from columns of these names, as `Axes.errorbar` takes them."""
    middle = part[value]
    return scale * middle, scale * np.abs(np.stack([middle - part[low], part[high] - middle]))


def joint_bars(part: pd.DataFrame, prefix: str = "", scale: float = 1000) -> tuple[pd.Series, np.ndarray]:
    """`error_bars` of differences, with the intervals that hold for all rows of a table at once."""
    return error_bars(part, f"{prefix}difference", f"{prefix}joint_low", f"{prefix}joint_high", scale)


def signed_ticks(axes: Axes, ticks: Sequence[float]) -> None:
    """Ticks of a vertical axis of differences, with their signs."""
    axes.set_yticks(ticks, [signed(tick, "g") if tick else "0" for tick in ticks])
    axes.set_yticks([], minor=True)


def signed(number: float, form: str) -> str:
    """A number with its sign, the minus sign as long as the plus."""
    return f"{number:+{form}}".replace("-", "−")


#: What intervals hold for.
ONE, ALL = "each point by itself", "all points of a panel at once"


def sample_caption(table: pd.DataFrame, split: str) -> str:
    """What was measured on: a split of the text, sequences and tokens."""
    first = table.iloc[0]
    return f"{about_of(table).name}, {split} split: {first['sequences']:,.0f} sequences, {first['tokens']:,.0f} tokens"


def sizes_caption(table: pd.DataFrame) -> str:
    """Sequences and documents: those of most models, and of each that differs in brackets."""
    sizes = table.dropna(subset=["units"]).groupby("model", sort=False)[["sequences", "units"]].first()
    usual = sizes.value_counts().index[0]
    rows = zip(sizes.index, sizes["sequences"], sizes["units"], strict=True)
    others = ", ".join(f"{name}: {n:,.0f} of {units:.0f}" for name, n, units in rows if (n, units) != usual)
    return f"{usual[0]:,.0f} sequences of {usual[1]:.0f} documents" + f" ({others})" * bool(others)


def interval_caption(table: pd.DataFrame, scope: str) -> str:
    """What the bars are: units fewer than sequences are documents."""
    first = table.iloc[0]
    units = f"{first['units']:,.0f} documents" if first["units"] < first["sequences"] else "sequences"
    return f"bars: 95 % bootstrap over {units}, for {scope}"


def put_above(fig: Figure, text: str) -> None:
    """A line above everything that is drawn so far. (Below it would meet the legends, which savefig moves down.)"""
    fig.draw_without_rendering()  # puts everything into its place
    top = (fig.get_tightbbox().y1 + 0.05) / fig.get_figheight()
    fig.text(0.5, top, text, ha="center", va="bottom", fontsize=8, fontweight="bold")


def layer_ticks(layers: Iterable[int]) -> list[int]:
    """Ticks of an axis of layers: all of them, or every second, third, ... where they would touch each other."""
    layers = sorted(set(layers))
    return layers[:: 1 + (len(layers) - 1) // 12]


def ink_on(colors: np.ndarray) -> np.ndarray:
    """Black or white [n], whichever has the greater contrast with each of the RGBA `colors` [n, 4] on white paper."""
    opaque = colors[:, :3] * colors[:, 3:] + 1 - colors[:, 3:]
    return np.where(opaque**2.2 @ [0.2126, 0.7152, 0.0722] > 0.18, BLACK, "#ffffff")


def heat_map(axes: Axes, table: pd.DataFrame, text: pd.DataFrame | None = None, **options) -> None:
    """A table as colours, its first row on top, with a text in each cell.

    Parameters
    ----------
    axes : Axes
    table : pandas.DataFrame
        Its index and columns become the labels of the axes; a cell that is missing stays empty.
    text : pandas.DataFrame, optional
        Of the same shape, the text of each cell.
    **options
        Of `seaborn.heatmap`: ``cmap``, ``norm``, ``vmin``, ``vmax``, ``alpha``, ``cbar``, ``cbar_kws``.
    """
    cells = {} if text is None else {"annot": text, "fmt": "", "annot_kws": {"fontsize": 7.5}}
    seaborn.heatmap(table, ax=axes, linewidths=0.5, **cells, **options)
    if text is not None:
        mesh = axes.collections[0]
        filled = ~np.ma.getmaskarray(mesh.get_array()).ravel()
        for label, ink in zip(axes.texts, ink_on(mesh.get_facecolors()[filled]), strict=True):
            label.set_color(ink)  # seaborn writes white on colours that are light enough for black
    axes.set(xlabel="", ylabel="")
    axes.tick_params(length=0, rotation=0)
    axes.grid(False)
