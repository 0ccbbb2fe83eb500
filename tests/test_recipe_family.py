"""The recipe "Add a family of models" (CONTRIBUTING.md): one `Weighting`, and its models are patched bit for bit."""

import pytest
import torch
from models import state_of, tiny_olmoe, tokens
from torch import nn

from bhlib import RoutingPatch, find_moe_layers
from bhlib.figures import Passage
from bhlib.rules import BH, TopK
from bhlib.weighting import WEIGHTINGS, Weighting, normalized, register


def root_of_softplus(logits):
    return nn.functional.softplus(logits.float()).sqrt()


class Router(nn.Module):
    """Scores of its own for each expert; the weights are those of the best eight, divided by their sum."""

    def __init__(self, weight, score):
        super().__init__()
        self.weight, self.score = weight, score

    def forward(self, hidden_states):
        logits = nn.functional.linear(hidden_states.reshape(-1, hidden_states.shape[-1]), self.weight)
        weights, index = self.score(logits).topk(8, dim=-1)
        return logits, (weights / weights.sum(dim=-1, keepdim=True)).to(logits.dtype), index


def family_of(score, dtype=torch.float32):
    """A tiny model of a family that transformers does not have."""
    model = tiny_olmoe()
    for layer in model.model.layers:
        layer.mlp.gate = Router(layer.mlp.gate.weight, score)
    return model.to(dtype)


@pytest.fixture
def entry():
    """The weighting, as long as a test lasts."""
    yield register(Weighting("softplus", "root of the softplus, divided by the sum", root_of_softplus, normalized))
    del WEIGHTINGS["softplus"]


def test_without_the_entry_the_family_is_refused():
    with pytest.raises(ValueError, match="in none of the ways that are known: softmax, .*one more bhlib"):
        find_moe_layers(family_of(root_of_softplus))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_the_entry_it_is_patched(entry, dtype):
    model, ids = family_of(root_of_softplus, dtype), tokens(2, 40)
    before = state_of(model)
    with torch.no_grad():
        own = model(ids).logits
        with RoutingPatch(model, TopK(8)):
            assert torch.equal(model(ids).logits, own)
        with RoutingPatch(model, BH(0.05), mode="analyze") as watch:
            assert torch.equal(model(ids).logits, own)
        with RoutingPatch(model, BH(0.05)) as patch:
            assert not torch.equal(model(ids).logits, own)
    assert {layer.weighting for layer in patch.layers} == {"softplus"}
    assert 1 < watch.get_routing_stats()["bh_would_select_mean"] < 8
    assert 1 < patch.get_routing_stats()["mean_experts_per_token"] < 8
    assert state_of(model) == before


def test_it_is_seen_everywhere(entry, monkeypatch):
    """By name in rules and patches, and in the explorer's passages; a kernel leaves it alone."""
    logits = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    scores = root_of_softplus(logits).topk(8).values
    routing = TopK(8)(logits, weighting="softplus")
    assert torch.equal(routing.weights, scores / scores.sum(-1, keepdim=True))
    with RoutingPatch(tiny_olmoe(), TopK(8), weights="softplus") as other, torch.no_grad():
        other.model(tokens(1, 8))
    assert other.records.passes[0].routings[0].weights.sum(-1).tolist() == pytest.approx(8 * [1.0])
    (layer, *_) = find_moe_layers(family_of(root_of_softplus))
    passage = Passage(torch.zeros(1, 5), list("abcde"), logits[None], layer.top_k, layer.weighting)
    assert torch.equal(torch.from_numpy(passage.route(TopK(8)).weights[0]), routing.weights)
    monkeypatch.setattr(BH, "kernel_cuts", lambda *_: pytest.fail("a kernel was asked"))
    fused, slow = (route(logits, weighting="softplus") for route in (BH(0.05).fused, BH(0.05)))
    assert torch.equal(fused.weights, slow.weights)


def test_plain_sigmoids_are_known_already():
    """Scores that rise with the logits rank experts alike."""
    model, ids = family_of(torch.sigmoid), tokens(2, 40)
    with torch.no_grad():
        own = model(ids).logits
        with RoutingPatch(model, TopK(8)) as patch:
            assert torch.equal(model(ids).logits, own)
    assert {layer.weighting for layer in patch.layers} == {"sigmoid_normalized"}
