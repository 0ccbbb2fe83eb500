"""What training for fewer experts gives: against experts, against what was trained as long, and against tokens.

The table is what `bhlib/demo/tuning_runs.py` and `tuning_table.py` make, on GPUs.
"""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bhlib.figures.drawing import Picture
from bhlib.figures.registry import figure
from bhlib.looks import BLACK, BLUE, GREEN, ORANGE, PINK, RED, SKY

__all__ = ["draw_training"]

#: Series over experts: what is trained, rule, whether elastic; colour, marker, line; legend.
CURVES = (
    ("untuned", "top", False, BLACK, "s", ":", "untuned, static top-k"),
    ("untuned", "BH", False, BLACK, "o", "--", "untuned, BH"),
    ("routers", "BH", False, SKY, "o", "none", "routers, BH, each for its k"),
    ("routers", "BH", True, SKY, "^", "-", "routers, BH, elastic"),
    ("all weights", "top", False, RED, "s", ":", "all weights, static"),
    ("all weights", "threshold", False, GREEN, "D", "none", "all weights, threshold"),
    ("all weights", "BH", False, BLUE, "o", "none", "all weights, BH, each for its k"),
    ("all weights", "BH", True, ORANGE, "^", "-", "all weights, BH, elastic"),
)

#: Series over tokens: what is trained, rule; colour, marker; legend.
TOKENS = (
    ("all weights", "top-4", PINK, "s", "all weights, top-4"),
    ("routers", "BH", SKY, "o", "routers, BH, 4 experts"),
    ("all weights", "BH", BLUE, "o", "all weights, BH, 4 experts"),
    ("all weights", "top-8", RED, "s", "all weights, top-8"),
)


@figure("training", None, of_model=False)
def draw_training(table: pd.DataFrame) -> Figure:
    """Loss against experts on the test split, differences at the same number of experts, loss against tokens.

    Parameters
    ----------
    table : pandas.DataFrame
        As `bhlib/demo/tuning_table.py` makes it.
    """
    table = table.assign(k=table["k"].astype(str))
    fig = Picture(figsize=(9.4, 7.4), layout="constrained")
    upper, lower = fig.subfigures(2, 1, height_ratios=[1.0, 1.0])
    experts, tokens = upper.subplots(1, 2, width_ratios=[1.5, 1.0])
    _draw_experts(experts, table[table["kind"] == "curve"])
    _draw_tokens(tokens, table[table["kind"] == "tokens"])
    _draw_differences(lower.subplots(), table[(table["kind"] == "difference") & (table["k"] != "elastic")])
    first, seeds = table.iloc[0], table.loc[table["kind"] == "difference", "seeds"]
    fig.text(
        0.5, -0.005,
        f"demo, test split: {first['sequences']:,} sequences, {first['measured_tokens']:,} tokens, means of up to "
        f"{seeds.max():.0f} seeds; bars: 95 % bootstrap over {first['units']:,} documents, for each point by itself. "
        f"Upper right: validation split, one seed.",
        ha="center", va="top", fontsize=7,
    )  # fmt: skip
    return fig


def _is(part: pd.DataFrame, what: str, method: str, elastic: bool) -> pd.DataFrame:
    """The rows of a series."""
    named = part["method"].str.startswith("top-") if method == "top" else part["method"] == method
    return part[(part["what"] == what) & named & ((part["k"] == "elastic") == elastic)].sort_values("mean_k")


def _draw_experts(axes: Axes, part: pd.DataFrame) -> None:
    for what, method, elastic, color, marker, line, label in CURVES:
        rows = _is(part, what, method, elastic)
        if len(rows):
            axes.plot(rows["mean_k"], rows["loss"], color=color, marker=marker, ls=line, ms=5, lw=1.2, label=label)
    axes.set(xlabel="mean experts per token", ylabel="loss, nats per token", title="test split", xlim=(2.6, 8.2))
    shown = part[part["mean_k"] > 2.6]
    axes.set_ylim(shown["loss"].min() - 0.01, shown["loss"].max() + 0.01)
    axes.legend(fontsize=7)


def _draw_tokens(axes: Axes, part: pd.DataFrame) -> None:
    for what, method, color, marker, label in TOKENS:
        rows = part[(part["what"] == what) & (part["method"] == method) & part["k"].isin(["4", "8"])].sort_values(
            "tokens"
        )
        if len(rows):
            axes.plot(rows["tokens"] / 1e6, rows["loss"], color=color, marker=marker, ms=4, lw=1.2, label=label)
    axes.set(xscale="log", xlabel="million tokens trained on", ylabel="loss, nats per token", title="validation split")
    axes.xaxis.set_major_formatter(lambda value, place: f"{value:g}")
    axes.legend(fontsize=7)


def _draw_differences(axes: Axes, part: pd.DataFrame) -> None:
    """A bar for each comparison, in thousandths of a nat."""
    place = -np.arange(len(part))
    middle = 1000 * part["difference"]
    reach = 1000 * np.stack([part["difference"] - part["low"], part["high"] - part["difference"]])
    axes.axvline(0, color=BLACK, lw=0.8)
    axes.errorbar(middle, place, xerr=reach, fmt="o", color=BLUE, capsize=2, ms=4)
    labels = [f"{row.what}, {row.method}, {row.mean_k:g} experts − {_rival(row.versus)}" for row in part.itertuples()]
    axes.set_yticks(place, labels, fontsize=7)
    for y, row in zip(place, part.itertuples(), strict=True):
        axes.annotate(
            f"{row.percent:+.2f} %".replace("-", "−"), (1.01, y), xycoords=("axes fraction", "data"), va="center",
            fontsize=7,
        )  # fmt: skip
    axes.set(xlabel="difference of losses at the same number of experts, thousandths of a nat")
    axes.grid(visible=False, axis="y")


def _rival(versus: str) -> str:
    """``all weights BH 4`` as people say it; the number of a static rule is in its name."""
    what, method, _ = versus.rsplit(" ", 2)
    return f"{what}, {method}"
