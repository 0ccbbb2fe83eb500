"""Figures: their data, and that each can be drawn from its table alone."""

import matplotlib
import pandas as pd
import pytest

from bhlib import figures


def test_stepup_table_is_the_papers():
    table = figures.compute_stepup()
    assert len(table) == 15 and table["rejected_bh"].sum() == 4 and table["rejected_bonferroni"].sum() == 3
    assert table["bh"].iloc[3] == pytest.approx(0.05 * 4 / 15)


@pytest.fixture(scope="module")
def small_demo():
    demo = figures.Demo()
    demo.sequences_per_domain = 1
    return demo


@pytest.mark.parametrize("name", sorted(figures.FIGURES))
def test_every_figure_computes_saves_and_redraws(name, small_demo, tmp_path):
    spec = figures.FIGURES[name]
    path = tmp_path / f"{name}.csv"
    spec.compute(small_demo).to_csv(path, index=False)
    before = dict(matplotlib.rcParams)
    fig = spec.draw(pd.read_csv(path))
    figures.save(fig, path)
    assert dict(matplotlib.rcParams) == before  # the user's style is untouched
    assert path.with_suffix(".png").stat().st_size > 5_000 and path.with_suffix(".pdf").stat().st_size > 5_000
    labels = [(axes.get_xlabel(), axes.get_ylabel()) for axes in fig.axes]
    assert fig.get_supxlabel() or any(x for x, _ in labels) or fig.axes[0].get_xticklabels()
    assert fig.get_supylabel() or any(y for _, y in labels)


def test_unknown_figure_is_named(tmp_path):
    with pytest.raises(ValueError, match="no figure is called 'nothing'; there are: .*stepup_1995"):
        figures.make_figures(tmp_path, only=["nothing"])
