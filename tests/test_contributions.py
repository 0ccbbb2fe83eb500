"""Contributions: every expert by hand, in a model that is left as it was."""

import numpy as np
import pytest
import torch
from families import PATCHED, tiny
from models import state_of, tiny_olmoe, tokens
from torch.nn.functional import cross_entropy, linear, silu

from bhlib import BHRoutingIntegration, find_moe_layers
from bhlib.contributions import measure_contributions, one_changed

FAMILY = {family.model_type: family for family in PATCHED}


def loud_olmoe():
    """A tiny OLMoE whose experts say something."""
    model = tiny_olmoe(num_hidden_layers=2)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.mlp.experts.gate_up_proj, std=0.2)
        torch.nn.init.normal_(layer.mlp.experts.down_proj, std=0.4)
    return model


MODELS = {"olmoe": loud_olmoe, "mixtral": lambda: tiny(FAMILY["mixtral"])}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return MODELS[request.param]()


def own_weights(model, logits):
    """Weights and experts of one token, by the model's convention."""
    config = model.config
    probs = logits.softmax(-1)
    weights, experts = probs.topk(config.num_experts_per_tok)
    if config.model_type == "mixtral":
        weights = weights / weights.sum()
    return weights, experts.tolist()


def weight_beside(model, logits, expert):
    """The weight of an expert that is added to the model's own."""
    probs = logits.softmax(-1)
    if model.config.model_type == "mixtral":
        own = own_weights(model, logits)[1]
        return probs[expert] / (probs[own].sum() + probs[expert])
    return probs[expert]


def one_expert(module, hidden, expert):
    """An expert of OLMoE or Mixtral, written out."""
    gate, up = linear(hidden, module.gate_up_proj[expert]).chunk(2, dim=-1)
    return linear(silu(gate) * up, module.down_proj[expert])


def blocks_of(model, ids):
    """For each layer: what its MoE block was given, [sequences, length, hidden]."""
    seen = []
    handles = [
        layer.mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0])) for layer in model.model.layers
    ]
    with torch.no_grad():
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return seen


# -- all experts -----------------------------------------------------------------------------------------------


def test_every_expert_is_what_a_loop_over_experts_gives(model):
    ids = tokens(3, 7)[:, :7] % 128
    measured = measure_contributions(model, ids, batch_size=2, progress=False)
    with torch.no_grad():
        for number, (layer, hidden) in enumerate(zip(model.model.layers, blocks_of(model, ids), strict=True)):
            for token, state in enumerate(hidden.flatten(0, 1)):
                logits = linear(state, layer.mlp.gate.weight)
                weights, own = own_weights(model, logits)
                parts = [one_expert(layer.mlp.experts, state, e) for e in range(len(logits))]
                whole = sum(weight * parts[e] for weight, e in zip(weights, own, strict=True))
                for e, part in enumerate(parts):
                    weight = weights[own.index(e)] if e in own else weight_beside(model, logits, e)
                    expected = {
                        "r": (weight * part).norm() / whole.norm(),
                        "along": weight * (part @ whole) / whole.norm() ** 2,
                        "norms": part.norm(),
                        "logits": logits[e],
                    }
                    for name, value in expected.items():
                        # float32 sums in another order
                        torch.testing.assert_close(
                            getattr(measured, name)[number, token, e], value, rtol=1e-4, atol=1e-6
                        )
                    assert measured.selected[number, token, e] == (e in own)


@pytest.mark.parametrize("family", PATCHED, ids=str)
def test_the_parts_of_the_selected_experts_are_the_whole_in_every_family(family):
    model = tiny(family)
    layers = find_moe_layers(model)
    measured = measure_contributions(model, tokens(2, 5) % 128, progress=False)
    assert measured.r.shape == (len(layers), 10, 16) and (measured.r > 0).all()
    assert (measured.selected.sum(-1) == layers[0].top_k).all()
    along = (measured.along * measured.selected).sum(-1)
    torch.testing.assert_close(along, torch.ones_like(along), rtol=0, atol=1e-5)
    assert (measured.along.abs() <= measured.r * 1.0001).all()  # Cauchy and Schwarz, and rounding


def test_tokens_know_where_they_come_from():
    model = tiny_olmoe(num_hidden_layers=1)
    text = {"a": tokens(3, 6), "b": tokens(2, 4, seed=1)}
    documents = {"a": [0, 0, 1], "b": [0, 1]}
    whole = measure_contributions(model, text, documents=documents, batch_size=2, progress=False)
    assert whole.domains.tolist() == ["a"] * 18 + ["b"] * 8
    assert whole.sequences.tolist() == [0] * 6 + [1] * 6 + [2] * 6 + [0] * 4 + [1] * 4
    assert whole.positions.tolist() == 3 * [*range(6)] + 2 * [*range(4)]
    assert whole.documents.tolist() == [0] * 12 + [1] * 6 + [0] * 4 + [1] * 4
    assert whole.units.tolist() == [0] * 12 + [1] * 6 + [2] * 4 + [3] * 4
    alone = measure_contributions(model, text["b"], progress=False)
    assert alone.documents.tolist() == [0] * 4 + [1] * 4 and set(alone.domains) == {"token_ids"}
    torch.testing.assert_close(alone.r, whole.r[:, 18:])


def test_a_sample_is_some_of_all_tokens_and_takes_no_padding():
    model = tiny_olmoe(num_hidden_layers=1)
    ids = tokens(4, 10)
    mask = torch.ones_like(ids)
    mask[2, 4:] = 0
    options = dict(attention_mask=mask, batch_size=3, progress=False)
    whole = measure_contributions(model, ids, **options)
    assert whole.r.shape[1] == 34 and not ((whole.sequences == 2) & (whole.positions >= 4)).any()
    some = measure_contributions(model, ids, max_tokens=9, seed=1, **options)
    other = measure_contributions(model, ids, max_tokens=9, seed=2, **options)
    places = {place: i for i, place in enumerate(zip(whole.sequences, whole.positions, strict=True))}
    chosen = [places[place] for place in zip(some.sequences, some.positions, strict=True)]
    assert len(set(chosen)) == 9 and chosen == sorted(chosen)
    torch.testing.assert_close(some.r, whole.r[:, chosen])
    assert (some.sequences * 10 + some.positions).tolist() != (other.sequences * 10 + other.positions).tolist()


def test_half_precision_is_measured_in_float32():
    model = tiny_olmoe(num_hidden_layers=1).bfloat16()
    measured = measure_contributions(model, tokens(2, 8), progress=False)
    assert {getattr(measured, name).dtype for name in ("r", "along", "norms", "logits")} == {torch.float32}
    along = (measured.along * measured.selected).sum(-1)
    # Outputs have eight bits, and the layer's is a sum of eight.
    torch.testing.assert_close(along, torch.ones_like(along), rtol=0, atol=0.03)


# -- one changed -----------------------------------------------------------------------------------------------


def predictions_with(model, ids, number, position, chosen):
    """Log-probabilities [length, vocabulary] if one token has these experts in one layer, by a hook on its block."""

    def other(module, args, output):
        state = args[0][0, position]
        logits = linear(state, module.gate.weight)
        scores = logits.softmax(-1)[chosen]
        if model.config.model_type == "mixtral":
            scores = scores / scores.sum()
        output = output.clone()
        output[0, position] = sum(
            score * one_expert(module.experts, state, e) for score, e in zip(scores, chosen, strict=True)
        )
        return output

    handle = model.model.layers[number].mlp.register_forward_hook(other)
    with torch.no_grad():
        predicted = model(input_ids=ids[None]).logits[0].log_softmax(-1)
    handle.remove()
    return predicted


def test_one_changed_is_what_the_network_says_with_other_experts(model):
    text = {"a": tokens(2, 6) % 128, "b": tokens(2, 9, seed=3) % 128}
    ranks = model.config.num_experts_per_tok + 2
    frame = one_changed(model, text, num_tokens=5, ranks=ranks, batch_size=4, progress=False)
    assert len(frame) == 5 * ranks and frame["rank"].tolist() == 5 * [*range(1, ranks + 1)]
    assert (frame["selected"] == (frame["rank"] <= model.config.num_experts_per_tok)).all()
    for row in frame.itertuples():
        ids = text[row.domain][row.sequence]
        with torch.no_grad():
            before = model(input_ids=ids[None]).logits[0].log_softmax(-1)
            state = blocks_of(model, ids[None])[row.layer][0, row.position]
        logits = linear(state, model.model.layers[row.layer].mlp.gate.weight)
        assert logits.argsort(descending=True)[row.rank - 1] == row.expert
        own = own_weights(model, logits)[1]
        chosen = [e for e in own if e != row.expert] if row.selected else [*own, row.expert]
        after = predictions_with(model, ids, row.layer, row.position, chosen)
        kl = (before.exp() * (before - after)).sum(-1)
        loss = cross_entropy(after[:-1], ids[1:], reduction="none") - cross_entropy(
            before[:-1], ids[1:], reduction="none"
        )
        at = row.position
        expected = [kl[at], loss[at], kl[at + 1 :].sum(), loss[at + 1 :].sum()]
        found = [row.kl, row.loss_change, row.kl_after, row.loss_change_after]
        # Log-probabilities of float32 have some 1e-6 of rounding, here up to nine are added up.
        assert found == pytest.approx([value.item() for value in expected], abs=2e-5)
        assert kl[:at].abs().max() < 1e-5 if at else True  # the past knows nothing of it
    assert frame["kl"].max() > 1e-4  # more than rounding


def test_leaving_out_the_only_expert_leaves_nothing():
    model = tiny_olmoe(num_experts=4, num_experts_per_tok=1, num_hidden_layers=1)
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj.zero_()
    frame = one_changed(model, tokens(1, 4), num_tokens=3, progress=False)
    assert frame["kl"].abs().max() < 1e-6


def test_changes_are_drawn_once_each_and_by_the_seed():
    model = tiny_olmoe(num_hidden_layers=2)
    first, again, other = (
        one_changed(model, tokens(3, 5), num_tokens=12, ranks=1, seed=seed, progress=False) for seed in (0, 0, 1)
    )
    assert first.equals(again) and not first.equals(other)
    assert not first.duplicated(["sequence", "position", "layer"]).any()
    everything = one_changed(model, tokens(1, 3), num_tokens=4, ranks=1, progress=False)
    assert sorted(zip(everything["position"], everything["layer"], strict=True)) == [(0, 0), (0, 1), (1, 0), (1, 1)]


# -- the model is left as it was -------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", [measure_contributions, one_changed])
def test_the_model_is_left_as_it_was(measure):
    model = tiny_olmoe()
    state, ids = state_of(model), tokens(2, 8)
    before = model(ids).logits
    options = {} if measure is measure_contributions else {"num_tokens": 2}
    measure(model, ids, progress=False, **options)
    assert state_of(model) == state and torch.equal(model(ids).logits, before)

    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight[3, 5] = torch.nan
    with pytest.raises(ValueError):
        measure(model, ids, progress=False, **options)
    assert state_of(model) == state
    with pytest.raises(IndexError):  # an id beyond the vocabulary, after all checks
        measure(tiny := tiny_olmoe(), ids + 1000, progress=False, **options)
    assert state_of(tiny) == state_of(tiny_olmoe())


@pytest.mark.parametrize("measure", [measure_contributions, one_changed])
def test_patched_models_and_training_are_refused(measure):
    model = tiny_olmoe(num_hidden_layers=1)
    with BHRoutingIntegration(model), pytest.raises(RuntimeError, match="is patched"):
        measure(model, tokens(2, 8))
    with pytest.raises(ValueError, match="is in training mode"):
        measure(model.train(), tokens(2, 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0, but must be 1 or more; None measures all"),
        ({"batch_size": 0}, "batch_size is 0, but must be 1 or more"),
        ({"documents": {"token_ids": [1]}}, r"documents\['token_ids'\] has shape \(1,\), but there are 2 sequences"),
        ({"documents": {"other": [1, 2]}}, r"documents\['token_ids'\] has shape \(0,\)"),
    ],
)
def test_bad_requests_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        measure_contributions(tiny_olmoe(num_hidden_layers=1), tokens(2, 4), progress=False, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tokens": 0}, r"num_tokens is 0, but must lie in 1..6"),
        ({"num_tokens": 7}, r"num_tokens is 7, but must lie in 1..6, the pairs of a token and layer"),
        ({"ranks": 65}, r"ranks is 65, but must lie in 1..64"),
        ({"batch_size": 1}, "batch_size is 1, but must be 2 or more: one copy stays unchanged"),
    ],
)
def test_bad_changes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        one_changed(tiny_olmoe(num_hidden_layers=1), tokens(2, 4), progress=False, **options)
    with pytest.raises(ValueError, match="the sequences of token_ids have one token"):
        one_changed(tiny_olmoe(num_hidden_layers=1), tokens(2, 1), progress=False)


def test_experts_of_other_processes_are_named():
    model = tiny_olmoe(num_hidden_layers=1)
    spread = model.model.layers[0].mlp.experts
    spread._is_expert_parallel, spread.num_experts = True, 32
    model.config.distributed_config = type(
        "Config", (), {"enable_expert_parallel": True, "ep_implementation": "all_reduce", "ep_size": 2}
    )()
    with pytest.raises(ValueError, match="routes to 64 experts, but this process holds 32 of them"):
        measure_contributions(model, tokens(1, 4))


def test_units_count_documents_across_texts():
    measured = measure_contributions(
        tiny_olmoe(num_hidden_layers=1), {"x": tokens(2, 3), "y": tokens(2, 3)}, max_tokens=8, progress=False
    )
    expected = {pair: i for i, pair in enumerate(dict.fromkeys(zip(measured.domains, measured.documents, strict=True)))}
    pairs = zip(measured.domains, measured.documents, strict=True)
    assert measured.units.tolist() == [expected[pair] for pair in pairs] and np.unique(measured.units).size > 2
