"""Both matrix products of the experts over tiles of pairs: for anything from a few tokens to a long prompt.

Three kernels after `tile_pairs`. The first gathers the hidden states of a tile's pairs and multiplies them with the
gate and the up rows of the expert at once, so that ``silu(gate) * up`` is formed in registers. The second multiplies
with the down rows, and with the routing weight, and writes tile after tile, each with room for all its rows, filled or
not: whole blocks can be written without asking. The third adds up a token's filled slots, in order.

Many pairs on Hopper: its copy engine (TMA) moves what lies in blocks, and each multiprocessor runs one program, which
works off its share of the blocks: it fetches the next one, and writes the last, while it computes.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bhlib.kernels.few import room_for_few
from bhlib.kernels.launch import quick
from bhlib.kernels.missing import add_up
from bhlib.kernels.pairs import Tiles, tile_pairs


class Product(NamedTuple):
    """How one matrix product is cut up: columns of a program, inner step, warps, stages of the pipeline.

    `tma` is for the copy engine, `persistent` for as many programs as there are multiprocessors. These and the stages
    are what is wanted: a device that cannot do that much gets less (`_fit`).
    """

    columns: int
    inner: int
    warps: int
    stages: int
    tma: bool = False
    persistent: bool = False


class Plan(NamedTuple):
    """How both products are cut up: rows of a tile, and the two products."""

    rows: int
    gate_up: Product
    down: Product


#: By the most pairs per expert that the shape allows (tokens * slots / experts): the first entry that is not exceeded.
#: Each is within 2 % of the fastest of some 160 plans on an H100, with OLMoE's shapes and half of the slots filled; the
#: last, among persistent ones, is the fastest of eight.
PLANS = (
    (16, Plan(16, Product(32, 256, 4, 4), Product(64, 128, 4, 3))),
    (128, Plan(64, Product(64, 128, 4, 4), Product(128, 128, 4, 4))),
    (float("inf"), Plan(128, Product(128, 64, 8, 4, True, True), Product(256, 64, 8, 4, True, True))),
)


def choose_plan(num_pairs: int, num_experts: int) -> Plan:
    """The plan for a shape; it does not depend on how many slots are filled."""
    return next(plan for most, plan in PLANS if num_pairs <= most * num_experts)


def grouped_forward(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    plan: Plan | None = None,
    missing: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """Experts' forward over the filled slots.

    Parameters
    ----------
    hidden_states : Tensor [tokens, hidden], contiguous, bfloat16 or float16 (float32 works, in TF32)
    gate_up_proj : Tensor [experts, 2 * intermediate, hidden], contiguous
    down_proj : Tensor [experts, hidden, intermediate], contiguous
    top_k_index : Tensor [tokens, slots], contiguous
        Anything outside ``0..experts - 1`` marks an empty slot.
    top_k_weights : Tensor [tokens, slots], contiguous
    plan : Plan, optional
        By default `choose_plan`.
    missing : tuple of Tensor, optional
        What stands in for dropped experts (`bhlib.compensation.LayerCompensation`), in the dtype of `hidden_states`.

    Returns
    -------
    Tensor [tokens, hidden], in the dtype of `hidden_states`
        Sum over the filled slots of weight times ``down(silu(gate) * up)``: float32 sums, rounded where a model in the
        dtype rounds: after the activation, after the weighted expert, and after the sum, in which is what is `missing`.
    """
    num_tokens, hidden = hidden_states.shape
    slots = top_k_index.shape[1]
    num_experts, _, intermediate = down_proj.shape
    num_pairs = num_tokens * slots
    plan = plan or choose_plan(num_pairs, num_experts)
    few = None if missing is None else room_for_few(hidden_states, missing[1])
    tiles = tile_pairs(top_k_index, num_experts, plan.rows, few=few)

    activated = hidden_states.new_empty(num_pairs, intermediate)
    _launch(_gate_up, plan.gate_up, hidden_states, gate_up_proj, activated, tiles, plan.rows, SLOTS=slots)
    outputs = hidden_states.new_empty(len(tiles.expert) * plan.rows, hidden)
    _launch(_down, plan.down, activated, down_proj, outputs, tiles, plan.rows, top_k_weights)
    if missing is not None and few is not None:
        return add_up(outputs, tiles, top_k_index, top_k_weights, few.out, missing[0], missing[2])
    total = torch.empty_like(hidden_states)
    block = min(2048, triton.next_power_of_2(hidden))
    _add_slots[(num_tokens, triton.cdiv(hidden, block))](
        outputs, tiles.places, top_k_index, total, hidden,
        SLOTS=slots, NUM_EXPERTS=num_experts, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return total


def _launch(
    kernel, product: Product, rows: Tensor, matrices: Tensor, out: Tensor, tiles: Tiles, block_rows, *more, **constants
):
    """Start a product of `rows` with the experts' `matrices`."""
    num_experts, _, depth = matrices.shape
    width = out.shape[1]
    parts = matrices.shape[1] // width  # 2: gate and up
    product = _fit(product, block_rows, parts, rows.device, rows.element_size())
    programs = len(tiles.expert) * triton.cdiv(width, product.columns)
    if product.persistent:
        programs = min(programs, _multiprocessors(rows.device))
    if product.tma:
        matrices = _descriptor(matrices.view(-1, width, depth), [parts, product.columns, product.inner])
        if kernel is _down:
            rows = _descriptor(rows, [block_rows, product.inner])
            out = _descriptor(out, [block_rows, product.columns // 2])
    kernel[(programs,)](
        rows,
        matrices,
        out,
        tiles.pairs,
        tiles.expert,
        tiles.first,
        tiles.last,
        tiles.used,
        *more,
        **constants,
        WIDTH=width,
        DEPTH=depth,
        NUM_EXPERTS=num_experts,
        BLOCK_ROWS=block_rows,
        BLOCK_COLUMNS=product.columns,
        BLOCK_DEPTH=product.inner,
        TMA=product.tma,
        PERSISTENT=product.persistent,
        num_warps=product.warps,
        num_stages=product.stages,
    )


@functools.cache
def _fit(product: Product, block_rows: int, parts: int, device: torch.device, element_size: int) -> Product:
    """What a device can do of a plan; `parts` is how many blocks of matrices a step of the inner loop reads."""
    if device.type != "cuda":
        return product
    limits = torch.cuda.get_device_properties(device)
    stage = (block_rows + parts * product.columns) * product.inner * element_size
    stages = max(2, min(product.stages, limits.shared_memory_per_block_optin // stage))
    # What was measured: elsewhere, and in float32, shared memory may not hold the stages beside what is written.
    hopper = (limits.major, limits.minor) == (9, 0) and element_size == 2
    return product._replace(
        stages=stages, tma=product.tma and limits.major >= 9, persistent=product.persistent and hopper
    )


def _multiprocessors(device: torch.device) -> int:
    """How many programs run at once; in the interpreter few, so that each has several blocks to work off."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _descriptor(tensor: Tensor, block: list[int]):
    """A tensor in blocks, for the copy engine; what lies beyond it is read as zero."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(tensor, block)


@triton.jit
def _inside(filled, index, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Which of [rows, BLOCK] are there; where no block is cut off, asking of the rows alone saves some per cent."""
    inside = filled[:, None]
    if SIZE % BLOCK != 0:
        inside = inside & (index < SIZE)[None, :]
    return inside


@triton.jit
def _matrix_block(
    matrices, matrix, column, start, PARTS: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Rows ``column...`` of PARTS matrices [WIDTH, DEPTH], from `start` on: [PARTS * BLOCK_COLUMNS, BLOCK_DEPTH]."""
    if TMA:
        block = matrices.load([matrix, column, start]).reshape(PARTS * BLOCK_COLUMNS, BLOCK_DEPTH)
    else:
        index = tl.arange(0, PARTS * BLOCK_COLUMNS)
        columns = column + index % BLOCK_COLUMNS
        rows = (matrix + index // BLOCK_COLUMNS) * WIDTH + columns
        inner = start + tl.arange(0, BLOCK_DEPTH)
        pointers = matrices + rows[:, None].to(tl.int64) * DEPTH + inner[None, :]
        block = tl.load(pointers, mask=_inside(columns < WIDTH, inner, DEPTH, BLOCK_DEPTH), other=0.0)
    return block


@quick
@triton.jit
def _gate_up(
    hidden_ptr,
    matrices,
    out_ptr,
    pairs_ptr,
    expert_ptr,
    first_ptr,
    last_ptr,
    used_ptr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    TMA: tl.constexpr,
    PERSISTENT: tl.constexpr,
):
    """``silu(x @ gate.T) * (x @ up.T)`` of every tile, into the rows of the tile."""
    blocks: tl.constexpr = (WIDTH + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    program = tl.program_id(0)
    if PERSISTENT:
        for block in tl.range(program, tl.load(used_ptr) * blocks, tl.num_programs(0), flatten=True):
            _gate_up_block(
                block, hidden_ptr, matrices, out_ptr, pairs_ptr, expert_ptr, first_ptr, last_ptr,
                WIDTH, DEPTH, SLOTS, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_DEPTH, TMA,
            )  # fmt: skip
    elif tl.load(expert_ptr + program // blocks) < NUM_EXPERTS:
        _gate_up_block(
            program, hidden_ptr, matrices, out_ptr, pairs_ptr, expert_ptr, first_ptr, last_ptr,
            WIDTH, DEPTH, SLOTS, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_DEPTH, TMA,
        )  # fmt: skip


@triton.jit
def _gate_up_block(
    block, hidden_ptr, matrices, out_ptr, pairs_ptr, expert_ptr, first_ptr, last_ptr,
    WIDTH: tl.constexpr, DEPTH: tl.constexpr, SLOTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Some columns of one tile."""
    blocks: tl.constexpr = (WIDTH + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    # Neighbouring blocks share a tile and differ in columns, then share an expert: L2 holds what they share.
    tile = block // blocks
    column = (block % blocks) * BLOCK_COLUMNS
    expert = tl.load(expert_ptr + tile)
    row = tl.load(first_ptr + tile) + tl.arange(0, BLOCK_ROWS)
    filled = row < tl.load(last_ptr + tile)
    token = tl.load(pairs_ptr + row, mask=filled, other=0) // SLOTS
    inner = tl.arange(0, BLOCK_DEPTH)
    hidden_ptrs = hidden_ptr + token[:, None].to(tl.int64) * DEPTH + inner[None, :]
    # Gate and up side by side: one product is faster than two.
    both = tl.zeros([BLOCK_ROWS, 2 * BLOCK_COLUMNS], tl.float32)
    for start in range(0, DEPTH, BLOCK_DEPTH):
        x = tl.load(hidden_ptrs + start, mask=_inside(filled, start + inner, DEPTH, BLOCK_DEPTH), other=0.0)
        rows = _matrix_block(matrices, 2 * expert, column, start, 2, WIDTH, DEPTH, BLOCK_COLUMNS, BLOCK_DEPTH, TMA)
        both = tl.dot(x, rows.T, both)
    gate, up = both.reshape(BLOCK_ROWS, 2, BLOCK_COLUMNS).permute(0, 2, 1).split()
    # Rounded here, before addresses are formed: some per cent faster on Hopper, by what ptxas makes of it.
    activated = (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty)
    columns = column + tl.arange(0, BLOCK_COLUMNS)
    out_ptrs = out_ptr + row[:, None].to(tl.int64) * WIDTH + columns[None, :]
    inside = _inside(filled, columns, WIDTH, BLOCK_COLUMNS)
    tl.store(out_ptrs, activated, mask=inside)


@quick
@triton.jit
def _down(
    rows,
    matrices,
    out,
    pairs_ptr,
    expert_ptr,
    first_ptr,
    last_ptr,
    used_ptr,
    weights_ptr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    TMA: tl.constexpr,
    PERSISTENT: tl.constexpr,
):
    """``weight * (rows @ down.T)`` of every tile, into the places of the tile."""
    blocks: tl.constexpr = (WIDTH + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    program = tl.program_id(0)
    if PERSISTENT:
        for block in tl.range(program, tl.load(used_ptr) * blocks, tl.num_programs(0), flatten=True):
            _down_block(
                block, rows, matrices, out, pairs_ptr, expert_ptr, first_ptr, last_ptr, weights_ptr,
                WIDTH, DEPTH, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_DEPTH, TMA,
            )  # fmt: skip
    elif tl.load(expert_ptr + program // blocks) < NUM_EXPERTS:
        _down_block(
            program, rows, matrices, out, pairs_ptr, expert_ptr, first_ptr, last_ptr, weights_ptr,
            WIDTH, DEPTH, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_DEPTH, TMA,
        )  # fmt: skip


@triton.jit
def _down_block(
    block, rows, matrices, out, pairs_ptr, expert_ptr, first_ptr, last_ptr, weights_ptr,
    WIDTH: tl.constexpr, DEPTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Some columns of one tile."""
    blocks: tl.constexpr = (WIDTH + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    tile = block // blocks
    column = (block % blocks) * BLOCK_COLUMNS
    expert = tl.load(expert_ptr + tile)
    first = tl.load(first_ptr + tile)
    row = first + tl.arange(0, BLOCK_ROWS)
    filled = row < tl.load(last_ptr + tile)
    pair = tl.load(pairs_ptr + row, mask=filled, other=0)
    weight = tl.load(weights_ptr + pair, mask=filled, other=0.0).to(tl.float32)
    inner = tl.arange(0, BLOCK_DEPTH)
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for start in range(0, DEPTH, BLOCK_DEPTH):
        if TMA:  # with rows of the next tile, whose sums nobody reads
            x = rows.load([first, start])
        else:
            pointers = rows + row[:, None].to(tl.int64) * DEPTH + start + inner[None, :]
            x = tl.load(pointers, mask=_inside(filled, start + inner, DEPTH, BLOCK_DEPTH), other=0.0)
        downs = _matrix_block(matrices, expert, column, start, 1, WIDTH, DEPTH, BLOCK_COLUMNS, BLOCK_DEPTH, TMA)
        total = tl.dot(x, downs.T, total)
    total *= weight[:, None]
    if TMA:  # in halves: shared memory has no room for more beside the stages of the pipeline
        half: tl.constexpr = BLOCK_COLUMNS // 2
        left, right = total.reshape(BLOCK_ROWS, 2, half).permute(0, 2, 1).split()
        out.store([tile * BLOCK_ROWS, column], left.to(out.dtype))
        out.store([tile * BLOCK_ROWS, column + half], right.to(out.dtype))
    else:
        place = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        columns = column + tl.arange(0, BLOCK_COLUMNS)
        out_ptrs = out + place[:, None].to(tl.int64) * WIDTH + columns[None, :]
        tl.store(out_ptrs, total.to(out.dtype.element_ty), mask=_inside(filled, columns, WIDTH, BLOCK_COLUMNS))


@quick
@triton.jit
def _add_slots(
    rows_ptr, places_ptr, index_ptr, out_ptr, width,
    SLOTS: tl.constexpr, NUM_EXPERTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum of a token's filled slots, first to last."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for slot in tl.static_range(SLOTS):
        pair = token * SLOTS + slot
        expert = tl.load(index_ptr + pair)
        filled = (expert >= 0) & (expert < NUM_EXPERTS) & (columns < width)
        place = tl.load(places_ptr + pair).to(tl.int64)
        total += tl.load(rows_ptr + place * width + columns, mask=filled, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * width + columns, total.to(out_ptr.dtype.element_ty), mask=columns < width)
