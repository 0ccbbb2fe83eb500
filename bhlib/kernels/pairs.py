"""The selected (token, expert) pairs, listed by expert and cut into tiles of rows, on the device.

A pair is a filled slot; its number is ``token * slots + slot``. Matrix products run over tiles: up to ``block_rows``
pairs of one expert. How many tiles there are is known on the device alone, so tables have the size of the most that
there can be, and a tile beyond the last one has the expert ``num_experts``.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_STEP = 128  # pairs that a program looks at together


class Tiles(NamedTuple):
    """Pairs by expert.

    Attributes
    ----------
    pairs : Tensor [tokens * slots], int32
        Numbers of the pairs, those of expert 0 first, in increasing order within an expert. What follows the last
        pair is undefined.
    expert, first, last : Tensor [tiles], int32
        Expert of each tile, and its rows ``first <= row < last`` of `pairs`.
    """

    pairs: Tensor
    expert: Tensor
    first: Tensor
    last: Tensor


def most_tiles(num_pairs: int, num_experts: int, block_rows: int) -> int:
    """The most tiles that this many pairs can make: every expert may have one that is not full."""
    return min(num_pairs, num_pairs // block_rows + num_experts)


def choose_chunk(num_pairs: int) -> int:
    """Pairs of a program: few, since its steps run one by one, but enough that adding up all loads is quick.

    The fastest on an H100 for 64 to 131,072 pairs and 64 experts.
    """
    return 64 if num_pairs <= 4096 else 128 if num_pairs <= 32_768 else 512


def tile_pairs(top_k_index: Tensor, num_experts: int, block_rows: int, chunk: int | None = None) -> Tiles:
    """List the filled slots by expert.

    Parameters
    ----------
    top_k_index : Tensor [tokens, slots], int32 or int64, contiguous
        Expert of each slot; anything outside ``0..num_experts - 1`` marks an empty one.
    num_experts : int
        At most 256.
    block_rows : int
        Most rows of a tile.
    chunk : int, optional
        Pairs of a program, a power of two; by default `choose_chunk`.

    Returns
    -------
    Tiles
        With the order that a stable sort would give, whatever the device does first.
    """
    num_pairs, device = top_k_index.numel(), top_k_index.device
    chunk = chunk or choose_chunk(num_pairs)
    num_chunks = triton.cdiv(num_pairs, chunk)
    num_tiles = most_tiles(num_pairs, num_experts, block_rows)
    width = triton.next_power_of_2(num_experts)
    # One allocation for all tables.
    table = torch.empty(num_pairs + 3 * num_tiles + num_chunks * width, dtype=torch.int32, device=device)
    pairs, expert, first, last, loads = table.split([num_pairs] + 3 * [num_tiles] + [num_chunks * width])
    shape = {"NUM_EXPERTS": num_experts, "WIDTH": width, "CHUNK": chunk, "STEP": min(_STEP, chunk)}
    if num_chunks > 1:
        _count_loads[(num_chunks,)](top_k_index, loads, num_pairs, **shape)
    _list_pairs[(num_chunks,)](
        top_k_index,
        loads,
        pairs,
        expert,
        first,
        last,
        num_pairs,
        num_chunks,
        num_tiles,
        **shape,
        SINGLE=num_chunks == 1,
        BLOCK_ROWS=block_rows,
    )
    return Tiles(pairs, expert, first, last)


@triton.jit
def _chosen(index_ptr, start, num_pairs, NUM_EXPERTS: tl.constexpr, WIDTH: tl.constexpr, STEP: tl.constexpr):
    """Which expert each of STEP pairs chose, as a table [STEP, WIDTH] of 0 and 1."""
    pair = start + tl.arange(0, STEP)
    expert = tl.load(index_ptr + pair, mask=pair < num_pairs, other=NUM_EXPERTS)[:, None]
    columns = tl.arange(0, WIDTH)[None, :]
    return ((expert == columns) & (columns < NUM_EXPERTS)).to(tl.int32)


@triton.jit
def _chunk_loads(
    index_ptr, chunk, num_pairs,
    NUM_EXPERTS: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Pairs of each expert in one chunk, [WIDTH]."""
    loads = tl.zeros([WIDTH], tl.int32)
    for step in range(CHUNK // STEP):
        loads += tl.sum(_chosen(index_ptr, chunk * CHUNK + step * STEP, num_pairs, NUM_EXPERTS, WIDTH, STEP), axis=0)
    return loads


@triton.jit
def _count_loads(
    index_ptr, loads_ptr, num_pairs,
    NUM_EXPERTS: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Pairs of each expert in each chunk."""
    chunk = tl.program_id(0)
    loads = _chunk_loads(index_ptr, chunk, num_pairs, NUM_EXPERTS, WIDTH, CHUNK, STEP)
    tl.store(loads_ptr + chunk * WIDTH + tl.arange(0, WIDTH), loads)


@triton.jit
def _list_pairs(
    index_ptr,
    loads_ptr,
    pairs_ptr,
    expert_ptr,
    first_ptr,
    last_ptr,
    num_pairs,
    num_chunks,
    num_tiles,
    NUM_EXPERTS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
    SINGLE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Give each pair of a chunk its row, and write a share of the tiles."""
    chunk = tl.program_id(0)
    columns = tl.arange(0, WIDTH)
    if SINGLE:
        loads = _chunk_loads(index_ptr, chunk, num_pairs, NUM_EXPERTS, WIDTH, CHUNK, STEP)
        earlier = tl.zeros([WIDTH], tl.int32)
    else:
        loads = tl.zeros([WIDTH], tl.int32)
        earlier = tl.zeros([WIDTH], tl.int32)
        start = 0
        while start < num_chunks:
            rows = start + tl.arange(0, 32)[:, None]
            part = tl.load(loads_ptr + rows * WIDTH + columns[None, :], mask=rows < num_chunks, other=0)
            loads += tl.sum(part, axis=0)
            earlier += tl.sum(tl.where(rows < chunk, part, 0), axis=0)
            start += 32
    ends = tl.cumsum(loads, axis=0)
    free = ends - loads + earlier  # next free row of each expert
    for step in range(CHUNK // STEP):
        pair = chunk * CHUNK + step * STEP
        chosen = _chosen(index_ptr, pair, num_pairs, NUM_EXPERTS, WIDTH, STEP)
        row = tl.sum(chosen * (free[None, :] + tl.cumsum(chosen, axis=0) - 1), axis=1)
        tl.store(pairs_ptr + row, pair + tl.arange(0, STEP), mask=tl.sum(chosen, axis=1) > 0)
        free += tl.sum(chosen, axis=0)

    tiles = (loads + BLOCK_ROWS - 1) // BLOCK_ROWS
    tile_ends = tl.cumsum(tiles, axis=0)
    start = chunk * 32
    while start < num_tiles:
        tile = start + tl.arange(0, 32)
        expert = tl.sum((tile[:, None] >= tile_ends[None, :]).to(tl.int32), axis=1)
        own = (expert[:, None] == columns[None, :]).to(tl.int32)
        number = tile - tl.sum(own * (tile_ends - tiles)[None, :], axis=1)  # of the tile among its expert's
        end = tl.sum(own * ends[None, :], axis=1)
        first = end - tl.sum(own * loads[None, :], axis=1) + number * BLOCK_ROWS
        inside = tile < num_tiles
        tl.store(expert_ptr + tile, tl.minimum(expert, NUM_EXPERTS), mask=inside)
        tl.store(first_ptr + tile, first, mask=inside)
        tl.store(last_ptr + tile, tl.minimum(end, first + BLOCK_ROWS), mask=inside)
        start += num_chunks * 32
