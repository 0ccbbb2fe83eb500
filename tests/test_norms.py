"""How large experts' outputs are: measured, guessed from logits, kept in a file, and selected by, under any rule."""

import pickle

import pytest
import torch
from families import PATCHED, tiny
from models import state_of, tiny_olmoe, tokens
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_compensation import passes_of, random_compensation

from bhlib import BHRoutingIntegration, RoutingPatch, calibrate, find_moe_layers, fit_norms, load_norms
from bhlib.contributions import measure_contributions
from bhlib.discovery import name_of
from bhlib.evaluation import evaluate
from bhlib.explain import explain
from bhlib.fitting_norms import Regressions, features_of
from bhlib.layer_passes import expert_output, watch_layers
from bhlib.levels import level_for_mean_experts
from bhlib.norms import LayerGuess, LayerNorms, OutputNorms
from bhlib.procedures import reject
from bhlib.pvalues import DirichletNull
from bhlib.rules import BH, Replay, Threshold, TopK, TopP
from bhlib.rules.rivals import KeepMass
from bhlib.rules.routing import mark_dropped
from bhlib.weighting import of_model

EXPERTS = 64
SOME = [family for family in PATCHED if family.model_type in ("olmoe", "mixtral", "gpt_oss")]


def random_numbers(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_norms(model, near=6, seed=0):
    """Guesses that move experts past each other."""
    layers = find_moe_layers(model)
    experts = layers[0].num_experts
    parts = [
        LayerNorms(
            random_numbers(experts, seed=seed + i, scale=0.3),
            random_numbers(experts, seed=seed + 50 + i, scale=0.3 * bool(near)),
            random_numbers(experts if near else 0, experts, seed=seed + 100 + i, scale=0.3),
        )
        for i in range(len(layers))
    ]
    return OutputNorms(parts, near, name_of(model))


def by_hand(part, logits, near):
    """The guess for one token, expert by expert."""
    order = logits.argsort(descending=True).tolist()
    guess = part.constant.clone()
    if near:
        edge = logits[order[near]]
        guess += edge * part.slope
        for expert in order[:near]:
            guess += (logits[expert] - edge) * part.table[expert]
    return guess


# -- the guess ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("near", [0, 1, 6, 63])
def test_a_guess_is_as_by_hand(near):
    model = tiny_olmoe()
    norms, logits = random_norms(model, near), random_numbers(3, 4, EXPERTS, seed=5)
    for layer in range(3):
        found = norms(logits.bfloat16(), layer)
        assert found.shape == logits.shape and found.dtype == torch.float32
        rows = logits.bfloat16().float().view(-1, EXPERTS)
        expected = torch.stack([by_hand(norms.layers[layer], row, near) for row in rows])
        torch.testing.assert_close(found.view(-1, EXPERTS), expected, rtol=1e-4, atol=1e-5)


def test_nothing_jumps_where_an_expert_comes_or_goes():
    norms, logits = random_norms(tiny_olmoe()), random_numbers(1, EXPERTS, seed=5)
    sixth, seventh = logits.topk(7).values[0, -2:].tolist()
    place = logits.topk(7).indices[0, -1]
    below, above = logits.clone(), logits.clone()
    below[0, place], above[0, place] = sixth - 1e-6, sixth + 1e-6
    assert seventh < sixth
    torch.testing.assert_close(norms(below, 0), norms(above, 0), rtol=0, atol=1e-4)


def test_its_arithmetic_is_counted_in_experts():
    model = tiny_olmoe()
    assert random_norms(model, 0).cost(192, 64) == 0
    assert random_norms(model, 16).cost(192, 64) == pytest.approx(17 * 64 / (3 * 192 * 64))


# -- fitted ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", SOME, ids=str)
def test_constants_are_means_of_log_norms(family):
    model = tiny(family)
    ids = tokens(4, 9) % 100
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    norms = fit_norms(model, ids, near=0, attention_mask=mask, batch_size=3, progress=False)
    seen = measure_contributions(model, ids, attention_mask=mask, progress=False)
    top_k = find_moe_layers(model)[0].top_k
    ranked = torch.zeros_like(seen.selected).scatter(-1, seen.logits.topk(top_k + top_k // 2).indices, True)
    for layer, part in enumerate(norms.layers):
        mean = seen.norms[layer][seen.selected[layer]].mean().log()
        for expert in range(seen.norms.shape[-1]):
            rows = ranked[layer, :, expert]
            expected = (seen.norms[layer, rows, expert].log().mean() - mean) if rows.any() else torch.tensor(0.0)
            torch.testing.assert_close(part.constant[expert], expected, rtol=1e-3, atol=1e-4)
    assert norms.near == 0 and norms.layers[0].table.shape == (0, seen.norms.shape[-1])


def test_regressions_are_those_of_least_squares():
    features, norms = features_of(random_numbers(300, 8, seed=2), 3), random_numbers(300, seed=3).exp()
    sums = Regressions(2, features.shape[1], features.device)
    sums.add(1, features[:200], norms[:200], torch.ones(200, dtype=torch.bool))
    sums.add(1, features[200:], norms[200:], torch.zeros(100, dtype=torch.bool))
    found = sums.solve(1e-9)
    expected = torch.linalg.lstsq(features, norms.log()[:, None]).solution[:, 0]
    torch.testing.assert_close(found[1].float(), expected, rtol=1e-3, atol=1e-3)
    assert (found[0] == 0).all()
    assert float(sums.log_mean()) == pytest.approx(float(norms[:200].mean().log()), rel=1e-4)
    squares = (norms.log() ** 2).sum() - ((norms.log() - features @ expected) ** 2).sum()
    assert sums.gain(found) == pytest.approx(float(squares), rel=1e-4)
    assert float(sums.solve(float("inf"))[1, 0]) == pytest.approx(float(norms.log().mean()), rel=1e-4)


def test_where_logits_say_nothing_the_constants_remain():
    """A router that looks at what the experts cannot see: any guess from its logits is noise."""
    model = tiny_olmoe()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight[:, :32] = 0
            layer.mlp.experts.gate_up_proj[:, :, 32:] = 0
    norms = fit_norms(model, tokens(5, 4), near=8, batch_size=1, progress=False)
    constant = fit_norms(model, tokens(5, 4), near=0, batch_size=1, progress=False)
    same = [not one.table.any() and not one.slope.any() for one in norms.layers]
    assert any(same)
    for one, other, is_same in zip(norms.layers, constant.layers, same, strict=True):
        if is_same:
            torch.testing.assert_close(one.constant, other.constant)


def test_logits_say_something_of_the_norms_on_another_text():
    model = tiny_olmoe(num_hidden_layers=1)
    ids = tokens(20, 30)
    norms = fit_norms(model, ids, near=16, batch_size=2, progress=False)
    constant = fit_norms(model, ids, near=0, batch_size=2, progress=False)
    other = tokens(6, 30, seed=9)
    seen = measure_contributions(model, other, progress=False)
    wanted = seen.norms[0].log()
    errors = []
    for guess in (norms, constant):
        off = (guess(seen.logits[0], 0) - wanted)[seen.selected[0]]
        errors.append(float(off.var()))
    assert errors[0] < errors[1]


def test_with_a_compensation_it_is_the_deviation_that_counts():
    model = tiny_olmoe()
    ids, compensation = tokens(2, 6), random_compensation(model)
    norms = fit_norms(model, ids, near=0, compensation=compensation, progress=False)
    plain = fit_norms(model, ids, near=0, progress=False)
    layer, part = find_moe_layers(model)[0], compensation.layers[0]
    seen, _ = passes_of(model, ids)
    expert = int(seen[0].logits.topk(12).indices.flatten().mode().values)
    rows = (seen[0].logits.topk(12).indices == expert).any(dim=1)
    logs, selected = [], []
    for one in range(EXPERTS):
        output = expert_output(layer, seen[0].hidden, one)
        away = (output - part.means[1 + one] - seen[0].hidden @ part.down.T @ part.up).norm(dim=-1)
        selected.append(away[(seen[0].experts == one).any(dim=1)])
        if one == expert:
            logs = away[rows].log()
    torch.testing.assert_close(norms.layers[0].constant[expert], logs.mean() - torch.cat(selected).mean().log())
    assert not torch.equal(norms.layers[0].constant, plain.layers[0].constant)


def test_experts_that_give_nothing_leave_the_logits_as_they_are():
    model = tiny_olmoe(num_hidden_layers=1)
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj.zero_()
    norms = fit_norms(model, tokens(6, 8), batch_size=1, progress=False)
    assert (norms(random_numbers(5, EXPERTS), 0) == 0).all()


def test_fitting_leaves_the_model_as_it_was_and_repeats_itself():
    model = tiny_olmoe()
    state = state_of(model)
    first, second = (fit_norms(model, tokens(6, 8), batch_size=1, progress=False) for _ in range(2))
    assert state_of(model) == state
    assert all(
        torch.equal(a, b) for x, y in zip(first.layers, second.layers, strict=True) for a, b in zip(x, y, strict=True)
    )
    with pytest.raises(IndexError):  # an id beyond the vocabulary
        fit_norms(model, tokens(6, 8) + 1000, batch_size=1, progress=False)
    assert state_of(model) == state


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"near": 64}, r"near is 64, but must lie in 0\.\.63"),
        ({"near": -1}, "near is -1"),
        ({"batch_size": 8}, "the text has 1 batches of 8 sequences.*or near=0"),
    ],
)
def test_what_cannot_be_fitted_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        fit_norms(tiny_olmoe(), tokens(2, 4), progress=False, **options)


def test_a_patched_model_and_another_models_compensation_are_refused():
    model, other = tiny_olmoe(), tiny_olmoe(num_hidden_layers=2)
    with pytest.raises(ValueError, match="this compensation was fitted on"):
        fit_norms(model, tokens(2, 4), near=0, compensation=random_compensation(other), progress=False)
    with BHRoutingIntegration(model), pytest.raises(RuntimeError, match="is patched"):
        fit_norms(model, tokens(2, 4), near=0, progress=False)


# -- files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("near", [0, 6])
def test_a_file_keeps_it(near, tmp_path):
    model, path = tiny_olmoe(), tmp_path / "norms.safetensors"
    norms = random_norms(model, near)
    norms.save(path)
    for loaded in (load_norms(path), pickle.loads(pickle.dumps(norms))):
        assert repr(loaded) == repr(norms) and loaded.near == near and loaded.model_name == norms.model_name
        logits = random_numbers(5, EXPERTS)
        assert all(torch.equal(loaded(logits, layer), norms(logits, layer)) for layer in range(3))


def test_damaged_files_are_named(tmp_path):
    path = tmp_path / "norms.safetensors"
    with pytest.raises(OSError):  # there is none
        load_norms(path)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"norms.safetensors is not a whole safetensors file .*: save the norms again"):
        load_norms(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="holds no norms of format 1: write them with OutputNorms.save"):
        load_norms(path)
    random_norms(tiny_olmoe()).save(path)
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    save_file({name: tensor for name, tensor in tensors.items() if name != "slope.1"}, path, metadata=header)
    with pytest.raises(ValueError, match=r"is damaged: \['slope.1'\] do not fit its header"):
        load_norms(path)
    for bad in (torch.zeros(3), torch.full((64,), torch.nan)):
        save_file(tensors | {"slope.1": bad}, path, metadata=header)
        with pytest.raises(ValueError, match=r"is damaged: slope.1 is \[.*\], or not finite, but must be \[64\]"):
            load_norms(path)


def test_another_models_norms_are_refused():
    norms = random_norms(tiny_olmoe())
    with pytest.raises(ValueError, match=r"\(3 layers, 64 experts\), but the model is .* \(2 layers, 64 experts\)"):
        RoutingPatch(tiny_olmoe(num_hidden_layers=2), TopK(4), norms=norms)
    with pytest.raises(TypeError, match="norms must be what bhlib.fit_norms or bhlib.load_norms gives, got 'norms'"):
        RoutingPatch(tiny_olmoe(), TopK(4), norms="norms")


# -- routing -----------------------------------------------------------------------------------------------------

RULES = {
    "top-4": TopK(4),
    "threshold": Threshold(0.05),
    "top-p": TopP(0.5),
    "bh": BH(0.1),
    "storey": BH(0.1, method="storey"),
    "keep mass": KeepMass(Threshold(0.05)),
}


@pytest.mark.parametrize("weighting", ["softmax", "normalized", "softmax_selected"])
@pytest.mark.parametrize("name", RULES)
def test_any_rule_selects_by_the_sum_and_weighs_by_the_logits(name, weighting):
    rule, logits = RULES[name], random_numbers(50, EXPERTS, scale=2)
    log_norms = random_numbers(50, EXPERTS, seed=1)
    found = rule(logits, 0, weighting=weighting, log_norms=log_norms)
    shown = rule(logits + log_norms, 0, weighting=weighting)
    assert torch.equal(found.experts, shown.experts) and torch.equal(found.counts, shown.counts)
    if name == "keep mass":
        return
    probs = logits.softmax(-1)
    for token in range(50):
        experts = found.experts[token, : found.counts[token]]
        expected = probs[token, experts]
        if weighting != "softmax":
            expected = expected / expected.sum()
        torch.testing.assert_close(found.weights[token, : len(experts)], expected)
    assert (found.experts != rule(logits, 0, weighting=weighting).experts).any()


def test_zeros_change_nothing():
    logits = random_numbers(50, EXPERTS, scale=2)
    for rule in RULES.values():
        plain, with_zeros = rule(logits, 0), rule(logits, 0, log_norms=torch.zeros_like(logits))
        assert all(torch.equal(one, other) for one, other in zip(plain, with_zeros, strict=True))
        fused = rule.fused(
            logits, 0, norms=LayerGuess(LayerNorms(*torch.zeros(2, EXPERTS), torch.zeros(0, EXPERTS)), 0)
        )
        assert all(torch.equal(one, other) for one, other in zip(plain, fused, strict=True))


def test_what_is_dropped_is_marked_among_the_models_own():
    rule, logits = Threshold(0.05), random_numbers(50, EXPERTS, scale=2)
    norms = LayerGuess(LayerNorms(*random_numbers(2, EXPERTS, seed=1), random_numbers(EXPERTS, EXPERTS, seed=2)), 4)
    log_norms = norms.log_norms(logits)
    forms = rule.forms(logits, 0, dtype=torch.float32, own_k=8, norms=norms, exact=True)
    _, experts, _ = rule._route(logits, 0, "softmax", 1.0, EXPERTS, log_norms)
    expected = mark_dropped(experts, logits, 8, weighting="softmax", temperature=1.0, is_prefix=False)
    assert all(torch.equal(a, b) for a, b in zip((forms.weights, forms.experts, forms.exact), expected, strict=True))
    assert torch.equal(forms.experts[:, :8] % (EXPERTS + 1), logits.topk(8).indices)
    assert (forms.experts[:, 8:] < EXPERTS).any()  # selected from outside the model's own


@pytest.mark.parametrize("family", SOME, ids=str)
@pytest.mark.parametrize("kernels", ["auto", False])
def test_a_patched_layer_selects_by_it(family, kernels):
    model = tiny(family)
    layers, ids = find_moe_layers(model), tokens(2, 7) % 100
    top_k = layers[0].top_k
    norms, rule = random_norms(model, near=2), Threshold(0.02, max_k=top_k)
    with RoutingPatch(model, rule, norms=norms, kernels=kernels) as patch:
        seen, _ = passes_of(model, ids)
    for layer in layers:
        logits, routing = seen[layer.index].logits, patch.records.passes[0].routings[layer.index]
        weighting = of_model(layer.weighting, rule.max_k, layer.top_k)
        expected = rule(logits, layer.index, weighting=weighting, log_norms=norms(logits, layer.index))
        assert torch.equal(routing.experts.long(), expected.experts)
        torch.testing.assert_close(routing.weights.float(), expected.weights.float(), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("weighting", ["softmax", "normalized", "softmax_selected", "sigmoid_normalized"])
def test_weights_beside_the_models_own_are_on_its_scale(weighting):
    logits, experts = random_numbers(4, EXPERTS, scale=2), torch.tensor([[3, 60, 64], [5, 7, 11]]).repeat(2, 1)
    options = {"weighting": weighting, "temperature": 1.0, "is_prefix": False}
    weights, index, exact = mark_dropped(experts, logits, 8, **options)
    for token in range(4):
        scores = logits[token].sigmoid() if weighting.startswith("sigmoid") else logits[token].softmax(-1)
        own = logits[token].topk(8).indices
        scale = 1.0 if weighting == "softmax" else scores[own].sum()
        for slot, (weight, number) in enumerate(zip(weights[token], index[token].tolist(), strict=True)):
            if number == EXPERTS:
                assert slot >= 8 and weight == 0
                continue
            torch.testing.assert_close(weight, scores[number % (EXPERTS + 1)] / scale)
            assert exact[token, slot] == (0 if number > EXPERTS else weight)


def test_analysis_leaves_the_outputs_and_records_what_it_would_select():
    model = tiny_olmoe()
    ids, norms, rule = tokens(2, 7), random_norms(model), BH(0.2)
    own_seen, own = passes_of(model, ids)
    with RoutingPatch(model, rule, norms=norms, mode="analyze") as patch:
        _, analyzed = passes_of(model, ids)
    assert torch.equal(own, analyzed)
    for layer in range(3):
        logits = own_seen[layer].logits
        expected = rule(logits, layer, log_norms=norms(logits, layer))
        assert torch.equal(patch.records.passes[0].routings[layer].experts.long(), expected.experts)


def test_an_expert_outside_the_models_own_is_computed_beside_what_stands_in():
    model = tiny_olmoe()
    ids, norms, compensation = tokens(2, 5), random_norms(model), random_compensation(model)
    rule = Threshold(0.02)
    with RoutingPatch(model, rule, norms=norms, compensation=compensation) as patch:
        seen, _ = passes_of(model, ids)
    layer, first, part = find_moe_layers(model)[0], seen[0], compensation.layers[0]
    probs, outside = first.logits.softmax(-1), 0
    routing = patch.records.passes[0].routings[0]
    for token in range(10):
        kept, own = [e for e in routing.experts[token].tolist() if e >= 0], probs[token].topk(8).indices.tolist()
        expected = sum(probs[token, e] * expert_output(layer, first.hidden[token, None], e)[0] for e in kept)
        for expert in set(own) - set(kept):
            expected = expected + probs[token, expert] * part.alone(first.hidden[token, None], expert)[0]
        torch.testing.assert_close(first.output[token], expected, rtol=1e-4, atol=1e-6)
        outside += len(set(kept) - set(own))
    assert outside > 0


def test_padding_on_the_left_changes_nothing():
    model = tiny_olmoe()
    ids, norms = tokens(1, 6), random_norms(model)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), ids], dim=1)
    mask = torch.cat([torch.zeros(1, 3, dtype=torch.int64), torch.ones_like(ids)], dim=1)
    with BHRoutingIntegration(model, 0.2, norms=norms) as bh, torch.no_grad():
        alone = model(input_ids=ids).logits
        bh.reset_stats()
        beside = model(input_ids=padded, attention_mask=mask).logits[:, 3:]
        assert bh.get_routing_stats()["total_tokens"] == 6
    torch.testing.assert_close(alone, beside, rtol=1e-4, atol=1e-5)


def test_it_generates_replays_and_is_taken_back():
    model = tiny_olmoe()
    before, ids, norms = state_of(model), tokens(2, 4), random_norms(model)
    with BHRoutingIntegration(model, 0.2, norms=norms, max_recorded_tokens=None) as bh, torch.no_grad():
        model.generate(ids, max_new_tokens=3, do_sample=False)
        assert 1 < bh.get_routing_stats()["mean_experts_per_token"] < 8
        bh.reset_stats()
        patched = model(input_ids=ids).logits
    with RoutingPatch(model, Replay(bh.records)), torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, patched)
    assert state_of(model) == before


def test_a_token_is_explained_as_it_was_routed():
    model = tiny_olmoe()
    ids, norms = tokens(1, 6), random_norms(model)
    with BHRoutingIntegration(model, 0.2, norms=norms, record_logits=True) as bh, torch.no_grad():
        model(input_ids=ids)
    table = bh.explain((0, 4), 1)
    logits, routing = bh.records.find((0, 4), 1)
    log_norms = norms(logits[None], 1)[0]
    kept = table[table["kept"]]
    assert kept["expert"].tolist() == [e for e in routing.experts[0].tolist() if e >= 0]
    looked_at = (logits.float() + log_norms).double()
    order = torch.tensor(table["expert"].to_numpy())
    torch.testing.assert_close(torch.tensor(table["logit"].to_numpy()), looked_at[order], rtol=1e-5, atol=1e-6)
    pvals = DirichletNull()(looked_at[None].float())[0]
    assert table["found"].sum() == reject(pvals, 0.2, "bh").sum()
    torch.testing.assert_close(
        torch.tensor(kept["weight"].to_numpy()), logits.double().softmax(-1)[order[: len(kept)]], rtol=1e-4, atol=1e-6
    )
    alone = explain(bh.rule, logits, 1, log_norms=log_norms)
    assert alone.equals(table)


def test_an_evaluation_takes_it():
    model = tiny_olmoe()
    data, norms, rule = {"text": tokens(2, 6)}, random_norms(model), BH(0.2)
    table = evaluate(model, data, rule, norms=norms)
    with RoutingPatch(model, rule, norms=norms), torch.no_grad():
        logits = model(input_ids=data["text"], use_cache=False).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), data["text"][:, 1:], reduction="none").mean(dim=1)
    torch.testing.assert_close(torch.tensor(table["loss"].to_numpy()).float(), loss, rtol=1e-5, atol=1e-6)
    assert not table["loss"].equals(evaluate(model, data, rule)["loss"])


@pytest.mark.parametrize("near", [0, 6])
def test_compiled_code_decides_alike(near):
    rule, logits = BH(0.1), random_numbers(20, EXPERTS, seed=3, scale=2)
    norms = random_norms(tiny_olmoe(), near)
    rule.prepare(EXPERTS, 1, torch.device("cpu"))
    norms.prepare(1, torch.device("cpu"))
    torch._dynamo.reset()

    def route(logits):
        return rule(logits, 1, log_norms=norms(logits, 1))

    compiled = torch.compile(route, backend="eager", fullgraph=True)
    assert all(torch.equal(one, other) for one, other in zip(compiled(logits), route(logits), strict=True))


def test_watchers_see_the_models_own_pass_while_it_is_fitted():
    """The experts' outputs that are measured are no output of the layer."""
    model, seen = tiny_olmoe(), []
    ids = tokens(1, 4)
    with watch_layers(find_moe_layers(model), lambda layer, what: seen.append(what.output)):
        fit_norms(model, ids, near=0, progress=False)
    own, _ = passes_of(model, ids)
    assert len(seen) == 3 and all(torch.equal(part, own[i].output) for i, part in enumerate(seen))


# -- levels and nulls --------------------------------------------------------------------------------------------


def test_levels_are_found_on_what_rules_are_shown():
    model, logits = tiny_olmoe(), random_numbers(3, 200, EXPERTS, scale=2)
    norms = random_norms(model)
    shown = norms.shown(logits)
    assert all(torch.equal(shown[layer], logits[layer] + norms(logits[layer], layer)) for layer in range(3))
    level = level_for_mean_experts(Threshold, shown, 3.0)
    counts = [Threshold(level)(logits[i], i, log_norms=norms(logits[i], i)).counts for i in range(3)]
    assert float(torch.cat(counts).float().mean()) == pytest.approx(3.0, abs=0.02)


def test_a_calibrated_null_brings_the_levels_for_rules_with_norms():
    model, ids = tiny_olmoe(), tokens(6, 20)
    norms = random_norms(model)
    options = {"max_values": 2000, "progress": False}
    plain, null = calibrate(model, ids, **options), calibrate(model, ids, norms=norms, **options)
    assert all(torch.equal(tensor, null.tensors[name]) for name, tensor in plain.tensors.items())
    assert plain.header["levels"] != null.header["levels"]
    for wanted in (3, 5):
        with BHRoutingIntegration(model, null.alpha_for(wanted), pvalues=null, norms=norms, mode="analyze") as bh:
            passes_of(model, ids)
        assert bh.get_routing_stats()["bh_would_select_mean"] == pytest.approx(wanted, abs=0.1)
    with pytest.raises(ValueError, match="these norms were fitted on"):
        calibrate(tiny_olmoe(num_hidden_layers=2), ids, norms=norms, **options)
