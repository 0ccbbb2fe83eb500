"""Recording inside compiled code: one operator at the end of a forward pass, into which the compiler does not look.

A compiled forward pass has no place for Python of ours. What the routers decide stays in the compiled code until the
end of the pass, and is handed to one operator there, which a CUDA graph leaves out and the host calls when it has
started the graph. It runs while the device is still busy with the pass, copies a few small tensors, and waits for
nothing.
"""

import itertools
from collections.abc import Mapping
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from bhlib.passes import PassNote, first_keys, note_inputs
from bhlib.rules import Routing


class Taker(Protocol):
    """What takes in the passes that compiled code has run (`bhlib.patching.RoutingPatch`)."""

    def take(
        self, note: PassNote, keys: Tensor | None, routings: dict[int, Routing], logits: dict[int, Tensor]
    ) -> None: ...


#: Takers by the number that compiled code knows them by.
_takers: "WeakValueDictionary[int, Taker]" = WeakValueDictionary()
_numbers = itertools.count()


def enroll(taker: Taker) -> int:
    """A number by which compiled code finds a taker again."""
    number = next(_numbers)
    _takers[number] = taker
    return number


def record(
    number: int,
    ticket: Tensor,
    inputs: Mapping[str, Any],
    cache: Any | None,
    routings: Mapping[int, Routing],
    logits: Mapping[int, Tensor],
) -> None:
    """Record a pass that has come to its end, in operations that a compiler can follow.

    Parameters
    ----------
    number : int
        From `enroll`.
    ticket : Tensor
        Any: it is passed for written to, so that the compiler neither drops nor reorders the operator.
    inputs : mapping
        Arguments of the forward, by name.
    cache : object or None
        The static cache among them.
    routings : dict of int to Routing
        By MoE layer.
    logits : dict of int to Tensor
        By MoE layer, if they are to be kept; else empty.
    """
    note = note_inputs(inputs, cache, has_run=True)
    weights, experts, counts = zip(*routings.values(), strict=True)
    torch.ops.bhlib.record(
        ticket,
        number,
        note.shape[0],
        note.shape[1],
        list(routings),
        note.past if isinstance(note.past, Tensor) else None,
        note.token_ids,
        note.own,
        note.before,
        first_keys(cache),
        [part.detach() for part in weights],
        experts,
        counts,
        [part.detach() for part in logits.values()],
    )


@torch.library.custom_op("bhlib::record", mutates_args=("ticket",), tags=(torch.Tag.cudagraph_unsafe,))
def _record(
    ticket: Tensor,
    number: int,
    batch: int,
    length: int,
    layers: list[int],
    past: Tensor | None,
    token_ids: Tensor | None,
    own: Tensor | None,
    before: Tensor | None,
    keys: Tensor | None,
    weights: list[Tensor],
    experts: list[Tensor],
    counts: list[Tensor],
    logits: list[Tensor],
) -> None:
    taker = _takers.get(number)
    if taker is None:
        return
    # Copies, since the next pass is written to the same memory.
    past, token_ids, own, before = (None if x is None else x.clone() for x in (past, token_ids, own, before))
    note = PassNote((batch, length), 0 if past is None else past, token_ids, own, before)
    routings = map(Routing, *(_copies(parts) for parts in (weights, experts, counts)))
    taker.take(note, keys, dict(zip(layers, routings, strict=True)), dict(zip(layers, _copies(logits), strict=False)))


def _copies(parts: list[Tensor]) -> tuple[Tensor, ...]:
    """Copies of tensors of any widths and the same number of rows, made at once."""
    if not parts:
        return ()
    if any(part.shape != parts[0].shape or part.device != parts[0].device for part in parts):
        return tuple(part.clone() for part in parts)
    return torch.cat(parts).chunk(len(parts))


@_record.register_fake
def _(ticket, number, batch, length, layers, past, token_ids, own, before, keys, weights, experts, counts, logits):
    return None
