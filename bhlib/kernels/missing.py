"""A token's experts added up, with what stands in for those that were dropped.

The map leads through a few dimensions: `to_few` brings the hidden states to these. `add_up` does the rest where the
outputs of the experts are added up anyway, so that no pass over the tokens is made for it: a slot is a row in any case,
of the products or of the table of means, which the cache holds.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bhlib.kernels.launch import quick
from bhlib.kernels.pairs import Tiles


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
            HIDDEN=hidden, RANK=rank, WIDTH=max(16, triton.next_power_of_2(rank)),
            BLOCK=min(512, triton.next_power_of_2(hidden)), num_warps=4,
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
    means : Tensor [1 + experts, hidden], up : Tensor [rank, hidden], contiguous
        As in `bhlib.compensation.LayerCompensation`.

    Returns
    -------
    Tensor [tokens, hidden], in the dtype of `outputs`
        Sums in float32, rounded once.
    """
    (num_tokens, slots), hidden, rank = index.shape, outputs.shape[1], few.shape[1]
    total = outputs.new_empty(num_tokens, hidden)
    block = min(2048, triton.next_power_of_2(hidden))
    _add_up[(num_tokens, triton.cdiv(hidden, block))](
        outputs, tiles.places, index, weights, few, means, up, total, hidden,
        SLOTS=slots, NUM_EXPERTS=len(means) - 1, RANK=rank, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return total


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
@triton.jit
def _add_up(
    rows_ptr, places_ptr, index_ptr, weights_ptr, few_ptr, means_ptr, up_ptr, out_ptr, hidden,
    SLOTS: tl.constexpr, NUM_EXPERTS: tl.constexpr, RANK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    within = columns < hidden
    total = tl.zeros([BLOCK], tl.float32)
    missing = tl.zeros([BLOCK], tl.float32)
    mass = 0.0
    for slot in tl.static_range(SLOTS):
        pair = token * SLOTS + slot
        expert = tl.load(index_ptr + pair).to(tl.int64)
        is_kept = (expert >= 0) & (expert < NUM_EXPERTS)
        is_dropped = expert > NUM_EXPERTS
        place = tl.load(places_ptr + pair, mask=is_kept, other=0).to(tl.int64)
        total += tl.load(rows_ptr + place * hidden + columns, mask=is_kept & within, other=0.0).to(tl.float32)
        weight = tl.load(weights_ptr + pair, mask=is_dropped, other=0.0).to(tl.float32)
        mean_ptrs = means_ptr + (expert - NUM_EXPERTS) * hidden + columns
        missing += weight * tl.load(mean_ptrs, mask=is_dropped & within, other=0.0).to(tl.float32)
        mass += weight
    for inner in range(0, RANK):
        few = tl.load(few_ptr + token * RANK + inner) * mass
        missing += few * tl.load(up_ptr + inner * hidden + columns, mask=within, other=0.0).to(tl.float32)
    out = (total + missing).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + token * hidden + columns, out, mask=within)
