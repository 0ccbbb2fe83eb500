"""Promises hold in simulations whose truth is known, fail for the wrong unit, and are refused where they cannot be."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from bhlib import load_demo, load_heldout
from bhlib.contributions import Contributions, measure_contributions, one_changed
from bhlib.guarantees import (
    betting_pvalue,
    corrected_risk,
    discoveries,
    discoveries_by_effect,
    promise_discoveries,
    promise_effects,
    promise_loss,
)
from bhlib.loading import heldout_sequence_documents
from bhlib.rules import BH, Threshold, TopK

THRESHOLDS = (0.6, 0.45, 0.3, 0.2, 0.15, 0.1, 0.07, 0.05, 0.03)


def simulated(documents, seed, tokens=6, experts=16, bad=0.0):
    """Contributions of one layer. What a logit tells of them differs by document; in a share `bad` it tells nothing."""
    generator = torch.Generator().manual_seed(seed)
    shape = documents, tokens, experts
    signal, noise = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    quality = torch.randn(documents, 1, 1, generator=generator).exp()
    r = torch.where(signal * quality + noise > 1, 1.0, 0.01)
    r[torch.rand(documents, generator=generator) < bad] = 0.01
    flat, numbers = (1, documents * tokens, experts), np.repeat(np.arange(documents), tokens)
    r, logits = r.reshape(flat), (2 * signal).view(flat)
    names = np.full(len(numbers), "simulated")
    return Contributions(r, r, r, logits, r > 0.1, names, numbers, np.zeros_like(numbers), numbers)


def realised(rule, contributions):
    return discoveries(rule, contributions.logits, contributions.r <= 0.1).proportion.mean().item()


def test_discoveries_are_those_of_a_loop():
    found = simulated(3, seed=0)
    rule, useless = Threshold(0.1, min_k=0, max_k=5), found.r <= 0.1
    counted = discoveries(rule, found.logits, useless)
    for token, logits in enumerate(found.logits[0]):
        probs = logits.softmax(-1)
        kept = [e for e in probs.argsort(descending=True).tolist() if probs[e] >= 0.1][:5]
        wrong = [e for e in kept if useless[0, token, e]]
        assert (counted.kept[0, token], counted.useless[0, token]) == (len(kept), len(wrong))
        assert counted.useful[0, token] == (~useless[0, token]).sum()
        assert counted.proportion[0, token] == pytest.approx(len(wrong) / max(len(kept), 1))


@pytest.mark.parametrize(("documents", "alpha"), [(9, 0.3), (19, 0.1), (19, 0.3)])
def test_useless_experts_stay_below_alpha(documents, alpha):
    """Over 200 calibration texts, each with a document of its own that was not in it."""
    shares = []
    for trial in range(200):
        try:
            promise = promise_discoveries(
                simulated(documents, 2 * trial), alpha, rule=Threshold(max_k=16, min_k=0), levels=THRESHOLDS
            )
        except ValueError:
            shares.append(0.0)  # as the promise counts it
            continue
        assert promise.documents == documents
        shares.append(realised(promise.rule, simulated(1, 2 * trial + 1)))
    # 3 standard errors of the mean over independent trials: a wrong alarm in one of 700 runs.
    assert np.mean(shares) <= alpha + 3 * np.std(shares) / np.sqrt(len(shares))
    assert np.mean(shares) > alpha / 10  # the promise is not kept by keeping nothing


def test_tokens_of_a_document_are_no_units():
    """One document promises nothing about a tenth; its tokens, taken for documents, promise what does not hold.

    In one half of the documents all experts are useless, in the other half none is.
    """
    rule, shares, generator = Threshold(), [], np.random.default_rng(0)
    for trial in range(200):
        seen, new = (replace(simulated(1, trial, tokens=30), r=r) for r in _all_or_nothing(generator))
        with pytest.raises(ValueError, match="1 documents can promise no alpha below 1/2"):
            promise_discoveries(seen, 0.1, rule=rule, levels=(0.6,))
        try:
            promise = promise_discoveries(replace(seen, documents=np.arange(30)), 0.1, rule=rule, levels=(0.6, 0.1))
            shares.append(realised(promise.rule, new))
        except ValueError:
            shares.append(0.0)
    assert np.mean(shares) - 3 * np.std(shares) / np.sqrt(len(shares)) > 0.1


def _all_or_nothing(generator):
    return [torch.full((1, 30, 16), float(generator.random() < 0.5)) for _ in range(2)]


def test_the_level_is_the_last_whose_corrected_risk_is_small_enough():
    found = simulated(30, seed=5)
    promise = promise_discoveries(found, 0.5, rule=Threshold(max_k=16), levels=THRESHOLDS)
    shares = [
        discoveries(Threshold(t, max_k=16), found.logits, found.r <= 0.1).proportion.view(30, 6).mean(1).numpy()
        for t in THRESHOLDS
    ]
    corrected = (np.maximum.accumulate(shares).sum(axis=1) + 1) / 31
    number = len(promise.tried)
    assert promise.tried["corrected"].to_numpy() == pytest.approx(corrected[:number])
    assert promise.tried["risk"].to_numpy() == pytest.approx(np.maximum.accumulate(shares).mean(axis=1)[:number])
    assert corrected[number - 2] <= 0.5 < corrected[number - 1]
    assert promise.rule.threshold == THRESHOLDS[number - 2]
    assert "at most 0.5 in expectation contribute 0.1 of the output or less" in promise.text


def test_what_cannot_be_promised_is_refused():
    found = simulated(9, seed=0, bad=0.5)
    with pytest.raises(
        ValueError, match="9 documents can promise no alpha below 1/10 = 0.1, .* on 19 documents or more"
    ):
        promise_discoveries(found, 0.05)
    with pytest.raises(ValueError, match="alpha is 1.5, but must lie strictly between 0 and 1"):
        promise_discoveries(found, 1.5)
    with pytest.raises(ValueError, match="the level 0.6 alone has a corrected risk of 0.*, but alpha is 0.1"):
        promise_discoveries(found, 0.1, rule=Threshold(), levels=(0.6, 0.3))
    assert corrected_risk(np.zeros(9)) == pytest.approx(0.1)  # so nine documents are enough for a tenth


@pytest.mark.parametrize("shape", ["normal", "rare"])
def test_a_mean_of_zero_is_seldom_called_negative(shape):
    """Of 60 values with a mean of 0, at the level that is used, 0.1; rare large values are what fools a t-test."""
    generator, alarms, alarms_of_t = np.random.default_rng(0), 0, 0
    for _ in range(400):
        if shape == "normal":
            values = generator.normal(0, 0.02, 60).clip(max=0.1)
        else:
            values = np.where(generator.random(60) < 0.02, 0.098, -0.002)
        alarms += betting_pvalue(values, 0.1) <= 0.1
        alarms_of_t += values.mean() + 1.296 * values.std(ddof=1) / np.sqrt(60) <= 0  # 90 % of Student's t
    assert alarms <= 400 * 0.1 + 3 * np.sqrt(400 * 0.09)  # 3 standard deviations of the count
    if shape == "rare":
        assert alarms_of_t > 400 * 0.1 + 3 * np.sqrt(400 * 0.09)


def test_a_negative_mean_is_found():
    generator = np.random.default_rng(1)
    assert betting_pvalue(generator.normal(-0.01, 0.01, 60), 0.1) < 0.01
    with pytest.raises(ValueError, match=r"upper is 0.1, but must .* bound the values, the largest of which is 0.2"):
        betting_pvalue(np.array([0.2]), 0.1)


@pytest.fixture(scope="module")
def demo():
    return load_demo()[0], load_heldout("calibration", 32, 4)


def test_a_promise_about_the_loss_of_the_demo(demo):
    """Top-8 itself is promised, three experts are not, and levels after the first failure are not looked at."""
    model, text = demo
    documents = heldout_sequence_documents("calibration", 32, 4)
    generous = {"documents": documents, "percent": 2.0, "rule": Threshold()}
    promise = promise_loss(model, text, levels=(1e-6, 0.2, 0.01), **generous)
    assert promise.rule == Threshold(1e-6)
    assert promise.tried["level"].tolist() == [1e-6, 0.2]
    assert promise.tried["mean_k"].tolist()[0] == 8
    assert promise.documents == sum(len(set(numbers)) for numbers in documents.values())
    assert promise.tried["pvalue"].iloc[0] <= 0.1 < promise.tried["pvalue"].iloc[1]
    assert promise.text == "at most 2 % worse than the model's own routing, with probability 0.9"


def test_a_loss_that_cannot_be_promised_is_refused(demo):
    model, text = demo
    few = {"drama": text["drama"][:2]}
    with pytest.raises(ValueError, match=r"no level can be promised: at the first, 0.3, 2 documents lose"):
        promise_loss(model, few, rule=Threshold(), levels=(0.3,))
    with pytest.raises(ValueError, match="percent is 5.0 and cap 4.0, but they must be .* 0 < percent < cap"):
        promise_loss(model, few, percent=5.0)
    with pytest.raises(ValueError, match="probability is 1.0, but must lie strictly between 0 and 1"):
        promise_loss(model, few, probability=1.0)


def test_a_promise_about_the_demo_can_be_made(demo):
    model, text = demo
    measured = measure_contributions(model, text, progress=False, max_tokens=300)
    promise = promise_discoveries(measured, 0.2, levels=(0.001, 0.01, 0.1))
    assert isinstance(promise.rule, BH)
    assert realised(promise.rule, measured) <= 0.2
    with pytest.raises(TypeError, match="has no level to move"):
        promise_discoveries(measured, 0.2, rule=TopK(4))


@pytest.fixture(scope="module")
def changed(demo):
    """Effects at 30 places of some sequences of the demo, each a document; contributions of all their tokens."""
    model, text = demo
    text = {"drama": text["drama"], "python": text["python"]}
    effects = one_changed(model, text, num_tokens=30, progress=False)
    return effects, measure_contributions(model, text, progress=False)


def test_discoveries_by_effect_are_those_of_a_loop(changed):
    effects, contributions = changed
    rule, found = Threshold(0.08), []
    for place, experts in effects.groupby(["layer", "domain", "sequence", "position"]):
        layer, domain, sequence, position = place
        of_token = (contributions.domains, contributions.sequences, contributions.positions)
        token = np.logical_and.reduce([a == b for a, b in zip(of_token, (domain, sequence, position), strict=True)])
        kept = rule(contributions.logits[layer, torch.from_numpy(token)], layer).experts[0].tolist()
        useful = dict(zip(experts["expert"], experts["kl"] >= 1e-3, strict=True))
        hits = sum(useful[expert] for expert in kept if expert >= 0)
        number = sum(expert >= 0 for expert in kept)
        found.append((domain, sequence, number, hits, sum(useful.values()), (number - hits) / number))
    table = discoveries_by_effect(rule, effects, contributions)
    assert sorted(map(tuple, table.to_numpy())) == [pytest.approx(row) for row in sorted(found)]


def test_a_promise_about_effects(changed):
    effects, contributions = changed
    promise = promise_effects(effects, contributions, 0.6, levels=(0.001, 0.01, 0.1))
    table = discoveries_by_effect(promise.rule, effects, contributions)
    risks = table.groupby(["domain", "document"])["proportion"].mean()
    assert promise.documents == len(risks)
    assert promise.tried["corrected"].iloc[0] == pytest.approx(
        (discoveries_by_effect(promise.rule.at(0.001), effects, contributions)
         .groupby(["domain", "document"])["proportion"].mean().sum() + 1) / (len(risks) + 1)
    )  # fmt: skip
    assert (risks.sum() + 1) / (len(risks) + 1) <= 0.6
    assert promise.text.endswith("at most 0.6 in expectation change a prediction by less than 0.001 nats")
    with pytest.raises(ValueError, match="keeps an expert whose effect is not known: measure more ranks"):
        discoveries_by_effect(TopK(9, max_k=9), effects, contributions)
