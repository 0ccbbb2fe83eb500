"""Charts of a passage: how many experts, in which layers, with which weights; and all its views in one figure.

Each is a panel: a frame that is set up once, and artists that are given new data. The artists are "animated", which
to matplotlib means that a saved figure has them, and that a live one may draw them alone, over a copy of its frame.
"""

from io import BytesIO

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imsave

from bhlib.figures.drawing import STYLE, Picture
from bhlib.figures.passage import RoutedPassage
from bhlib.figures.passage_text import WIDTH, put_text, text_height, wrap
from bhlib.looks import BLACK, BLUE, RED

__all__ = [
    "PassageCharts",
    "draw_passage",
    "draw_passage_histogram",
    "draw_passage_layers",
    "draw_passage_weights",
]

#: The share of tokens that a bar of spread covers: from the 10th to the 90th percentile.
_SPREAD = (10, 90)


class _Histogram:
    """Share of (token, layer) pairs with k experts, and the mean."""

    def __init__(self, axes: Axes, routed: RoutedPassage, layer: int | None) -> None:
        self.bars = axes.bar(range(routed.most + 1), 0, color=BLUE, animated=True)
        self.mean = axes.axvline(0, color=RED, linestyle="--", animated=True)
        self.label = axes.text(0.03, 0.9, "", color=RED, transform=axes.transAxes, animated=True)
        pairs = "(token, layer) pairs" if layer is None else "tokens"
        axes.set(xlabel="experts", ylabel=f"% of {pairs}", ylim=(0, 100), xlim=(-0.6, routed.most + 0.6))
        axes.set_xticks(range(0, routed.most + 1, 1 + routed.most // 10))
        axes.set_title(routed.sample(layer), fontsize=8)
        self.artists = [*self.bars, self.mean, self.label]

    def show(self, routed: RoutedPassage, layer: int | None) -> None:
        counts = routed.counts[routed.layers(layer)]
        shares = np.bincount(counts.ravel(), minlength=routed.most + 1) / counts.size
        for bar, share in zip(self.bars, shares, strict=True):
            bar.set_height(100 * share)
        mean = counts.mean()
        self.mean.set_xdata([mean, mean])
        self.label.set_text(f"mean {mean:.2f}")


class _Layers:
    """Experts per token by layer: the mean, and the middle 80 % of tokens."""

    def __init__(self, axes: Axes, routed: RoutedPassage, layer: int | None) -> None:
        num_layers, top_k = len(routed.counts), routed.own_weights.shape[-1]
        axes.axhline(top_k, color=BLACK, linestyle=":")
        axes.text(-0.4, top_k + 0.15, f"the model's own top-{top_k}", fontsize=7.5)
        if layer is not None:
            axes.axvspan(layer - 0.4, layer + 0.4, color=BLACK, alpha=0.1, linewidth=0)
        look = {"color": BLUE, "animated": True}
        (self.line,) = axes.plot(range(num_layers), np.zeros(num_layers), marker="o", markersize=4, **look)
        self.spread = axes.vlines(range(num_layers), 0, 0, alpha=0.4, linewidth=5, **look)
        axes.set(xlabel="layer", ylabel="experts per token")
        axes.set(xlim=(-0.6, num_layers - 0.4), ylim=(0, routed.most * 1.12))
        axes.set_xticks(range(0, num_layers, 1 + num_layers // 10))
        axes.set_title(f"mean, middle 80 %; {len(routed.tokens)} tokens", fontsize=8)
        self.artists = [self.spread, self.line]

    def show(self, routed: RoutedPassage, layer: int | None) -> None:
        self.line.set_ydata(routed.counts.mean(axis=1))
        low, high = np.percentile(routed.counts, _SPREAD, axis=1)
        self.spread.set_segments([[(i, a), (i, b)] for i, (a, b) in enumerate(zip(low, high, strict=True))])


class _Weights:
    """Router weight by the expert's rank in its token, beside the model's own."""

    def __init__(self, axes: Axes, routed: RoutedPassage, layer: int | None) -> None:
        ranks = range(1, routed.most + 1)
        self.bars = axes.bar(ranks, 0, color=BLUE, animated=True, label="kept (0 if dropped)")
        self.spread = axes.vlines(ranks, 0, 0, color=RED, linewidth=1.2, animated=True)
        top_k = routed.own_weights.shape[-1]
        (self.own,) = axes.plot(
            range(1, top_k + 1), np.zeros(top_k), "_", color=BLACK, markersize=13, markeredgewidth=2, animated=True,
            label=f"own top-{top_k}, temperature 1",
        )  # fmt: skip
        axes.set(xlabel="rank of the expert", ylabel="router weight", ylim=(0, _weight_limit(routed, layer)))
        axes.set(xlim=(0.4, routed.most + 0.6), xticks=range(1, routed.most + 1, 1 + routed.most // 10))
        axes.set_title(f"mean, middle 80 %; {routed.sample(layer)}", fontsize=8)
        axes.legend(fontsize=7.5, loc="upper right")
        self.label = axes.text(0.97, 0.62, "", transform=axes.transAxes, ha="right", animated=True)
        self.artists = [*self.bars, self.spread, self.own, self.label]

    def show(self, routed: RoutedPassage, layer: int | None) -> None:
        kept, own = _by_rank(routed.weights, routed, layer), _by_rank(routed.own_weights, routed, layer)
        means = np.zeros(routed.most)
        means[: kept.shape[1]] = kept.mean(axis=0)
        for bar, mean in zip(self.bars, means, strict=True):
            bar.set_height(mean)
        low, high = np.percentile(kept, _SPREAD, axis=0)
        self.spread.set_segments([[(i, a), (i, b)] for i, (a, b) in enumerate(zip(low, high, strict=True), 1)])
        self.own.set_ydata(own.mean(axis=0))
        self.label.set_text(f"sum kept {means.sum():.2f}, own {own.mean(axis=0).sum():.2f}")


def _by_rank(weights: np.ndarray, routed: RoutedPassage, layer: int | None) -> np.ndarray:
    """Weights [pairs, slots] of the (token, layer) pairs that a view shows."""
    return weights[routed.layers(layer)].reshape(-1, weights.shape[-1])


def _weight_limit(routed: RoutedPassage, layer: int | None) -> float:
    """Upper end of the weights' axis, from a few, so that it does not move with every slider."""
    largest = max(np.percentile(_by_rank(w, routed, layer)[:, 0], 90) for w in (routed.weights, routed.own_weights))
    return next((limit for limit in (0.25, 0.5, 0.75) if 1.05 * largest <= limit), 1.05)


def _draw_one(panel, routed: RoutedPassage, layer: int | None) -> Figure:
    with matplotlib.rc_context(STYLE):
        fig = Picture(figsize=(3.6, 2.6), layout="constrained")
        panel(fig.add_subplot(axisbelow=True), routed, layer).show(routed, layer)
    return fig


def draw_passage_histogram(routed: RoutedPassage, layer: int | None = None) -> Figure:
    """How many of the passage's (token, layer) pairs, or tokens of one layer, get k experts."""
    return _draw_one(_Histogram, routed, layer)


def draw_passage_layers(routed: RoutedPassage, layer: int | None = None) -> Figure:
    """Experts per token in each layer; `layer` is marked."""
    return _draw_one(_Layers, routed, layer)


def draw_passage_weights(routed: RoutedPassage, layer: int | None = None) -> Figure:
    """Router weights of the kept experts, in one layer or over all, beside those of the model's own."""
    return _draw_one(_Weights, routed, layer)


_CHARTS_HEIGHT = 2.5  # inches


def _put_charts(fig: Figure, routed: RoutedPassage, layer: int | None, bottom: float = 0.0) -> list:
    """The three panels in a row, above the fraction `bottom` of the figure."""
    share = 1 - bottom
    places = [(left, bottom + 0.2 * share, 0.26, 0.67 * share) for left in (0.065, 0.395, 0.73)]
    kinds = (_Histogram, _Layers, _Weights)
    return [kind(fig.add_axes(place, axisbelow=True), routed, layer) for kind, place in zip(kinds, places, strict=True)]


def draw_passage(routed: RoutedPassage, layer: int | None = None) -> Figure:
    """All views of a passage in one figure: the three charts, and below them the coloured text."""
    with matplotlib.rc_context(STYLE):
        rows = wrap(routed.tokens)
        text = text_height(rows)
        height = _CHARTS_HEIGHT + text
        fig = Picture(figsize=(WIDTH, height))
        for panel in _put_charts(fig, routed, layer, bottom=text / height):
            panel.show(routed, layer)
        put_text(fig.add_axes((0.01, 0, 0.98, text / height)), routed, layer, rows)
    return fig


class PassageCharts:
    """The three charts as a PNG, redrawn in milliseconds while a slider moves.

    Axes, ticks and labels take matplotlib longest. They are drawn once and kept as an image, and only bars and lines
    are drawn anew on top, until the passage, the layer or a limit changes. The picture is a function of what is shown
    alone: the same decisions give the same bytes, whatever was shown before.

        charts = PassageCharts()
        image.value = charts.png(passage.route(BH(0.1)))
    """

    def __init__(self) -> None:
        self._frame = None

    def png(self, routed: RoutedPassage, layer: int | None = None) -> bytes:
        """The charts of one passage; parameters as for `draw_passage`."""
        frame = (routed.sample(layer), layer, len(routed.counts), routed.most, _weight_limit(routed, layer))
        if frame != self._frame:
            self._draw_frame(routed, layer)
            self._frame = frame
        self._canvas.restore_region(self._background)
        for panel in self._panels:
            panel.show(routed, layer)
            for artist in panel.artists:
                artist.axes.draw_artist(artist)
        buffer = BytesIO()
        options = {"metadata": {"Software": None}, "pil_kwargs": {"compress_level": 1}}
        imsave(buffer, self._canvas.buffer_rgba(), format="png", **options)
        return buffer.getvalue()

    def _draw_frame(self, routed: RoutedPassage, layer: int | None) -> None:
        with matplotlib.rc_context(STYLE):
            fig = Figure(figsize=(WIDTH, _CHARTS_HEIGHT), dpi=100)
            self._canvas = FigureCanvasAgg(fig)
            self._panels = _put_charts(fig, routed, layer)
            self._canvas.draw()
            self._background = self._canvas.copy_from_bbox(fig.bbox)
