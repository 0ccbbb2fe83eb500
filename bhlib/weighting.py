"""How a model turns a token's router logits into the weights of the experts that it keeps.

Models differ in two things: by which scores they rank their experts, and how the scores of the kept ones become
weights. A `Weighting` says both, in the operations of transformers' own routers, so that results have the same bits.
``rule(logits, weighting="normalized")`` and ``RoutingPatch(model, rule, weights="normalized")`` know it by its name;
`bhlib.find_moe_layers` tries all that are registered on each router, until one gives the router's own weights. A family
of models with weights of its own needs one object more::

    register(Weighting("softplus", "softplus of the logits", lambda logits: softplus(logits.float()), plain))
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Weighting:
    """A convention by which weights follow from logits.

    Parameters
    ----------
    name : str
    label : str
        In words, for tables.
    score : callable
        Logits [tokens, experts] in any float dtype -> scores of the same shape, float32 or wider, by which the model
        ranks its experts.
    weights : callable
        Scores of the best experts [tokens, slots], and which of these slots are kept [tokens, slots] bool -> weights
        [tokens, slots], 0 in the others. A token may keep none.
    kernel : int or None
        What `bhlib.kernels.routing.bh_route` is told: `KERNEL_PLAIN`, `KERNEL_NORMALIZED`, or None, which keeps
        kernels away: plain torch routes then, on every device.
    """

    name: str
    label: str
    score: Callable[[Tensor], Tensor]
    weights: Callable[[Tensor, Tensor], Tensor]
    kernel: int | None = None

    def scores(self, router_logits: Tensor, temperature: float = 1.0) -> Tensor:
        """`score` of the logits [tokens, experts], divided by the temperature."""
        return self.score(router_logits if temperature == 1.0 else _wide(router_logits) / temperature)


#: Codes by which the routing kernel knows its two ways: the softmax over all experts as it is, and divided by the sum
#: of those kept (which is also what a softmax over the kept logits gives).
KERNEL_PLAIN, KERNEL_NORMALIZED = 0, 1

#: Every weighting by its name, in the order in which they are tried on a router.
WEIGHTINGS: dict[str, Weighting] = {}


def register(weighting: Weighting) -> Weighting:
    """Enter a weighting in `WEIGHTINGS`; raises ValueError if its name is taken."""
    if weighting.name in WEIGHTINGS:
        raise ValueError(f"a weighting called {weighting.name!r} is registered already: give yours another name.")
    WEIGHTINGS[weighting.name] = weighting
    return weighting


def find_weighting(name: str) -> Weighting:
    """The weighting of a name; raises ValueError if there is none."""
    if name not in WEIGHTINGS:
        raise ValueError(f"no weighting is called {name!r}; there are: {', '.join(WEIGHTINGS)}.")
    return WEIGHTINGS[name]


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


# -- scores --------------------------------------------------------------------------------------------------------


def as_they_are(router_logits: Tensor) -> Tensor:
    """The logits themselves, in float32 or wider."""
    return _wide(router_logits)


def probabilities(router_logits: Tensor) -> Tensor:
    """Softmax of the logits over all experts, in float32 or wider."""
    return torch.softmax(router_logits, dim=-1, dtype=torch.promote_types(router_logits.dtype, torch.float32))


# -- weights -------------------------------------------------------------------------------------------------------


def plain(top: Tensor, kept: Tensor) -> Tensor:
    """The scores."""
    return top.masked_fill(~kept, 0.0)


def normalized(top: Tensor, kept: Tensor) -> Tensor:
    """The scores, divided by their sum."""
    weights = plain(top, kept)
    total = weights.sum(dim=-1, keepdim=True)
    return weights / total.masked_fill(total == 0, 1.0)


def share_of_top(top: Tensor, kept: Tensor) -> Tensor:
    """The scores, divided by the sum of the best, kept or not."""
    return plain(top, kept) / top.sum(dim=-1, keepdim=True)


def _softmax(top: Tensor, kept: Tensor) -> Tensor:
    # A row that keeps nothing would be a softmax over nothing, NaN: nan_to_num gives it zeros.
    return torch.softmax(top.masked_fill(~kept, -torch.inf), dim=-1).nan_to_num(nan=0.0)


def _sigmoid(top: Tensor, kept: Tensor) -> Tensor:
    return plain(torch.sigmoid(top), kept)


def _sigmoid_normalized(top: Tensor, kept: Tensor) -> Tensor:
    return normalized(torch.sigmoid(top), kept)


# -- what models do ------------------------------------------------------------------------------------------------

# OLMoE; Mixtral and Qwen3-MoE; GPT-OSS and Granite; Cohere2-MoE with expert_selection_fn="sigmoid".
register(Weighting("softmax", "softmax over all experts", probabilities, plain, KERNEL_PLAIN))
register(
    Weighting(
        "normalized", "softmax over all experts, divided by the sum of those kept", probabilities, normalized,
        KERNEL_NORMALIZED,
    )
)  # fmt: skip
register(Weighting("softmax_selected", "softmax over those kept", as_they_are, _softmax, KERNEL_NORMALIZED))
register(Weighting("sigmoid", "sigmoid of the logits", as_they_are, _sigmoid))
register(
    Weighting(
        "sigmoid_normalized", "sigmoid of the logits, divided by the sum of those kept", as_they_are,
        _sigmoid_normalized,
    )
)  # fmt: skip

# What no model does by itself: a kept expert has the weight that it had if none were dropped, as long as `max_k` is the
# model's own top-k. Better for models that divide by the sum of those kept (notebook 11).
register(
    Weighting(
        "share_of_top", "softmax over all experts, divided by the sum of the best max_k, kept or not", probabilities,
        share_of_top,
    )
)  # fmt: skip
