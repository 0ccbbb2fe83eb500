"""The recipe "Find out why a token used six experts" of CONTRIBUTING.md, performed on models that were just run."""

import pickle
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from models import tiny_olmoe, tokens

from bhlib import BHRoutingIntegration, RoutingPatch
from bhlib.explain import explain
from bhlib.procedures import critical_values
from bhlib.pvalues import TokenGaussian
from bhlib.rules import BH, PrefixRule, Replay, TopK


@dataclass(frozen=True)
class Positive(PrefixRule):
    """A rule that the package does not know: all experts with a score above 0.05."""

    def count(self, top, scores, layer):
        return (top > 0.05).sum(dim=-1)


def run(model, *args, **kwargs):
    with torch.no_grad():
        return model(*args, **kwargs)


def check_every_row(patch):
    """Each row of `to_frame` is explained, by its place, as it was routed."""
    frame = patch.records.to_frame()
    assert len(frame) > 20
    for row in frame.itertuples():
        table = patch.explain((row.sequence, row.position), row.layer)
        kept = table[table["kept"]]
        assert tuple(kept["expert"]) == row.experts and len(kept) == row.count
        np.testing.assert_array_equal(kept["weight"], row.weights)
        by_definition = {True: "min_k", False: "max_k"}.get(len(kept) > table["found"].sum())
        assert table["bound"][0] == ("none" if len(kept) == table["found"].sum() else by_definition)
    return frame


def test_explain():
    """The recipe: patch with record_logits, generate, look for six experts, ask why."""
    model = tiny_olmoe()
    with BHRoutingIntegration(model, alpha=0.2, record_logits=True) as bh:
        model.generate(tokens(1, 8), max_new_tokens=8, do_sample=False)
    frame = bh.records.to_frame()
    row = frame.query("count == 6").iloc[0]
    table = bh.explain((row["sequence"], row["position"]), row["layer"])
    assert table["kept"].sum() == 6 and tuple(table["expert"][:6]) == row["experts"]
    last = table.iloc[5]
    assert last["pvalue"] <= last["pvalue_threshold"] == critical_values(64, 0.2)[5]
    assert (table["pvalue"][6:] > table["pvalue_threshold"][6:]).all() and table["bound"][0] == "none"


@pytest.mark.parametrize("mode", ["patch", "analyze"])
@pytest.mark.parametrize(
    "rule",
    [BH(0.3, max_k=4, min_k=2), BH(0.3, TokenGaussian(), "storey"), TopK(3), Positive(max_k=3)],
    ids=lambda rule: type(rule).__name__,
)
def test_every_recorded_token_is_explained_as_it_was_routed(rule, mode):
    model, mask = tiny_olmoe(), torch.ones(2, 6, dtype=torch.long)
    mask[1, :2] = 0  # padding is no token
    with RoutingPatch(model, rule, mode=mode, temperature=1.4, record_logits=True) as patch:
        model.generate(tokens(2, 6), attention_mask=mask, max_new_tokens=3, do_sample=False)
    frame = check_every_row(patch)
    assert len(frame) == 3 * (6 + 4 + 2 * 2)
    for number, counts in enumerate(patch.records.counts()):
        assert [patch.explain(number, layer)["kept"].sum() for layer in range(3)] == counts.tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_logits_are_those_that_were_decided_on(dtype):
    """In the precision of the decision, float32 for a float64 model: asked again, the rule decides the same."""
    model = tiny_olmoe(norm_topk_prob=True).to(dtype)
    model.set_experts_implementation("eager")  # the others do not multiply in float64
    with BHRoutingIntegration(model, alpha=0.2, record_logits=True, weights="softmax") as bh:
        run(model, tokens(1, 9))
    check_every_row(bh)
    logits, routing = bh.records.find(4, 1)
    assert logits.dtype == (torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    assert torch.equal(bh.rule(logits[None], 1).experts, routing.experts)
    again = explain(bh.rule, logits, 1, weighting="softmax")
    assert again.equals(bh.explain(4, 1))
    bh.records = pickle.loads(pickle.dumps(bh.records))
    assert again.equals(bh.explain(4, 1))


def test_a_replayed_token_is_explained_by_its_record():
    model = tiny_olmoe()
    with BHRoutingIntegration(model, alpha=0.2) as bh:
        run(model, tokens(1, 9))
    with RoutingPatch(model, Replay(bh.records), record_logits=True) as patch:
        run(model, tokens(1, 9))
    assert check_every_row(patch)["count"].nunique() > 3
    assert patch.explain(3, 0)["bound"][0] == "none"


def test_logits_stay_within_the_bound_and_take_the_memory_that_is_stated():
    model = tiny_olmoe()
    with BHRoutingIntegration(model, record_logits=True, max_recorded_tokens=10) as bh:
        run(model, tokens(1, 9))
        run(model, tokens(1, 9))
    assert bh.records.nbytes == 9 * bh.records.bytes_per_token(8, logit_bytes=4)
    assert bh.records.bytes_per_token(8, 4) - bh.records.bytes_per_token(8) == 3 * 64 * 4
    assert bh.explain(-1, 2).equals(bh.explain((0, 8), 2))
    with pytest.raises(IndexError, match=r"-9\.\.8, for the 9 recorded tokens \(max_recorded_tokens=10 left out later"):
        bh.explain(9, 0)


def test_what_cannot_be_explained_is_refused():
    model = tiny_olmoe()
    with pytest.raises(ValueError, match="leave collect_stats=True"):
        RoutingPatch(model, TopK(2), record_logits=True, collect_stats=False)
    with BHRoutingIntegration(model, record_logits=True) as bh:
        with pytest.raises(IndexError, match="no token is recorded: run the model inside the patch first"):
            bh.explain(0, 0)
        run(model, tokens(1, 4))
    with pytest.raises(IndexError, match=r"layer must lie in 0\.\.2, got 3"):
        bh.explain(0, 3)
    with pytest.raises(IndexError, match=r"token \(1, 0\) is not recorded: give \(sequence, position\) as in a row"):
        bh.explain((1, 0), 0)
    with BHRoutingIntegration(model) as bh:
        run(model, tokens(1, 4))
    with pytest.raises(ValueError, match="The logits were not recorded: patch with record_logits=True"):
        bh.explain(0, 0)


def test_a_layer_that_did_not_run_is_named():
    model = tiny_olmoe()
    middle = model.model.layers[1].mlp
    forward, middle.forward = middle.forward, lambda hidden_states: torch.zeros_like(hidden_states)
    with BHRoutingIntegration(model, record_logits=True) as bh:
        run(model, tokens(1, 4))
    middle.forward = forward
    with pytest.raises(ValueError, match="MoE layer 1 did not run in the forward pass of token 2"):
        bh.explain(2, 1)
    assert bh.explain(2, 2)["kept"].any()


def test_a_place_of_several_tokens_names_them_all():
    """As after a rejected draft: the cache was cropped, and a second token stands where the first did."""
    model = tiny_olmoe()
    with BHRoutingIntegration(model, record_logits=True) as bh:
        cache = run(model, tokens(1, 5)).past_key_values
        cache.crop(-1)
        run(model, torch.tensor([[9]]), past_key_values=cache)
    with pytest.raises(ValueError, match=r"Sequence 0, position 4 is the place of several .* among \[4, 5\]"):
        bh.explain((0, 4), 0)
    assert not bh.explain(4, 0).equals(bh.explain(5, 0))
