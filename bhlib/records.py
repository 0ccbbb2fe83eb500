"""Records: what was routed where, exactly.

Two kinds of record are kept while a patched model runs. *Totals* are integer counts per layer (how many tokens used
k experts, how often each expert was used), of constant size however long the run. *Rows* are the decisions
themselves, one per token and layer, aligned with the tokens through the attention mask. Padding is in neither.

Memory of the rows: ``6 * slots + 2`` bytes per token and layer (int16 expert, float32 weight, int16 count), so 0.8 kB
per token for 16 layers of 8 slots; `max_tokens` bounds them, and 0 keeps totals only.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from bhlib.rules import Routing


@dataclass(frozen=True)
class Step:
    """One forward pass of the model: which of its [batch, length] tokens are real, and where they stand.

    Attributes
    ----------
    valid : Tensor [batch, length], bool
        False for padding.
    position : Tensor [batch, length], int64
        Index of the token in its sequence, padding not counted.
    first_sequence : int
        Number of the sequence in row 0; rows are numbered on from there.
    generated : bool
        True for the decoding steps of `generate()`: a cache was passed that already held tokens.
    token_ids : Tensor [batch, length] or None
        Input ids, None if the model was given embeddings.
    """

    valid: Tensor
    position: Tensor
    first_sequence: int
    generated: bool
    token_ids: Tensor | None


class RoutingStats(Mapping):
    """Statistics of a run, read like a dict.

    Keys
    ----
    mean_experts_per_token, std_experts_per_token : float
        Of the number of experts that were activated, over all pairs of a token and a layer.
    sparsity_gain : float
        1 - mean / top_k: the fraction of the model's own expert computations that was saved; negative if more
        were made.
    total_tokens : int
        Tokens routed, padding not counted.
    top_k : int
        What the model itself activates.
    mean_experts_per_layer, std_experts_per_layer : list of float
    histogram : list of int
        Entry k is the number of (token, layer) pairs with k experts.
    bh_would_select_mean, bh_would_select_std, bh_would_sparsity_gain : float
        In analyze mode only: of the number that the rule would have activated. There the first three keys describe
        the untouched model, and the lists describe the rule.
    """

    def __init__(self, values: dict) -> None:
        self._values = values

    def __getitem__(self, key: str):
        try:
            return self._values[key]
        except KeyError:
            raise KeyError(f"{key!r} is not among the statistics: {', '.join(self._values)}.") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        if not self["total_tokens"]:
            return "RoutingStats: nothing was routed yet"
        would = "bh_would_select_mean" in self
        mean, std, gain = (
            self[key]
            for key in (
                ("bh_would_select_mean", "bh_would_select_std", "bh_would_sparsity_gain")
                if would
                else ("mean_experts_per_token", "std_experts_per_token", "sparsity_gain")
            )
        )
        verb = "would use" if would else "used"
        return (
            f"RoutingStats: {self['total_tokens']} tokens {verb} {mean:.2f} ± {std:.2f} experts per layer "
            f"instead of {self['top_k']} ({100 * gain:.1f} % fewer)"
        )


class Records:
    """Totals and rows of what the routers of a model decided.

    Parameters
    ----------
    num_layers, num_experts, top_k : int
        MoE layers of the model, experts in each, experts per token of the unpatched model.
    max_tokens : int or None
        Rows are kept for about so many tokens (whole forward passes), None for all. Totals are always complete.
    """

    def __init__(self, num_layers: int, num_experts: int, top_k: int, max_tokens: int | None = None) -> None:
        self.num_layers, self.num_experts, self.top_k = num_layers, num_experts, top_k
        self.max_tokens = max_tokens
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._histogram = [None] * self.num_layers
        self._load = [None] * self.num_layers
        self._steps: list[Step] = []
        self._rows: list[dict[int, Routing]] = []
        self._rows_tokens = 0

    def begin(self, step: Step) -> None:
        """Announce a forward pass; `add` calls for its layers follow."""
        keep = self.max_tokens is None or self._rows_tokens < self.max_tokens
        if keep:
            self._steps.append(step)
            self._rows.append({})
            self._rows_tokens += step.valid.numel()
        self._keeping = keep

    def add(self, layer: int, routing: Routing, valid: Tensor) -> None:
        """Take in the decisions of one layer for the tokens of the current pass.

        Parameters
        ----------
        layer : int
        routing : Routing
            Rows for all tokens of the pass, batch-major.
        valid : Tensor [tokens], bool
            False for padding.
        """
        weight = valid.to(routing.counts.device, torch.int64)
        if self._histogram[layer] is None:
            # On the layer's device: adding to totals never waits for it.
            self._histogram[layer] = weight.new_zeros(self.num_experts + 1)
            self._load[layer] = weight.new_zeros(self.num_experts + 1)
        self._histogram[layer].scatter_add_(0, routing.counts, weight)
        slots = routing.experts.masked_fill(routing.experts < 0, self.num_experts).flatten()
        self._load[layer].scatter_add_(0, slots, weight.repeat_interleave(routing.experts.shape[-1]))
        if self._keeping:
            self._rows[-1][layer] = Routing(
                routing.weights.detach().float(), routing.experts.to(torch.int16), routing.counts.to(torch.int16)
            )

    def histogram(self) -> np.ndarray:
        """Tokens by number of experts: int64 [layers, experts + 1], entry [l, k] tokens with k experts in layer l."""
        return self._stack(self._histogram)

    def expert_load(self) -> np.ndarray:
        """Tokens by expert: int64 [layers, experts]."""
        return self._stack(self._load)[:, : self.num_experts]

    def _stack(self, parts: list) -> np.ndarray:
        empty = np.zeros(self.num_experts + 1, dtype=np.int64)
        return np.stack([empty if part is None else part.cpu().numpy() for part in parts])

    def stats(self, would: bool = False) -> RoutingStats:
        """Exact statistics of all tokens; `would` if the rule only watched (analyze mode)."""
        histogram = self.histogram()
        means, stds = zip(*(_mean_std(row) for row in histogram), strict=True)
        mean, std = _mean_std(histogram.sum(axis=0))
        gain = 1 - mean / self.top_k
        values = {
            "mean_experts_per_token": float(self.top_k) if would else mean,
            "std_experts_per_token": 0.0 if would else std,
            "sparsity_gain": 0.0 if would else gain,
            "total_tokens": int(histogram.sum(axis=1).max()),
            "top_k": self.top_k,
            "mean_experts_per_layer": list(means),
            "std_experts_per_layer": list(stds),
            "histogram": histogram.sum(axis=0).tolist(),
        }
        if would:
            values |= {
                "bh_would_select_mean": mean,
                "bh_would_select_std": std,
                "bh_would_sparsity_gain": gain,
            }
        return RoutingStats(values)

    def counts(self) -> np.ndarray:
        """Experts per recorded token and layer: int64 [tokens, layers], in the order of `to_frame`'s tokens."""
        rows = [
            np.stack([routing[layer].counts.cpu().numpy() for layer in range(self.num_layers)], axis=1)[
                step.valid.flatten().cpu().numpy()
            ]
            for step, routing in zip(self._steps, self._rows, strict=True)
        ]
        return np.concatenate(rows).astype(np.int64) if rows else np.zeros((0, self.num_layers), np.int64)

    def to_frame(self) -> pd.DataFrame:
        """One row per token and layer.

        Returns
        -------
        pandas.DataFrame
            Columns ``sequence`` (rows of the batches, numbered through), ``position`` (padding not counted),
            ``generated`` (False for the prompt), ``token_id`` (-1 if unknown), ``layer``, ``count``, ``experts``
            and ``weights`` (tuples of length ``count``, largest weight first).
        """
        columns = ["sequence", "position", "generated", "token_id", "layer", "count", "experts", "weights"]
        rows = []
        for step, routings in zip(self._steps, self._rows, strict=True):
            valid, position = step.valid.cpu().numpy(), step.position.cpu().numpy()
            ids = np.full(valid.shape, -1) if step.token_ids is None else step.token_ids.cpu().numpy()
            batch, length = np.nonzero(valid)
            flat = batch * valid.shape[1] + length
            for layer, routing in sorted(routings.items()):
                counts = routing.counts.cpu().numpy()[flat].astype(int)
                experts, weights = routing.experts.cpu().numpy()[flat], routing.weights.cpu().numpy()[flat]
                rows += zip(
                    (step.first_sequence + batch).tolist(),
                    position[batch, length].tolist(),
                    [step.generated] * len(flat),
                    ids[batch, length].tolist(),
                    [layer] * len(flat),
                    counts.tolist(),
                    [tuple(row[:k].tolist()) for row, k in zip(experts, counts, strict=True)],
                    [tuple(row[:k].tolist()) for row, k in zip(weights, counts, strict=True)],
                    strict=True,
                )
        return pd.DataFrame(rows, columns=columns)


def _mean_std(histogram: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation of counts given how often each of 0, 1, 2, … occurred; NaN if none did."""
    total = histogram.sum()
    if not total:
        return float("nan"), float("nan")
    values = np.arange(len(histogram))
    mean = (values * histogram).sum() / total
    return float(mean), float(np.sqrt(((values - mean) ** 2 * histogram).sum() / total))
