"""Fit what stands in for dropped experts, in one pass over a text: `fit_compensation`, or `fit_ranks` for several maps.

For every token, what its dropped experts would have added, ``sum w_e E_e(x)``, is explained by two things: the weights
of the dropped experts, whose coefficients are the means, and the hidden state times their sum, whose coefficients are
the linear map. Both are fitted together, by ridge regression, from sums of products that do not grow with the text.
The map is then cut to a small rank in the directions in which it explains most (reduced-rank regression), and the means
are fitted again beside it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bhlib.calibration import collect_router_logits
from bhlib.compensation import Compensation, LayerCompensation
from bhlib.discovery import MoELayer, find_moe_layers, implementation_of, name_of
from bhlib.experts import pairwise_forward
from bhlib.layer_passes import LayerPass, watch_text
from bhlib.levels import level_for_mean_experts
from bhlib.rules import Rule, Threshold
from bhlib.text_pass import Piece, check_plain, check_texts

#: Strengths of the ridge that are tried, as multiples of the mean square of a feature: the largest leave nothing.
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 1e3)

#: Sequences of each text, or up to twice as many, on which the default of `keep` is found.
SEQUENCES_FOR_LEVEL = 2

#: One in this many batches is held out while the strength is chosen.
HELD_OUT = 5


class Products:
    """Sums of products of the features of tokens [tokens, features] and what they explain [tokens, hidden]."""

    def __init__(self, features: int, hidden: int, device: torch.device) -> None:
        # In float32 the sums over a long text would lose digits that the solution needs.
        wide = torch.float32 if device.type == "mps" else torch.float64
        self.gram = torch.zeros(features, features, dtype=wide, device=device)
        self.cross = torch.zeros(features, hidden, dtype=wide, device=device)

    def add(self, features: Tensor, explained: Tensor) -> None:
        features = features.to(self.gram.dtype)
        self.gram += features.T @ features
        self.cross += features.T @ explained.to(self.gram.dtype)

    def __add__(self, other: "Products") -> "Products":
        features, hidden = self.cross.shape
        total = Products(features, hidden, self.gram.device)
        total.gram, total.cross = self.gram + other.gram, self.cross + other.cross
        return total

    def first(self, features: int) -> "Products":
        """Those of the first features alone."""
        part = Products(features, self.cross.shape[1], self.gram.device)
        part.gram, part.cross = self.gram[:features, :features], self.cross[:features]
        return part

    def gain(self, solution: Tensor) -> float:
        """By how much a solution [features, hidden] lowers the sum of squares of what is to be explained."""
        return float((solution * (2 * self.cross - self.gram @ solution)).sum())


@torch.no_grad()
def fit_compensation(
    model: nn.Module,
    token_ids: Tensor | Mapping[str, Tensor],
    *,
    rank: int = 0,
    keep: Rule | None = None,
    attention_mask: Tensor | Mapping[str, Tensor] | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> Compensation:
    """Fit the mean output of each dropped expert, and a linear map of small rank, on a text.

    Parameters
    ----------
    model, token_ids, attention_mask, batch_size, progress
        As for `bhlib.calibrate`.
    rank : int
        Of the linear map; 0 for means alone. It takes ``2 * rank * hidden`` products per token: on the demo, those of a
        rank of 16 are a sixth of an expert's.
    keep : Rule, optional
        Which experts count as kept: the others of the model's own top-k are the dropped ones that are explained. By
        default those above a threshold on the probability that keeps half of what there is to keep, found on a part of
        the text. On the demo, fits at thresholds that keep 2.5 to 5.5 of 8 differ little, and are better than one
        at static top-4, whatever then drops the experts.

    Returns
    -------
    Compensation
        Each layer's ridge is the strength that explains most of held-out batches, every fifth; the fit is then of all.
        An expert that was never dropped has the mean 0.

    Raises
    ------
    ValueError
        For a rank that is negative or above the hidden size, ids or a mask of the wrong shape, a model in training
        mode, or a text of fewer than five batches, of which none can be held out.
    RuntimeError
        If the model is patched.
    """
    options: dict[str, Any] = {
        "keep": keep,
        "attention_mask": attention_mask,
        "batch_size": batch_size,
        "progress": progress,
    }
    return fit_ranks(model, token_ids, (rank,), **options)[rank]


@torch.no_grad()
def fit_ranks(
    model: nn.Module,
    token_ids: Tensor | Mapping[str, Tensor],
    ranks: Sequence[int],
    *,
    keep: Rule | None = None,
    attention_mask: Tensor | Mapping[str, Tensor] | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> dict[int, Compensation]:
    """`fit_compensation` for several ranks of the map, by rank, in the same pass over the text.

    Parameters and errors are those of `fit_compensation`.
    """
    layers, texts = find_moe_layers(model), check_texts(token_ids, attention_mask)
    check_plain(model, layers)
    hidden = layers[0].router.weight.shape[-1]
    for rank in ranks:
        if not 0 <= rank <= hidden:
            raise ValueError(f"rank is {rank}, but must lie in 0..{hidden}, the size of the hidden states")
    if keep is None:
        keep = _keep_half(model, texts, layers[0].top_k, batch_size)
    keep.check_model(len(layers), layers[0].num_experts)
    features = layers[0].num_experts + (hidden if any(ranks) else 0)
    parts = [[Products(features, hidden, layer.router.weight.device) for _ in range(2)] for layer in layers]

    def take(layer: MoELayer, seen: LayerPass, number: int) -> None:
        is_held_out = number % HELD_OUT == HELD_OUT - 1
        parts[layer.index][is_held_out].add(*explain_missing(layer, seen, keep, any(ranks)))

    done = watch_text(model, layers, texts, batch_size, take, progress)
    if done < HELD_OUT:
        raise ValueError(
            f"the text has {done} batches of {batch_size} sequences, and one in {HELD_OUT} is held out to choose "
            f"the strength of the ridge: give more text, or a smaller batch_size"
        )
    num_experts = layers[0].num_experts
    return {
        rank: Compensation(
            [_fit_layer(fitted, held_out, num_experts, rank) for fitted, held_out in parts], name_of(model)
        )
        for rank in ranks
    }


def _keep_half(model: nn.Module, texts: Sequence[Piece], top_k: int, batch_size: int) -> Rule:
    """A threshold that keeps half of what lies between one expert and the model's own top-k."""
    part = {name: ids[:: max(1, len(ids) // SEQUENCES_FOR_LEVEL)] for name, ids, _ in texts}
    masks = {name: mask[:: max(1, len(mask) // SEQUENCES_FOR_LEVEL)] for name, _, mask in texts if mask is not None}
    logits = collect_router_logits(model, part, attention_mask=masks or None, batch_size=batch_size, progress=False)

    def threshold(level: float) -> Rule:
        return Threshold(level, max_k=top_k)

    return threshold(level_for_mean_experts(threshold, logits, (1 + top_k) / 2))


def explain_missing(layer: MoELayer, seen: LayerPass, keep: Rule, with_hidden: bool) -> tuple[Tensor, Tensor]:
    """Features [tokens, experts (+ hidden)] and what dropped experts would have added [tokens, hidden]."""
    kept = keep(seen.logits, layer.index, weighting=layer.weighting).experts
    dropped = ~(seen.experts[:, :, None] == kept[:, None, :]).any(dim=2)
    weights = seen.weights * dropped
    index = torch.where(dropped, seen.experts, layer.experts.num_experts)
    missing = pairwise_forward(
        implementation_of(layer.experts) or "eager", layer.experts, seen.hidden, index, seen.weights
    )
    features = weights.new_zeros(len(weights), layer.num_experts).scatter_(1, seen.experts, weights).float()
    if with_hidden:
        features = torch.cat([features, weights.sum(dim=1, keepdim=True).float() * seen.hidden.float()], dim=1)
    return features, missing


def _fit_layer(fitted: Products, held_out: Products, num_experts: int, rank: int) -> LayerCompensation:
    """The compensation of a layer, with the strength of the ridge that explains most of what is held out."""
    if not rank:
        fitted, held_out = fitted.first(num_experts), held_out.first(num_experts)
    gains = [held_out.gain(torch.cat(solve(fitted, num_experts, rank, strength)[:2])) for strength in STRENGTHS]
    best = STRENGTHS[max(range(len(gains)), key=gains.__getitem__)]
    means, linear_map, directions = solve(fitted + held_out, num_experts, rank, best)
    table = torch.cat([torch.zeros_like(means[:1]), means])
    down, up = (linear_map @ directions).T if rank else means[:0], directions.T
    return LayerCompensation(*(part.float().cpu().contiguous() for part in (table, down, up)))


def solve(products: Products, num_experts: int, rank: int, strength: float) -> tuple[Tensor, Tensor, Tensor]:
    """Ridge regression of reduced rank.

    Returns
    -------
    means : Tensor [experts, hidden]
    linear_map : Tensor [hidden, hidden]
        Of at most this rank, to be multiplied from the left with hidden states; no rows without features of them.
    directions : Tensor [hidden, rank]
        Orthonormal: ``linear_map @ directions @ directions.T`` is the map.
    """
    gram, cross, n = products.gram.clone(), products.cross, num_experts
    squares = gram.diagonal().clone()
    for part in (slice(0, n), slice(n, None)):
        gram.diagonal()[part] += strength * squares[part].mean() if len(squares[part]) else 0
    # Means by elimination: what is left of the map's equations is what means cannot explain.
    by_means = torch.linalg.solve(gram[:n, :n], torch.cat([gram[:n, n:], cross[:n]], dim=1))
    of_map, of_missing = by_means[:, : len(gram) - n], by_means[:, len(gram) - n :]
    if not rank:
        return of_missing, torch.zeros_like(cross[n:]), cross.new_zeros(cross.shape[1], 0)
    rest = gram[n:, n:] - gram[n:, :n] @ of_map
    full = torch.linalg.solve(rest, cross[n:] - gram[n:, :n] @ of_missing)
    # The directions of the output in which the full map explains most.
    directions = torch.linalg.eigh(full.T @ rest @ full).eigenvectors[:, -rank:]
    linear_map = full @ directions @ directions.T
    return of_missing - of_map @ linear_map, linear_map, directions
