"""The text of a passage, each token on a colour that says how many experts it gets: as HTML and as a figure."""

from html import escape

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from bhlib.figures.drawing import STYLE, Picture, ink_on
from bhlib.figures.passage import RoutedPassage

__all__ = ["draw_passage_text", "passage_html"]

_LINE_BREAK = "⏎"

WIDTH = 9.6  # inches
_COLUMNS = 116
_ROW = 0.19  # inches
_FONT = 9.2  # points, at which _COLUMNS characters of DejaVu Sans Mono, 0.602 em each, fill WIDTH


def count_colors(most: int) -> list[tuple[str, str]]:
    """Background and ink for 0 to `most` experts: white to dark blue, ordered by lightness, so in grey print too."""
    backgrounds = matplotlib.colormaps["Blues"](np.linspace(0, 0.95, most + 1))
    backgrounds[0, :3] = 1
    return [(to_hex(color), str(ink)) for color, ink in zip(backgrounds, ink_on(backgrounds), strict=True)]


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
        rows = wrap(routed.tokens)
        fig = Picture(figsize=(WIDTH, text_height(rows)))
        put_text(fig.add_axes((0.01, 0, 0.98, 1)), routed, layer, rows)
    return fig


def text_height(rows: list) -> float:
    return _ROW * (len(rows) + 2)


def wrap(tokens: list[str]) -> list[list[tuple[int, int, str]]]:
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


def put_text(axes: Axes, routed: RoutedPassage, layer: int | None, rows: list) -> None:
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
