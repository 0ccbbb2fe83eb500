"""Measures beyond the mean loss, each against a slow, obvious twin."""

import numpy as np
import pytest
import torch

from bhlib import load_demo, load_heldout
from bhlib.evaluation import evaluate
from bhlib.loading import heldout_sequence_documents
from bhlib.measures import BINS, MEASURES, measure
from bhlib.patching import RoutingPatch
from bhlib.rules import BH, TopK

NAMES = ("factbook", "novels", "python")


@pytest.fixture(scope="module")
def text():
    ids, numbers = load_heldout("validation", 64, 4), heldout_sequence_documents("validation", 64, 4)
    return {name: ids[name] for name in NAMES}, {name: numbers[name] for name in NAMES}


@pytest.fixture(scope="module")
def model():
    return load_demo()[0]


@pytest.fixture(scope="module")
def table(model, text):
    rules = {"top-3": (TopK(3), {}), "top-8": (TopK(8), {}), "BH": (BH(1e-3), {})}
    return measure(model, rules, *text, against={"BH": "top-3"}, batch_size=4).set_index(["rule", "measure"])


@pytest.fixture(scope="module")
def predictions(model, text):
    """Probabilities and targets of all tokens under BH, domain by domain."""
    with RoutingPatch(model, BH(1e-3)), torch.no_grad():
        return {
            name: (model(input_ids=ids).logits[:, :-1].softmax(-1).flatten(0, 1), ids[:, 1:].flatten())
            for name, ids in text[0].items()
        }


def test_means_are_those_of_evaluate(model, text, table):
    frame = evaluate(model, text[0], BH(1e-3), agreement=True)
    for name, column in (("loss", "loss"), ("accuracy", "accuracy"), ("kl", "kl"), ("agreement", "top1_agreement")):
        assert table["value"]["BH", name] == pytest.approx(frame[column].mean(), abs=1e-5), name
    assert table["mean_k"]["BH", "loss"] == pytest.approx(frame["mean_k"].mean(), abs=1e-3)  # a token on the brink
    assert table["units"].iloc[0] == sum(len(np.unique(numbers)) for numbers in text[1].values())


def test_ece_is_the_mean_distance_of_confidence_and_accuracy_over_bins(table, predictions):
    probabilities = torch.cat([p for p, _ in predictions.values()])
    targets = torch.cat([t for _, t in predictions.values()])
    confidence, guess = (part.numpy() for part in probabilities.double().max(-1))
    right, error = guess == targets.numpy(), 0.0
    for i in range(BINS):
        inside = (confidence >= i / BINS) & (confidence < (i + 1) / BINS)
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert table["value"]["BH", "ece"] == pytest.approx(error, abs=1e-5)


def test_the_worst_domain_and_the_worst_tokens(table, predictions):
    losses = {name: -p.gather(1, t[:, None])[:, 0].log().numpy() for name, (p, t) in predictions.items()}
    assert table["value"]["BH", "worst domain"] == pytest.approx(max(map(np.mean, losses.values())), abs=1e-5)
    every = np.sort(np.concatenate([*losses.values()]))
    share = 0.05 * len(every)
    whole = int(share)
    worst = (every[-whole:].sum() + (share - whole) * every[-whole - 1]) / share
    assert table["value"]["BH", "worst 5 % of tokens"] == pytest.approx(worst, rel=2e-3)
    assert table["value"]["BH", "worst domain's rise"] > 0


def test_the_models_own_routing_has_no_distance_from_itself(table):
    own = table.loc["top-8"]
    assert own["value"]["kl"] == pytest.approx(0, abs=1e-6) and own["value"]["agreement"] == 1
    assert own["value"]["worst domain's rise"] == pytest.approx(0, abs=1e-6)
    assert own["difference"].isna().all()


def test_differences_are_paired(table):
    for name in MEASURES:
        difference = table["value"]["BH", name] - table["value"]["top-3", name]
        assert table["difference"]["BH", name] == pytest.approx(difference)
    loss = table.loc[("BH", "loss")]
    assert loss["difference_high"] - loss["difference_low"] < 0.5 * (loss["high"] - loss["low"])
