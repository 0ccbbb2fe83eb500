"""Settings of rules from calibration text: levels that give a mean, weights of layers."""

import itertools

import numpy as np
import pytest
import torch
from models import tiny_olmoe, tokens

from bhlib import BHRoutingIntegration, load_demo, load_heldout
from bhlib.evaluation import evaluate
from bhlib.loading import load_settings
from bhlib.procedures import benjamini_hochberg
from bhlib.rules import BH, StaticPerLayer
from bhlib.tuning import (
    choose_layer_weights,
    choose_static_per_layer,
    tune_layer_weights,
)

DATA = {"a": tokens(3, 20, seed=1), "b": tokens(5, 20, seed=2)}


def random_logits(*shape, seed=0):
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_layer_weights_multiply_the_odds_of_alpha():
    rule = BH(0.2, layer_weights=[1, 4, 0.25])
    assert [rule.layer_levels(layer)[0] for layer in range(3)] == pytest.approx([0.2, 0.5, 1 / 17])
    logits = random_logits(3, 400, 64)
    for layer, weighted in enumerate(logits):
        assert torch.equal(rule(weighted, layer).counts, BH(rule.layer_levels(layer)[0])(weighted).counts)
    by_expert = BH(0.2, layer_weights=[1, 4, 0.25], method="storey")
    assert torch.equal(by_expert(logits[1], 1).counts, BH(0.5, method="storey")(logits[1]).counts)


def test_layer_weights_are_a_step_up_per_layer_and_not_one_over_all():
    """Not weighted BH (Genovese, Roeder and Wasserman 2006): one step-up on p / w, the weights' arithmetic mean 1."""
    logits, weights = random_logits(2, 50, 64), torch.tensor([1.5, 0.5])
    rule = BH(0.05, layer_weights=weights.tolist(), min_k=0, max_k=64)
    pvals = torch.stack([rule.pvalues(layer) for layer in logits], dim=1)  # [tokens, layers, experts]
    for layer, tested in enumerate(logits):
        alone = benjamini_hochberg(pvals[:, layer], rule.layer_levels(layer)[0])
        assert torch.equal(rule(tested, layer).counts, alone.sum(-1))
    pooled = benjamini_hochberg((pvals / weights[:, None]).clamp(max=1).flatten(1), 0.05).view(pvals.shape)
    counts = torch.stack([rule(tested, layer).counts for layer, tested in enumerate(logits)], dim=1)
    assert not torch.equal(pooled.sum(-1), counts)


def test_levels_of_large_weights_stay_below_1():
    assert 0.999 < BH(1 - 1e-13, layer_weights=[1e9]).layer_levels(0)[0] < 1


@pytest.mark.parametrize("method", ["bh", "fixed"])
def test_the_shipped_layer_weights_have_geometric_mean_1(method):
    weights = load_settings()["layer_weights"][method]
    assert np.exp(np.log(weights).mean()) == pytest.approx(1, abs=1e-3)
    assert np.mean(weights) > 3


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((), "layer_weights must hold one finite number above 0 per MoE layer"),
        ((1, 0, 2), r"layer_weights must hold .* got \(1, 0, 2\)"),
        ((1, float("inf")), "layer_weights must hold one finite number above 0"),
    ],
)
def test_bad_layer_weights_are_named(weights, message):
    with pytest.raises(ValueError, match=message):
        BH(0.05, layer_weights=weights)


def test_layer_weights_of_another_model_are_refused():
    model, _ = load_demo()
    with (
        pytest.raises(ValueError, match="layer_weights has 3 entries for a model of 8 MoE layers"),
        BHRoutingIntegration(model, layer_weights=(1, 2, 3)),
    ):
        pass
    with pytest.raises(ValueError, match=r"layer must lie in 0\.\.2 for layer_weights, got None"):
        BH(layer_weights=(1, 2, 3))(random_logits(4, 64))


def test_a_layer_whose_experts_do_nothing_gets_the_smallest_weight():
    model, _ = load_demo()
    with torch.no_grad():
        model.model.layers[3].mlp.experts.down_proj.zero_()
    text = load_heldout("calibration", 128, 1)
    weights = choose_layer_weights(model, text, BH(0.01), rounds=1)
    assert len(weights) == 8 and np.prod(weights) == pytest.approx(1)
    assert np.argmin(weights) == 3
    with pytest.raises(ValueError, match="factor must be above 1, got 1"):
        choose_layer_weights(model, text, BH(0.01), factor=1)


def test_layer_weights_that_help_are_taken_at_the_wanted_number():
    """Experts of layers that do nothing are better spent elsewhere, on documents that were held out too."""
    model, text = load_demo()[0], load_heldout("calibration", 64, 2)
    with torch.no_grad():
        for layer in model.model.layers[1:5]:
            layer.mlp.experts.down_proj.zero_()
    tuned = tune_layer_weights(model, text, BH(layer_weights=[9] * 8), 2.5, rounds=1)
    assert tuned.low < tuned.difference < tuned.high < 0
    assert tuned.rule.layer_weights == tuned.layer_weights
    assert max(tuned.layer_weights[1:5]) < 1 < min(tuned.layer_weights[0], *tuned.layer_weights[5:])
    # Measured anew on the half that was held out: less loss, for fewer experts than one level for all layers takes.
    half = {name: sequences[1::2] for name, sequences in text.items()}
    weighted, plain = evaluate(model, half, tuned.rule), evaluate(model, half, BH(0.0001))
    assert weighted["mean_k"].mean() == pytest.approx(2.5, abs=0.2)
    assert weighted["mean_k"].mean() < plain["mean_k"].mean() and weighted["loss"].mean() < plain["loss"].mean()


def test_layer_weights_that_hurt_are_left_out():
    model, text = load_demo()[0], load_heldout("calibration", 64, 2)
    tuned = tune_layer_weights(model, text, BH(), 4, factor=1e6, rounds=1)  # steps that are far too large
    assert tuned.rule.layer_weights is None and tuned.high > 0 and max(tuned.layer_weights) > 100
    assert evaluate(model, text, tuned.rule)["mean_k"].mean() == pytest.approx(4, abs=0.2)


def test_layer_weights_are_judged_on_other_documents():
    from bhlib.tuning import _halves

    chosen, judged = _halves({"a": tokens(5, 4), "b": tokens(2, 4)}, {"a": [3, 3, 4, 7, 7], "b": [0, 0]})
    assert {name: rows.tolist() for name, rows in chosen.items()} == {"a": [0, 1, 3, 4], "b": [0, 1]}
    assert {name: rows.tolist() for name, rows in judged.items()} == {"a": [2]}
    with pytest.raises(ValueError, match="no domain has two documents, so none can be held out"):
        tune_layer_weights(tiny_olmoe(), {"a": tokens(2, 4)}, BH(), 4, documents={"a": [1, 1]})


@pytest.mark.parametrize("mean_k", [1, 5 / 3, 2.4, 3])
def test_static_k_per_layer_is_the_best_by_brute_force(mean_k):
    model = tiny_olmoe(num_experts=8, num_experts_per_tok=3)

    def loss(ks):
        return evaluate(model, DATA, StaticPerLayer(ks))["loss"].mean()

    budget = round(3 * mean_k)
    alone = {(at, k): loss([k if i == at else 3 for i in range(3)]) for at in range(3) for k in (1, 2, 3)}
    candidates = [ks for ks in itertools.product((1, 2, 3), repeat=3) if sum(ks) == budget]
    wanted = min(candidates, key=lambda ks: sum(alone[at, k] for at, k in enumerate(ks)))
    assert choose_static_per_layer(model, DATA, [2, mean_k])[mean_k].ks == wanted


def test_static_k_per_layer_wants_a_possible_mean():
    with pytest.raises(ValueError, match="mean_ks must lie between 1 and max_k=8, got 9"):
        choose_static_per_layer(tiny_olmoe(), DATA, [4, 9])
