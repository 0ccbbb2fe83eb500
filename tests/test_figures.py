"""Figures: their data, that each can be drawn from its table alone, and that a check finds what has moved."""

import dataclasses

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.axes import Axes
from scipy.stats import spearmanr

from bhlib import evaluation, figures
from bhlib.__main__ import main
from bhlib.comparisons import resample
from bhlib.figures import registry, tables
from bhlib.figures.runs import Run, observe, rank_correlation
from bhlib.patching import RoutingPatch
from bhlib.rules import BH, FAMILIES, KeepMass, TopK
from bhlib.weighting import probabilities


def test_stepup_table_is_the_papers():
    table = figures.compute_stepup()
    assert len(table) == 15 and table["rejected_bh"].sum() == 4 and table["rejected_bonferroni"].sum() == 3
    assert table["bh"].iloc[3] == pytest.approx(0.05 * 4 / 15)


@pytest.fixture(scope="module")
def small_study():
    """The embedded model on short texts of some domains: seconds instead of minutes."""
    study = figures.Study()
    study.sequences_per_domain, study.window = 1, 64
    study.test = {domain: study.test[domain][:, :64] for domain in ("manuals", "novels", "python", "scripture")}
    return study


def refuse_series(errorbar):
    """`Axes.errorbar`, but not of a tuple of Series: matplotlib 3.10 warns of it where a family has one point."""

    def checked(self, x, y, yerr=None, xerr=None, **options):
        series = [part for error in (xerr, yerr) if isinstance(error, tuple) for part in error]
        assert not any(isinstance(part, pd.Series) for part in series)
        return errorbar(self, x, y, yerr, xerr, **options)

    return checked


@pytest.mark.parametrize(
    "name", sorted(name for name, spec in figures.FIGURES.items() if spec.is_computed(named=False))
)
def test_every_figure_computes_saves_and_redraws(name, small_study, tmp_path, monkeypatch):
    monkeypatch.setattr(Axes, "errorbar", refuse_series(Axes.errorbar))
    spec = figures.FIGURES[name]
    before = dict(matplotlib.rcParams)
    (path,) = figures.make_figures(tmp_path, [name], small_study)
    assert dict(matplotlib.rcParams) == before  # the user's style is untouched
    assert path.with_suffix(".png").stat().st_size > 5_000 and path.with_suffix(".pdf").stat().st_size > 5_000
    table = tables.read_table(path)
    assert set(spec.tolerance) <= set(table.columns)
    fig = spec.draw(table)
    labels = [(axes.get_xlabel(), axes.get_ylabel()) for axes in fig.axes if axes.axison]
    assert not labels or fig.get_supxlabel() or any(x for x, _ in labels) or fig.axes[0].get_xticklabels()
    assert not labels or fig.get_supylabel() or any(y for _, y in labels)


def test_families_are_tried_on_the_validation_split(small_study):
    table = figures.compute_families_tried(small_study, mean_k=(4,), length=32, per_domain=1)
    assert table["sequences"].eq(9).all() and table["family"].is_unique
    assert table["mean_k"].sub(4).abs().median() < 0.3
    assert {"BH, Dirichlet 4", "BH, KDE, log_prob", "threshold", "top-p"} <= set(table["family"])
    figures.draw_families_tried(table)


def test_the_whole_test_split_is_compared_with_static_and_with_the_threshold(small_study, tmp_path, monkeypatch):
    study = figures.Study(cache=tmp_path)
    study.model_and_tokenizer = small_study.model_and_tokenizer
    study.calibration_logits = small_study.calibration_logits
    assert sum(len(sequences) for sequences in study.whole_test.values()) == 1008
    study.whole_test = small_study.test
    table = figures.compute_whole_test_split(study)
    monkeypatch.setattr(
        evaluation, "evaluate_patched", lambda *_, **__: pytest.fail("a finished cell was computed again")
    )
    pd.testing.assert_frame_equal(figures.compute_whole_test_split(study), table)
    assert {"BH, fitted null", "fixed cut, fitted null"} <= set(table["family"]) <= FAMILIES.keys()
    assert table["sequences"].eq(4).all() and len(table) == 5 * table["family"].nunique()
    assert table["units"].eq(4).all() and table["level"].isna().eq(table["family"] == "static per layer").all()
    threshold = table[table["family"] == "threshold"]
    assert threshold[["threshold_difference", "threshold_low", "threshold_high"]].eq(0).all(axis=None)
    stepup = table[table["stepup_difference"].notna()]
    assert set(stepup["family"]) == {"BH", "BH, fitted null", "BH, layer weights"}
    default = table[table["family"] == "BH"]
    assert np.allclose(default["stepup_difference"], default["threshold_difference"], equal_nan=True)
    monkeypatch.setattr(Axes, "errorbar", refuse_series(Axes.errorbar))
    figures.draw_whole_test_split(table)


def test_a_slow_figure_is_computed_only_by_name(made, monkeypatch):
    name = "count_distribution"
    slow = dataclasses.replace(figures.FIGURES[name], compute=lambda study: pytest.fail("it was computed"), slow=True)
    monkeypatch.setattr(registry, "FIGURES", {name: slow})
    figures.make_figures(made)
    assert figures.check_figures(made).empty
    with pytest.raises(pytest.fail.Exception, match="it was computed"):
        figures.make_figures(made, [name])


def test_unknown_figure_is_named(tmp_path):
    with pytest.raises(ValueError, match="no figure is called 'nothing'; there are: .*stepup_1995"):
        figures.make_figures(tmp_path, only=["nothing"])


# -- redraw and check --------------------------------------------------------------------------------------------------

CHEAP = ["stepup_1995", "token_layer_map", "count_distribution"]


@pytest.fixture(scope="module")
def made(small_study, tmp_path_factory):
    """A folder with some figures of the small demo."""
    folder = tmp_path_factory.mktemp("figures")
    figures.make_figures(folder, CHEAP, small_study)
    return folder


@pytest.fixture
def no_model(monkeypatch):
    monkeypatch.setattr("bhlib.figures.study.load_demo", lambda: pytest.fail("the model was loaded"))


def change(path, row, column, value):
    """Rewrite one cell of a CSV; returns what it was."""
    table = tables.read_table(path)
    was = table.loc[row - 1, column]
    table.loc[row - 1, column] = value
    table.to_csv(path, index=False)
    return was


def test_redraw_needs_no_model_and_writes_no_table(made, no_model):
    before = {path: path.read_bytes() for path in made.glob("*.csv")}
    for path in made.glob("*.p*"):
        path.unlink()
    main(["figures", "--redraw", "--folder", str(made), *(word for name in CHEAP for word in ("--only", name))])
    assert {path: path.read_bytes() for path in made.glob("*.csv")} == before
    assert sorted(path.stem for path in made.glob("*.png")) == sorted(CHEAP)


def test_redraw_without_a_table_says_what_is_missing(tmp_path, no_model):
    with pytest.raises(FileNotFoundError, match="has no CSV of stepup_1995.*python -m bhlib figures"):
        figures.redraw_figures(tmp_path, ["stepup_1995"])


def test_check_passes_on_what_was_just_computed(made, small_study):
    before = {path: path.stat().st_mtime_ns for path in made.iterdir()}
    assert figures.check_figures(made, CHEAP, small_study).empty
    assert {path: path.stat().st_mtime_ns for path in made.iterdir()} == before


def test_check_names_what_has_moved(tmp_path, capsys):
    (path,) = figures.make_figures(tmp_path, ["stepup_1995"])
    main(["figures", "--check", "--folder", str(tmp_path), "--only", "stepup_1995"])
    assert "every number is as it was" in capsys.readouterr().out
    was = change(path, 4, "bh", 0.5)
    with pytest.raises(SystemExit) as caught:
        main(["figures", "--check", "--folder", str(tmp_path), "--only", "stepup_1995"])
    message = caught.value.code  # a text: printed, and exit status 1
    assert message.startswith("stepup_1995.csv: 1 cell moved")
    assert f"row 4, bh: was 0.5, is {was:.6g}, tolerance 0.0006" in message


def test_long_reports_are_cut():
    moved = pd.DataFrame({"figure": "x", "row": range(1, 31), "column": "y", "was": 0.0, "now": 1.0, "tolerance": 0.1})
    lines = tables.report(moved).splitlines()
    assert len(lines) == 12 and lines[0] == "x.csv: 30 cells moved beyond tolerance" and lines[-1] == "  and 20 more"


@pytest.mark.parametrize(
    ("was", "now", "tolerance", "moved"),
    [
        (1.0, 1.001, {}, False),  # within the default
        (1.0, 1.002, {}, True),
        (1.0, 1.002, {"x": 0.01}, False),
        (0.0, 1.5e-4, {}, True),
        (4, 5, {}, True),  # whole numbers may not move
        (4, 5, {"x": 1}, False),
        (np.nan, np.nan, {}, False),
        (1.0, np.nan, {}, True),
        (np.inf, np.inf, {}, False),
        (True, False, {"x": 1}, True),
        ("a", "b", {}, True),
        ("a", "b", {"x": figures.FREE}, False),
        (1.0, 100.0, {"x": figures.FREE}, False),
    ],
)
def test_tolerances(was, now, tolerance, moved):
    found = tables.compare_tables(pd.DataFrame({"x": [was]}), pd.DataFrame({"x": [now]}), tolerance)
    assert len(found) == moved


def test_tables_of_another_shape_have_moved():
    table = pd.DataFrame({"x": [1, 2]})
    (shorter,) = tables.compare_tables(table, table[:1], {}).itertuples()
    assert (shorter.column, shorter.was, shorter.now) == ("number of rows", 2, 1)
    (renamed,) = tables.compare_tables(table, table.rename(columns={"x": "y"}), {}).itertuples()
    assert (renamed.column, renamed.was, renamed.now) == ("names of columns", "x", "y")


def test_what_was_measured_elsewhere_is_only_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(registry, "FIGURES", {"gpu": registry.FIGURES["stepup_1995"]})
    registry.figure("gpu", None)(figures.draw_stepup)
    with pytest.raises(FileNotFoundError, match="has no CSV of gpu"):
        figures.make_figures(tmp_path)
    figures.compute_stepup().to_csv(tmp_path / "gpu.csv", index=False)
    before = (tmp_path / "gpu.csv").read_bytes()
    assert figures.make_figures(tmp_path) == [tmp_path / "gpu.csv"]
    assert (tmp_path / "gpu.png").exists() and (tmp_path / "gpu.csv").read_bytes() == before
    assert figures.check_figures(tmp_path).empty
    assert "gpu: not checked (measured elsewhere)" in capsys.readouterr().out


def test_tokens_that_look_like_missing_numbers_stay_text(tmp_path):
    pd.DataFrame({"token": ["null", "NA", "x"], "count": [1.0, np.nan, 3.0]}).to_csv(tmp_path / "x.csv", index=False)
    table = tables.read_table(tmp_path / "x.csv")
    assert table["token"].tolist() == ["null", "NA", "x"] and table["count"].isna().tolist() == [False, True, False]


# -- what the tables are made of ---------------------------------------------------------------------------------------


def test_a_run_agrees_with_the_records_of_the_whole_text(small_study):
    text = {domain: sequences[:, :32] for domain, sequences in list(small_study.test.items())[:2]}
    run = observe(small_study.model, text, small_study.test_documents, BH(0.1))
    both = torch.cat(list(text.values()))
    with RoutingPatch(small_study.model, BH(0.1)) as patch, torch.no_grad():
        output = small_study.model(input_ids=both, labels=both, use_cache=False)
    assert run.domain.tolist() == list(text) and run.document.tolist() == [0, 0]
    assert run.loss.mean() == pytest.approx(output.loss.item(), abs=1e-4)
    assert run.counts.shape == (2, 32, 8) and run.counts.sum() == pytest.approx(patch.records.counts().sum(), abs=2)
    assert np.abs(run.coactivation.sum(axis=0) - patch.records.coactivation()).sum() <= 60  # a flip moves 2 rows of 8
    assert (np.diagonal(run.coactivation, axis1=2, axis2=3).sum(axis=2) == run.counts.sum(axis=1)).all()


def test_a_run_resamples_its_documents():
    domain, document = np.array(["a", "a", "a", "b", "b", "b"]), np.array([0, 0, 1, 0, 1, 2])
    run = Run(domain, document, *np.zeros((3, 6)))
    assert (run.drawn.units, run.drawn_within("a").units, run.drawn_within("b").units) == (5, 2, 3)
    assert np.allclose(run.drawn.weights[:, 0], run.drawn.weights[:, 1])
    assert run.drawn_within("b").weights.shape == (2001, 3)


def test_rank_correlation_is_spearmans():
    generator = np.random.default_rng(2)
    x = generator.normal(size=(30, 40)).round(1)  # with ties
    y = (x + generator.normal(size=(30, 40))).round(1)
    found = rank_correlation(x, y, resample(["x"] * 30, range(30)))
    assert found["value"] == pytest.approx(spearmanr(x.ravel(), y.ravel()).statistic)
    assert 0.4 < found["low"] < found["value"] < found["high"] < 0.9


def test_kept_mass_is_that_of_the_models_own_experts():
    logits = torch.randn(50, 64, generator=torch.Generator().manual_seed(3)) * 2
    plain, scaled = BH(0.05)(logits), KeepMass(BH(0.05))(logits)
    assert torch.equal(plain.experts, scaled.experts) and torch.equal(plain.counts, scaled.counts)
    for row, weights in enumerate(scaled.weights):
        mass = probabilities(logits)[row].sort(descending=True).values[:8].sum()
        assert weights.sum().item() == pytest.approx(mass.item(), rel=1e-5)
        ratio = weights[: scaled.counts[row]] / plain.weights[row, : plain.counts[row]]
        assert torch.allclose(ratio, ratio[:1].expand_as(ratio))


def test_the_figures_tell_what_was_routed(small_study):
    """Averages of the tables, against the counts of the run that they are made of."""
    run = small_study.runs["BH 0.05"]
    layers = figures.compute_experts_per_layer(small_study).query("domain == 'all'")
    assert np.allclose(layers["value"], run.counts.mean(axis=(0, 1)))
    load = figures.compute_expert_load(small_study)
    shares = load.query("kind == 'load'").groupby(["rule", "layer"])["value"]
    assert np.allclose(shares.sum(), 1) and shares.apply(lambda part: part.is_monotonic_decreasing).all()
    # Of 8 experts, 7 are not the one that is asked about: 7 of 63 others.
    assert np.allclose(load.query("kind == 'pairs' and rule == 'top-8'")["value"], 7 / 63)
    tokens = figures.compute_token_loss(small_study).query("kind == 'bin' and domain == 'all'")
    assert tokens["value"].mean() == pytest.approx(run.counts[:, :-1].mean(), rel=0.01)
    assert tokens["loss"].is_monotonic_increasing
    assert small_study.runs["top-8"].counts.min() == TopK(8).k


def test_an_empty_cell_among_words_has_not_moved():
    was = pd.DataFrame({"equal": [True, None, "word"]})
    assert tables.compare_tables(was, was.copy(), {}).empty
    assert len(tables.compare_tables(was, was.assign(equal=[True, "word", None]), {})) == 2
