"""Rules over a batch, each against loops over tokens and experts that anyone can read."""

import math

import numpy as np
import pytest
import torch
from models import tiny_olmoe, tokens

from bhlib import figures
from bhlib.compensating import fit_compensation
from bhlib.figures import batch_bytes
from bhlib.patching import RoutingPatch
from bhlib.procedures import benjamini_hochberg
from bhlib.pvalues import DirichletNull
from bhlib.rules import BH, OEA, BatchBH, BatchThreshold, Threshold, TopK
from bhlib.rules.batch import demand_weights
from bhlib.speed.whole_model import cache_argument

RULES = {
    "OEA": lambda **options: OEA(k0=2, **options),
    "weighted BH": lambda **options: BatchBH(alpha=0.1, **options),
    "BH": lambda **options: BatchBH(alpha=0.1, boost=0, **options),
    "threshold": lambda **options: BatchThreshold(threshold=0.12, **options),
}


def logits_of(rows, seed=0, experts=64):
    return 1.5 * torch.randn(rows, experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def chosen(routing):
    """The experts of each token, best first."""
    return [row[:count].tolist() for row, count in zip(routing.experts, routing.counts, strict=True)]


# -- slow twins ------------------------------------------------------------------------------------------------------


def bh_by_hand(pvals, alpha):
    """Indices that a step-up finds."""
    order = sorted(range(len(pvals)), key=lambda e: pvals[e])
    passed = [k for k, e in enumerate(order, start=1) if pvals[e] <= k / len(pvals) * alpha]
    return set(order[: max(passed, default=0)])


def wants_by_hand(rule, batch, probs, ranking):
    """The experts that each token of a batch asks for."""
    if isinstance(rule, OEA):
        return [set(row[: rule.k0]) for row in ranking]
    if isinstance(rule, BatchThreshold):
        sums = [math.sqrt(sum(row[e] ** 2 for row in probs)) for e in range(len(probs[0]))]
        return [{e for e, total in enumerate(sums) if total >= rule.threshold}] * len(probs)
    pvals = rule.pvalues(batch, 0).tolist()
    found = [bh_by_hand(row, rule.alpha) for row in pvals]
    wanted = []
    for token, row in enumerate(pvals):
        demand = [1 + rule.boost * sum(e in f for i, f in enumerate(found) if i != token) for e in range(len(row))]
        mean = sum(demand) / len(demand)
        wanted.append(bh_by_hand([p / (d / mean) for p, d in zip(row, demand, strict=True)], rule.alpha))
    return wanted


def route_by_hand(rule, batch):
    """The experts of each token of one batch [tokens, experts], best first."""
    probs = batch.softmax(dim=-1).tolist()
    ranking = [sorted(range(len(row)), key=lambda e, row=row: -row[e]) for row in probs]
    loaded = set()
    for wants, row in zip(wants_by_hand(rule, batch, probs, ranking), ranking, strict=True):
        loaded |= (wants & set(row[: rule.max_k])) | set(row[: rule.min_k])
    return [[e for e in row if e in loaded][: rule.max_k] for row in ranking]


@pytest.mark.parametrize("bounds", [(1, 8), (0, 8), (2, 12), (3, 3)])
@pytest.mark.parametrize("name", RULES)
def test_rules_are_what_loops_make_of_them(name, bounds):
    rule = RULES[name](min_k=bounds[0], max_k=bounds[1])
    for size in (2, 7, 16):
        batch = logits_of(size, seed=size)
        assert chosen(rule(batch, 0)) == route_by_hand(rule, batch)


@pytest.mark.parametrize("name", RULES)
def test_tokens_at_one_place_are_a_batch(name):
    """Of 5 sequences of 6 tokens, one behind the other."""
    logits = logits_of(30)
    found = chosen(RULES[name](batch=5)(logits, 0))
    for place in range(6):
        assert found[place::6] == chosen(RULES[name]()(logits[place::6], 0))


# -- alone, in a prompt, and beside padding ----------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [None, 1])
def test_a_token_alone_is_routed_by_the_plain_rule(batch):
    logits = logits_of(200)
    twins = [(OEA(k0=3), TopK(3)), (BatchBH(0.1), BH(0.1)), (BatchThreshold(0.06), Threshold(0.06))]
    for rule, plain in twins:
        rule = type(rule)(rule.level, batch=batch) if isinstance(rule, BatchThreshold | BatchBH) else rule
        for row in logits.split(1):
            assert chosen(rule(row, 0)) == chosen(plain(row, 0))


def test_one_sequence_is_batches_of_one():
    logits = logits_of(100)
    for rule, plain in [(BatchBH(0.1, batch=1), BH(0.1)), (BatchThreshold(0.06, batch=1), Threshold(0.06))]:
        assert chosen(rule(logits, 0)) == chosen(plain(logits, 0))


@pytest.mark.parametrize("name", RULES)
def test_a_prompt_is_routed_by_the_plain_rule(name):
    logits = logits_of(33)
    rule = RULES[name](most=32)
    plain = {"OEA": TopK(8), "threshold": Threshold(0.12)}.get(name, BH(0.1))
    assert chosen(rule(logits, 0)) == chosen(plain(logits, 0))
    assert chosen(rule(logits[:32], 0)) == route_by_hand(rule, logits[:32])
    assert rule(logits[:0], 0).experts.shape == (0, 8)


@pytest.mark.parametrize("name", RULES)
def test_padding_is_a_token_like_another(name):
    """A rule sees no mask: what padding wants is loaded, and free to the others."""
    logits = logits_of(6)
    padding = torch.full((1, 64), 0.0, dtype=torch.float64)
    padding[0, logits[0].argsort(descending=True)[7]] = 9.0  # the eighth of token 0
    alone, beside = chosen(RULES[name]()(logits[:1], 0)), chosen(RULES[name]()(torch.cat([logits[:1], padding]), 0))
    eighth = int(padding.argmax())
    assert eighth not in alone[0] and eighth in beside[0]


@pytest.mark.parametrize("name", RULES)
def test_rules_are_deterministic_and_know_no_order(name):
    logits, shuffled = logits_of(16), torch.randperm(16, generator=torch.Generator().manual_seed(1))
    found = chosen(RULES[name]()(logits, 0))
    assert found == chosen(RULES[name]()(logits, 0))
    assert [found[i] for i in shuffled] == chosen(RULES[name]()(logits[shuffled], 0))


# -- what is promised --------------------------------------------------------------------------------------------------


def test_weights_have_mean_one_and_leave_the_token_out():
    found = torch.rand(5, 7, 64, generator=torch.Generator().manual_seed(0)) < 0.1
    weights = demand_weights(found, 3.0)
    assert torch.allclose(weights.mean(dim=-1), torch.ones(5, 7, dtype=torch.float64))
    changed = found.clone()
    changed[:, 2] = ~changed[:, 2]
    assert torch.equal(demand_weights(changed, 3.0)[:, 2], weights[:, 2])
    assert not torch.equal(demand_weights(changed, 3.0)[:, 3], weights[:, 3])
    assert torch.equal(demand_weights(found[:, :1], 3.0), torch.ones(5, 1, 64, dtype=torch.float64))


def test_weighted_bh_keeps_its_level_on_independent_tokens():
    """And finds more of what many tokens need than BH does: 16 tokens, 12 true signals, 8 of them the same for all."""
    draw, alpha, level = torch.Generator().manual_seed(0), 0.2, []
    power = {0.0: [], 3.0: []}
    for _ in range(400):
        pvals = torch.rand(16, 64, generator=draw, dtype=torch.float64)
        real = torch.zeros(16, 64, dtype=torch.bool)
        real[:, :8] = True
        real.scatter_(1, 8 + torch.rand(16, 56, generator=draw).argsort(dim=1)[:, :4], True)
        pvals = torch.where(real, pvals**4, pvals)
        for boost, found_real in power.items():
            weights = demand_weights(benjamini_hochberg(pvals, alpha), boost)
            found = benjamini_hochberg((pvals / weights), alpha, check=False)
            share = (found & ~real).sum(dim=1) / found.sum(dim=1).clamp(min=1)
            found_real.append((found & real)[:, :8].double().mean())
            if boost:
                level.append(share.double().mean())
    level = torch.stack(level)
    assert level.mean() - 3 * level.std() / 20 <= alpha
    assert torch.stack(power[3.0]).mean() > 1.2 * torch.stack(power[0.0]).mean()


# -- in a model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RULES)
@torch.no_grad()
def test_a_pass_with_teacher_forcing_decodes_as_steps_do(name):
    """A pass over whole sequences that is told its batch gives the logits of steps on a cache, token by token."""
    model, ids = tiny_olmoe(), tokens(6, 9)
    with RoutingPatch(model, RULES[name](batch=6)) as patch:
        whole = model(input_ids=ids, use_cache=False).logits
        (at_once,) = patch.records.passes
    with RoutingPatch(model, RULES[name]()) as patch:
        cache, steps = {}, []
        for place in range(9):
            out = model(input_ids=ids[:, place : place + 1], use_cache=True, **cache)
            cache = {cache_argument(model): out.past_key_values}
            steps.append(out.logits)
        for layer, routing in at_once.routings.items():
            stepwise = torch.stack([one.routings[layer].experts for one in patch.records.passes], dim=1)
            assert torch.equal(routing.experts.view(stepwise.shape), stepwise)
    assert torch.allclose(torch.cat(steps, dim=1), whole, atol=1e-4)
    with RoutingPatch(model, TopK(8)):
        assert not torch.allclose(model(input_ids=ids, use_cache=False).logits, whole, atol=1e-3)


@pytest.mark.parametrize("name", RULES)
@torch.no_grad()
def test_a_compensation_stands_in_for_what_is_not_loaded(name):
    """What is dropped of a token's own top 8 is added as its weighted mean; experts beyond them are as they were."""
    model, ids = tiny_olmoe(), tokens(4, 12)
    compensation = fit_compensation(model, tokens(10, 12), batch_size=1)
    seen = {}
    layer = model.model.layers[0].mlp
    rule = RULES[name](batch=4, max_k=6)
    for option in (None, compensation):
        handle = layer.register_forward_hook(lambda m, args, out: seen.update(out=out, hidden=args[0]))
        with RoutingPatch(model, rule, compensation=option, kernels=False):
            model(input_ids=ids, use_cache=False)
        handle.remove()
        out = seen["out"][0] if isinstance(seen["out"], tuple) else seen["out"]
        seen[option is None] = out.reshape(48, -1)
    hidden = seen["hidden"].reshape(48, -1)
    logits = hidden @ layer.gate.weight.T
    routing, means = rule(logits, 0), compensation.layers[0].means
    weights, own = logits.softmax(dim=-1).topk(8)
    dropped = ~(own[:, :, None] == routing.experts[:, None, :]).any(dim=2)
    assert dropped.any()
    missing = ((weights * dropped)[..., None] * means[1 + own]).sum(dim=1)
    assert torch.allclose(seen[False] - seen[True], missing, atol=1e-6)


@pytest.mark.parametrize("name", RULES)
@torch.no_grad()
def test_generation_and_its_prompt(name):
    model, ids = tiny_olmoe(), tokens(4, 5)
    with RoutingPatch(model, RULES[name]()) as patch:
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    assert out.shape == (4, 9)
    for one in list(patch.records.passes)[1:]:
        for routing in one.routings.values():
            assert routing.counts.unique().numel() == 1  # all take as many of what is loaded


# -- the figure -------------------------------------------------------------------------------------------------------


def test_a_batch_mixes_domains_and_documents():
    text = {name: torch.arange(6)[:, None] + 10 * i + torch.zeros(1, 3).long() for i, name in enumerate("ab")}
    documents = {"a": np.array([0, 0, 0, 1, 1, 2]), "b": np.array([4, 4, 4, 4, 4, 4])}
    ids, facts = batch_bytes.mixed_sequences(text, documents)
    assert facts["domain"].tolist() == ["a", "b"] * 6
    assert facts.loc[facts["domain"] == "a", "document"].tolist() == [0, 1, 2, 0, 1, 0]
    assert sorted(ids[:, 0].tolist()) == [0, 1, 2, 3, 4, 5, 10, 11, 12, 13, 14, 15]
    for row, (_, fact) in zip(ids, facts.iterrows(), strict=True):
        assert torch.equal(row, text[fact["domain"]][fact["sequence"]])
        assert fact["document"] == documents[fact["domain"]][fact["sequence"]]
    assert len(batch_bytes.mixed_sequences(text, documents, most=4)[0]) == 4


def test_loss_and_loaded_experts_are_those_of_single_steps():
    """Each batch decoded token by token on a cache, its experts counted in sets."""
    model, ids, rule = tiny_olmoe(), tokens(7, 5), BatchBH(0.01)
    found = batch_bytes.measure(model, ids, rule, 3, ids.device)  # the seventh fills no batch
    assert len(found) == 6
    for start in (0, 3):
        part, unique, cache, losses = ids[start : start + 3], [], {}, []
        with RoutingPatch(model, rule) as patch, torch.no_grad():
            for place in range(5):
                out = model(input_ids=part[:, place : place + 1], use_cache=True, **cache)
                cache = {cache_argument(model): out.past_key_values}
                if place < 4:
                    losses.append(
                        torch.nn.functional.cross_entropy(out.logits[:, 0], part[:, place + 1], reduction="none")
                    )
            for one in patch.records.passes:
                unique += [len({*routing.experts.flatten().tolist()} - {-1}) for routing in one.routings.values()]
        rows = found.iloc[start : start + 3]
        assert rows["loss"].tolist() == pytest.approx(torch.stack(losses).mean(dim=0).tolist(), abs=1e-5)
        assert rows["unique"].tolist() == pytest.approx([sum(unique) / len(unique)] * 3)


def test_the_figure_is_computed_and_drawn(monkeypatch):
    monkeypatch.setattr(batch_bytes, "BATCHES", (8, 512))
    monkeypatch.setattr(batch_bytes, "ALPHAS", (1e-3,))
    monkeypatch.setattr(batch_bytes, "THRESHOLDS", (0.026,))
    study = figures.Study(length=32, tokens_per_pass=64)
    table = batch_bytes.measure_batches(study, "validation", most=8)  # too few for 512
    assert table["batch"].unique().tolist() == [8] and (table["sequences"] == 8).all()
    assert table["length"].unique().tolist() == [16] and table["split"].eq("validation").all()
    own = table[table["rule"] == "top-8"]
    assert (own["above"] == 0).all() and (own["saved"] == 0).all() and (own["mean_k"] == 8).all()
    assert table.loc[table["family"] == "OEA", "oea"].eq(0).all()
    shared = table[table["family"] == "BH, free experts"]
    assert (shared["mean_k"] > 5).all() and (shared["unique"] < own["unique"].to_numpy()).all()
    assert table["low"].le(table["above"] + 1e-12).all() and table["high"].ge(table["above"] - 1e-12).all()
    assert len(figures.draw_batch_bytes(table).axes) == 2


def test_a_text_of_few_sequences_is_refused():
    study = figures.Study(length=32)
    with pytest.raises(figures.NotForThisModel, match="fewer sequences than the smallest batch, 8"):
        batch_bytes.measure_batches(study, "validation", most=4)


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_bad_inputs():
    with pytest.raises(ValueError, match="30 tokens are not 4 sequences of equal length"):
        OEA(batch=4)(logits_of(30))
    with pytest.raises(ValueError, match="k0 must be an int between 1 and max_k=8, got 9"):
        OEA(k0=9)
    with pytest.raises(ValueError, match=r"k0 must be an int between 1 and max_k=8, got 2\.5"):
        OEA(k0=2.5)
    with pytest.raises(TypeError, match=r"alpha must be one number, got \(0\.1, 0\.2\)"):
        BatchBH(alpha=(0.1, 0.2))
    with pytest.raises(ValueError, match="alpha=1"):
        BatchBH(alpha=1)
    with pytest.raises(ValueError, match="boost must be a finite number of 0 or more, got -1"):
        BatchBH(boost=-1)
    with pytest.raises(ValueError, match="threshold must be 0 or more, got -1"):
        BatchThreshold(threshold=-1)
    with pytest.raises(ValueError, match="most must be an int of 1 or more, got 0"):
        BatchThreshold(most=0)
    with pytest.raises(ValueError, match=r"batch must be an int of 1 or more, got 2\.5"):
        OEA(batch=2.5)
    assert isinstance(BatchBH(pvalues="dirichlet").pvalues, DirichletNull)
    assert BatchThreshold(0.2).at(0.1) == BatchThreshold(0.1)
