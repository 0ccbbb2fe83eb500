"""The table that explains a decision, against the decision itself: every rule, every procedure, every kind of null."""

import functools
import io
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest
import torch

from bhlib.calibration import fit_null
from bhlib.explain import COLUMNS, explain
from bhlib.procedures import PROCEDURES, critical_values, reject
from bhlib.pvalues import DirichletNull, SoftmaxPseudo, TokenGaussian
from bhlib.rules import (
    BH,
    EntropyK,
    KeepMass,
    MinP,
    PrefixRule,
    Rule,
    StaticPerLayer,
    Threshold,
    TopK,
    TopP,
    WeightRatio,
)
from bhlib.weighting import WEIGHTINGS, of_top

EXPERTS, LAYER = 16, 1
CONSTANT = ("bh", "by", "hochberg", "bonferroni", "fixed")


def random_logits(*shape, seed=0):
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@functools.cache
def fitted(null, statistic="log_prob", per_expert=False):
    logits = random_logits(3, 400, EXPERTS, seed=1)
    return fit_null(
        logits, model_name="none", null=null, statistic=statistic, exclude_top=4, per_expert=per_expert
    )  # fmt: skip


MAKERS = {
    "dirichlet": DirichletNull,
    "gaussian": lambda: TokenGaussian(exclude_top=4),
    "kde": lambda: fitted("kde"),
    "kde of centered": lambda: fitted("kde", "centered"),
    "kde per expert": lambda: fitted("kde", per_expert=True),
    "conformal": lambda: fitted("conformal"),
    "conformal per expert": lambda: fitted("conformal", per_expert=True),
}
BOUNDS = {"min_k": 2, "max_k": 5}
RULES = {
    "top-k": TopK(4),
    "static per layer": StaticPerLayer((2, 3, 4)),
    "threshold": Threshold(0.08, **BOUNDS),
    "top-p": TopP(0.7, **BOUNDS),
    "min-p": MinP(0.15, **BOUNDS),
    "weight ratio": WeightRatio(0.1, **BOUNDS),
    "entropy": EntropyK((1.5, 2.0), (1, 3, 6)),
    "keep mass": KeepMass(BH(0.2, **BOUNDS), top_k=4),
    "none at all": BH(1e-9, min_k=0, max_k=5),
}


def check_agreement(rule, logits, table, **options):
    """The table says of each token what the rule itself decides, and its columns do not contradict each other."""
    routing = rule(logits, LAYER, **options)
    assert len(table) == logits.numel()
    for token, part in table.groupby("token"):
        count = int(routing.counts[token])
        kept = part[part["kept"]]
        assert kept["expert"].tolist() == routing.experts[token, :count].tolist()
        np.testing.assert_array_equal(kept["weight"], routing.weights[token, :count])
        assert (part.loc[~part["kept"], "weight"] == 0).all()
        assert part["rank"].tolist() == list(range(1, EXPERTS + 1)) and sorted(part["expert"]) == list(range(EXPERTS))
        np.testing.assert_array_equal(part["logit"], logits[token, part["expert"].tolist()].double())
        np.testing.assert_allclose(part["probability"].sum(), 1, rtol=1e-5)
        found = int(part["found"].sum())
        assert part["found"].tolist() == [True] * found + [False] * (EXPERTS - found)
        bound = "min_k" if found < count else "max_k" if found > count else "none"
        assert (part["bound"] == bound).all()
        if bound != "none":
            assert count == getattr(rule, bound)


@pytest.mark.parametrize("weighting", [*WEIGHTINGS, of_top("normalized")])
@pytest.mark.parametrize("name", RULES)
def test_every_rule_is_explained_as_it_decides(name, weighting):
    rule, logits = RULES[name], random_logits(60, EXPERTS)
    options = {"weighting": weighting, "temperature": 1.3}
    table = explain(rule, logits, LAYER, **options)
    check_agreement(rule, logits, table, **options)
    assert table["pvalue"].isna().all() == (name not in ("keep mass", "none at all"))
    assert table["probability_threshold"].isna().all() == (name not in ("threshold", "keep mass", "none at all"))
    if name in ("threshold", "top-p", "min-p", "weight ratio"):
        assert set(table["bound"]) == {"min_k", "max_k", "none"}
    elif name in ("top-k", "static per layer", "entropy"):
        assert set(table["bound"]) == {"none"}


@pytest.mark.parametrize("method", PROCEDURES)
@pytest.mark.parametrize("null", MAKERS)
def test_every_procedure_and_null_is_explained_as_it_decides(null, method):
    maker, logits = MAKERS[null](), random_logits(25, EXPERTS)
    rule = BH(0.2, maker, method, **BOUNDS)
    table = explain(rule, logits, LAYER)
    check_agreement(rule, logits, table)
    pvals = maker(logits, LAYER)
    for token, part in table.groupby("token"):
        experts = part["expert"].tolist()
        np.testing.assert_array_equal(part["pvalue"], pvals[token, experts])
        assert (part["pvalue"].diff()[1:] >= -1e-5).all()
        assert set(part.loc[part["found"], "expert"]) == set(reject(pvals[token], 0.2, method).nonzero()[:, 0].tolist())
        if method in CONSTANT:
            passed = np.flatnonzero(part["pvalue"] <= part["pvalue_threshold"])
            assert part["found"].sum() == (passed[-1] + 1 if len(passed) else 0)
        if method in CONSTANT and null in ("dirichlet", "kde", "conformal"):
            clear = (part["probability"] - part["probability_threshold"]).abs() > 1e-6
            passed = np.flatnonzero(part["probability"] >= part["probability_threshold"])
            assert not clear.all() or part["found"].sum() == (passed[-1] + 1 if len(passed) else 0)
    assert table["pvalue_threshold"].isna().all() == (method not in CONSTANT)
    constants = method in CONSTANT and null in ("dirichlet", "kde", "conformal")
    assert table["probability_threshold"].notna().all() == constants
    assert table["found"].any() and not table["found"].all()


def test_thresholds_are_those_of_the_layers_own_level():
    rule = BH(0.05, layer_weights=(1.0, 4.0, 1.0))
    table = explain(rule, random_logits(EXPERTS), LAYER)
    np.testing.assert_array_equal(table["pvalue_threshold"], critical_values(EXPERTS, rule.layer_levels(LAYER)[0]))
    assert rule.layer_levels(LAYER)[0] > 0.05


@pytest.mark.parametrize(
    "rule", [BH(method="by"), BH(layer_weights=(1.0, 4.0, 1.0)), BH(method="storey"), Threshold(), TopP()]
)
def test_tokens_at_two_levels_are_explained_each_at_its_own(rule):
    logits, levels = random_logits(6, EXPERTS), (0.05, 0.3)
    table = explain(rule.at(levels), logits, LAYER)
    check_agreement(rule.at(levels), logits, table)
    for level, half, part in zip(levels, logits.split(3), (table[: 3 * EXPERTS], table[3 * EXPERTS :]), strict=True):
        alone = explain(rule.at(level), half, LAYER).drop(columns="token")
        pd.testing.assert_frame_equal(part.drop(columns="token").reset_index(drop=True), alone)


def test_the_pseudo_pvalues_are_explained_too():
    with pytest.warns(UserWarning, match="1 - softmax is not a p-value"):
        rule = BH(0.2, SoftmaxPseudo(), **BOUNDS)
    logits = random_logits(60, EXPERTS)
    check_agreement(rule, logits, explain(rule, logits, LAYER))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_logits_of_every_dtype(dtype):
    logits = random_logits(40, EXPERTS).to(dtype)
    check_agreement(BH(0.2, **BOUNDS), logits, explain(BH(0.2, **BOUNDS), logits, LAYER))


def test_ties_are_explained_as_they_are_decided():
    logits = random_logits(40, EXPERTS).round()
    for rule in (BH(0.3, **BOUNDS), BH(0.3, fitted("conformal", per_expert=True), **BOUNDS), TopP(0.5, **BOUNDS)):
        check_agreement(rule, logits, explain(rule, logits, LAYER))
    check_agreement(TopK(3), torch.zeros(2, EXPERTS), explain(TopK(3), torch.zeros(2, EXPERTS), LAYER))


def test_one_token_has_no_token_column_and_several_have():
    logits = random_logits(3, EXPERTS)
    several, one = explain(BH(0.2), logits), explain(BH(0.2), logits[2])
    assert one.columns.tolist() == COLUMNS and several.columns.tolist() == ["token", *COLUMNS]
    pd.testing.assert_frame_equal(one, several[several["token"] == 2].drop(columns="token").reset_index(drop=True))


def test_a_csv_keeps_the_table():
    table = explain(BH(0.2), random_logits(20, EXPERTS))
    back = pd.read_csv(io.StringIO(table.to_csv(index=False)))
    pd.testing.assert_frame_equal(back, table, check_dtype=False)
    assert "none" in set(back["bound"])


def test_a_rule_of_ones_own_is_explained():
    @dataclass(frozen=True)
    class Worst(Rule):
        """Keeps the two experts that the model ranks last."""

        def select(self, router_logits, scores, layer):
            order = scores.argsort(dim=-1)[:, : self.max_k]
            return order, torch.full(order.shape[:1], 2).clamp(self.min_k, self.max_k)

    @dataclass(frozen=True)
    class Positive(PrefixRule):
        def count(self, top, scores, layer):
            return (top > 0.1).sum(dim=-1)

    logits = random_logits(30, EXPERTS)
    for rule in (Worst(), Worst(min_k=4), Worst(max_k=1), Positive(max_k=3)):
        check_agreement(rule, logits, explain(rule, logits, LAYER))


def test_logits_that_cannot_be_explained_are_refused():
    with pytest.raises(ValueError, match=r"must be \[experts\] or \[tokens, experts\], got shape \(2, 3, 16\)"):
        explain(BH(), random_logits(2, 3, EXPERTS))
    with pytest.raises(ValueError, match="values that are NaN or infinite"):
        explain(BH(), torch.full((EXPERTS,), torch.nan))
    with pytest.raises(ValueError, match="max_k must not exceed the number of experts, got max_k=8 for 4 experts"):
        explain(BH(), random_logits(4))
    with pytest.raises(ValueError, match=r"layer must lie in 0\.\.2"):
        explain(StaticPerLayer((1, 2, 3)), random_logits(EXPERTS))
