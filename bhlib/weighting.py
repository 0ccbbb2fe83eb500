"""How a model turns a token's router logits into the weights of the experts that it keeps.

Models differ in two things: by which scores they rank their experts, and how the scores of the kept ones become
weights. A `Weighting` says both, in the operations of transformers' own routers, so that results have the same bits.
``rule(logits, weighting="normalized")`` and ``RoutingPatch(model, rule, weights="normalized")`` know it by its name;
`bhlib.find_moe_layers` tries all that are registered on each router, until one gives the router's own weights. A family
of models with weights of its own needs one object more::

    register(Weighting("softplus", "softplus of the logits", lambda logits: softplus(logits.float()), plain))

A convention that divides by a sum can be followed in two ways where a rule keeps fewer experts than the model. By its
name it divides by the sum of those kept, which makes them the larger the more is dropped. By the name that `of_top`
makes of it, it gives them the weights that they have beside all of the best, the dropped ones simply missing: so a
patch routes by default. Without a sum there is no difference.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

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
    of_top : bool
        Whether experts have their weights among all of a token's best, kept or not. `find_weighting` makes these.
    """

    name: str
    label: str
    score: Callable[[Tensor], Tensor]
    weights: Callable[[Tensor, Tensor], Tensor]
    kernel: int | None = None
    of_top: bool = False

    def scores(self, router_logits: Tensor, temperature: float = 1.0) -> Tensor:
        """`score` of the logits [tokens, experts], divided by the temperature."""
        return self.score(router_logits if temperature == 1.0 else _wide(router_logits) / temperature)

    def weigh(self, scores: Tensor, experts: Tensor, kept: Tensor, *, are_best: bool = False) -> Tensor:
        """The weights of what a rule keeps.

        Parameters
        ----------
        scores : Tensor [tokens, experts]
        experts : Tensor [tokens, slots], int64
            As many as the rule may keep.
        kept : Tensor [tokens, slots], bool
        are_best : bool
            Whether these are the experts of the largest scores, in their order.

        Returns
        -------
        Tensor [tokens, slots]
            0 in slots that are not kept. With `of_top`, the weights among the experts of the `slots` largest scores;
            of one that is not among these, on their scale.
        """
        chosen = scores.gather(-1, experts)
        if not self.of_top:
            return self.weights(chosen, kept)
        if are_best:
            return self._of_all(chosen).masked_fill(~kept, 0.0)
        top, best = scores.topk(min(experts.shape[-1], scores.shape[-1]), dim=-1)
        same = experts[:, :, None] == best[:, None, :]
        among_top = (self._of_all(top)[:, None, :] * same).sum(dim=-1)
        return torch.where(same.any(dim=-1), among_top, self.beside(top, chosen)).masked_fill(~kept, 0.0)

    def beside(self, top: Tensor, others: Tensor) -> Tensor:
        """Weights [tokens, others] of scores, on the scale of those of the best scores [tokens, slots], best first."""
        together = self._of_all(torch.cat([top, others], dim=-1))
        # The best expert is in both: by it, one sum is exchanged for the other.
        return together[:, top.shape[-1] :] * (self._of_all(top)[:, :1] / together[:, :1])

    def _of_all(self, top: Tensor) -> Tensor:
        return self.weights(top, torch.ones_like(top, dtype=torch.bool))


#: Codes by which the routing kernel knows its ways: the softmax over all experts as it is; divided by the sum of those
#: kept (which is also what a softmax over the kept logits gives); and by that of the best `max_k`, kept or not.
KERNEL_PLAIN, KERNEL_NORMALIZED, KERNEL_SHARES = 0, 1, 2

#: Every weighting by its name, in the order in which they are tried on a router.
WEIGHTINGS: dict[str, Weighting] = {}

#: What `of_top` makes of them.
_OF_TOP: dict[str, Weighting] = {}


def register(weighting: Weighting) -> Weighting:
    """Enter a weighting in `WEIGHTINGS`; raises ValueError if its name is taken."""
    if weighting.name in WEIGHTINGS:
        raise ValueError(f"a weighting called {weighting.name!r} is registered already: give yours another name.")
    WEIGHTINGS[weighting.name] = weighting
    _OF_TOP[of_top(weighting.name)] = replace(
        weighting,
        name=of_top(weighting.name),
        kernel=KERNEL_SHARES if weighting.kernel == KERNEL_NORMALIZED else weighting.kernel,
        of_top=weighting.weights is not plain,  # which looks at no other expert
    )
    return weighting


def of_top(name: str) -> str:
    """The name, for rules and `find_weighting`, of a registered weighting by which dropped experts are only missing.

    A kept expert has the weight that the convention gives it among the best `max_k` of its token, whatever is dropped.

    Examples
    --------
    >>> import torch
    >>> from bhlib.rules import Threshold
    >>> from bhlib.weighting import of_top
    >>> logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    >>> for weighting in ("normalized", of_top("normalized")):
    ...     print([f"{weight:.2f}" for weight in Threshold(0.25, max_k=3)(logits, weighting=weighting).weights[0]])
    ['0.62', '0.38', '0.00']
    ['0.50', '0.30', '0.00']
    """
    return name + ", of the top"


def of_model(name: str, max_k: int, top_k: int) -> str:
    """The name, for rules and `find_weighting`, by which a patch gives weights as the model does.

    It is `of_top` of the model's convention; but where a rule may keep more experts (`max_k`) than the model's own
    routing (`top_k`), the model has no such weights, and the name is left: the convention is computed on what is kept.
    """
    return of_top(name) if max_k <= top_k else name


def find_weighting(name: str) -> Weighting:
    """The weighting of a name, or of what `of_top` makes of one; raises ValueError if there is none."""
    found = WEIGHTINGS.get(name) or _OF_TOP.get(name)
    if found is None:
        raise ValueError(f"no weighting is called {name!r}; there are: {', '.join(WEIGHTINGS)}.")
    return found


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
