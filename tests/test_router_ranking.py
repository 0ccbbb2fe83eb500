"""The figure of how well a router ranks its experts: correlations within tokens, means over documents."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from models import tiny_olmoe, tokens
from scipy.stats import spearmanr

from bhlib import figures
from bhlib.comparisons import resample
from bhlib.contributions import measure_contributions, one_changed
from bhlib.figures.ranking import _by_effect, _by_output, correlation_within

FIGURES = Path(__file__).resolve().parent.parent / "figures"


@pytest.fixture(scope="module")
def model():
    return tiny_olmoe(num_experts=16, num_experts_per_tok=4, num_hidden_layers=2)


TEXT = {"a": tokens(4, 12), "b": tokens(4, 12, seed=1)}
DOCUMENTS = {"a": np.array([0, 0, 1, 2]), "b": np.array([0, 1, 1, 1])}


def test_correlation_within_is_scipys():
    generator = np.random.default_rng(0)
    scores, values = generator.standard_normal((2, 3, 5, 8))
    values[0, 0, :3] = 0.5  # ties get their mean rank
    expected = [
        [spearmanr(a, b).statistic for a, b in zip(*rows, strict=True)] for rows in zip(scores, values, strict=True)
    ]
    np.testing.assert_allclose(correlation_within(scores, values), expected)
    assert correlation_within(scores, scores**3) == pytest.approx(1) and (correlation_within(scores, -scores) < 0).all()


def test_values_that_do_not_vary_rank_nothing():
    assert correlation_within(np.arange(4.0)[None], np.ones((1, 4))).tolist() == [0]


def test_correlations_with_contributions_are_those_of_a_loop_over_tokens(model):
    seen = measure_contributions(model, TEXT, documents=DOCUMENTS, progress=False)
    table = pd.DataFrame(_by_output(seen))
    found = table[table["kind"] == "correlation"].set_index(["measure", "among", "layer"])
    for among in ("all", "top-k"):
        for measure in ("r", "along"):
            of_layers = []
            for layer in range(2):
                values = []
                for token in range(96):
                    at = seen.selected[layer, token] if among == "top-k" else slice(None)
                    pair = seen.logits[layer, token][at], getattr(seen, measure)[layer, token][at]
                    values.append(spearmanr(*pair).statistic)
                of_layers.append(values)
                row = found.loc[(measure, among, str(layer))]
                assert row["value"] == pytest.approx(np.mean(values), abs=1e-9)
                assert row["tokens"] == 96 and row["documents"] == 5
            whole = found.loc[(measure, among, "all")]
            assert whole["value"] == pytest.approx(np.mean(of_layers), abs=1e-9)
            # Whole documents are drawn, with all of their tokens.
            drawn = resample(seen.domains, seen.documents)
            low, high = drawn.interval(drawn.means(np.mean(of_layers, axis=0)))
            assert (whole["low"], whole["high"]) == pytest.approx((low, high), abs=1e-9)
    ranks = table[table["kind"] == "rank"].pivot(index="rank", columns="measure", values="value")
    assert len(ranks) == 16 and (ranks["r by itself"].diff().dropna() < 0).all()
    assert ranks["r by itself"].sum() == pytest.approx(ranks["r by router"].sum(), rel=1e-5)
    best = seen.logits.argmax(dim=-1, keepdim=True)
    assert ranks.loc[1, "r by router"] == pytest.approx(seen.r.gather(-1, best).mean().item(), rel=1e-5)


@pytest.mark.parametrize(("among", "ranks"), [("all", 16), ("top-k", 4)])
def test_correlations_with_effects_are_those_of_a_loop_over_places(model, among, ranks):
    changed = one_changed(model, TEXT, num_tokens=10, ranks=ranks, documents=DOCUMENTS, progress=False)
    rows = pd.DataFrame(_by_effect(changed, among)).set_index("measure")
    kl, loss = [], []
    for _, part in changed.groupby(["domain", "sequence", "position", "layer"]):
        kl.append(spearmanr(-part["rank"], part["kl"]).statistic)
        # An expert is worth what is lost without it, and what is won with it.
        worth = [row.loss_change if row.selected else -row.loss_change for row in part.itertuples()]
        loss.append(spearmanr(-part["rank"], worth).statistic)
    assert rows.loc["kl", "value"] == pytest.approx(np.mean(kl)) and rows.loc["kl", "tokens"] == 10
    assert rows.loc["loss", "value"] == pytest.approx(np.mean(loss)) and rows["among"].eq(among).all()


def test_the_picture_says_what_it_is_of():
    table = pd.read_csv(FIGURES / "router_ranking.csv")
    fig = figures.draw_router_ranking(table)
    assert "1,600 tokens of 102 documents" in fig.get_suptitle() and "test split" in fig.get_suptitle()
    assert "the top 8 alone: 80 pairs, 51 documents" in fig.axes[2].get_title()
