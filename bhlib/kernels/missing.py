"""A token's experts added up, with what stands in for those that were dropped.

Both are done where the outputs of the experts are added up anyway, so that no pass over the tokens is made for it: a
slot is a row in any case, of the products or of the table of means, which the cache holds. The map leads through a few
dimensions (`bhlib.kernels.few`); from there, what a program reads of it serves several tokens.
"""

import triton
import triton.language as tl
from torch import Tensor

from bhlib.kernels.launch import quick
from bhlib.kernels.pairs import Tiles


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
        ``hidden_states @ down.T``.
    means : Tensor [1 + experts, hidden], up : Tensor [rank, hidden], contiguous
        As in `bhlib.compensation.LayerCompensation`.

    Returns
    -------
    Tensor [tokens, hidden], in the dtype of `outputs`
        Sums in float32, rounded once.
    """
    (num_tokens, slots), hidden, rank = index.shape, outputs.shape[1], few.shape[1]
    total = outputs.new_empty(num_tokens, hidden)
    rows, block, warps = _cut(num_tokens, hidden, rank)
    _add_up[(triton.cdiv(num_tokens, rows) * triton.cdiv(hidden, block),)](
        outputs, tiles.places, index, weights, few, means, up, total, num_tokens,
        HIDDEN=hidden, SLOTS=slots, NUM_EXPERTS=len(means) - 1, RANK=rank,
        ROWS=rows, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return total


def _cut(num_tokens: int, hidden: int, rank: int) -> tuple[int, int, int]:
    """Tokens and columns of a program, and its warps: with a map, several tokens that share what they read of it."""
    if not rank:
        rows, block, warps = 1, 2048, 4
    else:  # 256 columns of a warp: then a row of the map is laid out as the rows that it is added to
        rows = 1 if num_tokens <= 64 else 4
        block, warps = (256, 1) if num_tokens <= 1024 else (1024, 4)
    return rows, min(block, triton.next_power_of_2(hidden)), warps


@quick
@triton.jit(do_not_specialize=["num_tokens"])
def _add_up(
    rows_ptr, places_ptr, index_ptr, weights_ptr, few_ptr, means_ptr, up_ptr, out_ptr, num_tokens,
    HIDDEN: tl.constexpr, SLOTS: tl.constexpr, NUM_EXPERTS: tl.constexpr, RANK: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (HIDDEN + BLOCK - 1) // BLOCK
    # Neighbouring programs share tokens: together they read whole rows.
    token = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside, within = token < num_tokens, (columns < HIDDEN)[None, :]
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    for slot in tl.static_range(SLOTS):
        pair = token * SLOTS + slot
        expert = tl.load(index_ptr + pair, mask=inside, other=NUM_EXPERTS).to(tl.int64)
        is_kept = (expert >= 0) & (expert < NUM_EXPERTS)
        is_dropped = expert > NUM_EXPERTS
        place = tl.load(places_ptr + pair, mask=is_kept, other=0).to(tl.int64)
        weight = tl.load(weights_ptr + pair, mask=is_dropped, other=0.0).to(tl.float32)
        mass += weight
        row_ptrs = tl.where(is_kept, rows_ptr + place * HIDDEN, means_ptr + (expert - NUM_EXPERTS) * HIDDEN)
        there = (is_kept | is_dropped)[:, None] & within
        row = tl.load(row_ptrs[:, None] + columns[None, :], mask=there, other=0.0).to(tl.float32)
        total += row * tl.where(is_kept, 1.0, weight)[:, None]
    # On tensor cores, all that was added up so far would have to be brought into their layout.
    for first in range(0, RANK, 16):
        for step in tl.static_range(min(RANK, 16)):
            inner = first + step
            few = tl.load(few_ptr + token * RANK + inner, mask=inside & (inner < RANK), other=0.0) * mass
            up = tl.load(up_ptr + inner * HIDDEN + columns[None, :], mask=within & (inner < RANK), other=0.0)
            total += few[:, None] * up.to(tl.float32)
    out_ptrs = out_ptr + token[:, None] * HIDDEN + columns[None, :]
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=inside[:, None] & within)
