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

from bhlib.kernels.few import Few, few_block
from bhlib.kernels.launch import quick

_STEP = 128  # pairs that a program looks at together
_NO_FEW = {"HIDDEN": 0, "RANK": 0, "RANK_WIDTH": 0, "FEW_ROWS": 0, "FEW_STEP": 0}
_FEW_CHUNKS = 32  # up to this many, every program adds up the loads of those before it: one kernel less


class Tiles(NamedTuple):
    """Pairs by expert.

    Attributes
    ----------
    pairs : Tensor [tokens * slots], int32
        Numbers of the pairs, those of expert 0 first, in increasing order within an expert. What follows the last
        pair is undefined.
    places : Tensor [tokens * slots], int32
        Of each pair, ``tile * block_rows`` plus its row in the tile; undefined where a slot is empty.
    expert, first, last : Tensor [tiles], int32
        Expert of each tile, and its rows ``first <= row < last`` of `pairs`.
    used : Tensor [1], int32
        How many tiles there are: those from here on have the expert ``num_experts``.
    """

    pairs: Tensor
    places: Tensor
    expert: Tensor
    first: Tensor
    last: Tensor
    used: Tensor


def most_tiles(num_pairs: int, num_experts: int, block_rows: int) -> int:
    """The most tiles that this many pairs can make: every expert may have one that is not full."""
    return min(num_pairs, num_pairs // block_rows + num_experts)


def choose_chunk(num_pairs: int) -> int:
    """Pairs of a program: few, since its steps run one by one.

    The fastest on an H100 for 64 to 131,072 pairs and 64 experts.
    """
    return 64 if num_pairs <= 32_768 else 512


def tile_pairs(
    top_k_index: Tensor, num_experts: int, block_rows: int, chunk: int | None = None, few: Few | None = None
) -> Tiles:
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
    few : Few, optional
        A product that is made meanwhile: to list pairs leaves most of the device idle.

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
    sizes = [num_pairs, num_pairs, num_tiles, num_tiles, num_tiles, 1, width * (num_chunks + 1)]
    table = torch.empty(sum(sizes), dtype=torch.int32, device=device)
    pairs, places, expert, first, last, used, loads = table.split(sizes)
    shape = {"NUM_EXPERTS": num_experts, "WIDTH": width, "CHUNK": chunk, "STEP": min(_STEP, chunk)}
    if num_chunks > 1:
        _count_loads[(num_chunks,)](top_k_index, loads, num_pairs, **shape)
    if num_chunks > _FEW_CHUNKS:
        _add_loads[(num_experts,)](loads, num_chunks, WIDTH=width, BLOCK=min(1024, triton.next_power_of_2(num_chunks)))
    few_programs, few_constants = (0, _NO_FEW) if few is None else few.cut()
    _list_pairs[(few_programs + num_chunks,)](
        top_k_index,
        loads,
        pairs,
        places,
        expert,
        first,
        last,
        used,
        num_pairs,
        num_chunks,
        num_tiles,
        *((None, None, None) if few is None else few),
        len(top_k_index),
        **shape,
        FEW_CHUNKS=0 if num_chunks > _FEW_CHUNKS else triton.next_power_of_2(num_chunks),
        BLOCK_ROWS=block_rows,
        **few_constants,
    )
    return Tiles(pairs, places, expert, first, last, used)


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


@quick
@triton.jit
def _count_loads(
    index_ptr, loads_ptr, num_pairs,
    NUM_EXPERTS: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Pairs of each expert in each chunk."""
    chunk = tl.program_id(0)
    loads = _chunk_loads(index_ptr, chunk, num_pairs, NUM_EXPERTS, WIDTH, CHUNK, STEP)
    tl.store(loads_ptr + chunk * WIDTH + tl.arange(0, WIDTH), loads)


@quick
@triton.jit
def _add_loads(loads_ptr, num_chunks, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Put what earlier chunks have in the place of an expert's loads, and their sum behind the last."""
    loads_ptr += tl.program_id(0)
    total = 0
    start = 0
    while start < num_chunks:
        chunk = start + tl.arange(0, BLOCK)
        loads = tl.load(loads_ptr + chunk * WIDTH, mask=chunk < num_chunks, other=0)
        tl.store(loads_ptr + chunk * WIDTH, total + tl.cumsum(loads, axis=0) - loads, mask=chunk < num_chunks)
        total += tl.sum(loads, axis=0)
        start += BLOCK
    tl.store(loads_ptr + num_chunks * WIDTH, total)


@quick
@triton.jit(do_not_specialize=["num_tokens"])
def _list_pairs(
    index_ptr,
    loads_ptr,
    pairs_ptr,
    places_ptr,
    expert_ptr,
    first_ptr,
    last_ptr,
    used_ptr,
    num_pairs,
    num_chunks,
    num_tiles,
    hidden_ptr,
    down_ptr,
    few_ptr,
    num_tokens,
    NUM_EXPERTS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
    FEW_CHUNKS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    HIDDEN: tl.constexpr,
    RANK: tl.constexpr,
    RANK_WIDTH: tl.constexpr,
    FEW_ROWS: tl.constexpr,
    FEW_STEP: tl.constexpr,
):
    """Give each pair of a chunk its row, and write a share of the tiles; the first programs make the few dimensions."""
    chunk = tl.program_id(0)
    if RANK > 0:
        few_programs = (num_tokens + FEW_ROWS - 1) // FEW_ROWS
        if chunk < few_programs:
            few_block(
                chunk, hidden_ptr, down_ptr, few_ptr, num_tokens, HIDDEN, RANK, RANK_WIDTH, FEW_ROWS, FEW_STEP
            )  # fmt: skip
            return
        chunk -= few_programs
    columns = tl.arange(0, WIDTH)
    if FEW_CHUNKS == 1:
        loads = _chunk_loads(index_ptr, chunk, num_pairs, NUM_EXPERTS, WIDTH, CHUNK, STEP)
        earlier = tl.zeros([WIDTH], tl.int32)
    elif FEW_CHUNKS > 1:
        rows = tl.arange(0, FEW_CHUNKS)[:, None]
        part = tl.load(loads_ptr + rows * WIDTH + columns[None, :], mask=rows < num_chunks, other=0)
        loads = tl.sum(part, axis=0)
        earlier = tl.sum(tl.where(rows < chunk, part, 0), axis=0)
    else:
        experts = columns < NUM_EXPERTS
        loads = tl.load(loads_ptr + num_chunks * WIDTH + columns, mask=experts, other=0)
        earlier = tl.load(loads_ptr + chunk * WIDTH + columns, mask=experts, other=0)
    ends = tl.cumsum(loads, axis=0)
    free = ends - loads + earlier  # next free row of each expert
    tiles = (loads + BLOCK_ROWS - 1) // BLOCK_ROWS
    tile_ends = tl.cumsum(tiles, axis=0)
    shift = (tile_ends - tiles) * BLOCK_ROWS - (ends - loads)  # from the rows of an expert to its places
    for step in range(CHUNK // STEP):
        pair = chunk * CHUNK + step * STEP
        chosen = _chosen(index_ptr, pair, num_pairs, NUM_EXPERTS, WIDTH, STEP)
        row = tl.sum(chosen * (free[None, :] + tl.cumsum(chosen, axis=0) - 1), axis=1)
        filled = tl.sum(chosen, axis=1) > 0
        tl.store(pairs_ptr + row, pair + tl.arange(0, STEP), mask=filled)
        tl.store(places_ptr + pair + tl.arange(0, STEP), row + tl.sum(chosen * shift[None, :], axis=1), mask=filled)
        free += tl.sum(chosen, axis=0)

    tl.store(used_ptr, tl.sum(tiles, axis=0), mask=chunk == 0)
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
