"""Records: what was routed where, exactly.

Two kinds of record are kept while a patched model runs. *Totals* are integer counts per layer (how many tokens used
k experts, how often each expert was used), of constant size however long the run. *Rows* are the decisions
themselves, one per token and layer, aligned with the tokens through the attention mask. Padding is in neither.

Memory of the rows: ``6 * slots + 2`` bytes per token and layer (int16 expert, float32 weight, int16 count), 9 bytes
per token and 48 per forward pass, so 0.8 kB per token for 16 layers of 8 slots, on the device of the layers. Router
logits, if they are kept too, take their own size per expert: for 16 layers of 64 experts 2 kB more per token in
bfloat16, 4 kB in float32. Short passes share a block that has room for `BLOCK_TOKENS`. `max_tokens` bounds the rows, and 0 keeps totals only; whatever
reads rows that were cut short says so in a warning.
"""

import threading
import warnings
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import pad

from bhlib.passes import Step
from bhlib.rules import Routing

#: Tokens whose rows are kept unless more are asked for: 8 MB for OLMoE.
MAX_RECORDED_TOKENS = 10_000

#: Tokens that a block of rows has room for, unless it was made for one longer pass.
BLOCK_TOKENS = 256


class RoutingStats(dict):
    """Statistics of a run: a dict that names its keys when one is missing, and prints as a sentence.

    Keys
    ----
    mean_experts_per_token, std_experts_per_token : float
        Of the number of experts that were activated, over all pairs of a token and a layer.
    sparsity_gain : float
        1 - mean / top_k: the fraction of the model's own expert computations that was saved; negative if more
        were made.
    total_tokens : int
        Tokens routed, padding not counted.
    total_forward_passes : int
    top_k : int
        What the model itself activates.
    mean_experts_per_layer, std_experts_per_layer : list of float
    histogram : list of int
        Entry k is the number of (token, layer) pairs with k experts.
    bh_would_select_mean, bh_would_select_std, bh_would_sparsity_gain : float
        In analyze mode only: of the number that the rule would have activated. There the first three keys describe
        the untouched model, and the lists describe the rule.
    mode : str
        ``"patch"`` or ``"analyze"``; this and the next from a patch, not from its `Records`.
    alpha : float or None
        Level of the rule, if it has one.
    """

    def __missing__(self, key: str):
        raise KeyError(f"{key!r} is not among the statistics: {', '.join(self)}.")

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


class Rows(NamedTuple):
    """Decisions about tokens, and which tokens they are: one tensor of each kind, for all layers.

    Attributes
    ----------
    weights : Tensor [layers, tokens, slots], float32
        As in `Routing`; float64 where a rule computes in it. 0 in an empty slot.
    experts : Tensor [layers, tokens, slots], int16
        -1 in an empty slot.
    counts : Tensor [layers, tokens], int16
        -1 where a layer did not run.
    valid, position, token_ids : Tensor [1, tokens], bool, int32, int32
        As in `Step`; -1 for an unknown id.
    logits : Tensor [layers, tokens, experts]
        Router logits that the decisions were made on, in the dtype in which they were; 0 where a layer did not run.
        Without columns if they were not recorded.
    """

    weights: Tensor
    experts: Tensor
    counts: Tensor
    valid: Tensor
    position: Tensor
    token_ids: Tensor
    logits: Tensor

    @classmethod
    def pack(cls, finished: "Pass", num_layers: int) -> "Rows":
        """Rows of one forward pass, from the decisions of the layers that ran."""
        step, routings = finished.step, finished.routings
        some = next(iter(routings.values()))
        slots = max(routing.experts.shape[-1] for routing in routings.values())
        absent = Routing(torch.zeros_like(some.weights), *(torch.full_like(part, -1) for part in some[1:]))
        layers = [routings.get(layer, absent) for layer in range(num_layers)]
        no_logits = torch.zeros_like(next(iter(finished.logits.values()), some.weights[:, :0]))

        def stack(parts: Iterable[Tensor], empty: float) -> Tensor:
            parts = [part.to(some.counts.device) for part in parts]
            missing = [slots - part.shape[-1] for part in parts]
            return torch.stack([pad(x, (0, n), value=empty) if n else x for x, n in zip(parts, missing, strict=True)])

        ids = torch.full_like(step.position, -1) if step.token_ids is None else step.token_ids
        return cls(
            stack((routing.weights for routing in layers), 0.0),
            stack((routing.experts for routing in layers), -1).to(torch.int16),
            torch.stack([routing.counts.to(some.counts.device) for routing in layers]).to(torch.int16),
            *(part.reshape(1, -1).to(some.counts.device) for part in (step.valid, step.position, ids)),
            torch.stack([finished.logits.get(layer, no_logits).to(some.counts.device) for layer in range(num_layers)]),
        )

    def between(self, start: int, stop: int) -> "Rows":
        """The rows of some of the tokens, as views."""
        return Rows(*(part[:, start:stop] for part in self))

    def totals(self, num_experts: int) -> Tensor:
        """Tokens by number of experts, and tokens by expert: int64 [2, layers, experts + 2], the last column void."""
        size = num_experts + 2
        weight = self.valid.long().expand(len(self.counts), -1)
        slots = self.experts.flatten(1)
        totals = weight.new_zeros(2, len(self.counts), size)
        # A remainder makes the last column of -1, for what did not run or is empty.
        totals[0].scatter_add_(1, self.counts.long() % size, weight)
        totals[1].scatter_add_(1, slots.long() % size, weight.repeat_interleave(self.experts.shape[-1], dim=1))
        return totals


class Block:
    """Rows of several forward passes, one after another, in tensors that have room for `BLOCK_TOKENS`."""

    def __init__(self, first: Rows) -> None:
        """Take the rows of a pass: as they are if they fill a block."""
        self.used = first.counts.shape[1]
        self.rows = first
        if self.used < BLOCK_TOKENS:
            self.used = 0
            self.rows = Rows(*(part.new_empty(part.shape[0], BLOCK_TOKENS, *part.shape[2:]) for part in first))
            self.append(first)

    def has_room(self, num_tokens: int) -> bool:
        return self.used + num_tokens <= self.rows.counts.shape[1]

    def append(self, rows: Rows) -> None:
        for room, part in zip(self.rows, rows, strict=True):
            room[:, self.used : self.used + part.shape[1]] = part
        self.used += rows.counts.shape[1]

    def close(self) -> None:
        """Give back the room that is left."""
        if self.has_room(1):
            self.rows = Rows(*(part.clone() for part in self.filled))

    @property
    def filled(self) -> Rows:
        return self.rows.between(0, self.used)


class Pass:
    """What the routers decide in one forward pass, while it runs. It belongs to one thread."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self.routings: dict[int, Routing] = {}
        self.logits: dict[int, Tensor] = {}

    def add(self, layer: int, routing: Routing, logits: Tensor | None = None) -> None:
        """Take in the decisions of one layer, a row for each token of the pass, batch-major.

        `logits` [tokens, experts] are those that they were made on, if these are to be kept: for every layer or none.

        Raises
        ------
        RuntimeError
            If the rows are not the tokens of the pass, or the layer was there already: such records would be wrong.
        """
        if layer in self.routings or len(routing.counts) != self.step.valid.numel():
            raise RuntimeError(
                f"MoE layer {layer} routed {len(routing.counts)} tokens in a forward pass of "
                f"{self.step.valid.numel()}{', for the second time' if layer in self.routings else ''}: its decisions "
                f"cannot be aligned with the tokens. Patch with collect_stats=False to route without recording."
            )
        self.routings[layer] = Routing(routing.weights.detach(), routing.experts, routing.counts)
        if logits is not None:
            self.logits[layer] = logits.detach()


class RecordedPass(NamedTuple):
    """A forward pass as it is read back: views of a block.

    Attributes
    ----------
    rows : Rows
        Batch-major.
    layers : sequence of int
        The layers that ran.
    shape : (int, int)
        Batch, length.
    first_sequence : int
    generated : bool
        As in `Step`.
    """

    rows: Rows
    layers: Sequence[int]
    shape: tuple[int, int]
    first_sequence: int
    generated: bool

    @property
    def step(self) -> Step:
        """The tokens."""
        valid, position, token_ids = (part.view(self.shape) for part in self.rows[3:6])
        return Step(valid, position, token_ids, self.first_sequence, self.generated)

    @property
    def routings(self) -> dict[int, Routing]:
        """The decisions of each layer that ran."""
        by_layer = list(map(Routing, *(part.unbind() for part in self.rows[:3])))
        return {layer: by_layer[layer] for layer in self.layers}


class RecordedPasses(Sequence):
    """The forward passes whose rows are kept, in the order in which they ended."""

    _FIELDS = 6  # block, first row in it, batch, length, first sequence, generated

    def __init__(self, num_layers: int) -> None:
        self.num_layers = num_layers
        self.blocks: list[Block] = []
        self._index = array("q")
        self._open: dict[tuple, int] = {}
        self._partial: dict[int, list[int]] = {}

    def __len__(self) -> int:
        return len(self._index) // self._FIELDS

    def __getitem__(self, number: int) -> RecordedPass:
        number = range(len(self))[number]
        at = number * self._FIELDS
        block, start, batch, length, first_sequence, generated = self._index[at : at + self._FIELDS]
        rows = self.blocks[block].rows.between(start, start + batch * length)
        layers = self._partial.get(number, range(self.num_layers))
        return RecordedPass(rows, layers, (batch, length), first_sequence, bool(generated))

    def append(self, finished: Pass, rows: Rows) -> None:
        if len(finished.routings) < self.num_layers:
            self._partial[len(self)] = sorted(finished.routings)
        kind = (rows.weights.shape[-1], rows.weights.dtype, rows.logits.dtype, rows.weights.device)
        number = self._open.get(kind)
        if number is not None and self.blocks[number].has_room(rows.counts.shape[1]):
            start = self.blocks[number].used
            self.blocks[number].append(rows)
        else:
            if number is not None:
                self.blocks[number].close()
            number, start = len(self.blocks), 0
            self._open[kind] = number
            self.blocks.append(Block(rows))
        step = finished.step
        self._index.extend((number, start, *step.valid.shape, step.first_sequence, step.generated))


class Records:
    """Totals and rows of what the routers of a model decided.

    Passes that raise an exception, or are interrupted, leave nothing here. Threads may record at the same time.

    Parameters
    ----------
    num_layers, num_experts, top_k : int
        MoE layers of the model, experts in each, experts per token of the unpatched model.
    max_tokens : int or None
        Rows are kept while they hold no more than this many tokens, padding included, in whole forward passes; None
        keeps all. After the first pass that did not fit none is kept, so that the rows have no gap. Totals are
        always complete.

    Attributes
    ----------
    passes : sequence of RecordedPass
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
        self._totals: Tensor | None = None
        self.passes = RecordedPasses(self.num_layers)
        self.truncated = False
        self._num_passes = self._num_tokens = self._num_rows = 0

    def begin(self, step: Step) -> Pass:
        """Announce a forward pass; hand its decisions to `Pass.add`, and the pass to `end`."""
        return Pass(step)

    # Made outside of inference mode, tensors can be written to in and out of it.
    @torch.inference_mode(False)
    @torch.no_grad()
    def end(self, finished: Pass) -> None:
        """Take in a forward pass that has come to its end."""
        num_tokens = finished.step.valid.numel()
        rows = Rows.pack(finished, self.num_layers) if finished.routings else None
        totals = None if rows is None else rows.totals(self.num_experts)
        with self._lock:
            self._num_passes += 1
            self._num_tokens += num_tokens
            if rows is None:
                return
            if self._totals is None:
                self._totals = totals
            else:
                self._totals += totals.to(self._totals.device)
            if self.max_tokens is not None and self._num_rows + num_tokens > self.max_tokens:
                self.truncated = True
            if not self.truncated:
                self.passes.append(finished, rows)
                self._num_rows += num_tokens

    @property
    def nbytes(self) -> int:
        """Bytes that the rows hold; the block that passes are added to may have room for some tokens more."""
        return sum(part.nbytes for block in self.passes.blocks for part in block.filled)

    def bytes_per_token(self, slots: int, logit_bytes: int = 0) -> int:
        """Bytes that the rows need per token, padding included, at this many slots (the rule's `max_k`).

        `logit_bytes` is the size of a recorded logit: 2 in half precision, 4 in float32, 0 if none are recorded.
        """
        return self.num_layers * (6 * slots + 2 + logit_bytes * self.num_experts) + 9

    def histogram(self) -> np.ndarray:
        """Tokens by number of experts: int64 [layers, experts + 1], entry [l, k] tokens with k experts in layer l."""
        return self._read_totals(0)[:, : self.num_experts + 1]

    def expert_load(self) -> np.ndarray:
        """Tokens by expert: int64 [layers, experts]."""
        return self._read_totals(1)[:, : self.num_experts]

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
        self._warn_if_cut_short()
        totals = np.zeros((self.num_layers, self.num_experts, self.num_experts), dtype=np.int64)
        for block in self.passes.blocks:
            rows = block.filled
            for layer, experts in enumerate(rows.experts):
                experts = experts[rows.valid[0]].long()
                # One column more for the empty slots. In float64, which autocast leaves alone, products count exactly.
                used = torch.zeros(len(experts), self.num_experts + 1, dtype=torch.float64, device=experts.device)
                used.scatter_(1, experts % (self.num_experts + 1), 1.0)
                used = used[:, : self.num_experts]
                totals[layer] += (used.T @ used).long().cpu().numpy()
        return totals

    def _read_totals(self, kind: int) -> np.ndarray:
        if self._totals is None:
            return np.zeros((self.num_layers, self.num_experts + 2), dtype=np.int64)
        return self._totals[kind].cpu().numpy()

    def _warn_if_cut_short(self) -> None:
        if self.truncated:
            warnings.warn(
                f"these rows hold {self._num_rows} of {self._num_tokens} tokens, because of max_recorded_tokens="
                f"{self.max_tokens}; only the statistics and expert_load() count all. To keep every row, patch with "
                f"max_recorded_tokens=None.",
                stacklevel=3,
            )

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
            "total_forward_passes": self._num_passes,
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
        self._warn_if_cut_short()
        parts = [np.zeros((0, self.num_layers), np.int64)]
        for one in self.passes:
            parts.append(one.rows.counts.T[one.rows.valid[0]].cpu().numpy().astype(np.int64))
        return np.concatenate(parts)

    def find(self, token: int | tuple[int, int], layer: int) -> tuple[Tensor, Routing]:
        """The recorded logits of a token in a layer, and what was decided on them.

        Parameters
        ----------
        token : (int, int) or int
            Its ``(sequence, position)``, as in a row of `to_frame`; or its number among the rows of `counts`, from the
            end if negative.
        layer : int

        Returns
        -------
        logits : Tensor [experts]
        routing : Routing
            Of one row.

        Raises
        ------
        IndexError
            If there is no such token or layer among the rows.
        ValueError
            If the place is that of several tokens, the layer did not run for it, or no logits were recorded.
        """
        if layer not in range(self.num_layers):
            raise IndexError(f"layer must lie in 0..{self.num_layers - 1}, got {layer!r}.")
        number = self._number_of(token)
        for one in self.passes:
            real = one.rows.valid[0].nonzero()[:, 0]
            if number < len(real):
                break
            number -= len(real)
        if layer not in one.layers:
            raise ValueError(f"MoE layer {layer} did not run in the forward pass of token {token}.")
        if not one.rows.logits.shape[-1]:
            raise ValueError("The logits were not recorded: patch with record_logits=True, and run the model again.")
        row = slice(int(real[number]), int(real[number]) + 1)
        weights, experts, counts = (part[layer, row] for part in one.rows[:3])
        return one.rows.logits[layer, row][0], Routing(weights, experts.long(), counts.long())

    def _number_of(self, token: int | tuple[int, int]) -> int:
        """Number of a token among the rows of `counts`, from 0."""
        cut = f" (max_recorded_tokens={self.max_tokens} left out later ones)" if self.truncated else ""
        if not isinstance(token, tuple):
            total = sum(int(one.rows.valid.sum()) for one in self.passes)
            if not -total <= token < total:
                raise IndexError(
                    f"token must lie in {-total}..{total - 1}, for the {total} recorded tokens{cut}, got {token!r}."
                    if total
                    else f"token is {token!r}, but no token is recorded{cut}: run the model inside the patch first."
                )
            return token % total
        places = [np.zeros((0, 2), np.int64)]
        for one in self.passes:
            valid, position = (part.view(one.shape) for part in one.rows[3:5])
            rows = torch.arange(one.shape[0], device=valid.device)[:, None].expand(one.shape) + one.first_sequence
            places.append(torch.stack([rows[valid], position[valid]], dim=-1).cpu().numpy())
        numbers = np.flatnonzero((np.concatenate(places) == token).all(axis=1)).tolist()
        if not numbers:
            raise IndexError(
                f"token {token} is not recorded{cut}: give (sequence, position) as in a row of records.to_frame()."
            )
        if len(numbers) > 1:
            raise ValueError(
                f"Sequence {token[0]}, position {token[1]} is the place of several recorded tokens (packed sequences, "
                f"or drafts that were rejected): give one by its number in records.counts(), among {numbers}."
            )
        return numbers[0]

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
        self._warn_if_cut_short()
        columns = ["sequence", "position", "generated", "token_id", "layer", "count", "experts", "weights"]
        rows = []
        for number, one in enumerate(self.passes):
            if beam_indices is None:
                rows += _frame_rows(one, range(one.shape[0]), one.first_sequence)
            else:
                rows += _frame_rows(one, self._beams(beam_indices, number), 0)
        return pd.DataFrame(rows, columns=columns)

    def _beams(self, beam_indices: Tensor, number: int) -> list[int | None]:
        """Row of the batch that each hypothesis occupied in a pass; None where it had ended."""
        steps, firsts = beam_indices.shape[1], {one.first_sequence for one in self.passes}
        batch = self.passes[0].shape[0]
        if len(firsts) > 1 or len(self.passes) > steps or int(beam_indices.max()) >= batch or self.truncated:
            raise ValueError(
                f"beam_indices of {steps} steps do not belong to these records of {len(self.passes)} forward passes "
                f"of {len(firsts)} calls, {batch} rows each: call reset_stats() before that generate(), and "
                f"to_frame() right after it, and patch with max_recorded_tokens=None."
            )
        return [row if row >= 0 else None for row in beam_indices[:, number].tolist()]


def _frame_rows(one: RecordedPass, batch_rows: Iterable[int | None], first_sequence: int) -> Iterator[tuple]:
    """Rows of `Records.to_frame` for some rows of a pass's batch, numbered from `first_sequence`."""
    weights, experts, counts, *tokens = (part.cpu().numpy() for part in one.rows[:6])
    valid, position, ids = (part.reshape(one.shape) for part in tokens)
    for layer in one.layers:
        for offset, row in enumerate(batch_rows):
            for column in [] if row is None else np.flatnonzero(valid[row]):
                at = row * one.shape[1] + column
                k = int(counts[layer, at])
                yield (
                    first_sequence + offset,
                    int(position[row, column]),
                    one.generated,
                    int(ids[row, column]),
                    layer,
                    k,
                    tuple(experts[layer, at, :k].tolist()),
                    tuple(weights[layer, at, :k].tolist()),
                )


def _mean_std(histogram: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation of counts given how often each of 0, 1, 2, … occurred; NaN if none did."""
    total = histogram.sum()
    if not total:
        return float("nan"), float("nan")
    values = np.arange(len(histogram))
    mean = (values * histogram).sum() / total
    return float(mean), float(np.sqrt(((values - mean) ** 2 * histogram).sum() / total))
