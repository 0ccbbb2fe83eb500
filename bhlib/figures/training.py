"""What training for fewer experts gives.

The table is what `bhlib/demo/tuning_runs.py` and `tuning_table.py` make, on GPUs.
"""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from bhlib.figures.drawing import Picture
from bhlib.figures.registry import figure
from bhlib.looks import BLACK, BLUE, GREEN, ORANGE, PINK, RED, SKY

__all__ = ["draw_training"]

#: Series over experts: what is trained, rule, for which number ("own", "elastic"), whether it is one of the longest
#: trainings; colour, marker, line; legend.
CURVES = (
    ("untuned", "top", "own", False, BLACK, "s", ":", "untuned, static top-k"),
    ("untuned", "BH", "own", False, BLACK, "o", "--", "untuned, BH"),
    ("routers", "BH", "own", False, SKY, "o", "none", "routers, BH, each for its k"),
    ("routers", "BH", "elastic, even", False, SKY, "^", "-", "routers, BH, elastic"),
    ("routers, gates", "BH", "own", True, PINK, "*", "none", "routers, BH, gates, three times as long"),
    ("routers, stand-ins", "threshold", "own", True, PINK, "D", "none", "these routers, threshold, stand-ins (cost)"),
    ("all weights", "top", "own", False, RED, "s", ":", "all weights, static"),
    ("all weights", "BH", "own", False, BLUE, "o", "none", "all weights, BH, each for its k"),
    ("all weights", "BH", "elastic", False, ORANGE, "^", "-", "all weights, BH, elastic"),
    ("all weights", "top", "own", True, RED, "P", ":", "all weights, static, three times as long"),
    ("all weights", "BH", "own", True, GREEN, "*", "none", "all weights, BH, three times as long"),
)

#: Elastic models: how the means were drawn, colour, marker, legend.
DRAWS = (
    ("elastic", ORANGE, "^", "few experts drawn more often"),
    ("elastic, even", SKY, "o", "drawn evenly"),
)

#: Percent within which an elastic model was to be of one that was trained for one number of experts.
AIM = 0.3

#: Trainings whose settings were chosen: what is trained, rule; colour, marker; legend.
TRAININGS = (
    ("routers", "BH", SKY, "o", "routers, BH, 4 experts"),
    ("all weights", "top-4", PINK, "s", "all weights, top-4"),
    ("all weights", "BH", BLUE, "o", "all weights, BH, 4 experts"),
    ("all weights", "top-8", RED, "s", "all weights, top-8"),
)

#: How a panel of the choice calls the weight of the distillation.
LOSSES = {0.0: "the text alone", 0.5: "half text, half distillation", 1.0: "distillation alone"}


@figure("training", None, of_model=False)
def draw_training(table: pd.DataFrame) -> Figure:
    """The choice of settings on validation text; above it, where it is there, what was measured on test text.

    Parameters
    ----------
    table : pandas.DataFrame
        As `bhlib/demo/tuning_table.py` makes it. What it does not have is left out.
    """
    table = table.assign(k=table["k"].astype(str))
    tested, choice = table[table["split"] == "test"], table[table["kind"] == "choice"]
    heights = [3.8, 5.6] * (len(tested) > 0) + [3.2]
    fig = Picture(figsize=(9.4, sum(heights)), layout="constrained")
    parts = fig.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    if len(tested):
        experts, tokens = parts[0].subplots(1, 2, width_ratios=[1.5, 1.0])
        _draw_experts(experts, tested[tested["kind"] == "curve"])
        _draw_tokens(tokens, table[table["kind"] == "tokens"])
        differences = tested[tested["kind"] == "difference"]
        elastic = differences["k"].str.startswith("elastic")
        left, right = parts[1].subplots(1, 2, width_ratios=[1.9, 1.0])
        _draw_differences(left, differences[~elastic])
        _draw_elastic(right, differences[elastic & differences["versus"].str.startswith("all weights")])
    _draw_choice(parts[-1], choice)
    fig.text(0.5, -0.005, _caption(tested, choice), ha="center", va="top", fontsize=7)
    return fig


def _caption(tested: pd.DataFrame, choice: pd.DataFrame) -> str:
    said = (
        f"Learning rates: demo, whole validation split, one seed, {choice['tokens'].max() / 1e6:g} million tokens of "
        f"training text each; no intervals."
    )
    if tested.empty:
        return f"{said} Nothing was measured on the test split."
    first = tested.iloc[0]
    return (
        f"Demo, test split: {first['sequences']:,.0f} sequences, {first['measured_tokens']:,.0f} tokens, means of up "
        f"to {tested['seeds'].max():.0f} seeds; bars: 95 % bootstrap over {first['units']:,.0f} documents, for each "
        f"point by itself.\n{said}"
    )


def _draw_choice(fig: SubFigure, choice: pd.DataFrame) -> None:
    """A panel for each loss: what a training ends with on validation text, against its learning rate."""
    choice = choice[choice["gate"] == "kept"]
    grid = fig.subplots(1, len(LOSSES), sharex=True, sharey=True)
    untuned = choice[choice["what"] == "untuned"]
    for axes, (share, title) in zip(grid, LOSSES.items(), strict=True):
        for what, method, color, marker, label in TRAININGS:
            named = (choice["what"] == what) & (choice["method"] == method) & (choice["distillation"] == share)
            rows = choice[named].sort_values("learning_rate")
            axes.plot(rows["learning_rate"], rows["loss"], color=color, marker=marker, ms=4, lw=1.2, label=label)
        for row, line in zip(untuned.itertuples(), ("-", "--", ":"), strict=False):
            axes.axhline(
                row.loss, color=BLACK, lw=0.8, ls=line, label=f"untuned, {row.method}, {row.mean_k:.0f} experts"
            )
        axes.set(xscale="log", title=title)
    grid[0].set_ylabel("loss, nats per token")
    grid[1].set_xlabel("peak of the learning rate")
    fig.legend(*grid[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=7)


def _is(part: pd.DataFrame, what: str, method: str, k: str, long: bool) -> pd.DataFrame:
    """The rows of a series."""
    named = part["method"].str.startswith("top-") if method == "top" else part["method"] == method
    kinds = part["k"].where(part["k"].str.startswith("elastic"), "own") == k
    trained = part["tokens"] == (part["tokens"].max() if long else part["tokens"].min())
    return part[(part["what"] == what) & named & kinds & trained].sort_values("mean_k")


def _draw_experts(axes: Axes, part: pd.DataFrame) -> None:
    lengths = part["tokens"].nunique()
    for what, method, k, long, color, marker, line, label in CURVES:
        rows = _is(part, what, method, k, long)
        if len(rows) and (lengths > 1 or not long):
            size = 9 if marker == "*" else 5
            axes.plot(rows["mean_k"], rows["loss"], color=color, marker=marker, ls=line, ms=size, lw=1.2, label=label)
    axes.set(xlabel="mean experts per token", ylabel="loss, nats per token", title="test split", xlim=(2.6, 8.2))
    shown = part[part["mean_k"] > 2.6]
    axes.set_ylim(shown["loss"].min() - 0.01, shown["loss"].max() + 0.01)
    axes.legend(fontsize=6.5)


def _draw_tokens(axes: Axes, part: pd.DataFrame) -> None:
    for what, method, color, marker, label in TRAININGS:
        named = (part["what"] == what) & (part["method"] == method) & part["k"].isin(["4", "8"])
        for gate, line, more in (("kept", "-", ""), ("st-all", "--", ", gates")):
            losses = part[named & (part["gate"] == gate)].groupby("tokens")["loss"].mean()
            if len(losses):
                million, name = losses.index.to_numpy() / 1e6, label + more
                axes.plot(million, losses.to_numpy(), color=color, marker=marker, ls=line, ms=4, lw=1.2, label=name)
    axes.set(xscale="log", xlabel="million tokens trained on", ylabel="loss, nats per token", title="validation split")
    axes.xaxis.set_major_formatter(lambda value, place: f"{value:g}")
    axes.legend(fontsize=7)


def _draw_differences(axes: Axes, part: pd.DataFrame) -> None:
    """A line for each comparison, with a bar for each length of the trainings, in thousandths of a nat."""
    labels = pd.Series(
        [f"{row.what}, {row.method}, {row.mean_k:g} − {_rival(row.versus)}" for row in part.itertuples()]
    )
    names = list(dict.fromkeys(labels))
    axes.axvline(0, color=BLACK, lw=0.8)
    for length, color, marker, shift in zip(
        sorted(part["tokens"].unique()), (BLUE, GREEN), "o*", (0.2, -0.2), strict=False
    ):
        here = (part["tokens"] == length).to_numpy()
        rows = part[here]
        place = np.array([shift - names.index(name) for name in labels[here]])
        middle = 1000 * rows["difference"].to_numpy()
        reach = 1000 * np.stack([rows["difference"] - rows["low"], rows["high"] - rows["difference"]])
        axes.errorbar(
            middle,
            place,
            xerr=reach,
            fmt=marker,
            color=color,
            capsize=2,
            ms=5,
            label=f"{length / 1e6:g} million tokens",
        )
        for y, percent in zip(place, rows["percent"], strict=True):
            axes.annotate(
                f"{percent:+.2f} %".replace("-", "−"), (1.01, y), xycoords=("axes fraction", "data"), va="center",
                fontsize=6, color=color,
            )  # fmt: skip
    axes.set_yticks(-np.arange(len(names)), names, fontsize=6.5)
    axes.set(xlabel="difference of losses at the same number of experts, thousandths of a nat")
    axes.xaxis.label.set_size(8)
    axes.legend(fontsize=6.5, loc="upper left")
    axes.grid(visible=False, axis="y")


def _draw_elastic(axes: Axes, part: pd.DataFrame) -> None:
    """Elastic models minus the one that was trained for a number of experts, over that number."""
    axes.axhline(0, color=BLACK, lw=0.8)
    axes.axhline(AIM, color=BLACK, lw=0.8, ls="--", label=f"aim: {AIM} %")
    for (k, color, marker, label), shift in zip(DRAWS, (-0.07, 0.07), strict=True):
        rows = part[part["k"] == k].sort_values("mean_k")
        reach = np.stack([rows["percent"] - rows["percent_low"], rows["percent_high"] - rows["percent"]])
        place, middle = rows["mean_k"].to_numpy() + shift, rows["percent"].to_numpy()
        axes.errorbar(place, middle, yerr=reach, fmt=marker, color=color, capsize=2, ms=5, label=label)
    axes.set(xlabel="mean experts per token", ylabel="% of the loss of a model trained for it", title="elastic models")
    axes.legend(fontsize=7)


def _rival(versus: str) -> str:
    """``all weights BH`` as people say it."""
    what, method = versus.rsplit(" ", 1)
    return f"{what}, {method}"
