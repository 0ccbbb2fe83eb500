"""A token's experts added up, with what stands in for those that were dropped.

What stands in is two small products: the weights of the dropped experts with the table of means, and the hidden state,
through a few dimensions, with the map. `to_few` brings the hidden states to these; `add_up` does the rest where the
experts' outputs are added up anyway, so that no pass over the tokens is made for it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bhlib.kernels.launch import quick
from bhlib.kernels.pairs import Tiles

#: Experts whose means are multiplied in one step.
EXPERTS_PER_STEP = 64


def to_few(hidden_states: Tensor, down: Tensor) -> Tensor:
    """``hidden_states @ down.T`` [tokens, rank], float32: a product so narrow that it is read, not multiplied.

    Parameters
    ----------
    hidden_states : Tensor [tokens, hidden], contiguous
    down : Tensor [rank, hidden], contiguous
    """
    (num_tokens, hidden), rank = hidden_states.shape, len(down)
    few = torch.empty(num_tokens, rank, dtype=torch.float32, device=hidden_states.device)
    if rank:
        _to_few[(triton.cdiv(num_tokens, 16),)](
            hidden_states, down, few, num_tokens,
            HIDDEN=hidden, RANK=rank, WIDTH=_width(rank), BLOCK=min(256, triton.next_power_of_2(hidden)), num_warps=4,
        )  # fmt: skip
    return few


def add_up(
    outputs: Tensor, tiles: Tiles, index: Tensor, weights: Tensor, few: Tensor, means: Tensor, up: Tensor
) -> Tensor:
    """What the experts of each token gave, and what stands in for the dropped ones: [tokens, hidden].

    Parameters
    ----------
    outputs : Tensor [places, hidden], contiguous
        Of each pair, weighted, at its place among the tiles.
    tiles : Tiles
    index, weights : Tensor [tokens, slots], contiguous
        Slots with ``num_experts + 1 + e`` stand for the dropped expert e (`bhlib.rules.routing.mark_dropped`).
    few : Tensor [tokens, rank], float32
        `to_few`.
    means : Tensor [1 + experts, hidden], up : Tensor [hidden, rank], contiguous
        As in `bhlib.compensation.LayerCompensation`.

    Returns
    -------
    Tensor [tokens, hidden], in the dtype of `outputs`
        Sums in float32, rounded once.
    """
    (num_tokens, slots), hidden, rank = index.shape, outputs.shape[1], few.shape[1]
    total = outputs.new_empty(num_tokens, hidden)
    rows = 16 if num_tokens <= 1024 else 32
    block = min(128, triton.next_power_of_2(hidden))
    _add_up[(triton.cdiv(num_tokens, rows), triton.cdiv(hidden, block))](
        outputs, tiles.places, index, weights, few, means, up, total, num_tokens, hidden,
        SLOTS=slots, NUM_EXPERTS=len(means) - 1, RANK=rank, WIDTH=_width(rank),
        EXPERTS=min(EXPERTS_PER_STEP, max(16, triton.next_power_of_2(len(means) - 1))),
        ROWS=rows, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return total


def _width(rank: int) -> int:
    """The rank, as wide as a product has to be."""
    return max(16, triton.next_power_of_2(rank))


@quick
@triton.jit(do_not_specialize=["num_tokens"])
def _to_few(
    hidden_ptr, down_ptr, few_ptr, num_tokens,
    HIDDEN: tl.constexpr, RANK: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * 16 + tl.arange(0, 16)
    inner = tl.arange(0, WIDTH)
    columns = tl.arange(0, BLOCK)
    inside, within = token < num_tokens, inner < RANK
    total = tl.zeros([16, WIDTH], tl.float32)
    for start in range(0, HIDDEN, BLOCK):
        there = (start + columns < HIDDEN)[None, :]
        x = tl.load(hidden_ptr + token[:, None] * HIDDEN + start + columns, mask=inside[:, None] & there, other=0.0)
        down = tl.load(down_ptr + inner[:, None] * HIDDEN + start + columns, mask=within[:, None] & there, other=0.0)
        total = tl.dot(x, down.T, total)
    few_ptrs = few_ptr + token[:, None] * RANK + inner[None, :]
    tl.store(few_ptrs, total, mask=inside[:, None] & within[None, :])


@quick
@triton.jit(do_not_specialize=["num_tokens"])
def _add_up(
    rows_ptr, places_ptr, index_ptr, weights_ptr, few_ptr, means_ptr, up_ptr, out_ptr, num_tokens, hidden,
    SLOTS: tl.constexpr, NUM_EXPERTS: tl.constexpr, RANK: tl.constexpr, WIDTH: tl.constexpr, EXPERTS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, within = token < num_tokens, columns < hidden
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    for slot in tl.static_range(SLOTS):
        pair = token * SLOTS + slot
        expert = tl.load(index_ptr + pair, mask=inside, other=NUM_EXPERTS)
        filled = (expert >= 0) & (expert < NUM_EXPERTS)
        place = tl.load(places_ptr + pair, mask=filled, other=0).to(tl.int64)
        row_ptrs = rows_ptr + place[:, None] * hidden + columns[None, :]
        total += tl.load(row_ptrs, mask=filled[:, None] & within[None, :], other=0.0).to(tl.float32)
        mass += tl.load(weights_ptr + pair, mask=expert > NUM_EXPERTS, other=0.0).to(tl.float32)
    for first in tl.static_range(0, NUM_EXPERTS, EXPERTS):
        number = first + tl.arange(0, EXPERTS)
        weights = tl.zeros([ROWS, EXPERTS], tl.float32)
        for slot in tl.static_range(SLOTS):
            pair = token * SLOTS + slot
            expert = tl.load(index_ptr + pair, mask=inside, other=NUM_EXPERTS) - NUM_EXPERTS - 1
            weight = tl.load(weights_ptr + pair, mask=expert >= 0, other=0.0).to(tl.float32)
            weights += tl.where(expert[:, None] == number[None, :], weight[:, None], 0.0)
        mean_ptrs = means_ptr + (1 + number)[:, None].to(tl.int64) * hidden + columns[None, :]
        means = tl.load(mean_ptrs, mask=(number < NUM_EXPERTS)[:, None] & within[None, :], other=0.0)
        total = tl.dot(weights.to(means.dtype), means, total)
    if RANK:
        inner = tl.arange(0, WIDTH)
        few_ptrs = few_ptr + token[:, None] * RANK + inner[None, :]
        few = tl.load(few_ptrs, mask=inside[:, None] & (inner < RANK)[None, :], other=0.0) * mass[:, None]
        up_ptrs = up_ptr + columns[:, None].to(tl.int64) * RANK + inner[None, :]
        up = tl.load(up_ptrs, mask=within[:, None] & (inner < RANK)[None, :], other=0.0)
        total = tl.dot(few.to(up.dtype), up.T, total)
    place = token[:, None] * hidden + columns[None, :]
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=inside[:, None] & within[None, :])
