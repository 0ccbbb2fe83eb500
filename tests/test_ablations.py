"""The figure of what each ingredient of a calibrated rule adds: its rules, its table, its drawing."""

import numpy as np
import pandas as pd
import pytest
import torch
from models import tiny_olmoe, tokens

from bhlib import evaluation, figures
from bhlib.comparisons import matched_difference
from bhlib.figures import ablations, ingredients
from bhlib.figures.ingredients import DEFAULT, INGREDIENTS, MEAN_NORMS, PLAIN, combinations, fit_one, named
from bhlib.levels import level_for_mean_experts, mean_experts
from bhlib.rules import BH, Threshold
from bhlib.texts import Text


class Few(figures.Study):
    """A study at two numbers of experts, of so little text that levels take all of it."""

    mean_ks = (2, 3)
    thin_logits = property(lambda self: self.calibration_logits)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A model with random weights on random text: sixteen experts, top 4, two layers, two documents a domain."""
    model = tiny_olmoe(num_experts=16, num_experts_per_tok=4, num_hidden_layers=2)
    splits = ("calibration", "validation", "test")
    text = Text(
        "random",
        {
            split: {domain: list(tokens(3, 96, seed=10 * i + j)) for j, domain in enumerate("ab")}
            for i, split in enumerate(splits)
        },
    )
    return Few(tmp_path_factory.mktemp("cells"), model=model, text=text, sequences=8, length=32)


@pytest.fixture(scope="module")
def table(study):
    return figures.compute_ablations(study, layer_weights=True)


def test_every_combination_is_there_at_every_number_of_experts(study, table):
    assert [named(parts) for parts in combinations()[:3]] == [PLAIN, "step-up", "layer weights"]
    assert len(combinations()) == 16
    families = {DEFAULT, *MEAN_NORMS.values(), *map(named, combinations())}
    static = table[table["against"] == "static top-k"]
    assert set(static["family"]) == families
    assert static.groupby("family")["wanted_k"].apply(set).map(lambda ks: ks == set(study.mean_ks)).all()
    assert static["mean_k"].sub(static["wanted_k"]).abs().max() < 0.3
    assert table["split"].eq("test").all() and table["sequences"].eq(18).all() and table["units"].eq(6).all()


def test_an_ingredient_is_credited_with_the_difference_from_the_same_rule_without_it(table):
    described = table.drop_duplicates("family").set_index("family")[["null", "statistic", "layer_weights", "step_up"]]
    columns = dict(zip(INGREDIENTS, described.columns, strict=True))
    for family, part in table.groupby("family"):
        without = {name.removeprefix("without ") for name in part["against"].unique() if name.startswith("without ")}
        if family in MEAN_NORMS.values():
            assert without == {"norms"}
            continue
        parts = {"step-up"} if family == DEFAULT else set(family.split(" + ")) - {PLAIN}
        assert without == parts
        for ingredient in parts if family != DEFAULT else ():
            rest = named(tuple(name for name in INGREDIENTS if name in parts - {ingredient}))
            differ = described.loc[family] != described.loc[rest]
            assert list(differ.index[differ]) == [columns[ingredient]]
    default = table[table["family"] == DEFAULT].pivot(index="wanted_k", columns="against", values="difference")
    assert np.allclose(default["without step-up"], default[PLAIN], equal_nan=True)


def test_rows_are_what_comparisons_of_the_stored_sweep_say(study, table, monkeypatch):
    seen = {}
    monkeypatch.setattr(
        evaluation, "evaluate_patched", lambda *_, **__: pytest.fail("a finished cell was computed again")
    )
    monkeypatch.setattr(ablations, "summarize_ablations", lambda frame, *_: seen.update(frame=frame))
    with pytest.raises(AttributeError, match="assign"):  # of None: nothing is made of the sweep here
        figures.compute_ablations(study, layer_weights=True)
    frame, ks = seen["frame"], study.mean_ks
    cut, step_up, norms = (
        [f"null per layer{more}, k = {k:g}" for k in ks] for more in ("", " + step-up", " + mean norms")
    )
    expected = matched_difference(frame, step_up, cut)
    found = table[(table["family"] == "null per layer + step-up") & (table["against"] == "without step-up")]
    np.testing.assert_allclose(found["difference"], expected["difference"], atol=1e-12)
    np.testing.assert_allclose(found["high"], expected["high"], atol=1e-12)
    assert (found["joint_high"] >= found["high"]).all()
    expected = matched_difference(frame, norms, cut)
    found = table[(table["family"] == "null per layer + mean norms") & (table["against"] == "without norms")]
    np.testing.assert_allclose(found["difference"], expected["difference"], atol=1e-12)
    losses = frame.groupby("rule")[["loss", "mean_k"]].mean()
    row = table[(table["family"] == PLAIN) & (table["against"] == "static top-k")].set_index("wanted_k").loc[ks[0]]
    assert row["loss"] == pytest.approx(losses.loc[f"{PLAIN}, k = {ks[0]:g}", "loss"])


def test_weights_that_do_not_help_are_left_out(study, table):
    weighted = table[table["layer_weights"] != "no"]
    assert set(weighted["family"]) == {name for name in table["family"] if "layer weights" in name}
    entries = [entry for entry in ingredients.rules_of_ingredients(study, True) if entry.helped is not None]
    assert entries and {entry.helped for entry in entries} <= {True, False}
    assert all((getattr(entry.rule, "layer_weights", None) is None) != entry.helped for entry in entries)
    fell_back = table[(table["layer_weights"] == "no help") & (table["against"] == "without layer weights")]
    assert np.allclose(fell_back["difference"], 0, atol=1e-12)  # the same rule


def test_a_cut_on_one_null_for_all_layers_is_a_threshold_on_the_probability(study):
    logits = study.calibration_logits
    null = fit_one(study, logits)
    assert null.num_layers == 2 and torch.equal(null(logits[0], 0), null(logits[0], 1))
    for make in (lambda level: BH(level, null, "fixed", max_k=4), lambda level: Threshold(level, max_k=4)):
        rule = make(level_for_mean_experts(make, logits, 2.5))
        assert mean_experts(rule, logits) == pytest.approx(2.5, abs=0.02)
    cut = BH(level_for_mean_experts(lambda a: BH(a, null, "fixed", max_k=4), logits, 2.5), null, "fixed", max_k=4)
    counts = torch.stack([cut(part, layer).counts for layer, part in enumerate(logits)])
    least = torch.cat([part.softmax(-1).topk(4).values[torch.arange(4) < n[:, None]].flatten()
                       for part, n in zip(logits, counts, strict=True)]).min()  # fmt: skip
    threshold = Threshold(float(least), max_k=4)
    assert torch.equal(torch.stack([threshold(part).counts for part in logits]).clamp(min=1), counts)


def test_experts_as_good_as_the_models_own_are_read_from_the_curve():
    rules = pd.DataFrame({"mean_k": [6.0, 7.0], "loss": [2.04, 2.02]})
    assert ablations._as_good(rules, 2.0, "top-8") == pytest.approx(7.5)
    assert ablations._as_good(rules.assign(loss=[2.02, 2.005]), 2.0, "top-8") == pytest.approx(6 + 2 / 3)
    assert np.isnan(ablations._as_good(rules.assign(loss=[2.009, 2.005]), 2.0, "top-8"))  # fewer than six
    assert np.isnan(ablations._as_good(rules.assign(mean_k=[3.0, 5.0]), 2.0, "top-8"))  # somewhere between 5 and 8


def test_another_split_is_looked_at_by_name(study, monkeypatch):
    monkeypatch.setattr(ablations, "summarize_ablations", lambda frame, *_: frame)
    validation = figures.compute_ablations(study, "validation", max_sequences=4, layer_weights=True)
    assert validation["split"].eq("validation").all()
    assert validation.groupby("rule").size().eq(8).all() and validation["document"].max() < 3


def test_it_is_drawn_from_its_table(table):
    fig = figures.draw_ablations(table)
    titles = [axes.get_title() for axes in fig.axes]
    assert titles[2:] == [f"what it adds: {ingredient}" for ingredient in INGREDIENTS]
    assert "test split" in fig.get_suptitle() and "6 documents" in fig.get_suptitle()
