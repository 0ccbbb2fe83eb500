"""Records: what was routed where, exactly.

Two kinds of record are kept while a patched model runs. *Totals* are integer counts per layer (how many tokens used
k experts, how often each expert was used), of constant size however long the run. *Rows* are the decisions
themselves, one per token and layer, aligned with the tokens through the attention mask. Padding is in neither.

Memory of the rows: ``6 * slots + 2`` bytes per token and layer (int16 expert, float32 weight, int16 count), 9 bytes
per token and 56 per forward pass, so 0.8 kB per token for 16 layers of 8 slots, on the device of the layers. Router
logits, if they are kept too, take their own size per expert: for 16 layers of 64 experts 2 kB more per token in
bfloat16, 4 kB in float32. Short passes share a block (`bhlib.recorded_passes`). `max_tokens` bounds the rows, and 0
keeps totals only; whatever reads rows that were cut short says so in a warning.

Passes that have ended wait as they are, some two kB a token, until there are enough to be taken in together
(`MOST_PENDING_PASSES`, `MOST_PENDING_TOKENS`) or somebody reads: a step of decoding adds a copy or two.
"""

import itertools
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from bhlib.passes import PassNote, PassReader, PassTokens
from bhlib.recorded_passes import RecordedPass, RecordedPasses, Rows, RunningPass
from bhlib.rules import Routing, Rule
from bhlib.stats import RoutingStats, mean_std

#: Passes, and tokens in them, that may have ended before they are taken in together.
MOST_PENDING_PASSES, MOST_PENDING_TOKENS = 64, 2048

#: Tokens whose rows are kept unless more are asked for: 8 MB for OLMoE.
MAX_RECORDED_TOKENS = 10_000


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

    reader : PassReader, optional
        Reads the notes of passes that `begin` is given.
    """

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        top_k: int,
        max_tokens: int | None = None,
        reader: PassReader | None = None,
    ) -> None:
        self.num_layers, self.num_experts, self.top_k = num_layers, num_experts, top_k
        self.max_tokens = max_tokens
        self.reader = reader or PassReader()
        self._lock = threading.RLock()
        self.reset()

    def __getstate__(self) -> dict:
        self._take_in()
        return {name: value for name, value in vars(self).items() if name not in ("_lock", "reader")}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state, _lock=threading.RLock(), reader=PassReader())

    def reset(self) -> None:
        """Forget everything."""
        with self._lock:
            self._pending: list[RunningPass] = []
            self._totals: Tensor | None = None
            self._passes = RecordedPasses(self.num_layers)
            self._truncated = False
            self._num_passes = self._num_tokens = self._num_rows = self._num_pending = 0
            self.reader.reset()

    def begin(self, tokens: PassTokens | PassNote, rule: Rule | None = None) -> RunningPass:
        """Announce a forward pass; hand its decisions to `RunningPass.add`, and the pass to `end`."""
        return RunningPass(tokens, rule)

    def end(self, finished: RunningPass) -> None:
        """Take a forward pass that has come to its end.

        Its tensors are kept as they are, until there are enough passes to go through together, or somebody asks. Where
        looking at them waits for no device, only single steps of decoding are gathered.
        """
        with self._lock:
            num_tokens = finished.tokens.num_tokens
            self._num_passes += 1
            self._num_tokens += num_tokens
            self._pending.append(finished)
            self._num_pending += num_tokens
            is_step = not isinstance(finished.tokens, PassNote) or finished.tokens.shape[1] == 1
            at_hand = finished.device is not None and finished.device.type == "cpu"
            many = len(self._pending) >= MOST_PENDING_PASSES or self._num_pending >= MOST_PENDING_TOKENS
            if many or at_hand and not is_step:
                self._take_in()

    # Made outside of inference mode, tensors can be written to in and out of it.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _take_in(self) -> None:
        """Go through the passes that have ended since the last time."""
        with self._lock:
            pending, self._pending, self._num_pending = self._pending, [], 0
            read = iter(self.reader.read([one.tokens for one in pending if isinstance(one.tokens, PassNote)]))
            known = [next(read) if isinstance(one.tokens, PassNote) else one.tokens for one in pending]
            routed = [(one, tokens) for one, tokens in zip(pending, known, strict=True) if one.routings]
            for _, group in itertools.groupby(routed, key=lambda pair: pair[0].kind):
                passes, tokens = zip(*group, strict=True)
                rows = Rows.pack(passes, tokens, self.num_layers, self.num_experts)
                totals = rows.totals(self.num_experts)
                if self._totals is None:
                    self._totals = totals
                else:
                    self._totals += totals.to(self._totals.device)
                self._keep(passes, tokens, rows)

    def _keep(self, passes: Sequence[RunningPass], tokens: Sequence[PassTokens], rows: Rows) -> None:
        """Keep the rows of as many passes as there is room for."""
        ends = self._num_rows + np.cumsum([one.num_tokens for one in tokens])
        fitting = len(passes)
        if self.max_tokens is not None:
            fitting = 0 if self._truncated else int(np.searchsorted(ends, self.max_tokens, side="right"))
        self._truncated |= fitting < len(passes)
        if fitting:
            num_rows = int(ends[fitting - 1]) - self._num_rows
            kept = rows if fitting == len(passes) else rows.between(0, num_rows).clone()
            self._passes.append(passes[:fitting], tokens[:fitting], kept)
            self._num_rows += num_rows

    @property
    def passes(self) -> RecordedPasses:
        """The recorded forward passes, a sequence of `RecordedPass` in the order in which they ended."""
        self._take_in()
        return self._passes

    @property
    def truncated(self) -> bool:
        """Whether `max_tokens` has left out a pass."""
        self._take_in()
        return self._truncated

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
        return self._read_totals()[0]

    def expert_load(self) -> np.ndarray:
        """Tokens by expert: int64 [layers, experts]."""
        return self._read_totals()[1, :, : self.num_experts]

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
                used = used.scatter_(1, experts + 1, 1.0)[:, 1:]
                totals[layer] += (used.T @ used).long().cpu().numpy()
        return totals

    def _read_totals(self) -> np.ndarray:
        self._take_in()
        if self._totals is None:
            return np.zeros((2, self.num_layers, self.num_experts + 1), dtype=np.int64)
        return self._totals.cpu().numpy()[:, :, 1:]

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
        means, stds = zip(*(mean_std(row) for row in histogram), strict=True)
        mean, std = mean_std(histogram.sum(axis=0))
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
        one, row = self._place_of(token)
        if layer not in one.layers:
            raise ValueError(f"MoE layer {layer} did not run in the forward pass of token {token}.")
        if not one.rows.logits.shape[-1]:
            raise ValueError("The logits were not recorded: patch with record_logits=True, and run the model again.")
        weights, experts, counts = (part[layer, row : row + 1] for part in one.rows[:3])
        return one.rows.logits[layer, row], Routing(weights, experts.long(), counts.long())

    def rule_of(self, token: int | tuple[int, int]) -> Rule | None:
        """The rule that routed a token, at the level of its sequence; the token as for `find`, and the same errors."""
        one, row = self._place_of(token)
        return one.rule_of(row)

    def _place_of(self, token: int | tuple[int, int]) -> tuple[RecordedPass, int]:
        """The pass of a token, and its row there."""
        number = self._number_of(token)
        for one in self.passes:
            real = one.rows.valid[0].nonzero()[:, 0]
            if number < len(real):
                break
            number -= len(real)
        return one, int(real[number])

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
            Columns ``sequence`` (over all passes), ``position`` (padding not counted), ``generated`` (False for the
            prompt), ``token_id`` (-1 if unknown), ``layer``, ``count``, ``experts`` and ``weights`` (tuples of length
            ``count``, in the order in which the rule ranks them). Drafts that assisted generation rejects are
            among the rows, since they were routed, and tokens checked several at a time are not ``generated``.
        """
        self._warn_if_cut_short()
        columns = ["sequence", "position", "generated", "token_id", "layer", "count", "experts", "weights"]
        rows: list[tuple] = []
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
            if row is None:
                continue
            for column in np.flatnonzero(valid[row]):
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
