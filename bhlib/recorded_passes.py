"""Rows of decisions, forward pass by forward pass, in blocks that many short passes share."""

from array import array
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from bhlib.passes import PassNote, PassTokens
from bhlib.rules import Routing, Rule
from bhlib.rules.base import tokens_each

#: Tokens that a block of rows has room for, unless it was made for one longer pass.
BLOCK_TOKENS = 256


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
        As in `PassTokens`; -1 for an unknown id.
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
    def pack(
        cls, passes: Sequence["RunningPass"], known: Sequence[PassTokens], num_layers: int, num_experts: int
    ) -> "Rows":
        """Rows of passes of one `RunningPass.kind`, one after another, from the decisions of the layers that ran."""
        whole = [one.stacked(num_layers) for one in passes]
        weights, experts, counts = (torch.cat([one[part] for one in whole], dim=1) for part in range(3))
        logits = [kept for *_, kept in whole]
        place = known[0].valid.device
        facts = zip(*((one.valid, one.position, _ids_of(one)) for one in known), strict=True)
        valid, position, token_ids = (torch.cat([x.reshape(1, -1).to(place) for x in parts], 1) for parts in facts)
        return cls(
            weights,
            torch.where(experts < num_experts, experts, -1).to(torch.int16),
            counts.to(torch.int16),
            valid.to(counts.device),
            position.to(counts.device),
            token_ids.to(counts.device),
            torch.cat(logits, dim=1),
        )

    def between(self, start: int, stop: int) -> "Rows":
        """The rows of some of the tokens, as views."""
        return Rows(*(part[:, start:stop] for part in self))

    def clone(self) -> "Rows":
        """The same rows, in memory of their own."""
        return Rows(*(part.clone() for part in self))

    def totals(self, num_experts: int) -> Tensor:
        """Tokens by number of experts, and tokens by expert: int64 [2, layers, experts + 2], the first column void."""
        weight = self.valid.long().expand(len(self.counts), -1)
        totals = weight.new_zeros(2, len(self.counts), num_experts + 2)
        # What did not run, or is empty, is -1: one is added everywhere, and it falls into the void.
        totals[0].scatter_add_(1, self.counts.long() + 1, weight)
        weight = weight[:, :, None].expand(self.experts.shape)
        totals[1].scatter_add_(1, (self.experts.long() + 1).flatten(1), weight.flatten(1))
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
            self.rows = self.filled.clone()

    @property
    def filled(self) -> Rows:
        return self.rows.between(0, self.used)


def _ids_of(tokens: PassTokens) -> Tensor:
    return torch.full_like(tokens.position, -1) if tokens.token_ids is None else tokens.token_ids


class RunningPass:
    """What the routers decide in one forward pass, while it runs. It belongs to one thread.

    Parameters
    ----------
    tokens : PassTokens or PassNote
        The tokens of the pass, or what they will be read from.
    rule : Rule, optional
        The rule that decides.
    routings, logits : mapping, optional
        By layer, of a pass that has run.
    """

    def __init__(
        self,
        tokens: PassTokens | PassNote,
        rule: Rule | None = None,
        routings: Mapping[int, Routing] | None = None,
        logits: Mapping[int, Tensor] | None = None,
    ) -> None:
        self.tokens, self.rule = tokens, rule
        self.routings: dict[int, Routing] = dict(routings or {})
        self.slots = max((routing.experts.shape[-1] for routing in self.routings.values()), default=0)
        self.logits: dict[int, Tensor] = dict(logits or {})

    def add(self, layer: int, routing: Routing, logits: Tensor | None = None) -> None:
        """Take in the decisions of one layer, a row for each token of the pass, batch-major.

        An empty slot holds -1, or what is no expert's number. `logits` [tokens, experts] are those that the decisions
        were made on, if these are to be kept: for every layer or none. Nobody may write into these tensors later.

        Raises
        ------
        RuntimeError
            If the rows are not the tokens of the pass, or the layer was there already: such records would be wrong.
        """
        if layer in self.routings or len(routing.counts) != self.tokens.num_tokens:
            again = ", for the second time" if layer in self.routings else ""
            raise RuntimeError(
                f"MoE layer {layer} routed {len(routing.counts)} tokens in a forward pass of "
                f"{self.tokens.num_tokens}{again}: its decisions cannot be aligned with the tokens. Patch with "
                f"collect_stats=False to route without recording."
            )
        self.routings[layer] = Routing(routing.weights.detach(), routing.experts, routing.counts)
        self.slots = max(self.slots, routing.experts.shape[-1])
        if logits is not None:
            self.logits[layer] = logits.detach()

    @property
    def device(self) -> torch.device | None:
        """Where the decisions lie; None if there are none."""
        return next((routing.counts.device for routing in self.routings.values()), None)

    @property
    def kind(self) -> tuple:
        """What the rows of two passes must have in common to stand in one tensor."""
        some, logits = next(iter(self.routings.values())), next(iter(self.logits.values()), None)
        return self.slots, some.weights.dtype, None if logits is None else logits.dtype, self.device

    def stacked(self, num_layers: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weights, experts, counts and logits of all layers, [layers, tokens, ...]; no logits if none are kept.

        Those of a layer that did not run are void: its counts and experts are -1.
        """
        some, slots = next(iter(self.routings.values())), self.slots
        layers = [self.routings.get(layer) or _void(some) for layer in range(num_layers)]
        if any(routing.counts.device != some.counts.device for routing in layers):
            layers = [Routing(*(part.to(some.counts.device) for part in routing)) for routing in layers]
        if any(routing.experts.shape[-1] != slots for routing in layers):
            layers = [_widened(routing, slots) for routing in layers]
        weights, experts, counts = (torch.stack(parts) for parts in zip(*layers, strict=True))
        if not self.logits:
            return weights, experts, counts, weights[..., :0]
        none = torch.zeros_like(next(iter(self.logits.values())))
        logits = torch.stack([self.logits.get(layer, none).to(counts.device) for layer in range(num_layers)])
        return weights, experts, counts, logits


def _void(routing: Routing) -> Routing:
    """Decisions of a layer that did not run, in the shape of another's."""
    return Routing(torch.zeros_like(routing.weights), *(torch.full_like(part, -1) for part in routing[1:]))


def _widened(routing: Routing, slots: int) -> Routing:
    """The same decisions in more slots, which are empty."""
    more = (0, slots - routing.experts.shape[-1])
    return Routing(pad(routing.weights, more), pad(routing.experts, more, value=-1), routing.counts)


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
        As in `PassTokens`.
    rule : Rule or None
        The rule that decided.
    """

    rows: Rows
    layers: Sequence[int]
    shape: tuple[int, int]
    first_sequence: int
    generated: bool
    rule: Rule | None

    def rule_of(self, row: int) -> Rule | None:
        """The rule that decided about a row, at the level of the row's sequence."""
        level = None if self.rule is None else self.rule.level
        if self.rule is None or not isinstance(level, tuple):
            return self.rule
        return self.rule.at(level[row // tokens_each(self.shape[0] * self.shape[1], len(level))])

    @property
    def tokens(self) -> PassTokens:
        """The tokens."""
        valid, position, token_ids = (part.view(self.shape) for part in self.rows[3:6])
        return PassTokens(valid, position, token_ids, self.first_sequence, self.generated)

    @property
    def routings(self) -> dict[int, Routing]:
        """The decisions of each layer that ran."""
        by_layer = list(map(Routing, *(part.unbind() for part in self.rows[:3])))
        return {layer: by_layer[layer] for layer in self.layers}


class RecordedPasses(Sequence):
    """The forward passes whose rows are kept, in the order in which they ended."""

    _FIELDS = 7  # block, first row in it, batch, length, first sequence, generated, rule

    def __init__(self, num_layers: int) -> None:
        self.num_layers = num_layers
        self.blocks: list[Block] = []
        self._index = array("q")
        self._open: dict[tuple, int] = {}
        self._partial: dict[int, list[int]] = {}
        self._rules: list[Rule | None] = []

    def __len__(self) -> int:
        return len(self._index) // self._FIELDS

    def __getitem__(self, number: int) -> RecordedPass:  # type: ignore[override]  # no slices
        number = range(len(self))[number]
        at = number * self._FIELDS
        block, start, batch, length, first_sequence, generated, rule = self._index[at : at + self._FIELDS]
        rows = self.blocks[block].rows.between(start, start + batch * length)
        layers = self._partial.get(number, range(self.num_layers))
        return RecordedPass(rows, layers, (batch, length), first_sequence, bool(generated), self._rules[rule])

    def append(self, passes: Sequence[RunningPass], known: Sequence[PassTokens], rows: Rows) -> None:
        """Add passes of one kind, whose rows follow one another."""
        kind = passes[0].kind
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
        for one, tokens in zip(passes, known, strict=True):
            if len(one.routings) < self.num_layers:
                self._partial[len(self)] = sorted(one.routings)
            if not self._rules or self._rules[-1] is not one.rule:
                self._rules.append(one.rule)
            place = number, start, *tokens.valid.shape, tokens.first_sequence, tokens.generated, len(self._rules) - 1
            self._index.extend(place)
            start += tokens.num_tokens
