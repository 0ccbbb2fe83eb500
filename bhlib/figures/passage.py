"""One passage: how many experts each of its tokens gets, and with which weights.

A `Passage` is read once and routed by any rule, without another pass over the model; every view of the result is a
function of one argument, for notebooks, scripts and sliders alike (`bhlib.figures.passage_text`, `passage_charts`).

    passage = Passage.read(model, tokenizer, "It was a bright morning, and she had")
    draw_passage(passage.route(BH(alpha=0.1)))

What is shown is what a rule *would* select from the logits of the model's own routing (as in analyze mode). Under a
patch the logits of deeper layers differ somewhat, since the layers before them have routed differently.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import Tensor

from bhlib.calibration import collect_router_logits
from bhlib.discovery import find_moe_layers
from bhlib.rules import Rule, TopK
from bhlib.weighting import of_model

__all__ = ["Passage", "RoutedPassage"]


@dataclass(frozen=True)
class RoutedPassage:
    """What a rule decides for each token of a passage in each layer, beside the model's own top-k.

    Attributes
    ----------
    tokens : list of str
        The text of each token.
    counts : ndarray [layers, tokens], int64
        Experts that the rule selects.
    weights : ndarray [layers, tokens, slots], float32
        Their router weights, best expert first; 0 in an empty slot.
    own_weights : ndarray [layers, tokens, top_k], float32
        Router weights of the model's own experts, at temperature 1.
    """

    tokens: list[str]
    counts: np.ndarray
    weights: np.ndarray
    own_weights: np.ndarray

    @property
    def most(self) -> int:
        """The largest number of experts that the rule or the model can give to a token."""
        return max(self.weights.shape[-1], self.own_weights.shape[-1])

    def layers(self, layer: int | None) -> list[int]:
        """Indices of the layers that a view shows: one, or all for None. ValueError if there is no such layer."""
        if layer is not None and not 0 <= layer < len(self.counts):
            raise ValueError(f"layer must lie in 0..{len(self.counts) - 1}, or be None for all layers, got {layer}.")
        return list(range(len(self.counts))) if layer is None else [layer]

    def sample(self, layer: int | None) -> str:
        """How much a view shows, in words."""
        size = f"{len(self.tokens)} tokens"
        return f"{size} × {len(self.counts)} layers" if layer is None else f"{size}, layer {layer}"


@dataclass(frozen=True)
class Passage:
    """A passage, and the logits that the routers of an unpatched model give to its tokens.

    Attributes
    ----------
    token_ids : Tensor [1, tokens], int64
    tokens : list of str
    router_logits : Tensor [layers, tokens, experts], float32, on the CPU
    top_k : int
        Experts per token of the model itself.
    weighting : str
        How the model makes weights of scores (`bhlib.weighting.WEIGHTINGS`).
    """

    token_ids: Tensor
    tokens: list[str]
    router_logits: Tensor
    top_k: int
    weighting: str

    @classmethod
    def read(cls, model, tokenizer, text: str, max_tokens: int = 512) -> "Passage":
        """Run a model over a text, cut after `max_tokens` tokens.

        Raises
        ------
        ValueError
            If the text has fewer than two tokens: the first has no loss, and a picture of nothing shows nothing.
        """
        token_ids = tokenizer(text, return_tensors="pt")["input_ids"].long()[:, :max_tokens]
        if token_ids.shape[1] < 2:
            raise ValueError(
                f"the passage has {token_ids.shape[1]} tokens, but needs 2 or more: type a few words, or pick a passage"
            )
        layer = find_moe_layers(model)[0]
        router_logits = collect_router_logits(model, token_ids, progress=False)
        tokens = [tokenizer.decode([token]) for token in token_ids[0].tolist()]
        return cls(token_ids, tokens, router_logits, layer.top_k, layer.weighting)

    def route(self, rule: Rule, temperature: float = 1.0) -> RoutedPassage:
        """What a rule would decide; `temperature` divides the logits in the softmax of the weights."""
        rule.check_model(len(self.router_logits), self.router_logits.shape[-1])
        routings = [
            rule(logits, layer, weighting=of_model(self.weighting, rule.max_k, self.top_k), temperature=temperature)
            for layer, logits in enumerate(self.router_logits)
        ]
        return RoutedPassage(
            self.tokens,
            np.stack([routing.counts.numpy() for routing in routings]),
            np.stack([routing.weights.numpy() for routing in routings]),
            self._own_weights,
        )

    @cached_property
    def _own_weights(self) -> np.ndarray:
        own = TopK(self.top_k)
        return np.stack([own(logits, weighting=self.weighting).weights.numpy() for logits in self.router_logits])
