"""Forward passes: which of their tokens are real, and where these stand in which sequence.

A token counts if the model was to read it. Padding does not, nor does what `generate()` feeds in the place of a
sequence that has ended while others in the batch go on. What tells them apart:

- The attention mask, in every shape that transformers gives it.
- In a batch without a mask, the padding token of the model's configuration, at the right end of the rows.
- In a decoding step of a batch, the same padding token, and what is fed to a row after its end-of-text token.

An ``eos_token_id`` and a ``pad_token_id`` that `generate()` alone is told, both other than the configuration's, cannot
be seen in a forward pass: set them in ``model.generation_config`` before patching.
"""

import itertools
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

#: Caches that were first seen by compiled code, of which sequences are remembered.
MOST_UNSEEN_CACHES = 64


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

    @property
    def num_tokens(self) -> int:
        """Tokens of the pass, padding included."""
        return self.valid.numel()


@dataclass(eq=False)
class PassNote:
    """What a forward pass was given: enough to tell its real tokens later, when somebody asks.

    To note it down waits for no device, whatever the cache; its tensors belong to nobody else.

    Attributes
    ----------
    shape : (int, int)
        Batch, length.
    past : int or Tensor [], int64
        Tokens in the cache before the pass.
    token_ids : Tensor [batch, length], int64, or None
    own : Tensor [batch, length], bool, or None
        Whether the attention mask lets a token attend to itself; None without a mask.
    before : Tensor [batch], int64, or None
        Real tokens before the pass, by the mask; -1 or None where it does not say.
    cached : _Cached or None
        The sequences that the pass goes on with.
    """

    shape: tuple[int, int]
    past: int | Tensor
    token_ids: Tensor | None
    own: Tensor | None
    before: Tensor | None
    cached: "_Cached | None" = None

    @property
    def num_tokens(self) -> int:
        """Tokens of the pass, padding included."""
        return self.shape[0] * self.shape[1]


class _Sequences:
    """The sequences in one cache: the number of the first, and which of their tokens [batch, end] are real."""

    def __init__(self, first: int, batch: int) -> None:
        self.first, self.end = first, 0
        self._real = np.ones((batch, 64), dtype=bool)  # columns from `end` on are room to grow
        # Which rows were fed an end-of-text token, and with what they have been fed since (-1: nothing yet).
        self._ended, self._filler = np.zeros(batch, dtype=bool), np.full(batch, -1)

    def __len__(self) -> int:
        return len(self._real)

    def lengths(self, past: int) -> np.ndarray:
        """Real tokens [batch] among the first `past` in the cache. Tokens that came unseen are taken for real."""
        return self._real[:, : min(past, self.end)].sum(axis=1) + max(past - self.end, 0)

    def put(self, past: int, real: np.ndarray) -> None:
        """Add tokens [batch, length] after the first `past`; what stood there was cropped from the cache."""
        end = past + real.shape[1]
        if end > self._real.shape[1]:
            larger = np.ones((len(real), 2 * end), dtype=bool)
            larger[:, : self.end] = self._real[:, : self.end]
            self._real = larger
        self._real[:, self.end : past] = True
        self._real[:, past:end] = real
        self.end = end

    def idle(self, token_ids: np.ndarray, ends: tuple[int, ...]) -> np.ndarray:
        """Rows [batch] that a decoding step feeds with the same token over and over since their end of text."""
        idle = self._ended & ((self._filler < 0) | (self._filler == token_ids))
        self._ended = idle | _among(token_ids, ends)
        self._filler = np.where(idle, token_ids, -1)
        return idle

    def resume(self) -> None:
        """Take all rows for unfinished."""
        self._ended, self._filler = np.zeros(len(self), dtype=bool), np.full(len(self), -1)


class _Cached:
    """What passes on the same cache have in common: the sequences that they go on with."""

    sequences: _Sequences | None = None


class PassReader:
    """Reads the arguments of forward passes, and follows sequences from pass to pass through their cache.

    In two steps: a pass is noted down while it runs (`note`), and notes are read later, in the order of the passes
    (`read`). Two threads, or two interleaved generations, each with a cache of its own, do not disturb each other.

    Parameters
    ----------
    padding, ends : iterable of int
        The padding token and the end-of-text tokens of the model's configuration.
    """

    def __init__(self, padding: Iterable[int] = (), ends: Iterable[int] = ()) -> None:
        self.padding, self.ends = tuple(padding), tuple(ends)
        self._padding_alone = tuple({*self.padding} - {*self.ends})
        self._lock = threading.Lock()
        self._has_warned = False
        self.reset()

    def reset(self) -> None:
        """Number sequences from 0 again."""
        self._by_cache: WeakKeyDictionary[Any, _Cached] = WeakKeyDictionary()
        self._by_address: dict[int | None, _Cached] = {}
        self._num_sequences = 0

    def note(self, inputs: Mapping[str, Any], ran_on: Any | None = None) -> "PassNote | PassTokens":
        """Note down a pass that is about to run, from the arguments of a forward, by name.

        A packed pass, which says everything itself, is read at once. `ran_on` is the cache of a pass that has run
        already, and is in it.

        Raises
        ------
        TypeError
            If there are neither token ids nor embeddings among them, or a mask that is no Tensor.
        """
        if is_packed(inputs):
            return _packed_tokens(inputs)
        cache = find_cache(inputs.values()) if ran_on is None else ran_on
        note = note_inputs(inputs, cache, has_run=ran_on is not None)
        note.cached = self._cached(cache)
        return note

    def follow(self, note: PassNote, cache: Any) -> None:
        """Remember which sequences are in a cache that a pass has made itself."""
        with self._lock:
            if cache not in self._by_cache and note.cached is not None:
                self._by_cache[cache] = note.cached

    def cached_at(self, keys: Tensor) -> _Cached:
        """The sequences in the cache whose first layer holds these keys: compiled code knows no more of a cache."""
        address = keys.data_ptr()
        with self._lock:
            for cache, cached in self._by_cache.items():
                if _address(cache) == address:
                    return cached
            while len(self._by_address) >= MOST_UNSEEN_CACHES:
                del self._by_address[next(iter(self._by_address))]
            return self._by_address.setdefault(address, _Cached())

    def _cached(self, cache: Any | None) -> _Cached:
        with self._lock:
            cached = self._by_cache.get(cache) if cache is not None else None
            if cached is None:
                cached = self._by_address.pop(_address(cache), None) or _Cached()
                if cache is not None:
                    self._by_cache[cache] = cached
            return cached

    def read(self, notes: Sequence[PassNote]) -> list[PassTokens]:
        """Which tokens of passes were real, and where they stood. In the order of the passes, each of them once."""
        return [self._read(note, *facts) for note, facts in zip(notes, _on_host(notes), strict=True)]

    def _read(
        self, note: PassNote, past: int, ids: np.ndarray | None, own: np.ndarray | None, before: np.ndarray | None
    ) -> PassTokens:
        batch, length = note.shape
        valid = np.ones(note.shape, dtype=bool) if own is None else own
        sequences = self._sequences(note.cached, past, batch)
        generated = past > 0 and length == 1
        if not generated or past < sequences.end:
            sequences.resume()
        position = valid.cumsum(axis=1) - 1
        if ids is not None and batch > 1:  # one sequence alone is neither padded nor fed after its end
            if generated:
                idle = sequences.idle(ids[:, 0], self.ends) | _among(ids[:, 0], self._padding_alone)
                valid = valid & ~idle[:, None]
            elif own is None and past == 0:
                valid = valid & ~self._trailing_padding(ids)
        if before is not None and (before >= 0).all():
            position = position + before[:, None]
        else:
            position = sequences.lengths(past)[:, None] + valid.cumsum(axis=1) - 1
        sequences.put(past, valid)
        return PassTokens(
            torch.from_numpy(valid),
            torch.from_numpy(position.clip(min=0).astype(np.int32)),
            None if ids is None else torch.from_numpy(ids.astype(np.int32)),
            sequences.first,
            generated,
        )

    def _sequences(self, cached: _Cached | None, past: int, batch: int) -> _Sequences:
        """Sequences that a pass goes on with, or newly numbered ones."""
        known = cached.sequences if cached is not None and past else None
        if known is not None and len(known) == batch:
            return known
        new = _Sequences(self._num_sequences, batch)
        self._num_sequences += batch
        if cached is not None:
            cached.sequences = new
        return new

    def _trailing_padding(self, ids: np.ndarray) -> np.ndarray:
        """Padding [batch, length] at the right end of rows that came without a mask."""
        padding = _among(ids, self.padding)
        if not self._has_warned and ids.shape[1] > 1:
            last, before = ids[:, -1], ids[:, -2]
            repeated = last[(last == before) & _among(last, (0, *self.ends)) & ~padding[:, -1]]
            if len(repeated):
                self._has_warned = True
                warnings.warn(
                    f"A batch without attention_mask has rows that end in token {int(repeated[0])} several times over. "
                    f"It is not the configuration's pad_token_id, so it was counted as text: pass attention_mask, or "
                    f"set model.config.pad_token_id before patching, if it is padding.",
                    stacklevel=2,
                )
        return np.minimum.accumulate(padding[:, ::-1], axis=1)[:, ::-1]


def _among(ids: np.ndarray, tokens: tuple[int, ...]) -> np.ndarray:
    """Which ids are one of a few tokens."""
    found = np.zeros(ids.shape, dtype=bool)
    for token in tokens:
        found |= ids == token
    return found


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


def is_packed(inputs: Mapping[str, Any]) -> bool:
    """Whether a pass has several sequences in one row, by its arguments."""
    return inputs.get("cu_seq_lens_q") is not None


def shape_of(inputs: Mapping[str, Any]) -> tuple[tuple[int, int], int | Tensor, Tensor | None]:
    """Batch and length of a pass, the tokens before it, and which of its own are real, from its arguments by name.

    Raises
    ------
    ValueError
        If the pass has several sequences in one row.
    """
    if is_packed(inputs):
        raise ValueError(
            "a rule that divides a budget among tokens cannot tell the sequences of a packed pass (cu_seq_lens_q) from "
            "each other: give every sequence a row of its own, with an attention mask."
        )
    note = note_inputs(inputs, find_cache(inputs.values()), has_run=False)
    return note.shape, note.past, note.own


def note_inputs(inputs: Mapping[str, Any], cache: Any | None, *, has_run: bool) -> PassNote:
    """What can be told from the arguments of a pass, by name, and the cache that it runs on, or has run on.

    In operations that a compiler can follow, and none that waits for the device.
    """
    token_ids, tokens = inputs.get("input_ids"), _tokens(inputs)
    batch, length = tokens.shape[:2]
    past: int | Tensor = 0 if cache is None else cache.get_seq_length()
    if has_run and cache is not None:  # the pass is in it by now
        past = past - length
    mask = _one_mask(inputs.get("attention_mask"))
    own = before = None
    if mask is not None:
        if not isinstance(mask, Tensor):
            raise TypeError(
                f"bhlib cannot tell padding from an attention mask of type {type(mask).__name__}: pass a Tensor "
                f"[batch, length], or patch with collect_stats=False."
            )
        own, before = _read_mask(mask, past, batch, length)
    return PassNote(
        (batch, length),
        past.clone() if isinstance(past, Tensor) else past,
        None if token_ids is None else token_ids.clone(),  # the caller may go on to write into its own tensors
        own,
        before,
    )


def _read_mask(mask: Tensor, past: int | Tensor, batch: int, length: int) -> tuple[Tensor, Tensor | None]:
    """`PassNote.own` and `PassNote.before`.

    A mask of all keys has the pass's own after the past ones, and may reach on to the cache's end. Under
    sliding-window attention the oldest keys are gone, and the pass's own are the last.
    """
    width = mask.shape[-1]
    if not isinstance(past, Tensor):
        start = min(past, width - length)
        if mask.dim() == 2:
            own = mask[:, start : start + length].to(torch.bool, copy=True)
            return own, mask[:, :start].long().sum(dim=1) if start == past > 0 else None
        # [batch, 1, query, key], True or 0.0 where attention is allowed: a real token may attend to itself.
        own = mask[:, 0].diagonal(offset=start, dim1=-2, dim2=-1)
        return _allowed(own).expand(batch, length).clone(), None
    first = past.clamp(max=width - length)
    column = first + torch.arange(length, device=mask.device)
    if mask.dim() == 2:
        is_past = torch.arange(width, device=mask.device) < first
        before = (mask.bool() & is_past).sum(dim=1).masked_fill(first < past, -1)
        return mask.index_select(1, column).bool(), before
    rows = mask[:, 0].gather(2, column[None, :, None].expand(mask.shape[0], length, 1))
    return _allowed(rows[..., 0]).expand(batch, length).clone(), None


def _allowed(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask == 0


def _on_host(notes: Sequence[PassNote]) -> Iterator[tuple]:
    """Past, token ids, own and before of each note, as numpy arrays, with one copy from the device for each kind."""
    tensors = [(note.past, note.token_ids, note.own, note.before) for note in notes]
    on_device: dict[tuple, list[Tensor]] = {}
    for one in itertools.chain.from_iterable(tensors):
        if isinstance(one, Tensor) and one.device.type != "cpu":
            on_device.setdefault((one.device, one.dtype), []).append(one)
    arrays: dict[int, np.ndarray] = {}
    for group in on_device.values():
        flat, start = torch.cat([one.reshape(-1) for one in group]).cpu().numpy(), 0
        for one in group:
            arrays[id(one)] = flat[start : start + one.numel()].reshape(one.shape)
            start += one.numel()
    for past, *others in tensors:
        found = [None if x is None else arrays[id(x)] if id(x) in arrays else x.numpy() for x in others]
        if isinstance(past, Tensor):
            past = int(arrays[id(past)] if id(past) in arrays else past)
        yield past, *found


def _address(cache: Any | None) -> int | None:
    """Where the keys of a cache's first layer lie; None if it has none yet."""
    keys = first_keys(cache)
    return None if keys is None else keys.data_ptr()


def first_keys(cache: Any | None) -> Tensor | None:
    """The keys of the first layer of a cache that holds any."""
    for layer in getattr(cache, "layers", ()):
        keys = getattr(layer, "keys", None)
        if isinstance(keys, Tensor):
            return keys
    return None


def _packed_tokens(inputs: Mapping[str, Any]) -> PassTokens:
    """A pass of several sequences in a row; the i-th ends at `cu_seq_lens_q[i + 1]`, padding may follow the last."""
    token_ids, ends = inputs.get("input_ids"), inputs["cu_seq_lens_q"]
    batch, length = _tokens(inputs).shape[:2]
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


def _one_mask(mask: Any) -> Any:
    """The mask that says most, where there is one for each kind of attention."""
    if isinstance(mask, dict):
        if "full_attention" in mask:
            return mask["full_attention"]
        return next((mask[kind] for kind in sorted(mask) if mask[kind] is not None), None)
    return mask
