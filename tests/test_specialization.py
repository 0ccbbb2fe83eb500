"""Analyses of routers after the OLMoE paper: definitions, held against counts by hand."""

import numpy as np
import pytest
import torch

from bhlib import load_demo, load_heldout
from bhlib.loading import heldout_sequence_documents
from bhlib.patching import RoutingPatch
from bhlib.rules import BH, TopK
from bhlib.specialization import (
    OFTEN,
    coactivation,
    domain_specialization,
    observe_selection,
    saturation,
    selected,
    summarize_specialization,
    vocabulary_specialization,
)


@pytest.fixture(scope="module")
def text():
    ids = load_heldout("validation", length=128, max_sequences=6)
    numbers = heldout_sequence_documents("validation", length=128, max_sequences=6)
    names = ("novels", "python", "verse")
    return {name: ids[name] for name in names}, {name: numbers[name] for name in names}


@pytest.fixture(scope="module")
def model():
    return load_demo()[0]


@pytest.fixture(scope="module")
def seen(model, text):
    return observe_selection(model, *text, BH(0.01), batch_size=2)


def by_hand(model, rule, sequences):
    """Selected experts, token by token, as sets: a list of tokens for each layer."""
    with RoutingPatch(model, rule, max_recorded_tokens=None) as patch, torch.no_grad():
        model(input_ids=sequences, use_cache=False)
        (only,) = patch.records.passes
        return [[set(row) - {-1} for row in only.routings[layer].experts.flatten(0, -2).tolist()] for layer in range(8)]


def test_domain_specialization_is_the_share_of_a_domains_tokens(model, text, seen):
    tokens = by_hand(model, BH(0.01), text[0]["python"])[3]
    share = domain_specialization(seen)
    assert share.shape == (8, 64, 3)
    for expert in (0, 17, 63):
        expected = np.mean([expert in one for one in tokens])
        assert share[3, expert, seen.domains.index("python")] == pytest.approx(expected)
    assert share.mean(axis=2).sum(axis=1) == pytest.approx(seen.mean_k)


def test_vocabulary_specialization_is_the_share_of_an_ids_occurrences(model, text, seen):
    ids, share = vocabulary_specialization(seen)
    tokens = torch.cat([part.flatten() for part in text[0].values()])
    assert all((tokens == one).sum() >= OFTEN for one in ids) and len(ids)
    used = [one for part in text[0].values() for one in by_hand(model, BH(0.01), part)[5]]
    mine = [one for one, token in zip(used, tokens.tolist(), strict=True) if token == ids[0]]
    expert = int(share[5, 0].argmax())
    assert share[5, 0, expert] == pytest.approx(np.mean([expert in one for one in mine]), rel=1e-5)
    with RoutingPatch(model, BH(0.01)), torch.no_grad():
        guesses = torch.cat([model(input_ids=part).logits.argmax(-1).flatten() for part in text[0].values()])
    assert np.array_equal(seen.occurrences["predicted"], guesses.bincount(minlength=4096))


def test_coactivation_is_the_papers(model, text, seen):
    used = [one for part in text[0].values() for one in by_hand(model, BH(0.01), part)[0]]
    share = coactivation(seen)[0]
    pair = np.unravel_index(np.argmax(share - np.eye(64)), share.shape)
    first = [one for one in used if pair[0] in one]
    assert share[pair] == pytest.approx(np.mean([pair[1] in one for one in first]))


def test_saturation_of_top_k_is_the_papers_and_of_other_rules_a_share_of_the_final_experts():
    now = selected(torch.tensor([[0, 1], [2, 3]]), 4)
    final = selected(torch.tensor([[1, 2], [2, 3]]), 4)
    assert saturation(now, final).tolist() == [0.5, 1.0]
    few = selected(torch.tensor([[1, -1], [4, 0]]), 4)  # -1 and 4 are no experts
    assert few.sum(dim=1).tolist() == [1, 1]
    assert saturation(few, final).tolist() == [0.5, 0.0]
    assert saturation(final, few).tolist() == [1.0, 0.0]


def test_a_router_that_knows_only_the_token_is_explained_by_it_and_by_nothing_else(model, text):
    """The first layer sees a token and what attention brings of others; a summary lies between 0 and 1, and falls."""
    table = summarize_specialization(observe_selection(model, *text, TopK(8)))
    assert table["mean_k"].eq(8).all()
    explained = table[table["measure"] == "input: explained"].set_index("layer")["value"]
    assert explained.between(0, 1).all() and explained[0] > explained[7]
    peaks = table[table["measure"] == "domain: largest over mean"]
    assert (peaks["value"] >= 1).all() and (peaks["low"] <= peaks["value"]).all()
