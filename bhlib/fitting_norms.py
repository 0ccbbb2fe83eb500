"""Fit guesses at the norms of the experts' outputs, in one pass over a text: `fit_norms`.

Each expert is computed for the tokens that rank it among their best, and the logarithm of its output's norm explained
by the token's largest logits (`bhlib.norms`), by ridge regression from sums of products that do not grow with the text.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from bhlib.compensation import Compensation
from bhlib.discovery import MoELayer, name_of
from bhlib.layer_passes import LayerPass, expert_output, scores_of, watch_text, whole_layers
from bhlib.norms import LayerNorms, OutputNorms, nearest
from bhlib.pvalues import check_logits
from bhlib.text_pass import check_texts

#: Strengths of the ridge that are tried, as multiples of the mean square of a logit's excess: the last one leaves the
#: constant alone.
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, float("inf"))

#: One in this many batches is held out while the strength is chosen.
HELD_OUT = 5


class Regressions:
    """Sums of products for one regression per expert, of its log norm on the features of the tokens that rank it."""

    def __init__(self, num_experts: int, features: int, device: torch.device) -> None:
        # In float32 the sums over a long text would lose digits that the solution needs.
        wide = torch.float32 if device.type == "mps" else torch.float64
        self.gram = torch.zeros(num_experts, features, features, dtype=wide, device=device)
        self.cross = torch.zeros(num_experts, features, dtype=wide, device=device)
        self.total = torch.zeros((), dtype=wide, device=device)  # of the norms where the model selects the expert
        self.selected = 0

    def add(self, expert: int, features: Tensor, norms: Tensor, selected: Tensor) -> None:
        """Take in tokens: features [tokens, features], norms [tokens], and whether the model selects the expert."""
        self.total += norms[selected].sum()
        self.selected += int(selected.sum())
        real = norms > 0  # of an output that is zero there is no logarithm
        features = features[real].to(self.gram.dtype)
        self.gram[expert] += features.T @ features
        self.cross[expert] += features.T @ norms[real].to(self.gram.dtype).log()

    def __add__(self, other: "Regressions") -> "Regressions":
        num_experts, features = self.cross.shape
        total = Regressions(num_experts, features, self.gram.device)
        for name in ("gram", "cross", "total", "selected"):
            setattr(total, name, getattr(self, name) + getattr(other, name))
        return total

    def solve(self, strength: float) -> Tensor:
        """Ridge regressions [experts, features], of which the first feature, the constant, is not held down."""
        counts = self.gram[:, 0, 0].clamp(min=1)
        if strength == float("inf") or self.gram.shape[-1] == 1:
            constant = self.cross[:, 0] / counts
            return torch.cat([constant[:, None], torch.zeros_like(self.cross[:, 1:])], dim=1)
        gram = self.gram.clone()
        squares = gram.diagonal(dim1=1, dim2=2)
        # One strength for all, so that an expert seen for few tokens keeps to its constant.
        squares[:, 1:] += (strength * squares[:, 2:].mean()).clamp(min=1e-9)
        squares[:, 0] += (squares[:, 0] == 0).to(gram.dtype)  # nothing is known of an expert that no token ranks
        return torch.linalg.solve(gram, self.cross)

    def gain(self, solution: Tensor) -> float:
        """By how much a solution lowers the sum of squares of what is to be explained."""
        return float((solution * (2 * self.cross - torch.einsum("efg,eg->ef", self.gram, solution))).sum())

    def log_mean(self) -> Tensor:
        """Logarithm of the mean norm of the selected experts; 0 if all are zero."""
        mean = self.total / max(self.selected, 1)
        return torch.where(mean > 0, mean, torch.ones_like(mean)).log()


@torch.no_grad()
def fit_norms(
    model: nn.Module,
    token_ids: Tensor | Mapping[str, Tensor],
    *,
    near: int = 16,
    compensation: Compensation | None = None,
    attention_mask: Tensor | Mapping[str, Tensor] | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> OutputNorms:
    """Fit how large the output of each expert is, on a text.

    Parameters
    ----------
    model, token_ids, attention_mask, batch_size, progress
        As for `bhlib.calibrate`.
    near : int
        How many of a token's largest logits the guess looks at; 0 for one number for each expert, its mean. A guess
        takes ``(near + 1) * experts`` products per token.
    compensation : Compensation, optional
        What will stand in for experts that are dropped (`bhlib.fit_compensation`). The norms are then those of what an
        expert gives *more* than that, which is what selecting it adds. On 18 sequences of the demo's validation text a
        threshold beside a compensation of rank 16 did as well with either kind of norms.

    Returns
    -------
    OutputNorms
        An expert counts where it is among a token's best one and a half times the model's own top-k, by the logits:
        where it may be selected. Each layer's ridge is the strength that explains most of held-out batches, every
        fifth; the fit is then of all. Where no guess is better than the constants they remain, with a table of zeros.
        An expert that no token ranks counts as its layer's mean.

    Raises
    ------
    ValueError
        For a `near` that is negative or not below the number of experts, ids or a mask of the wrong shape, a model in
        training mode, logits that are not finite, a compensation of another model, a model whose experts are spread
        over processes, or a text of fewer than five batches, of which none can be held out.
    RuntimeError
        If the model is patched.
    """
    layers, texts = whole_layers(model), check_texts(token_ids, attention_mask)
    num_experts, hidden = layers[0].num_experts, layers[0].router.weight.shape[-1]
    if not 0 <= near < num_experts:
        raise ValueError(f"near is {near}, but must lie in 0..{num_experts - 1}, below the number of experts")
    if compensation is not None:
        compensation.check_model(name_of(model), len(layers), num_experts, hidden)
    features = 2 + num_experts if near else 1
    parts = [[Regressions(num_experts, features, layer.router.weight.device) for _ in range(2)] for layer in layers]

    def take(layer: MoELayer, seen: LayerPass, number: int) -> None:
        check_logits(seen.logits)
        is_held_out = number % HELD_OUT == HELD_OUT - 1
        _measure(layer, seen, near, compensation, parts[layer.index][is_held_out])

    done = watch_text(model, layers, texts, batch_size, take, progress)
    if near and done < HELD_OUT:
        raise ValueError(
            f"the text has {done} batches of {batch_size} sequences, and one in {HELD_OUT} is held out to choose "
            f"the strength of the ridge: give more text, a smaller batch_size, or near=0"
        )
    return OutputNorms([_fit_layer(fitted, held_out) for fitted, held_out in parts], near, name_of(model))


def _measure(
    layer: MoELayer, seen: LayerPass, near: int, compensation: Compensation | None, regressions: Regressions
) -> None:
    """Take in what the experts of a layer give, each for the tokens that rank it among their best."""
    num_ranked = min(layer.num_experts, layer.top_k + layer.top_k // 2)
    ranked = scores_of(layer, seen).topk(num_ranked, dim=-1).indices
    features = features_of(seen.logits, near)
    stands_in = None if compensation is None else compensation.layer(layer.index, features)
    for expert in ranked.unique().tolist():
        rows = (ranked == expert).any(dim=-1).nonzero().flatten()
        output = expert_output(layer, seen.hidden[rows], expert)
        if stands_in is not None:
            output = output - stands_in.alone(seen.hidden[rows], expert)
        selected = (seen.experts[rows] == expert).any(dim=-1)
        regressions.add(expert, features[rows], output.norm(dim=-1), selected)


def features_of(router_logits: Tensor, near: int) -> Tensor:
    """What log norms are linear in: 1, and if `near` the edge and the excess of each expert; float32 [tokens, ...]."""
    ones = router_logits.new_ones(len(router_logits), 1, dtype=torch.float32)
    if not near:
        return ones
    edge, excess, experts = nearest(router_logits, near)
    return torch.cat([ones, edge, torch.zeros_like(router_logits, dtype=torch.float32).scatter(1, experts, excess)], 1)


def _fit_layer(fitted: Regressions, held_out: Regressions) -> LayerNorms:
    """The guess of a layer, with the strength of the ridge that explains most of what is held out."""
    gains = [held_out.gain(fitted.solve(strength)) for strength in STRENGTHS]
    best = STRENGTHS[max(range(len(gains)), key=gains.__getitem__)]
    whole = fitted + held_out
    solution = whole.solve(best)
    seen = whole.gram[:, 0, 0] > 0
    constant = torch.where(seen, solution[:, 0] - whole.log_mean(), 0.0)
    slope = solution[:, 1] if solution.shape[1] > 1 else torch.zeros_like(constant)
    parts: Sequence[Tensor] = (constant, slope, solution[:, 2:].T)
    return LayerNorms(*(part.float().cpu().contiguous() for part in parts))
