"""What each expert of a token adds beside the decision: the same numbers as those of the parts, row by row."""

import numpy as np
import pandas as pd
import pytest
import torch
from families import PATCHED, tiny
from models import tiny_olmoe, tokens

from bhlib import BHRoutingIntegration, RoutingPatch, find_moe_layers
from bhlib.contributions import measure_contributions, measure_token
from bhlib.explain import COLUMNS, explain
from bhlib.explain_token import MEASURED, add_contributions, explain_token
from bhlib.rules import BH, TopK
from bhlib.weighting import of_model

MODELS = {
    "olmoe": tiny_olmoe,
    "mixtral": lambda: tiny(next(family for family in PATCHED if family.model_type == "mixtral")),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return MODELS[request.param]()


@pytest.mark.parametrize("position", [0, 5, -1])
def test_a_token_is_measured_as_in_the_whole_text(model, position):
    ids = tokens(1, 9) % 128
    whole, alone = measure_contributions(model, ids, progress=False), measure_token(model, ids, position)
    for name in ("r", "along", "norms", "logits", "selected"):
        expected = getattr(whole, name)[:, [position]]
        torch.testing.assert_close(getattr(alone, name), expected, rtol=1e-4, atol=1e-6)
    assert alone.positions.tolist() == [position % 9]


def test_the_table_is_the_decision_and_the_measurement(model):
    ids, rule, layer = tokens(1, 9) % 128, BH(0.3, max_k=4), 1
    table = explain_token(model, rule, ids, 5, layer, temperature=1.3)
    whole = measure_contributions(model, ids, progress=False)
    assert table.columns.tolist() == [*COLUMNS, *MEASURED]
    own = find_moe_layers(model)[layer]
    weighting = of_model(own.weighting, rule.max_k, own.top_k)
    expected = explain(rule, whole.logits[layer, 5], layer, weighting=weighting, temperature=1.3)
    pd.testing.assert_frame_equal(table[COLUMNS], expected, rtol=1e-4)
    for row in table.itertuples():
        assert row.r == pytest.approx(float(whole.r[layer, 5, row.expert]), rel=1e-3)
        assert row.along == pytest.approx(float(whole.along[layer, 5, row.expert]), rel=1e-3, abs=1e-6)
        assert row.own == bool(whole.selected[layer, 5, row.expert])
    assert table["own"].sum() == find_moe_layers(model)[0].top_k
    assert table.loc[table["own"], "along"].sum() == pytest.approx(1, rel=1e-4)


def test_several_tokens_are_taken_in_their_order():
    model, ids = tiny_olmoe(), tokens(2, 6)
    measured = measure_contributions(model, ids, progress=False)
    table = add_contributions(explain(TopK(8), measured.logits[2], 2), measured, 2)
    assert table["token"].nunique() == 12 and (table["own"] == table["kept"]).all()
    for row in table.sample(50, random_state=0).itertuples():
        assert row.r == float(measured.r[2, row.token, row.expert])
    np.testing.assert_allclose(table[table["own"]].groupby("token")["along"].sum(), 1, rtol=1e-4)


def test_what_analyze_mode_recorded_can_have_it_too():
    model, ids = tiny_olmoe(), tokens(1, 6)
    with RoutingPatch(model, BH(0.2), mode="analyze", record_logits=True) as patch, torch.no_grad():
        model(input_ids=ids)
        recorded = patch.explain((0, 3), 1)
    table = add_contributions(recorded, measure_token(model, ids, 3), 1)
    pd.testing.assert_frame_equal(table, explain_token(model, BH(0.2), ids, 3, 1), rtol=1e-4)


def test_what_cannot_be_measured_is_refused():
    model, ids = tiny_olmoe(), tokens(1, 6)
    with pytest.raises(ValueError, match=r"layer is 3, but must lie in 0\.\.2, the model's MoE layers"):
        explain_token(model, BH(), ids, 0, 3)
    with pytest.raises(ValueError, match=r"position is 6 in token_ids of shape \(1, 6\), but must lie in -6\.\.5"):
        explain_token(model, BH(), ids, 6, 0)
    with pytest.raises(ValueError, match=r"shape \(2, 6\), .* in one sequence"):
        measure_token(model, tokens(2, 6), 0)
    with pytest.raises(ValueError, match="the table has 64 rows, but 6 tokens were measured, with 64 experts each"):
        measured = measure_contributions(model, ids, progress=False)
        add_contributions(explain(BH(), measured.logits[0, 0]), measured, 0)
    with BHRoutingIntegration(model), pytest.raises(RuntimeError, match="is patched"):
        measure_token(model, ids)
