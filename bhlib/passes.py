"""Forward passes: which of their tokens are real, and where these stand in which sequence.

A token counts if the model was to read it. Padding does not, nor does what `generate()` feeds in the place of a
sequence that has ended while others in the batch go on.
"""

import threading
from collections.abc import Iterable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor


@dataclass(frozen=True)
class Step:
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
        Number of the sequence in row 0; rows are numbered on from there.
    generated : bool
        True for a decoding step: one token for each sequence, and a cache that held tokens before.
    """

    valid: Tensor
    position: Tensor
    token_ids: Tensor | None
    first_sequence: int
    generated: bool


@dataclass
class _Sequences:
    """The sequences in one cache: the number of the first, and how many real tokens each has had [batch]."""

    first: int
    lengths: Tensor


class PassReader:
    """Reads the arguments of forward passes, and follows sequences from pass to pass through their cache.

    Two threads, or two interleaved generations, each with a cache of its own, do not disturb each other.

    Parameters
    ----------
    padding : iterable of int
        Ids that stand for nothing when a decoding step is fed with them.
    """

    def __init__(self, padding: Iterable[int] = ()) -> None:
        self.padding = tuple(padding)
        self._lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Number sequences from 0 again."""
        self._by_cache: WeakKeyDictionary = WeakKeyDictionary()
        self._num_sequences = 0

    def read(self, inputs: dict) -> Step:
        """Describe a pass from the arguments of the model's forward, by name."""
        token_ids = inputs.get("input_ids")
        tokens = token_ids if token_ids is not None else inputs["inputs_embeds"]
        batch, length = tokens.shape[:2]
        cache = inputs.get("past_key_values")
        past = int(cache.get_seq_length()) if cache is not None else 0
        mask = inputs.get("attention_mask")
        if isinstance(mask, dict):  # one mask per kind of attention
            mask = next(iter(mask.values()))
        valid = _valid_tokens(mask, batch, length, past, tokens.device)
        sequences = self._sequences(cache, past, batch, tokens.device)
        generated = past > 0 and length == 1
        if generated and token_ids is not None:
            for padding in self.padding:
                valid = valid & (token_ids != padding)
        if mask is not None and mask.dim() == 2:
            position = _last(mask.long().cumsum(dim=-1), past, length) - 1
        else:
            position = sequences.lengths[:, None] + valid.long().cumsum(dim=-1) - 1
        sequences.lengths = position[:, -1] + 1
        return Step(
            # Copies: the caller may go on to write into its own tensors.
            valid.clone(memory_format=torch.contiguous_format),
            position.clamp(min=0).to(torch.int32),
            None if token_ids is None else token_ids.to(torch.int32, copy=True),
            sequences.first,
            generated,
        )

    def follow(self, step: Step, cache: object) -> None:
        """Remember the sequences of a pass that made its own cache."""
        if cache not in self._by_cache:
            self._by_cache[cache] = _Sequences(step.first_sequence, step.position[:, -1].long() + 1)

    def _sequences(self, cache: object | None, past: int, batch: int, device: torch.device) -> _Sequences:
        """Sequences that a pass goes on with, or newly numbered ones."""
        with self._lock:
            known = self._by_cache.get(cache) if cache is not None and past else None
            if known is not None and len(known.lengths) == batch:
                return known
            new = _Sequences(self._num_sequences, torch.full((batch,), past, device=device))
            self._num_sequences += batch
            if cache is not None:
                self._by_cache[cache] = new
            return new


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
    own = mask[:, 0].diagonal(offset=past, dim1=-2, dim2=-1)
    return (own if own.dtype == torch.bool else own == 0).expand(batch, length)


def _last(mask: Tensor, past: int, length: int) -> Tensor:
    """Columns of the current tokens, in a mask that may reach back to the first token and on to the cache's end."""
    start = past if mask.shape[1] >= past + length else mask.shape[1] - length
    return mask[:, start : start + length]
