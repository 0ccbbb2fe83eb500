"""Forward passes: which of their tokens are real, and where these stand in which sequence.

A token counts if the model was to read it. Padding does not, nor does what `generate()` feeds in the place of a
sequence that has ended while others in the batch go on. What tells them apart:

- The attention mask, in every shape that transformers gives it.
- In a batch without a mask, the padding token of the model's configuration, at the right end of the rows.
- In a decoding step of a batch, the same padding token, and what is fed to a row after its end-of-text token.

An ``eos_token_id`` and a ``pad_token_id`` that `generate()` alone is told, both other than the configuration's, cannot
be seen in a forward pass: set them in ``model.generation_config`` before patching.
"""

import threading
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class PassTokens:
    """One forward pass of the model: which of its [batch, length] tokens are real, and where they stand.

    Attributes
    ----------
    valid : Tensor [batch, length], bool
        False for padding.
    position : Tensor [batch, length], int32
        Index of the token in its sequence, padding not counted.
    token_ids : Tensor [batch, length], int32, or None
        Input ids, None if the model was given embeddings.
    first_sequence : int
        Number of the sequence in row 0; the other rows follow. -1 for a packed pass: several sequences in
        one row, as in continuous batching, and no sign of which earlier ones they continue.
    generated : bool
        True for a decoding step: one token for each sequence, and a cache that held tokens before.
    """

    valid: Tensor
    position: Tensor
    token_ids: Tensor | None
    first_sequence: int
    generated: bool


class _Sequences:
    """The sequences in one cache: the number of the first, and which of their tokens [batch, end] are real."""

    def __init__(self, first: int, real: Tensor) -> None:
        self.first = first
        self._real, self.end = real.clone(), real.shape[1]  # columns from `end` on are room to grow
        # Which rows were fed an end-of-text token, and with what they have been fed since (-1: nothing yet).
        self._ended = real.new_zeros(len(real))
        self._filler = torch.full_like(self._ended, -1, dtype=torch.long)

    def __len__(self) -> int:
        return len(self._real)

    def lengths(self, past: int) -> Tensor:
        """Real tokens [batch] among the first `past` in the cache. Tokens that came unseen are taken for real."""
        return self._real[:, : min(past, self.end)].sum(dim=-1) + max(past - self.end, 0)

    def put(self, past: int, real: Tensor) -> None:
        """Add tokens [batch, length] after the first `past`; what stood there was cropped from the cache."""
        end = past + real.shape[1]
        if end > self._real.shape[1]:
            with torch.inference_mode(False):  # so that it can be written to in any mode
                larger = torch.ones(len(real), 2 * end, dtype=torch.bool, device=real.device)
            larger[:, : self.end] = self._real[:, : self.end]
            self._real = larger
        self._real[:, past:end] = real
        self.end = end

    def idle(self, token_ids: Tensor, ends: Tensor) -> Tensor:
        """Rows [batch] that a decoding step feeds with the same token over and over since their end of text."""
        idle = self._ended & ((self._filler < 0) | (self._filler == token_ids))
        self._ended = idle | torch.isin(token_ids, ends)
        self._filler = torch.where(idle, token_ids, -1)
        return idle

    def resume(self) -> None:
        """Take all rows for unfinished."""
        self._ended = torch.zeros_like(self._ended)


class PassReader:
    """Reads the arguments of forward passes, and follows sequences from pass to pass through their cache.

    Two threads, or two interleaved generations, each with a cache of its own, do not disturb each other.

    Parameters
    ----------
    padding, ends : iterable of int
        The padding token and the end-of-text tokens of the model's configuration.
    """

    def __init__(self, padding: Iterable[int] = (), ends: Iterable[int] = ()) -> None:
        self.padding, self.ends = tuple(padding), tuple(ends)
        self._lock = threading.Lock()
        self._has_warned = False
        self.reset()

    def reset(self) -> None:
        """Number sequences from 0 again."""
        self._by_cache: WeakKeyDictionary = WeakKeyDictionary()
        self._num_sequences = 0

    def read(self, inputs: Mapping[str, Any]) -> PassTokens:
        """Describe a pass from the arguments of a forward, by name.

        Raises
        ------
        TypeError
            If there are neither token ids nor embeddings among them, or a mask that is no Tensor.
        """
        token_ids, tokens = inputs.get("input_ids"), _tokens(inputs)
        batch, length = tokens.shape[:2]
        ends = inputs.get("cu_seq_lens_q")
        if ends is not None:
            return _packed_tokens(inputs, token_ids, ends, batch, length)
        cache = find_cache(inputs.values())
        past = int(cache.get_seq_length()) if cache is not None else 0
        mask = _one_mask(inputs.get("attention_mask"))
        valid = _valid_tokens(mask, batch, length, past, tokens.device)
        sequences = self._sequences(cache, past, valid)
        generated = past > 0 and length == 1
        if not generated or past < sequences.end:
            sequences.resume()
        if token_ids is not None and batch > 1:  # one sequence alone is neither padded nor fed after its end
            if generated:
                valid = valid & self._is_fed(token_ids, sequences)
            elif inputs.get("attention_mask") is None and past == 0:
                valid = valid & ~self._trailing_padding(token_ids)
        if mask is not None and mask.dim() == 2 and mask.shape[1] >= past + length:
            position = _last(mask.long().cumsum(dim=-1), past, length) - 1
        else:
            position = sequences.lengths(past)[:, None] + valid.long().cumsum(dim=-1) - 1
        sequences.put(past, valid)
        return PassTokens(
            # Copies: the caller may go on to write into its own tensors.
            valid.clone(memory_format=torch.contiguous_format),
            position.clamp(min=0).to(torch.int32),
            None if token_ids is None else token_ids.to(torch.int32, copy=True),
            sequences.first,
            generated,
        )

    def follow(self, tokens: PassTokens, cache: object) -> None:
        """Remember the sequences of a pass that made its own cache."""
        with self._lock:
            if cache not in self._by_cache and tokens.first_sequence >= 0:
                self._by_cache[cache] = _Sequences(tokens.first_sequence, tokens.valid)

    def _sequences(self, cache: object | None, past: int, valid: Tensor) -> _Sequences:
        """Sequences that a pass goes on with, or newly numbered ones."""
        with self._lock:
            known = self._by_cache.get(cache) if cache is not None and past else None
            if known is not None and len(known) == len(valid):
                return known
            new = _Sequences(self._num_sequences, valid[:, :0])
            self._num_sequences += len(valid)
            if cache is not None:
                self._by_cache[cache] = new
            return new

    def _is_fed(self, token_ids: Tensor, sequences: _Sequences) -> Tensor:
        """Rows [batch, 1] of a decoding step that are no fillers."""
        idle = sequences.idle(token_ids[:, 0], token_ids.new_tensor(self.ends))
        padding = token_ids.new_tensor([token for token in self.padding if token not in self.ends])
        return ~(idle[:, None] | torch.isin(token_ids, padding))

    def _trailing_padding(self, token_ids: Tensor) -> Tensor:
        """Padding [batch, length] at the right end of rows that came without a mask."""
        padding = torch.isin(token_ids, token_ids.new_tensor(self.padding))
        if not self._has_warned and token_ids.shape[1] > 1:
            fillers = token_ids.new_tensor([0, *self.ends])
            last, before = token_ids[:, -1], token_ids[:, -2]
            repeated = last[(last == before) & torch.isin(last, fillers) & ~padding[:, -1]]
            if len(repeated):
                self._has_warned = True
                warnings.warn(
                    f"A batch without attention_mask has rows that end in token {int(repeated[0])} several times over. "
                    f"It is not the configuration's pad_token_id, so it was counted as text: pass attention_mask, or "
                    f"set model.config.pad_token_id before patching, if it is padding.",
                    stacklevel=2,
                )
        return padding.flip(-1).cumprod(dim=-1).flip(-1).bool()


def special_tokens(model: nn.Module) -> tuple[list[int], list[int]]:
    """The padding token and the end-of-text tokens that `generate()` reads from the configuration; empty if unset."""
    found: list[list[int]] = []
    for name in ("pad_token_id", "eos_token_id"):
        configs = (getattr(model, "generation_config", None), getattr(model, "config", None))
        values = [getattr(config, name, None) for config in configs]
        tokens: list[int] | int = next((value for value in values if value is not None), [])
        found.append(tokens if isinstance(tokens, list) else [tokens])
    padding, ends = found
    return padding, ends


def find_cache(values: Iterable[Any]) -> Any | None:
    """The key-value cache among arguments or outputs: `past_key_values`, or `cache` since transformers 5.24."""
    return next((value for value in values if hasattr(value, "get_seq_length")), None)


def _tokens(inputs: Mapping[str, Any]) -> Tensor:
    """What a pass is given to read [batch, length, ...]: ids, embeddings, or the input of a decoder layer."""
    for name in ("input_ids", "inputs_embeds", "hidden_states"):
        if inputs.get(name) is not None:
            return inputs[name]
    raise TypeError(
        f"bhlib finds no tokens among the arguments {sorted(inputs)} of a forward pass: call the model with input_ids "
        f"or inputs_embeds, or patch with collect_stats=False."
    )


def _packed_tokens(
    inputs: Mapping[str, Any], token_ids: Tensor | None, ends: Tensor, batch: int, length: int
) -> PassTokens:
    """A pass of several sequences in a row; the i-th ends at `ends[i + 1]`, and padding may follow the last."""
    column = torch.arange(length, device=ends.device)
    position = inputs.get("position_ids")
    if position is None:
        position = column - ends[torch.searchsorted(ends, column, right=True).clamp(max=len(ends) - 1) - 1]
    valid = column < ends[-1]
    return PassTokens(
        valid.expand(batch, length).clone(),
        position.expand(batch, length).to(torch.int32, copy=True),
        None if token_ids is None else token_ids.to(torch.int32, copy=True),
        -1,
        bool((ends.diff() <= 1).all() and (position[..., valid] > 0).all()),
    )


def _one_mask(mask: Any) -> Tensor | None:
    """The mask that says most, where there is one for each kind of attention."""
    if isinstance(mask, dict):
        if "full_attention" in mask:
            return mask["full_attention"]
        return next((mask[kind] for kind in sorted(mask) if mask[kind] is not None), None)
    return mask


def _valid_tokens(mask: Tensor | None, batch: int, length: int, past: int, device: torch.device) -> Tensor:
    """Which tokens [batch, length] of a pass are no padding, by its attention mask."""
    if mask is None:
        return torch.ones(batch, length, dtype=torch.bool, device=device)
    if not isinstance(mask, Tensor):
        raise TypeError(
            f"bhlib cannot tell padding from an attention mask of type {type(mask).__name__}: pass a Tensor "
            f"[batch, length], or patch with collect_stats=False."
        )
    if mask.dim() == 2:
        return _last(mask, past, length).bool()
    # [batch, 1, query, key], True or 0.0 where attention is allowed: a real token may attend to itself.
    own = mask[:, 0].diagonal(offset=_start(mask, past, length), dim1=-2, dim2=-1)
    return (own if own.dtype == torch.bool else own == 0).expand(batch, length)


def _start(mask: Tensor, past: int, length: int) -> int:
    """Column of a pass's first token in a mask.

    A mask of all keys has it after the past ones, and may reach on to the cache's end. Under sliding-window attention
    the oldest keys are gone, and the pass's own are the last.
    """
    return min(past, mask.shape[-1] - length)


def _last(mask: Tensor, past: int, length: int) -> Tensor:
    """Columns of the current tokens."""
    start = _start(mask, past, length)
    return mask[:, start : start + length]
