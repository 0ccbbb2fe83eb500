"""One passage: its decisions are those of the patch that watches, and its views show them."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from matplotlib.colors import to_rgb

from bhlib import RoutingPatch, load_demo
from bhlib import figures as views
from bhlib.explain import explain
from bhlib.explain_token import explain_token
from bhlib.figures import Passage, PassageCharts
from bhlib.figures.passage_text import count_colors
from bhlib.looks import BLUE, ORANGE
from bhlib.rules import BH, TopK

TEXT = "def f(x):\n    return '<b>$x$</b>' & x\n\nIt was a bright morning, and she had nothing to say.\n" * 3


@pytest.fixture(scope="module")
def demo():
    return load_demo()


@pytest.fixture(scope="module")
def passage(demo):
    return Passage.read(*demo, TEXT)


@pytest.fixture(scope="module")
def routed(passage):
    return passage.route(BH(0.2))


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_decisions_are_those_that_analyze_mode_records(demo, passage, temperature):
    rule = BH(0.2, max_k=12)
    with RoutingPatch(demo[0], rule, mode="analyze", temperature=temperature) as patch, torch.no_grad():
        demo[0](input_ids=passage.token_ids)
    routed = passage.route(rule, temperature)
    np.testing.assert_array_equal(routed.counts, patch.records.counts().T)
    frame = patch.records.to_frame().sort_values(["layer", "position"])
    for mine, recorded in zip(routed.weights.reshape(-1, 12), frame["weights"], strict=True):
        np.testing.assert_allclose(mine[: len(recorded)], recorded, rtol=1e-6)


def test_own_weights_are_those_of_static_top_k_at_temperature_1(passage):
    np.testing.assert_array_equal(passage.route(TopK(8)).weights, passage.route(BH(0.01), 3.0).own_weights)


def test_temperature_changes_weights_and_no_count(passage, routed):
    hot = passage.route(BH(0.2), 2.0)
    np.testing.assert_array_equal(hot.counts, routed.counts)
    assert hot.weights[..., 0].mean() < 0.9 * routed.weights[..., 0].mean()


def test_a_long_text_is_cut_and_one_without_tokens_refused(demo):
    assert len(Passage.read(*demo, TEXT, max_tokens=5).tokens) == 5
    with pytest.raises(ValueError, match="the passage has 0 tokens, but needs 2 or more: type a few words"):
        Passage.read(*demo, "")


def test_a_layer_that_is_not_there_is_named(routed):
    with pytest.raises(ValueError, match=r"layer must lie in 0\.\.7, or be None for all layers, got 8"):
        views.passage_html(routed, layer=8)


class Spans(HTMLParser):
    """The (style, title, text) of every span; fails on markup that the passage itself brought in."""

    def __init__(self):
        super().__init__()
        self.spans = []

    def handle_starttag(self, tag, attrs):
        assert tag in ("div", "span")
        if tag == "span":
            self.spans.append([dict(attrs)["style"], dict(attrs).get("title"), ""])

    def handle_data(self, data):
        if self.spans:
            self.spans[-1][2] += data


@pytest.mark.parametrize("layer", [None, 3])
def test_html_gives_every_token_its_colour_and_its_number(routed, layer):
    parser = Spans()
    parser.feed(views.passage_html(routed, layer))
    tokens = [span for span in parser.spans if span[1] is not None]
    means = routed.counts[3] if layer == 3 else routed.counts.mean(axis=0)
    assert [text.replace("⏎\n", "\n") for _, _, text in tokens] == routed.tokens
    assert [float(title.split()[0]) for _, title, _ in tokens] == pytest.approx(means, abs=0.006)
    colors = count_colors(routed.most)
    for (style, _, _), mean in zip(tokens, means, strict=True):
        assert style == "background:{};color:{}".format(*colors[round(mean)])
    legend = [span for span in parser.spans if span[1] is None]
    assert [int(text.split()[0]) for _, _, text in legend] == list(range(9))


class Table(HTMLParser):
    """The rows of a table: (style of the row, texts of its cells, style of the bar in it)."""

    def __init__(self):
        super().__init__()
        self.rows, self.inside = [], False

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append([dict(attrs)["style"], [], None])
        elif tag == "td":
            self.rows[-1][1].append("")
            self.inside = True
        elif tag == "span":
            self.rows[-1][2] = dict(attrs)["style"]

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "td"

    def handle_data(self, data):
        if self.inside:
            self.rows[-1][1][-1] += data


@pytest.mark.parametrize("max_k", [2, 8])
def test_a_decision_as_html_shows_every_row_that_matters(demo, passage, max_k):
    table = explain_token(demo[0], BH(0.2, max_k=max_k), passage.token_ids, 7, 4)
    parser = Table()
    parser.feed(views.decision_html(table))
    (_, header, _), *rows = parser.rows
    assert header[-2:] == ["r", "along"]
    last = max(table["found"].sum(), table["kept"].sum(), table.loc[table["own"], "rank"].max())
    assert len(rows) == last + 2 and table["kept"].sum() <= max_k
    for (style, cells, bar), expected in zip(rows, table.itertuples(), strict=False):
        assert [int(cells[0]), int(cells[1])] == [expected.rank, expected.expert]
        assert [float(cell) for cell in cells[-2:]] == pytest.approx([expected.r, expected.along], abs=6e-4)
        assert ("#deebf7" in style) == expected.kept == (BLUE in bar) == (ORANGE not in bar)
        assert float(re.search(r"width:([\d.]+)em", bar).group(1)) == pytest.approx(5 * min(expected.r, 1), abs=0.006)
    along = table.loc[table["kept"], "along"].sum()
    assert f"the model's own 8 make 1.00 together, the kept ones make <b>{along:.2f}</b>" in views.decision_html(table)


def test_a_decision_as_html_without_measurement(passage):
    table = explain(BH(0.2), passage.router_logits[4, 7], 4)
    assert "along" not in views.decision_html(table) and "Measured" not in views.decision_html(table)


def luminance(color):
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
    return np.dot(linear, [0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize("most", [8, 16])
def test_colours_are_ordered_in_grey_print_and_readable(most):
    """4.5 : 1 is the contrast that WCAG asks of text."""
    backgrounds, inks = zip(*count_colors(most), strict=True)
    light = [luminance(color) for color in backgrounds]
    assert np.all(np.diff(light) < 0)
    for background, ink in zip(light, map(luminance, inks), strict=True):
        assert (max(background, ink) + 0.05) / (min(background, ink) + 0.05) > 4.5


def test_histogram_shows_the_counts_of_all_layers_or_of_one(routed):
    for layer, counts in ((None, routed.counts), (3, routed.counts[3])):
        axes = views.draw_passage_histogram(routed, layer).axes[0]
        shares = [100 * (counts == k).mean() for k in range(9)]
        assert [bar.get_height() for bar in axes.patches] == pytest.approx(shares)
        assert f"mean {counts.mean():.2f}" in [text.get_text() for text in axes.texts]
        assert re.search(rf"{len(routed.tokens)} tokens", axes.get_title())


def test_profile_and_weights_show_means(routed):
    line = views.draw_passage_layers(routed, 2).axes[0].lines[-1]
    assert line.get_ydata() == pytest.approx(routed.counts.mean(axis=1))
    axes = views.draw_passage_weights(routed, 2).axes[0]
    assert [bar.get_height() for bar in axes.patches] == pytest.approx(routed.weights[2].mean(axis=0))
    assert axes.lines[0].get_ydata() == pytest.approx(routed.own_weights[2].mean(axis=0))


@pytest.mark.parametrize("layer", [None, 3])
def test_every_drawing_says_what_its_axes_are_and_how_many_tokens(routed, layer):
    for draw in (views.draw_passage_histogram, views.draw_passage_layers, views.draw_passage_weights):
        (axes,) = draw(routed, layer).axes
        assert axes.get_xlabel() and axes.get_ylabel() and "tokens" in axes.get_title()
    for draw in (views.draw_passage, views.draw_passage_text):
        texts = [text.get_text() for text in draw(routed, layer).axes[-1].texts]
        assert any(f"{len(routed.tokens)} tokens" in text for text in texts)
    assert pyplot.get_fignums() == []


def test_drawn_text_holds_every_character(routed):
    texts = [text.get_text() for text in views.draw_passage_text(routed).axes[0].texts]
    shown = "".join(texts[: texts.index(" 0 ")])
    assert shown == "".join(routed.tokens).replace("\n", "⏎")


def test_live_charts_depend_on_what_is_shown_alone(passage, routed):
    charts = PassageCharts()
    first = charts.png(routed)
    assert charts.png(passage.route(BH(0.01))) != first
    charts.png(passage.route(BH(0.9, max_k=16)), 3)
    assert charts.png(routed) == first == PassageCharts().png(routed)
