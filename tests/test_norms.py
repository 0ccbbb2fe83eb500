"""Nulls that know the norms of the experts' outputs: measured, added, kept in a file, and ranked by."""

import json

import numpy as np
import pytest
import torch
from families import PATCHED, tiny
from models import state_of, tiny_olmoe, tokens
from safetensors.torch import save_file

from bhlib import BHRoutingIntegration, RoutingPatch, calibrate, find_moe_layers, load_calibration
from bhlib.calibration import collect_router_logits, fit_null, name_of
from bhlib.contributions import measure_contributions
from bhlib.explain import explain
from bhlib.procedures import PROCEDURES, reject
from bhlib.pvalues import ConformalNull, KDENull, load_null, null_values
from bhlib.rules import BH

EXPERTS = 64


def random_logits(*shape, seed=0):
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def null_with_norms(null="kde", layers=2):
    """A null of random logits, with norms that differ between experts as those of a trained model do."""
    log_norms = 0.3 * random_logits(layers, EXPERTS, seed=7)
    logits = random_logits(layers, 300, EXPERTS, seed=1)
    return fit_null(logits, model_name="tiny", null=null, log_norms=log_norms)


# -- measured --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [f for f in PATCHED if f.model_type in ("olmoe", "mixtral", "gpt_oss")], ids=str)
def test_norms_are_means_over_the_tokens_that_select_an_expert(family):
    model = tiny(family)
    ids = tokens(4, 9) % 128
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    options = dict(attention_mask=mask, progress=False)
    log_norms = calibrate(model, ids, norms=True, batch_size=3, **options).log_norms
    measured = measure_contributions(model, ids, **options)
    for layer, (norms, selected) in enumerate(zip(measured.norms, measured.selected, strict=True)):
        mean = norms[selected].mean()
        for expert in range(16):
            its_own = norms[selected[:, expert], expert]
            expected = (its_own.mean() / mean).log() if len(its_own) else torch.tensor(0.0)
            torch.testing.assert_close(log_norms[layer, expert], expected, rtol=1e-4, atol=1e-5)
    assert log_norms.std() > 0.01


def test_an_expert_that_nobody_selects_counts_as_the_mean():
    model = tiny_olmoe(num_hidden_layers=1, num_experts=16, num_experts_per_tok=2)
    log_norms = calibrate(model, tokens(1, 2), norms=True, progress=False).log_norms
    selected = measure_contributions(model, tokens(1, 2), progress=False).selected[0].any(dim=0)
    assert (~selected).sum() >= 12 and (log_norms[0, ~selected] == 0).all() and (log_norms[0, selected] != 0).any()


def test_experts_that_give_nothing_leave_the_statistic_as_it_is():
    model = tiny_olmoe(num_hidden_layers=1)
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj.zero_()
    assert (calibrate(model, tokens(2, 8), norms=True, progress=False).log_norms == 0).all()


def test_the_sample_is_that_of_the_shifted_statistic():
    model = tiny_olmoe()
    ids = tokens(3, 10)
    null = calibrate(model, ids, null="conformal", norms=True, batch_size=2, progress=False)
    logits = collect_router_logits(model, ids, batch_size=2, progress=False)
    for layer in range(3):
        values, experts = null_values(logits[layer])
        expected = (values + null.log_norms[layer][experts]).flatten().sort().values
        torch.testing.assert_close(null.tensors[f"sample.{layer}"][0], expected)
    later = fit_null(logits, model_name=name_of(model), null="conformal", log_norms=null.log_norms)
    assert later.header == null.header
    assert all(torch.equal(later.tensors[name], tensor) for name, tensor in null.tensors.items())


def test_the_draw_is_that_without_norms():
    model = tiny_olmoe(num_hidden_layers=1)
    options = dict(null="conformal", max_values=200, progress=False)
    plain, shifted = (calibrate(model, tokens(3, 10), norms=norms, **options) for norms in (False, True))
    assert plain.log_norms is None and plain.tensors.keys() == shifted.tensors.keys() - {"log_norms"}
    zero = fit_null(
        collect_router_logits(model, tokens(3, 10), progress=False),
        model_name=name_of(model), null="conformal", max_values=200, log_norms=torch.zeros(1, EXPERTS),
    )  # fmt: skip
    assert torch.equal(zero.tensors["sample.0"], plain.tensors["sample.0"])


def test_calibration_leaves_the_model_as_it_was():
    model = tiny_olmoe()
    state = state_of(model)
    calibrate(model, tokens(2, 8), norms=True, progress=False)
    assert state_of(model) == state
    with pytest.raises(IndexError):  # an id beyond the vocabulary
        calibrate(model, tokens(2, 8) + 1000, norms=True, progress=False)
    assert state_of(model) == state


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"statistic": "standardized"}, "norms of outputs go with the statistic 'log_prob'.* got 'standardized'"),
        ({"per_expert": True}, "norms of outputs make no difference with per_expert=True"),
    ],
)
def test_norms_that_mean_nothing_are_refused(options, message):
    model = tiny_olmoe(num_hidden_layers=1)
    with pytest.raises(ValueError, match=message):
        calibrate(model, tokens(2, 8), norms=True, progress=False, **options)
    with pytest.raises(ValueError, match=message):
        fit_null(random_logits(1, 60, EXPERTS), model_name="tiny", log_norms=torch.zeros(1, EXPERTS), **options)


@pytest.mark.parametrize(
    ("log_norms", "message"),
    [
        (torch.zeros(1, 64), r"log_norms is torch.float32 \[1, 64\], not torch.float32 \[2, 64\], a number for each"),
        (torch.zeros(2, 64).long(), r"log_norms is torch.int64 \[2, 64\], not"),
        (torch.full((2, 64), torch.inf), "log_norms has values that are NaN or infinite"),
    ],
)
def test_norms_of_another_model_are_refused(log_norms, message):
    samples = [torch.randn(40), torch.randn(40)]
    with pytest.raises(ValueError, match=message):
        ConformalNull.fit(samples, model_name="tiny", num_experts=64, log_norms=log_norms)
    with pytest.raises(ValueError, match=message):
        fit_null(random_logits(2, 40, EXPERTS), model_name="tiny", log_norms=log_norms)


# -- p-values and files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("null", ["kde", "conformal"])
def test_pvalues_are_those_of_logits_with_the_norms_added(null):
    """Adding a constant to a log-probability is what a null without norms sees as another statistic."""
    null = null_with_norms(null)
    logits = random_logits(50, EXPERTS, seed=3)
    for layer in range(2):
        statistics = logits.double().log_softmax(-1) + null.log_norms[layer].double()
        # Rounding may carry a statistic across one value of a conformal sample of 16,800.
        torch.testing.assert_close(null(logits, layer), null.survival(statistics.float(), layer), rtol=1e-3, atol=1e-4)
        assert not torch.equal(null(logits, layer), null.survival(null.statistic_of(logits), layer))
    assert null.shared and not null.ranks_by_logit and "with the norms of their outputs" in repr(null)


def test_a_file_keeps_the_norms(tmp_path):
    model = tiny_olmoe()
    path = tmp_path / "null.safetensors"
    null = calibrate(model, tokens(4, 10), norms=True, progress=False)
    null.save(path)
    loaded = load_calibration(path, model)
    assert torch.equal(loaded.log_norms, null.log_norms) and repr(loaded) == repr(null)
    logits = random_logits(20, EXPERTS)
    assert all(torch.equal(loaded(logits, layer), null(logits, layer)) for layer in range(3))
    assert loaded.alpha_for(4) == null.alpha_for(4)


@pytest.mark.parametrize(
    ("log_norms", "header", "message"),
    [
        (torch.zeros(3, 64), {}, r"log_norms is torch.float32 \[3, 64\], not torch.float32 \[2, 64\]"),
        (torch.zeros(2, 64).fill_(torch.nan), {}, "log_norms has values that are NaN"),
        (torch.zeros(2, 64), {"statistic": "logit"}, "norms of outputs go with the statistic 'log_prob'"),
    ],
)
def test_damaged_norms_are_refused(log_norms, header, message, tmp_path):
    null, path = null_with_norms("conformal"), tmp_path / "null.safetensors"
    tensors, text = null.tensors | {"log_norms": log_norms}, json.dumps(null.header | header)
    save_file(tensors, path, metadata={"bhlib": text})
    with pytest.raises(ValueError, match=f"is damaged: {message}"):
        load_null(path)


# -- routing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", sorted(PROCEDURES))
@pytest.mark.parametrize("alpha", [0.05, 0.3])
def test_experts_are_ranked_and_counted_by_their_pvalues(method, alpha):
    null = null_with_norms()
    logits = random_logits(200, EXPERTS, seed=3) + random_logits(200, EXPERTS, seed=4)
    rule = BH(alpha, null, method, min_k=1, max_k=8)
    weights, experts, counts = rule(logits, 1)
    pvals = null(logits, 1)
    found = reject(pvals, alpha, method).sum(-1)
    assert torch.equal(counts, found.clamp(1, 8)) and counts.unique().numel() > 1
    beyond = 0
    for token, count in enumerate(counts.tolist()):
        chosen = experts[token, :count]
        # Smallest first; p-values may be equal where their statistics are not.
        assert torch.equal(pvals[token, chosen], pvals[token].sort().values[:count])
        torch.testing.assert_close(weights[token, :count], logits[token].softmax(-1)[chosen])
        beyond += len(set(chosen.tolist()) - set(logits[token].topk(count).indices.tolist()))
    assert beyond > 0  # not the model's own order


def test_tokens_of_a_batch_may_have_levels_of_their_own():
    null, logits = null_with_norms(), random_logits(40, EXPERTS, seed=3)
    both = BH((0.01, 0.3), null)(logits, 0)
    for part, alpha in zip((slice(0, 20), slice(20, 40)), (0.01, 0.3), strict=True):
        alone = BH(alpha, null)(logits[part], 0)
        assert all(torch.equal(x[part], y) for x, y in zip(both, alone, strict=True))
    weighted = BH(0.1, null, layer_weights=(1.0, 3.0))
    assert torch.equal(weighted(logits, 1).counts, BH(weighted.layer_levels(1)[0], null)(logits, 1).counts)


def test_no_kernel_routes_by_norms():
    rule, logits = BH(0.1, null_with_norms()), random_logits(30, EXPERTS, seed=3)
    routing = rule(logits, 0)
    assert all(torch.equal(x, y) for x, y in zip(rule.fused(logits, 0), routing, strict=True))


def test_explained_as_it_decides():
    rule, logits = BH(0.1, null_with_norms(), max_k=5), random_logits(30, EXPERTS, seed=3)
    routing, table = rule(logits, 0), explain(rule, logits, 0)
    assert table["probability_threshold"].isna().all()  # differs by expert
    for token, rows in table.groupby("token"):
        kept = rows[rows["kept"]]
        assert kept["expert"].tolist() == routing.experts[token, : routing.counts[token]].tolist()
        assert rows["found"].sum() == reject(torch.tensor(rows["pvalue"].to_numpy()), 0.1, "bh").sum()


def test_a_patched_model_generates():
    model = tiny_olmoe()
    ids = tokens(2, 12)
    null = calibrate(model, ids, norms=True, progress=False)
    with BHRoutingIntegration(model, alpha=null.alpha_for(4), pvalues=null) as bh:
        model.generate(ids, max_new_tokens=3, do_sample=False)
        assert 2 < bh.get_routing_stats()["mean_experts_per_token"] < 6


@pytest.mark.parametrize("method", ["bh", "storey"])
def test_compiled_code_decides_alike(method):
    rule, logits = BH(0.1, null_with_norms(), method), random_logits(20, EXPERTS, seed=3)
    rule.prepare(EXPERTS, 1, torch.device("cpu"))
    torch._dynamo.reset()
    compiled = torch.compile(lambda logits: rule(logits, 1), backend="eager", fullgraph=True)
    assert all(torch.equal(one, other) for one, other in zip(compiled(logits), rule(logits, 1), strict=True))


def test_static_top_k_at_matched_counts_is_another_choice():
    """With norms that differ, the experts kept carry more weight times norm than as many of the largest weights."""
    null, logits = null_with_norms(), random_logits(300, EXPERTS, seed=3)
    _, experts, counts = BH(0.2, null)(logits, 0)
    worth = logits.log_softmax(-1) + null.log_norms[0]
    for token in range(len(logits)):
        count = counts[token]
        own = logits[token].topk(count).indices
        assert worth[token, experts[token, :count]].sum() >= worth[token, own].sum() - 1e-5


def test_layers_of_the_model_and_of_the_norms_agree():
    null = null_with_norms()
    with pytest.raises(ValueError, match="is for 2 layers of 64 experts, but the model has 3 MoE layers"):
        RoutingPatch(tiny_olmoe(), BH(0.1, null)).patch_model()
    assert isinstance(null, KDENull) and len(find_moe_layers(tiny_olmoe())) == 3
    with pytest.raises(ValueError, match="layer is None, but this null holds 2 layers"):
        null.tested(random_logits(3, EXPERTS))
    assert np.isfinite(null.header["table_error"])
