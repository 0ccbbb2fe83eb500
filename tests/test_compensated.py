"""The figures of what stands in for dropped experts, on short texts; their numbers against slow twins."""

import numpy as np
import pandas as pd
import pytest
import torch

from bhlib import RoutingPatch, figures, find_moe_layers
from bhlib.agreement import text_agreement
from bhlib.comparisons import percent_at_cost, with_documents
from bhlib.figures import stand_ins, written
from bhlib.figures.families import by_level
from bhlib.figures.recent import recent
from bhlib.layer_passes import expert_output, watch_layers
from bhlib.levels import mean_experts
from bhlib.rules import AllocMoE, Threshold, TopK, families_of


@pytest.fixture(scope="module")
def study():
    """The embedded model on two short sequences, fitted on few."""
    study = figures.Study()
    study.sequences_per_domain, study.window = 1, 64
    study.test = {domain: study.test[domain][:, :64] for domain in ("manuals", "python")}
    study.whole_test = study.test
    study.whole_test_documents = study.test_documents
    study.calibration = {domain: study.calibration[domain] for domain in study.test}
    study.fitting_text = study.text.sequences("calibration", 64, 5)
    return study


def test_a_mean_leaves_room_for_what_stands_in(study):
    assert stand_ins.mean_for(None, None, 4.0, study) == 4
    for rank in (0, 16):
        one = study.compensation(rank)
        mean = stand_ins.mean_for(one, None, 4.0, study)
        assert mean + one.cost(mean, 8, study.intermediate_size) == pytest.approx(4) and study.compensation(rank) is one


def test_recent_rivals_give_the_mean_that_is_wanted(study):
    makers = recent(study)
    assert [family.name for family in families_of(makers)] == list(makers)
    for name, make in makers.items():
        rule = make(study.thin_logits, 3.5)
        assert mean_experts(rule, study.thin_logits) == pytest.approx(3.5, abs=0.05), name
    assert isinstance(makers["Alloc-MoE"](study.thin_logits, 3.5), AllocMoE)


@pytest.fixture(scope="module")
def table(study):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stand_ins, "COSTS", (3.0, 5.0))
        return figures.compute_compensated(study)


def test_published_rules_are_compared_with_and_without(table):
    pairs = set(zip(table["family"], table["stands_in"], strict=True))
    both = [
        name
        for name in table["family"].unique()
        if {(name, one) for one, made in stand_ins.STAND_INS.items() if not made.by_norms} <= pairs
    ]
    assert len(both) >= 10 and {"BH", "BH, fitted null", "static top-k", "SeqTopK", "Alloc-MoE", "MoDES", "ACE"} <= {
        *both
    }
    assert {(name, "its own") for name in ("halving", "ExFold", "LDA")} <= pairs
    assert table.groupby(["family", "stands_in"])["kind"].apply(lambda kinds: (kinds == "at cost").sum() == 2).all()
    assert table["sequences"].eq(2).all() and table["tokens"].eq(2 * 63).all()
    plain = table[(table["kind"] == "measured") & (table["stands_in"] == "nothing")]
    assert plain["cost"].equals(plain["mean_k"].astype(float))
    with_map = table[(table["kind"] == "measured") & (table["stands_in"] == "means and a map of rank 16")]
    assert (with_map["cost"] - with_map["mean_k"]).between(1 / 6, 0.25).all()
    figures.draw_compensated(table)


def test_the_missing_part_is_energies_of_what_was_dropped(study):
    table = figures.compute_missing_part(study)
    assert sorted(table["rank"].unique()) == [0, 4, 8, 16, 32] and table["layer"].nunique() == 8
    assert table["mean_k"].between(3, 5).all() and table["tokens"].eq(9 * 64).all()
    assert (table["missing_low"] < table["missing"]).all() and (table["low"] < table["caught"]).all()
    layer = 2
    by_hand = missing_by_hand(study, layer, study.compensation(4))
    row = table[(table["layer"] == layer) & (table["rank"] == 4)].iloc[0]
    assert (row["missing"], row["caught"]) == pytest.approx(by_hand, rel=1e-3)
    figures.draw_missing_part(table)


@torch.no_grad()
def missing_by_hand(study, number, compensation):
    """Share of a layer's energy that is missing, and share of that which is caught: token by token."""
    layer, part = find_moe_layers(study.model)[number], compensation.layers[number]
    rule = by_level(Threshold, study)(study.thin_logits, study.half)
    output = missing = left = 0.0
    for sequences in study.validation.values():
        seen = {}
        with watch_layers([layer], lambda _, what, seen=seen: seen.update(what=what)):
            study.model(sequences)
        what = seen["what"]
        kept = rule(what.logits, number).experts
        for token in range(len(what.hidden)):
            lacks, caught = torch.zeros(192), torch.zeros(192)
            for expert, weight in zip(what.experts[token].tolist(), what.weights[token], strict=True):
                if expert not in kept[token].tolist():
                    lacks += weight * expert_output(layer, what.hidden[token, None], expert)[0]
                    caught += weight * (part.means[1 + expert] + part.up.T @ (part.down @ what.hidden[token]))
            output += float(what.output[token].square().sum())
            missing += float(lacks.square().sum())
            left += float((lacks - caught).square().sum())
    return missing / output, 1 - left / missing


def test_texts_are_compared_with_the_models_own(study):
    prompts = torch.stack([sequences[0, :8] for sequences in study.test.values()])
    same = text_agreement(study.model, prompts, TopK(8), 5)
    assert same["same"].eq(1).all() and same["until"].eq(5).all() and same["kl"].abs().lt(1e-6).all()
    few = text_agreement(study.model, prompts, TopK(1), 12, compensation=study.compensation(0))
    own = study.model.generate(prompts, do_sample=False, min_new_tokens=12, max_new_tokens=12)
    with RoutingPatch(study.model, TopK(1), compensation=study.compensation(0)):
        other = study.model.generate(prompts, do_sample=False, min_new_tokens=12, max_new_tokens=12)
    for row, mine, its in zip(few.itertuples(), own[:, 8:].tolist(), other[:, 8:].tolist(), strict=True):
        equal = [a == b for a, b in zip(mine, its, strict=True)]
        assert row.same == pytest.approx(sum(equal) / 12) and row.until == (equal + [False]).index(False)
    assert few["mean_k"].eq(1).all() and few["kl"].gt(0.01).all() and few["cost"].gt(1).all()


# -- percentages at a cost -------------------------------------------------------------------------------------------


def made_up(seed=0, size=60):
    """Sequences whose loss above the model's own falls with the cost as 8 e^-cost, at costs that differ by rule."""
    draw = np.random.default_rng(seed)
    own = draw.normal(2.5, 0.3, size)
    rules = {"own": (8.0, own)} | {
        f"a {k}": (k + 0.1, own * (1 + 0.08 * np.exp(-(k + 0.1) / 2))) for k in (2, 3, 4, 5, 6)
    }
    parts = [
        pd.DataFrame(
            {"rule": name, "domain": "x", "sequence": range(size), "tokens": 10, "mean_k": cost, "cost": cost,
             "loss": loss * (1 + (name != "own") * draw.normal(0, 1e-4, size)), "error": ""}
        )
        for name, (cost, loss) in rules.items()
    ]  # fmt: skip
    return with_documents(pd.concat(parts, ignore_index=True), {"x": np.arange(size) // 3})


def test_a_curve_is_read_at_a_cost_and_where_it_has_fallen():
    table = percent_at_cost(made_up(), {"a": [f"a {k}" for k in (4, 2, 3, 5, 6)]}, "own", (1, 3, 4.5, 7), within=0.5)
    assert table["units"].eq(20).all() and table["sequences"].eq(60).all()
    at_cost = table[table["kind"] == "at cost"].set_index("cost")
    assert at_cost["percent"].isna().tolist() == [True, False, False, True]
    for cost in (3, 4.5):
        row = at_cost.loc[cost]
        assert (
            row["percent"] == pytest.approx(8 * np.exp(-cost / 2), rel=0.02)
            and row["low"] < row["percent"] < row["high"]
        )
    within = table[table["kind"] == "within"].iloc[0]
    assert within["percent"] == 0.5 and within["cost"] == pytest.approx(2 * np.log(8 / 0.5), abs=0.03)
    assert within["low"] < within["cost"] < within["high"]
    rules = table[~table["kind"].isin(["at cost", "within"])]
    assert rules["cost"].tolist() == pytest.approx([2.1, 3.1, 4.1, 5.1, 6.1])


def test_a_curve_that_does_not_reach_says_so():
    families = {"a": ["a 2", "a 3"]}
    table = percent_at_cost(made_up(), families, "own", (3,), within=0.01)
    assert table[table["kind"] == "within"][["cost", "low", "high"]].isna().all(axis=None)
    with pytest.raises(
        ValueError, match=r"the family 'a' needs two or more rules to draw a curve through, got \['a 2'\]"
    ):
        percent_at_cost(made_up(), {"a": ["a 2"]}, "own", (3,))
    with pytest.raises(ValueError, match="the rule 'b' is not in this table"):
        percent_at_cost(made_up(), {"a": ["a 2", "b"]}, "own", (3,))


def test_what_is_written_with_and_without(study):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stand_ins, "COSTS", (4.0,))
        patch.setattr(written, "LENGTH", 6)
        table = figures.compute_written(study)
    documents = sum(len(set(map(int, study.whole_test_documents[domain]))) for domain in study.whole_test)
    assert len(table) == len(stand_ins.STAND_INS) * len(written.MEASURES) and (table["units"] == documents).all()
    assert table["cost"].between(3, 5).all()
    shares = table[table["measure"].isin(["same", "top1_agreement"])]
    assert shares["value"].between(0.01, 1).all() and (table["low"] <= table["value"]).all()
    figures.draw_written(table)
