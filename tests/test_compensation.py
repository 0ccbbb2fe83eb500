"""What stands in for dropped experts: held to loops over tokens and experts, on small real models."""

import copy
import pickle

import pytest
import torch
from families import PATCHED, tiny
from models import state_of, tiny_olmoe, tokens

from bhlib import BHRoutingIntegration, RoutingPatch, calibrate, find_moe_layers, load_demo, load_heldout
from bhlib.compensating import Products, explain_missing, fit_compensation, fit_ranks, solve
from bhlib.compensation import Compensation, LayerCompensation, load_compensation
from bhlib.discovery import name_of
from bhlib.evaluation import evaluate
from bhlib.layer_passes import expert_output, watch_layers
from bhlib.rules import BH, Threshold, TopK

MIXTRAL = next(family for family in PATCHED if family.model_type == "mixtral")
MODELS = {"olmoe": tiny_olmoe, "mixtral": lambda: tiny(MIXTRAL)}


def random_compensation(model, rank=3, seed=0):
    """Numbers of the size of the experts' outputs."""
    layers = find_moe_layers(model)
    hidden, generator = layers[0].router.weight.shape[-1], torch.Generator().manual_seed(seed)

    def draw(*shape):
        return 0.1 * torch.randn(*shape, generator=generator)

    experts = layers[0].num_experts
    return Compensation(
        [
            LayerCompensation(
                torch.cat([torch.zeros(1, hidden), draw(experts, hidden)]), draw(rank, hidden), draw(rank, hidden)
            )
            for _ in layers
        ],
        name_of(model),
    )


def passes_of(model, ids, patch=None):
    """What each layer's experts were given and gave, and the logits of the model."""
    seen = {}
    with torch.no_grad(), watch_layers(find_moe_layers(model), lambda layer, what: seen.update({layer.index: what})):
        logits = model(input_ids=ids).logits
    return seen, logits


def by_hand(layer, seen, kept, compensation):
    """The output of a layer, token by token: kept experts, and what stands in for the others of the model's own."""
    part = compensation.layers[layer.index]
    outputs = torch.stack([expert_output(layer, seen.hidden, expert) for expert in range(layer.num_experts)], dim=1)
    _, weights, experts = type(layer.router).forward(layer.router, seen.hidden)
    total = torch.zeros_like(seen.hidden)
    for token, (own, given) in enumerate(zip(experts.tolist(), weights, strict=True)):
        for expert, weight in zip(own, given, strict=True):
            if expert in kept[token]:
                total[token] += weight * outputs[token, expert]
            else:
                linear = part.up.T @ (part.down @ seen.hidden[token])
                total[token] += weight * (part.means[1 + expert] + linear)
    return total


@pytest.mark.parametrize("kernels", ["auto", False])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rank", [0, 3])
def test_a_layer_is_as_by_hand(name, rank, kernels):
    model = MODELS[name]()
    layers, ids = find_moe_layers(model), tokens(2, 5) % 100
    compensation, rule = random_compensation(model, rank), BH(0.2, max_k=layers[0].top_k)
    with RoutingPatch(model, rule, compensation=compensation, kernels=kernels) as patch:
        seen, _ = passes_of(model, ids)
    assert 0 < patch.get_routing_stats()["sparsity_gain"] < 1
    for layer in layers:
        routing = patch.records.passes[0].routings[layer.index]
        kept = [{*row.tolist()} - {-1} for row in routing.experts]
        expected = by_hand(layer, seen[layer.index], kept, compensation)
        torch.testing.assert_close(seen[layer.index].output, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_where_nothing_is_dropped_the_bits_are_the_models(name):
    model = MODELS[name]()
    ids, layers = tokens(2, 5) % 100, find_moe_layers(model)
    _, own = passes_of(model, ids)
    rule = Threshold(1e-30, max_k=layers[0].top_k)  # keeps all, and is not known to
    with RoutingPatch(model, rule, compensation=random_compensation(model)):
        _, patched = passes_of(model, ids)
    assert torch.equal(patched, own)


def test_an_expert_outside_the_models_own_is_computed_beside_them():
    model = tiny_olmoe()
    ids, layers = tokens(2, 5), find_moe_layers(model)
    compensation, chosen = random_compensation(model), torch.tensor([[3, 60, 1], [5, 7, 11]]).repeat(5, 1)

    class Fixed(TopK):
        is_prefix = False

        def select(self, router_logits, scores, layer):
            return chosen, torch.full((len(chosen),), 3)

    with RoutingPatch(model, Fixed(3), compensation=compensation) as patch:
        seen, _ = passes_of(model, ids)
    layer, first = layers[0], seen[0]
    part, probs = compensation.layers[0], first.logits.softmax(-1)
    for token in range(10):
        kept, own = chosen[token].tolist(), probs[token].topk(8).indices.tolist()
        expected = sum(probs[token, e] * expert_output(layer, first.hidden[token, None], e)[0] for e in kept)
        for expert in set(own) - set(kept):
            linear = part.up.T @ (part.down @ first.hidden[token])
            expected = expected + probs[token, expert] * (part.means[1 + expert] + linear)
        torch.testing.assert_close(first.output[token], expected, rtol=1e-4, atol=1e-6)
    assert patch.get_routing_stats()["mean_experts_per_token"] == 3
    kept = [sorted({*row.tolist()} - {-1}) for row in patch.records.passes[0].routings[0].experts]
    assert kept == [[1, 3, 60], [5, 7, 11]] * 5


def test_records_hold_what_was_kept_and_nothing_of_what_stands_in():
    model = tiny_olmoe()
    ids = tokens(2, 5)
    frames = []
    for compensation in (None, random_compensation(model)):
        with BHRoutingIntegration(model, 0.2, compensation=compensation) as bh, torch.no_grad():
            model(input_ids=ids)
        frames.append(bh.records.to_frame().query("layer == 0"))  # the layers after it see other tokens
    assert frames[0].reset_index(drop=True).equals(frames[1].reset_index(drop=True))


def test_weights_are_the_models_own_though_its_convention_divides_by_their_sum():
    model = MODELS["mixtral"]()
    ids = tokens(1, 6) % 100
    with RoutingPatch(model, TopK(1), compensation=random_compensation(model)) as patch:
        seen, _ = passes_of(model, ids)
    layer = find_moe_layers(model)[0]
    _, weights, _ = layer.router(seen[0].hidden)
    torch.testing.assert_close(patch.records.passes[0].routings[0].weights[:, :1], weights[:, :1])
    assert (weights[:, 0] < 1).all()


def test_it_generates_and_is_taken_back():
    model = tiny_olmoe()
    before, ids = state_of(model), tokens(2, 4)
    compensation = random_compensation(model)
    plain = model.generate(ids, max_new_tokens=5, do_sample=False)
    with BHRoutingIntegration(model, 0.2, compensation=compensation) as bh:
        generated = model.generate(ids, max_new_tokens=5, do_sample=False)
        copied = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    assert generated.shape == (2, 9) and bh.get_routing_stats()["total_tokens"] == 16
    assert state_of(model) == before
    for one in (model, *copied):
        assert torch.equal(one.generate(ids, max_new_tokens=5, do_sample=False), plain)


def test_analyze_mode_leaves_the_output_as_it_is():
    model = tiny_olmoe()
    _, own = passes_of(model, tokens(2, 4))
    with BHRoutingIntegration(model, 0.2, mode="analyze", compensation=random_compensation(model)) as bh:
        _, watched = passes_of(model, tokens(2, 4))
    assert torch.equal(watched, own) and 0 < bh.get_routing_stats()["bh_would_select_mean"] < 8


def test_gradients_reach_the_router_through_what_stands_in():
    model = tiny_olmoe(num_hidden_layers=1)
    ids, gradients = tokens(1, 6), []
    for compensation in (None, random_compensation(model)):
        with RoutingPatch(model, TopK(1), compensation=compensation):
            loss = model(input_ids=ids, labels=ids).loss
        gradients.append(torch.autograd.grad(loss, model.model.layers[0].mlp.gate.weight)[0])
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients)
    assert not torch.allclose(*gradients)


# -- the fit ---------------------------------------------------------------------------------------------------


def features_by_hand(layer, seen, keep, top_k):
    """Weights of dropped experts, with the hidden state times their sum, and what they would have added."""
    outputs = torch.stack([expert_output(layer, seen.hidden, expert) for expert in range(layer.num_experts)], dim=1)
    features = torch.zeros(len(seen.hidden), layer.num_experts)
    for token, (own, given) in enumerate(zip(seen.experts.tolist(), seen.weights, strict=True)):
        for expert, weight in list(zip(own, given, strict=True))[keep:top_k]:
            features[token, expert] = weight
    missing = (features[:, :, None] * outputs).sum(dim=1)
    return torch.cat([features, features.sum(dim=1, keepdim=True) * seen.hidden], dim=1), missing


@pytest.mark.parametrize("name", MODELS)
def test_features_are_as_by_hand(name):
    model = MODELS[name]()
    layers = find_moe_layers(model)
    top_k = layers[0].top_k
    seen, _ = passes_of(model, tokens(3, 7) % 100)
    for layer in layers:
        with torch.no_grad():
            found = explain_missing(layer, seen[layer.index], TopK(top_k // 2), True)
        for one, expected in zip(found, features_by_hand(layer, seen[layer.index], top_k // 2, top_k), strict=True):
            torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-6)


def planted(num_tokens=400, experts=6, hidden=5, rank=2, seed=0):
    """Features, what they explain but for a little noise, and the means and the map behind it."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    means, linear_map = draw(experts, hidden), draw(hidden, rank) @ draw(rank, hidden)
    weights = draw(num_tokens, experts).abs() * (draw(num_tokens, experts) > 0.5)
    features = torch.cat([weights, weights.sum(dim=1, keepdim=True) * draw(num_tokens, hidden)], dim=1)
    return features, features @ torch.cat([means, linear_map]) + 1e-4 * draw(num_tokens, hidden), means, linear_map


def test_a_planted_map_is_found():
    features, explained, means, linear_map = planted()
    products = Products(*features.shape[1:], explained.shape[1], torch.device("cpu"))
    for rows in torch.arange(400).split(150):
        products.add(features[rows], explained[rows])
    found = solve(products, 6, 2, 1e-9)
    torch.testing.assert_close(found[0], means, atol=1e-3, rtol=0)
    torch.testing.assert_close(found[1], linear_map, atol=1e-3, rtol=0)
    torch.testing.assert_close(found[2].T @ found[2], torch.eye(2, dtype=torch.float64))
    assert products.gain(torch.cat(found[:2])) == pytest.approx(float(explained.square().sum()), rel=1e-6)


@pytest.mark.parametrize("rank", [0, 5])
def test_means_alone_and_full_rank_are_ridge_regressions(rank):
    features, explained, *_ = planted()
    features = features[:, : 6 + rank]
    products = Products(features.shape[1], 5, torch.device("cpu"))
    products.add(features, explained)
    means, linear_map, _ = solve(products, 6, rank, 0.05)
    squares = features.square().sum(dim=0)
    ridge = torch.cat([squares[:6].mean().expand(6), squares[6:].mean().expand(rank)]) * 0.05
    expected = torch.linalg.lstsq(
        torch.cat([features, ridge.sqrt().diag()]), torch.cat([explained, torch.zeros(6 + rank, 5)]).double()
    ).solution
    torch.testing.assert_close(torch.cat([means, linear_map]), expected, atol=1e-8, rtol=1e-6)


def test_a_smaller_rank_loses_least_of_all_maps_of_that_rank():
    features, explained, *_ = planted(rank=5)
    products = Products(features.shape[1], 5, torch.device("cpu"))
    products.add(features, explained)
    gains = [products.gain(torch.cat(solve(products, 6, rank, 1e-9)[:2])) for rank in range(6)]
    assert gains == sorted(gains) and gains[0] < gains[5]
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):  # other directions
        basis = torch.linalg.qr(torch.randn(5, 2, generator=generator, dtype=torch.float64)).Q
        rest = Products(features.shape[1], 2, torch.device("cpu"))
        rest.add(features, explained @ basis)
        means_only = Products(6, 5, torch.device("cpu"))
        means_only.add(features[:, :6], explained @ (torch.eye(5, dtype=torch.float64) - basis @ basis.T))
        gain = rest.gain(torch.linalg.solve(rest.gram, rest.cross))
        gain += means_only.gain(torch.linalg.solve(means_only.gram + 1e-9 * torch.eye(6), means_only.cross))
        assert gain <= gains[2] * (1 + 1e-9)


@pytest.fixture(scope="module")
def fitted():
    model = tiny_olmoe()
    return model, fit_compensation(model, tokens(20, 16), rank=2, batch_size=2, progress=False)


def missing_after(model, ids, rule, **options):
    """Norm of what the first layer's output lacks under a rule, over that of its own output."""
    layer = find_moe_layers(model)[0]
    with RoutingPatch(model, rule, kernels=False, **options):
        seen, _ = passes_of(model, ids)
    with torch.no_grad():
        _, weights, experts = layer.router(seen[0].hidden)
        own = layer.experts(seen[0].hidden, experts, weights)
    return float((seen[0].output - own).norm() / own.norm())


def test_a_fit_gives_back_loss_on_other_text():
    model, _ = load_demo()
    text = load_heldout("calibration", length=64, max_sequences=10)
    data = load_heldout("validation", length=128, max_sequences=2)
    before, own = state_of(model), evaluate(model, data)["loss"].mean()
    lost = {"nothing": evaluate(model, data, TopK(3))["loss"].mean() - own}
    for rank in (0, 16):
        compensation = fit_compensation(model, text, rank=rank, progress=False)
        lost[rank] = evaluate(model, data, TopK(3), compensation=compensation)["loss"].mean() - own
    assert 0 < lost[16] < lost[0] < 0.85 * lost["nothing"]
    assert state_of(model) == before


def test_where_means_say_nothing_next_to_nothing_is_added(fitted):
    # Random experts are as often for as against a direction: whatever was fitted would be chance.
    model, compensation = fitted
    ids = tokens(20, 16, seed=5)
    lacks = [missing_after(model, ids, TopK(4), **options) for options in ({}, {"compensation": compensation})]
    assert lacks[1] < 1.01 * lacks[0]


def test_padding_is_left_out(fitted):
    model, _ = fitted
    ids = tokens(20, 16)
    padded, mask = torch.cat([ids, ids.flip(0)], dim=1), torch.ones(20, 32, dtype=torch.int64)
    mask[:, 16:] = 0
    options = {"rank": 2, "batch_size": 2, "progress": False}
    plain, masked = fit_compensation(model, ids, **options), fit_compensation(
        model, padded, attention_mask=mask, **options
    )  # fmt: skip
    for one, other in zip(plain.layers, masked.layers, strict=True):
        # The order of sums differs; directions are determined up to their sign, the map is not.
        torch.testing.assert_close(one.means, other.means, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(one.up.T @ one.down, other.up.T @ other.down, rtol=1e-3, atol=1e-6)


def test_files(fitted, tmp_path):
    model, compensation = fitted
    compensation.save(tmp_path / "c.safetensors")
    loaded = load_compensation(tmp_path / "c.safetensors")
    assert repr(loaded) == repr(compensation)
    for one, other in zip(loaded.layers, compensation.layers, strict=True):
        assert all(map(torch.equal, one, other))


def test_ranks_are_fitted_together_as_alone(fitted):
    model, compensation = fitted
    both = fit_ranks(model, tokens(20, 16), (0, 2), batch_size=2, progress=False)
    means = fit_compensation(model, tokens(20, 16), batch_size=2, progress=False)
    for rank, alone in ((0, means), (2, compensation)):
        assert both[rank].rank == rank
        for one, other in zip(both[rank].layers, alone.layers, strict=True):
            torch.testing.assert_close(one.means, other.means)
            torch.testing.assert_close(one.up.T @ one.down, other.up.T @ other.down)


def test_cost_counts_rows_and_the_map(fitted):
    _, compensation = fitted
    # 3 dropped experts of 64 numbers and two products of 2 x 64, over three matrices of 64 x 32
    assert compensation.cost(5.0, top_k=8, intermediate_size=32) == pytest.approx((3 * 64 + 2 * 2 * 64) / (3 * 64 * 32))


def test_a_sweep_counts_what_stands_in(fitted):
    model, compensation = fitted
    data = {"a": tokens(2, 8)}
    plain, with_it = evaluate(model, data, BH(0.2)), evaluate(model, data, BH(0.2), compensation=compensation)
    assert plain["cost"].equals(plain["mean_k"])
    for row in with_it.itertuples():  # dropped experts of 64 numbers, and two products of 2 x 64, over 3 x 64 x 32
        added = ((8 - row.mean_k) * 64 + 2 * 2 * 64) / (3 * 64 * 32)
        assert row.cost == pytest.approx(row.mean_k + added)
    own = evaluate(model, data, None, compensation=compensation)  # the model's own routing drops nothing
    assert own["cost"].equals(own["mean_k"])


# -- bad input -------------------------------------------------------------------------------------------------


def test_another_models_compensation_is_refused(fitted):
    _, compensation = fitted
    other = tiny_olmoe(hidden_size=32)
    with pytest.raises(ValueError, match=r"was fitted on 'OlmoeForCausalLM' \(3 layers, 64 experts, 64 hidden size\)"):
        RoutingPatch(other, TopK(4), compensation=compensation)


def test_a_path_is_no_compensation(fitted):
    with pytest.raises(
        TypeError, match="fit_compensation or bhlib.load_compensation gives, got 'c.safetensors' of type"
    ):
        RoutingPatch(fitted[0], TopK(4), compensation="c.safetensors")


def test_damaged_files_are_refused(fitted, tmp_path):
    model, compensation = fitted
    path = tmp_path / "c.safetensors"
    compensation.save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        load_compensation(path)
    calibrate(model, tokens(4, 16), null="conformal", max_values=100, progress=False).save(path)
    with pytest.raises(ValueError, match="holds no compensation of format 1"):
        load_compensation(path)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rank": -1}, "rank is -1, but must lie in 0..64"),
        ({"rank": 65}, "rank is 65, but must lie in 0..64"),
        ({"batch_size": 8}, "the text has 3 batches of 8 sequences, and one in 5 is held out"),
    ],
)
def test_bad_options(fitted, options, message):
    model, _ = fitted
    with pytest.raises(ValueError, match=message):
        fit_compensation(model, tokens(20, 8), progress=False, **options)
