"""Records: what was routed where, exactly.

Two kinds of record are kept while a patched model runs. *Totals* are integer counts per layer (how many tokens used
k experts, how often each expert was used), of constant size however long the run. *Rows* are the decisions
themselves, one per token and layer, aligned with the tokens through the attention mask. Padding is in neither.

Memory of the rows: ``6 * slots + 2`` bytes per token and layer (int16 expert, float32 weight, int16 count) and 9 bytes
per token, so 0.8 kB per token for 16 layers of 8 slots, on the device of the layer. `max_tokens` bounds them, and 0
keeps totals only.
"""

import threading
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from bhlib.passes import Step
from bhlib.rules import Routing


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


class Pass:
    """What the routers decide in one forward pass, while it runs. It belongs to one thread."""

    def __init__(self, step: Step, num_experts: int, keep: bool) -> None:
        self.step, self.num_experts, self.keep = step, num_experts, keep
        self.routings: dict[int, Routing] = {}
        self.histogram: dict[int, Tensor] = {}
        self.load: dict[int, Tensor] = {}

    def add(self, layer: int, routing: Routing) -> None:
        """Take in the decisions of one layer, a row for each token of the pass, batch-major.

        Raises
        ------
        RuntimeError
            If the rows are not the tokens of the pass, or the layer was there already: such records would be wrong.
        """
        if layer in self.histogram or len(routing.counts) != self.step.valid.numel():
            raise RuntimeError(
                f"MoE layer {layer} routed {len(routing.counts)} tokens in a forward pass of "
                f"{self.step.valid.numel()}{', for the second time' if layer in self.histogram else ''}: its decisions "
                f"cannot be aligned with the tokens. Patch with collect_stats=False to route without recording."
            )
        # On the layer's device: adding to totals never waits for it.
        weight = self.step.valid.flatten().to(routing.counts.device, torch.int64)
        empty = weight.new_zeros(self.num_experts + 1)
        slots = routing.experts.masked_fill(routing.experts < 0, self.num_experts).flatten()
        self.histogram[layer] = empty.scatter_add(0, routing.counts, weight)
        self.load[layer] = empty.scatter_add(0, slots, weight.repeat_interleave(routing.experts.shape[-1]))
        if self.keep:
            self.routings[layer] = Routing(
                routing.weights.detach().clone(), routing.experts.to(torch.int16), routing.counts.to(torch.int16)
            )

    def tensors(self) -> list[Tensor]:
        """All that is held of a kept pass."""
        held = [self.step.valid, self.step.position]
        held += [] if self.step.token_ids is None else [self.step.token_ids]
        return held + [tensor for routing in self.routings.values() for tensor in routing]


class Records:
    """Totals and rows of what the routers of a model decided.

    Passes that raise an exception, or are interrupted, leave nothing here. Threads may record at the same time.

    Parameters
    ----------
    num_layers, num_experts, top_k : int
        MoE layers of the model, experts in each, experts per token of the unpatched model.
    max_tokens : int or None
        Rows are kept while they hold no more than so many tokens, padding included, in whole forward passes; None
        keeps all. After the first pass that did not fit none is kept, so that the rows have no gap. Totals are
        always complete.

    Attributes
    ----------
    passes : list of Pass
        The recorded forward passes, in the order in which they ended.
    truncated : bool
        Whether `max_tokens` has left out a pass.
    """

    def __init__(self, num_layers: int, num_experts: int, top_k: int, max_tokens: int | None = None) -> None:
        self.num_layers, self.num_experts, self.top_k = num_layers, num_experts, top_k
        self.max_tokens = max_tokens
        self._lock = threading.Lock()
        self.reset()

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state, _lock=threading.Lock())

    def reset(self) -> None:
        """Forget everything."""
        self._histogram: list[Tensor | None] = [None] * self.num_layers
        self._load: list[Tensor | None] = [None] * self.num_layers
        self.passes: list[Pass] = []
        self.truncated = False
        self._num_rows = 0

    def begin(self, step: Step) -> Pass:
        """Announce a forward pass; hand its decisions to `Pass.add`, and the pass to `end`."""
        return Pass(step, self.num_experts, self._fits(step))

    def end(self, finished: Pass) -> None:
        """Take in a forward pass that has come to its end."""
        with self._lock:
            for layer, histogram in finished.histogram.items():
                for totals, part in ((self._histogram, histogram), (self._load, finished.load[layer])):
                    totals[layer] = part if totals[layer] is None else totals[layer] + part
            if finished.keep and self._fits(finished.step):
                self.passes.append(finished)
                self._num_rows += finished.step.valid.numel()
            else:
                self.truncated = True

    def _fits(self, step: Step) -> bool:
        if self.max_tokens is None:
            return True
        return not self.truncated and self._num_rows + step.valid.numel() <= self.max_tokens

    @property
    def nbytes(self) -> int:
        """Bytes that the rows hold."""
        return sum(tensor.nbytes for one in self.passes for tensor in one.tensors())

    def bytes_per_token(self, slots: int) -> int:
        """Bytes that the rows need per token, padding included, at so many slots (the rule's `max_k`)."""
        return self.num_layers * (6 * slots + 2) + 9

    def histogram(self) -> np.ndarray:
        """Tokens by number of experts: int64 [layers, experts + 1], entry [l, k] tokens with k experts in layer l."""
        return self._stack(self._histogram)

    def expert_load(self) -> np.ndarray:
        """Tokens by expert: int64 [layers, experts]."""
        return self._stack(self._load)[:, : self.num_experts]

    def load_balance(self) -> pd.DataFrame:
        """How evenly the experts were used, one row per layer.

        Returns
        -------
        pandas.DataFrame
            Index ``layer``; columns ``max_over_mean`` (load of the busiest expert over the mean load; 1 if even,
            `num_experts` if one expert does everything), ``entropy`` (of the distribution of the load, divided by
            the log of the number of experts; 1 if even, 0 if one does everything) and ``unused`` (experts that no
            token used). NaN for a layer that has routed nothing.
        """
        load = self.expert_load()
        share = load / np.where(load.sum(axis=1) > 0, load.sum(axis=1), np.nan)[:, None]
        entropy = -(share * np.log(np.where(share > 0, share, 1.0))).sum(axis=1) / np.log(self.num_experts)
        values = {
            "max_over_mean": share.max(axis=1) * self.num_experts,
            "entropy": entropy + 0.0,  # no -0.0
            "unused": (load == 0).sum(axis=1),
        }
        return pd.DataFrame(values, index=pd.RangeIndex(self.num_layers, name="layer"))

    def coactivation(self) -> np.ndarray:
        """How often two experts were used by the same token, over the recorded rows.

        Returns
        -------
        ndarray [layers, experts, experts], int64
            Entry [l, i, j]: tokens that used both experts i and j in layer l; the diagonal is the load. Divided by
            it, ``counts / np.diagonal(counts, axis1=1, axis2=2)[:, :, None]``, it is the share of expert i's tokens
            that expert j saw too: the co-activation of the OLMoE paper (Muennighoff et al., 2024, section 5.2).
        """
        totals = np.zeros((self.num_layers, self.num_experts, self.num_experts), dtype=np.int64)
        for one in self.passes:
            for layer, routing in one.routings.items():
                experts = routing.experts[one.step.valid.flatten().to(routing.experts.device)].long()
                # One column more for the empty slots. float32 counts exactly up to 2**24 tokens of one pass.
                used = torch.zeros(len(experts), self.num_experts + 1, device=experts.device)
                used.scatter_(1, experts.masked_fill(experts < 0, self.num_experts), 1.0)
                used = used[:, : self.num_experts]
                totals[layer] += (used.T @ used).round().to(torch.int64).cpu().numpy()
        return totals

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
        """Experts per recorded token and layer: int64 [tokens, layers]; -1 where a layer did not run.

        Tokens by forward pass, by row of the batch, by position; padding left out.
        """
        parts = [np.zeros((0, self.num_layers), np.int64)]
        for one in self.passes:
            valid = one.step.valid.flatten().cpu().numpy()
            part = np.full((valid.sum(), self.num_layers), -1, dtype=np.int64)
            for layer, routing in one.routings.items():
                part[:, layer] = routing.counts.cpu().numpy()[valid]
            parts.append(part)
        return np.concatenate(parts)

    def to_frame(self, beam_indices: Tensor | None = None) -> pd.DataFrame:
        """One row per token and layer.

        A sequence is a row of the batch that the model saw: with sampling, `num_return_sequences` rows for each
        prompt; in beam search, `num_beams` rows, whose beams change places from step to step. `beam_indices` follows
        the hypotheses that were returned instead.

        Parameters
        ----------
        beam_indices : Tensor [hypotheses, steps], optional
            As ``generate(..., num_beams=n, return_dict_in_generate=True, output_scores=True)`` returns it. The records
            must hold that one call and nothing else. `sequence` then counts the hypotheses.

        Returns
        -------
        pandas.DataFrame
            Columns ``sequence`` (numbered through), ``position`` (padding not counted), ``generated`` (False for the
            prompt), ``token_id`` (-1 if unknown), ``layer``, ``count``, ``experts`` and ``weights`` (tuples of length
            ``count``, in the order in which the rule ranks them). Drafts that assisted generation rejects are
            among the rows, since they were routed, and tokens checked several at a time are not ``generated``.
        """
        columns = ["sequence", "position", "generated", "token_id", "layer", "count", "experts", "weights"]
        rows = []
        for number, one in enumerate(self.passes):
            if beam_indices is None:
                rows += _frame_rows(one, range(len(one.step.valid)), one.step.first_sequence)
            else:
                rows += _frame_rows(one, self._beams(beam_indices, number), 0)
        return pd.DataFrame(rows, columns=columns)

    def _beams(self, beam_indices: Tensor, number: int) -> list[int | None]:
        """Row of the batch that each hypothesis occupied in a pass; None where it had ended."""
        steps, firsts = beam_indices.shape[1], {one.step.first_sequence for one in self.passes}
        batch = len(self.passes[0].step.valid)
        if len(firsts) > 1 or len(self.passes) > steps or int(beam_indices.max()) >= batch or self.truncated:
            raise ValueError(
                f"beam_indices of {steps} steps do not belong to these records of {len(self.passes)} forward passes "
                f"of {len(firsts)} calls, {batch} rows each: call reset_stats() before that generate(), and "
                f"to_frame() right after it, and leave max_recorded_tokens at None."
            )
        return [row if row >= 0 else None for row in beam_indices[:, number].tolist()]


def _frame_rows(one: Pass, batch_rows: Iterable[int | None], first_sequence: int) -> Iterator[tuple]:
    """Rows of `Records.to_frame` for some rows of a pass's batch, numbered from `first_sequence`."""
    valid, position = one.step.valid.cpu().numpy(), one.step.position.cpu().numpy()
    ids = np.full(valid.shape, -1) if one.step.token_ids is None else one.step.token_ids.cpu().numpy()
    for layer, routing in sorted(one.routings.items()):
        counts = routing.counts.cpu().numpy().reshape(valid.shape)
        experts, weights = (x.cpu().numpy().reshape(*valid.shape, -1) for x in (routing.experts, routing.weights))
        for offset, row in enumerate(batch_rows):
            for column in [] if row is None else np.flatnonzero(valid[row]):
                at, k = (row, column), int(counts[row, column])
                yield (
                    first_sequence + offset,
                    int(position[at]),
                    one.step.generated,
                    int(ids[at]),
                    layer,
                    k,
                    tuple(experts[at][:k].tolist()),
                    tuple(weights[at][:k].tolist()),
                )


def _mean_std(histogram: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation of counts given how often each of 0, 1, 2, … occurred; NaN if none did."""
    total = histogram.sum()
    if not total:
        return float("nan"), float("nan")
    values = np.arange(len(histogram))
    mean = (values * histogram).sum() / total
    return float(mean), float(np.sqrt(((values - mean) ** 2 * histogram).sum() / total))
