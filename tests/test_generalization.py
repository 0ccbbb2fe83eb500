"""Figures of other models: drawn from tables of few and of many models, and what is read from them."""

import numpy as np
import pandas as pd
import pytest

from bhlib import figures, load_demo, load_heldout
from bhlib.figures.drawing import sizes_caption
from bhlib.loading import heldout_sequence_documents
from bhlib.rules import BH, TopK
from bhlib.specialization import observe_selection


def rules_of(models):
    """A table of differences, models of growing size."""
    rng, rows = np.random.default_rng(0), []
    for number, model in enumerate(models):
        sizes = {"parameters": 5e6 * 3.0**number, "tokens": 1e8 * (number + 1), "layers": 8 + number % 2}
        for family, effect in {"BH": -0.01, "threshold": -0.011, "BH, fitted null": -0.02}.items():
            for share in (0.375, 0.5, 0.75):
                for against, other in (("static top-k", 0.0), ("threshold", 0.011)):
                    if family != against:
                        difference = effect + other + rng.normal(scale=2e-3)
                        interval = {"low": difference - 2e-3, "high": difference + 2e-3, "se": 1e-3}
                        row = {"model": model, "family": family, "share": share, "against": against}
                        rows.append(row | {"difference": difference, "sequences": 504, "units": 154} | interval | sizes)
    return pd.DataFrame(rows)


def texts(fig):
    return [text.get_text() for axes in fig.axes for text in (*axes.texts, *axes.get_yticklabels())]


def test_many_models_are_pooled_and_drawn_on_to_7_billion():
    fig = figures.draw_generalization(rules_of([f"model {i}" for i in range(5)]))
    assert "pooled" in texts(fig)
    assert any("extrapolated" in text for text in texts(fig)), "what was not measured is labelled"
    assert max(axes.get_xlim()[1] for axes in fig.axes) > 6.9e9


def test_two_models_are_shown_as_they_are():
    fig = figures.draw_generalization(rules_of(["one", "two"]))
    assert "pooled" not in texts(fig) and not any("extrapolated" in text for text in texts(fig))
    assert {"one", "two"} <= set(texts(fig))


def test_a_model_that_was_not_measured_at_half_is_shown_where_it_was_and_not_pooled():
    table = rules_of([f"model {i}" for i in range(5)])
    table = table[(table["model"] != "model 4") | (table["share"] != 0.5)]
    fig = figures.draw_generalization(table)
    assert {"model 3", "model 4,\nat 3/8", "pooled"} <= set(texts(fig))
    said = "".join(text.get_text() for text in fig.texts)
    assert "not pooled" in said and "the 4 models" in said


def test_models_that_divide_weights_have_a_panel_with_the_weights_that_they_gave():
    table = rules_of(["one", "two", "three"])
    few = len(figures.draw_generalization(table).axes)
    given = table[(table["model"] == "two") & (table["against"] == "static top-k")]
    given = given.assign(family=given["family"] + ", shares of the top")
    fig = figures.draw_generalization(pd.concat([table, given], ignore_index=True))
    assert len(fig.axes) == few + 1
    assert any("weights that the model gave" in axes.get_ylabel() for axes in fig.axes)


def test_pooled_differences_have_a_row_for_each_rival_family_and_share():
    table = rules_of(["one", "two", "three"])
    pooled = figures.pool_models(table).set_index(["against", "family", "share"])
    assert len(pooled) == 15 and pooled["models"].eq(3).all()
    rows = table[(table["against"] == "static top-k") & (table["family"] == "BH") & (table["share"] == 0.5)]
    assert pooled["mean"]["static top-k", "BH", 0.5] == pytest.approx(rows["difference"].mean(), abs=1e-5)


def test_regret_is_the_loss_above_the_best_variant_of_each_model():
    rows = [
        ("a", "concentration", "BH, Dirichlet 2", 0.5, -0.010),
        ("a", "concentration", "BH, Dirichlet 4", 0.5, -0.012),
        ("b", "concentration", "BH, Dirichlet 2", 0.5, -0.020),
        ("b", "concentration", "BH, Dirichlet 4", 0.5, -0.016),
        ("a", "layer weights", "BH", 0.5, -0.1),
    ]
    table = pd.DataFrame(rows, columns=["model", "choice", "variant", "share", "difference"])
    regret = figures.regret_of_defaults(table).set_index("variant")
    assert regret["regret"].to_dict() == pytest.approx({"BH, Dirichlet 2": 0.001, "BH, Dirichlet 4": 0.002})
    assert regret["worst"].to_dict() == pytest.approx({"BH, Dirichlet 2": 0.002, "BH, Dirichlet 4": 0.004})
    assert regret["best"].tolist() == [1, 1]


def test_saturation_is_drawn_with_chance_for_each_rule():
    rows = [
        ("m", rule, step, layer, step / 100, step / 100 - 0.01, step / 100 + 0.01, k / 64, k, 9)
        for rule, k in (("top-8", 8), ("BH, 3 experts", 3), ("BH, 4 experts", 4))
        for step in (1, 10, 100)
        for layer in range(4)
    ]
    columns = ["model", "rule", "step", "layer", "saturation", "low", "high", "chance", "mean_k", "domains"]
    fig = figures.draw_router_saturation(pd.DataFrame(rows, columns=columns))
    left, own, other = fig.axes
    assert [own.get_title(), other.get_title()] == ["top-8, layer by layer", "BH, 3 experts, layer by layer"]
    assert [text.get_text() for text in left.get_legend().get_texts()][-1] == "chance"
    assert max(left.lines[0].get_ydata()) == 1 and set(left.lines[1].get_ydata()) == {0.125}


def test_sizes_are_said_once_and_those_of_a_model_that_differs():
    table = pd.DataFrame({"model": ["a", "b", "c"], "sequences": [504, 72, 504], "units": [141, 69, 141]})
    assert sizes_caption(table) == "504 sequences of 141 documents (b: 72 of 69)"
    assert sizes_caption(table[table["model"] != "b"]) == "504 sequences of 141 documents"


def test_router_maps_show_each_rule_with_its_number_of_experts():
    model, _ = load_demo()
    text = {name: ids for name, ids in load_heldout("validation", 64, 2).items() if name in ("novels", "python")}
    documents = {name: heldout_sequence_documents("validation", 64, 2)[name] for name in text}
    seen = {name: observe_selection(model, text, documents, rule) for name, rule in
            {"top-8": TopK(8), "BH": BH(1e-3)}.items()}  # fmt: skip
    fig = figures.draw_router_maps(seen, 2)
    titles = [axes.get_title() for axes in fig.axes if axes.get_title()]
    assert titles[0] == "top-8: 8.0 experts" and titles[1] == f"BH: {seen['BH'].mean_k[2]:.1f} experts"
    assert len(fig.axes) == 6  # two of each, and two colour bars
