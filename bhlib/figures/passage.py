"""One passage: how many experts each of its tokens gets, and with which weights.

A `Passage` is read once and routed by any rule, without another pass over the model; every view of the result is a
function of one argument, for notebooks, scripts and sliders alike.

    passage = Passage.read(model, tokenizer, "It was a bright morning, and she had")
    draw_passage(passage.route(BH(alpha=0.1)))

What is shown is what a rule *would* select from the logits of the model's own routing (as in analyze mode). Under a
patch the logits of deeper layers differ somewhat, since the layers before them have routed differently.
"""

from dataclasses import dataclass
from functools import cached_property
from html import escape
from io import BytesIO

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PatchCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.patches import Rectangle
from torch import Tensor

from bhlib.calibration import collect_router_logits
from bhlib.discovery import find_moe_layers
from bhlib.figures.drawing import STYLE, Picture
from bhlib.looks import BLACK, BLUE, RED
from bhlib.rules import Rule, TopK

#: The share of tokens that a bar of spread covers: from the 10th to the 90th percentile.
_SPREAD = (10, 90)
_LINE_BREAK = "⏎"


@dataclass(frozen=True)
class RoutedPassage:
    """What a rule decides for each token of a passage in each layer, beside the model's own top-k.

    Attributes
    ----------
    tokens : list of str
        The text of each token.
    counts : ndarray [layers, tokens], int64
        Experts that the rule selects.
    weights : ndarray [layers, tokens, slots], float32
        Their router weights, best expert first; 0 in an empty slot.
    own_weights : ndarray [layers, tokens, top_k], float32
        Router weights of the model's own experts, at temperature 1.
    """

    tokens: list[str]
    counts: np.ndarray
    weights: np.ndarray
    own_weights: np.ndarray

    @property
    def most(self) -> int:
        """The largest number of experts that the rule or the model can give to a token."""
        return max(self.weights.shape[-1], self.own_weights.shape[-1])

    def layers(self, layer: int | None) -> list[int]:
        """Indices of the layers that a view shows: one, or all for None. Raises ValueError if there is none such."""
        if layer is not None and not 0 <= layer < len(self.counts):
            raise ValueError(f"layer must lie in 0..{len(self.counts) - 1}, or be None for all layers, got {layer}.")
        return list(range(len(self.counts))) if layer is None else [layer]

    def sample(self, layer: int | None) -> str:
        """How much a view shows, in words."""
        size = f"{len(self.tokens)} tokens"
        return f"{size} × {len(self.counts)} layers" if layer is None else f"{size}, layer {layer}"


@dataclass(frozen=True)
class Passage:
    """A passage, and the logits that the routers of an unpatched model give to its tokens.

    Attributes
    ----------
    token_ids : Tensor [1, tokens], int64
    tokens : list of str
    router_logits : Tensor [layers, tokens, experts], float32, on the CPU
    top_k : int
        Experts per token of the model itself.
    weighting : str
        How the model makes weights of scores (`bhlib.weighting.WEIGHTINGS`).
    """

    token_ids: Tensor
    tokens: list[str]
    router_logits: Tensor
    top_k: int
    weighting: str

    @classmethod
    def read(cls, model, tokenizer, text: str, max_tokens: int = 512) -> "Passage":
        """Run a model over a text, cut after `max_tokens` tokens.

        Raises
        ------
        ValueError
            If the text has fewer than two tokens: the first has no loss, and a picture of nothing shows nothing.
        """
        token_ids = tokenizer(text, return_tensors="pt")["input_ids"].long()[:, :max_tokens]
        if token_ids.shape[1] < 2:
            raise ValueError(
                f"the passage has {token_ids.shape[1]} tokens, but needs 2 or more: type a few words, or pick a passage"
            )
        layer = find_moe_layers(model)[0]
        router_logits = collect_router_logits(model, token_ids, progress=False)
        tokens = [tokenizer.decode([token]) for token in token_ids[0].tolist()]
        return cls(token_ids, tokens, router_logits, layer.top_k, layer.weighting)

    def route(self, rule: Rule, temperature: float = 1.0) -> RoutedPassage:
        """What a rule would decide; `temperature` divides the logits in the softmax of the weights."""
        rule.check_model(len(self.router_logits), self.router_logits.shape[-1])
        routings = [
            rule(logits, layer, weighting=self.weighting, temperature=temperature)
            for layer, logits in enumerate(self.router_logits)
        ]
        return RoutedPassage(
            self.tokens,
            np.stack([routing.counts.numpy() for routing in routings]),
            np.stack([routing.weights.numpy() for routing in routings]),
            self._own_weights,
        )

    @cached_property
    def _own_weights(self) -> np.ndarray:
        own = TopK(self.top_k)
        return np.stack([own(logits, weighting=self.weighting).weights.numpy() for logits in self.router_logits])


# -- the text ------------------------------------------------------------------------------------------------------


def count_colors(most: int) -> list[tuple[str, str]]:
    """Background and ink for 0 to `most` experts: white to dark blue, ordered by lightness, so in grey print too."""
    backgrounds = matplotlib.colormaps["Blues"](np.linspace(0, 0.95, most + 1))
    backgrounds[0, :3] = 1
    luminance = backgrounds[:, :3] ** 2.2 @ [0.2126, 0.7152, 0.0722]
    inks = np.where(luminance > 0.18, BLACK, "#ffffff")  # whichever has the greater contrast
    return [(to_hex(background), str(ink)) for background, ink in zip(backgrounds, inks, strict=True)]


def passage_html(routed: RoutedPassage, layer: int | None = None) -> str:
    """The passage as HTML: each token on a colour that says how many experts it gets; the number on hover.

    Parameters
    ----------
    routed : RoutedPassage
    layer : int, optional
        Which layer; by default the mean over all, coloured by the nearest whole number.
    """
    chosen = routed.counts[routed.layers(layer)]
    means = chosen.mean(axis=0)
    styles = [f"background:{color};color:{ink}" for color, ink in count_colors(routed.most)]
    if layer is None:
        by_layer = [" ".join(map(str, column)) for column in chosen.T.tolist()]
        hovers = [f"{mean:.2f} experts on average; by layer: {row}" for mean, row in zip(means, by_layer, strict=True)]
    else:
        hovers = [f"{count} experts in layer {layer}" for count in chosen[0].tolist()]
    spans = [
        f'<span style="{styles[nearest]}" title="{hover}">{_visible(token)}</span>'
        for token, nearest, hover in zip(routed.tokens, np.rint(means).astype(int).tolist(), hovers, strict=True)
    ]
    legend = "".join(f'<span style="{style};padding:0 0.5em">{k}</span>' for k, style in enumerate(styles))
    what = "mean over the layers" if layer is None else f"layer {layer}"
    return (
        f'<div style="font-size:90%;margin-bottom:0.5em">experts per token {legend} '
        f"({what}; {len(routed.tokens)} tokens; rest the pointer on a token for its number)</div>"
        f'<div style="white-space:pre-wrap;font-family:monospace;line-height:1.5">{"".join(spans)}</div>'
    )


def _visible(token: str) -> str:
    return escape(token).replace("\n", f"{_LINE_BREAK}\n")


def draw_passage_text(routed: RoutedPassage, layer: int | None = None) -> Figure:
    """The same coloured text as a figure: for paper, and where no HTML is shown."""
    with matplotlib.rc_context(STYLE):
        rows = _wrap(routed.tokens)
        fig = Picture(figsize=(_WIDTH, _text_height(rows)))
        _put_text(fig.add_axes((0.01, 0, 0.98, 1)), routed, layer, rows)
    return fig


_WIDTH = 9.6  # inches
_COLUMNS = 116
_ROW = 0.19  # inches
_FONT = 9.2  # points, at which _COLUMNS characters of DejaVu Sans Mono, 0.602 em each, fill _WIDTH


def _text_height(rows: list) -> float:
    return _ROW * (len(rows) + 2)


def _wrap(tokens: list[str]) -> list[list[tuple[int, int, str]]]:
    """Rows of (column, number of the token, text), broken at line ends and before a token that would stand out."""
    rows, column = [[]], 0
    for number, token in enumerate(tokens):
        lines = [_printable(line) for line in token.replace("\t", "    ").split("\n")]
        for i, line in enumerate(lines):
            text = line + (_LINE_BREAK if i < len(lines) - 1 else "")
            if column + len(text) > _COLUMNS and column:
                rows.append([])
                column = 0
            if text:
                rows[-1].append((column, number, text[:_COLUMNS]))
                column += len(text)
            if i < len(lines) - 1:
                rows.append([])
                column = 0
    return rows


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else "·" for character in text)


def _put_text(axes: Axes, routed: RoutedPassage, layer: int | None, rows: list) -> None:
    """Coloured tokens, in a grid of characters."""
    axes.set(xlim=(0, _COLUMNS), ylim=(len(rows) + 2, 0))
    axes.axis("off")
    colors = count_colors(routed.most)
    nearest = np.rint(routed.counts[routed.layers(layer)].mean(axis=0)).astype(int)
    pieces = [
        (column, row + 2, colors[nearest[number]], text)
        for row, line in enumerate(rows)
        for column, number, text in line
    ]
    pieces += [(18 + 3 * k, 0.5, color, f"{k:2d} ") for k, color in enumerate(colors)]
    boxes = [Rectangle((column, row), len(text), 0.94, facecolor=color) for column, row, (color, _), text in pieces]
    axes.add_collection(PatchCollection(boxes, match_original=True, linewidth=0))
    look = {"family": "DejaVu Sans Mono", "fontsize": _FONT, "va": "center", "parse_math": False, "in_layout": False}
    # A text for each token, not for each row: hinting rounds the width of a glyph, and a long text leaves its boxes.
    for column, row, (_, ink), text in pieces:
        axes.text(column, row + 0.5, text, color=ink, **look)
    axes.text(0, 1, "experts per token", **look)
    what = "mean over the layers, rounded" if layer is None else f"layer {layer}"
    axes.text(19 + 3 * len(colors), 1, f"{what}; {len(routed.tokens)} tokens", **look)


# -- the charts ----------------------------------------------------------------------------------------------------
# Each is a panel: a frame that is set up once, and artists that are given new data. The artists are "animated", which
# to matplotlib means that a saved figure has them, and that a live one may draw them alone, over a copy of its frame.


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
        rows = _wrap(routed.tokens)
        text = _text_height(rows)
        height = _CHARTS_HEIGHT + text
        fig = Picture(figsize=(_WIDTH, height))
        for panel in _put_charts(fig, routed, layer, bottom=text / height):
            panel.show(routed, layer)
        _put_text(fig.add_axes((0.01, 0, 0.98, text / height)), routed, layer, rows)
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
            fig = Figure(figsize=(_WIDTH, _CHARTS_HEIGHT), dpi=100)
            self._canvas = FigureCanvasAgg(fig)
            self._panels = _put_charts(fig, routed, layer)
            self._canvas.draw()
            self._background = self._canvas.copy_from_bbox(fig.bbox)
