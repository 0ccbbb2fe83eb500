"""What may be added to the loss: the balance of the selected experts, and a smooth count of them."""

import pytest
import torch
from models import tiny_olmoe, tokens
from torch.testing import assert_close
from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func

from bhlib.patching import RoutingPatch
from bhlib.penalties import load_balancing_loss
from bhlib.rules import BH, Threshold, TopK
from bhlib.rules.budgets import SeqTopK

MASK = torch.ones(2, 9, dtype=torch.int64)
MASK[1, 5:] = 0


def by_hand(router_logits, experts, real):
    """Expert by expert: the part of all real tokens that selected it, times its mean probability; times experts."""
    num_experts, rows, total = router_logits[0].shape[-1], len(router_logits) * sum(real), 0.0
    probs = [logits.double().softmax(dim=-1) for logits in router_logits]
    for expert in range(num_experts):
        selected = probable = 0.0
        for layer in range(len(probs)):
            for token in [token for token, is_real in enumerate(real) if is_real]:
                selected += (experts[layer][token] == expert).sum()
                probable += probs[layer][token, expert]
        total += selected / rows * probable / rows
    return num_experts * total


@pytest.mark.parametrize("mask", [None, MASK])
def test_top_k_gives_the_value_and_the_gradient_of_transformers(mask):
    model, values, gradients = tiny_olmoe(), [], []
    gates = [layer.mlp.gate.weight for layer in model.model.layers]
    with RoutingPatch(model, TopK(8)) as patch:
        logits = model(input_ids=tokens(2, 9), attention_mask=mask, output_router_logits=True).router_logits
        for loss in (load_balancing_loss_func(logits, 64, 8, mask), patch.load_balancing_loss(logits, mask)):
            values.append(loss)
            gradients.append(torch.autograd.grad(loss, gates, retain_graph=True))
    assert_close(*values)
    assert_close(*gradients)
    assert all(gradient.any() for gradient in gradients[0])


@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("rule", [BH(0.05), Threshold(0.03, max_k=20), TopK(1), Threshold(0.9, min_k=0)])
def test_it_balances_what_was_selected(rule, mask):
    model = tiny_olmoe()
    with RoutingPatch(model, rule) as patch:
        out = model(input_ids=tokens(2, 9), attention_mask=mask, output_router_logits=True)
        got = patch.load_balancing_loss(out.router_logits, mask)
    routings = patch.records.passes[0].routings
    experts = [routings[layer].experts.long() for layer in range(3)]
    real = [True] * 18 if mask is None else mask.bool().flatten().tolist()
    assert_close(got.double(), by_hand(out.router_logits, experts, real))
    assert_close(load_balancing_loss(out.router_logits, experts, mask), got)
    assert not torch.isclose(got, out.aux_loss), "transformers balances the model's own top 8"


def test_equal_use_gives_the_mean_number_of_experts():
    logits = [torch.zeros(8, 8)]
    two_each = torch.stack([torch.arange(8), (torch.arange(8) + 3) % 8], dim=1)
    assert_close(load_balancing_loss(logits, [two_each]), torch.tensor(2.0))
    two_each[::2, 1] = 8  # an empty slot
    assert_close(load_balancing_loss(logits, [two_each]), torch.tensor(1.5))


def test_balance_of_other_layers_is_refused():
    logits = torch.zeros(4, 8)
    for router_logits, experts in (([], []), ([logits], []), ([logits], [torch.zeros(3, 2, dtype=torch.int64)])):
        with pytest.raises(ValueError, match="must hold the same tokens of the same layers, and of one at least, got"):
            load_balancing_loss(router_logits, experts)
    with pytest.raises(ValueError, match="SeqTopK decides about a whole forward pass, not from logits alone"):
        RoutingPatch(tiny_olmoe(), SeqTopK(4)).load_balancing_loss([logits])
