"""Ways in which the decision of a rule could get a gradient of its own, tried against none.

Where a rule just keeps experts, a router's gradient comes through their weights alone. Here, in training passes:

- ``st-kept``: each kept expert's weight is multiplied by a gate that is 1 going forward, and whose gradient is that of
  a sigmoid of how far its log-probability lies above the edge, midway between the last kept and the first dropped one;
- ``st-all``: the same for all of the model's own top-k: dropped experts are computed, and multiplied by 0;
- ``penalty-X``: nothing changes but that X times the relaxed number of experts, the sum of those sigmoids, is added to
  the loss.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from bhlib.discovery import find_moe_layers

TAU = 0.25  # width of the sigmoid, in log-probability


class AddPenalty(torch.autograd.Function):
    """Hands on weights; the gradient of `scale` times a penalty is added in the backward pass."""

    @staticmethod
    def forward(ctx, weights, penalty, scale):
        ctx.scale = scale
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx, grad):
        return grad, torch.full((), ctx.scale, device=grad.device), None


@contextmanager
def gated(model: nn.Module, kind: str) -> Iterator[None]:
    """Within the block, decisions get a gradient in one of these ways; ``"kept"`` changes nothing."""
    logits: dict[int, torch.Tensor] = {}

    def look(layer):
        def hook(module, args, output):
            logits[layer.index] = output[0]

        return hook

    def gate(layer):
        def hook(module, args):
            if not torch.is_grad_enabled():
                return None
            hidden, experts, weights = args
            top, best = logits[layer.index].float().log_softmax(-1).topk(layer.top_k, dim=-1)
            counts = (experts < layer.num_experts).sum(-1, keepdim=True)
            last = top.detach().gather(1, (counts - 1).clamp(min=0))
            first = top.detach().gather(1, counts.clamp(max=layer.top_k - 1))
            soft = torch.sigmoid((top - (last + first) / 2) / TAU)
            if kind == "st-kept":
                return hidden, experts, weights * (1 + soft - soft.detach()).to(weights.dtype)
            if kind == "st-all":
                kept = (torch.arange(layer.top_k, device=top.device) < counts).float()
                return hidden, best, (top.exp() * (kept + soft - soft.detach())).to(weights.dtype)
            scale = float(kind.removeprefix("penalty-"))
            return hidden, experts, AddPenalty.apply(weights, soft.sum(-1).mean(), scale)

        return hook

    hooks = []
    for layer in find_moe_layers(model) if kind != "kept" else ():
        hooks.append(layer.router.register_forward_hook(look(layer)))
        hooks.append(layer.experts.register_forward_pre_hook(gate(layer)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
