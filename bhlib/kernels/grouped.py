"""Both matrix products of the experts over tiles of pairs: for anything from a few tokens to a long prompt.

Three kernels after `tile_pairs`. The first gathers the hidden states of a tile's pairs and multiplies them with the
gate and the up rows of the expert at once, so that ``silu(gate) * up`` is formed in registers. The second multiplies
with the down rows, and with the routing weight, and writes each pair where its token and slot are. The third adds up a
token's filled slots, in order.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bhlib.kernels.pairs import most_tiles, tile_pairs


class Product(NamedTuple):
    """How one matrix product is cut up: columns of a program, inner step, warps, stages of the pipeline, TMA or not.

    Stages and TMA, the copy engine of Hopper, are what is wanted: a device that cannot do that much gets less (`_fit`).
    """

    columns: int
    inner: int
    warps: int
    stages: int
    tma: bool = False


class Plan(NamedTuple):
    """How both products are cut up: rows of a tile, and the two products."""

    rows: int
    gate_up: Product
    down: Product


#: By the most pairs per expert that the shape allows (tokens * slots / experts): the first entry that is not exceeded.
#: Each is within 2 % of the fastest of some 160 plans on an H100, with OLMoE's shapes and half of the slots filled.
PLANS = (
    (16, Plan(16, Product(32, 256, 4, 4), Product(64, 128, 4, 3))),
    (128, Plan(64, Product(64, 128, 4, 4), Product(128, 128, 4, 4))),
    (float("inf"), Plan(128, Product(128, 64, 8, 4, tma=True), Product(256, 64, 8, 4, tma=True))),
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

    Returns
    -------
    Tensor [tokens, hidden], in the dtype of `hidden_states`
        Sum over the filled slots of weight times ``down(silu(gate) * up)``: float32 sums, rounded where a model in the
        dtype rounds: after the activation, after the weighted expert, and after the sum.
    """
    num_tokens, hidden = hidden_states.shape
    slots = top_k_index.shape[1]
    num_experts, _, intermediate = down_proj.shape
    num_pairs = num_tokens * slots
    plan = plan or choose_plan(num_pairs, num_experts)
    tiles = tile_pairs(top_k_index, num_experts, plan.rows)
    num_tiles = most_tiles(num_pairs, num_experts, plan.rows)

    activated = hidden_states.new_empty(num_pairs, intermediate)
    _launch(_gate_up, plan.gate_up, num_tiles, intermediate, hidden, hidden_states, gate_up_proj, activated, tiles,
            plan.rows, num_experts, SLOTS=slots)  # fmt: skip
    outputs = hidden_states.new_empty(num_pairs, hidden)
    _launch(_down, plan.down, num_tiles, hidden, intermediate, activated, down_proj, outputs, tiles,
            plan.rows, num_experts, weights_ptr=top_k_weights)  # fmt: skip
    total = torch.empty_like(hidden_states)
    block = min(2048, triton.next_power_of_2(hidden))
    _add_slots[(num_tokens, triton.cdiv(hidden, block))](
        outputs, top_k_index, total, hidden, SLOTS=slots, NUM_EXPERTS=num_experts, BLOCK=block, num_warps=4
    )
    return total


def _launch(kernel, product, num_tiles, width, depth, rows, matrices, out, tiles, block_rows, num_experts, **more):
    """Start a product of `rows` with the experts' `matrices`: `width` columns, sums over `depth`."""
    product = _fit(product, block_rows, 2 if kernel is _gate_up else 1, rows)
    grid = (num_tiles * triton.cdiv(width, product.columns),)
    kernel[grid](
        rows,
        _descriptor(matrices, product) if product.tma else matrices,
        out,
        tiles.pairs,
        tiles.expert,
        tiles.first,
        tiles.last,
        **more,
        WIDTH=width,
        DEPTH=depth,
        NUM_EXPERTS=num_experts,
        BLOCK_ROWS=block_rows,
        BLOCK_COLUMNS=product.columns,
        BLOCK_DEPTH=product.inner,
        TMA=product.tma,
        num_warps=product.warps,
        num_stages=product.stages,
    )


def _fit(product: Product, block_rows: int, blocks: int, rows: Tensor) -> Product:
    """What a device can do of a plan; `blocks` is how many blocks of matrices a step of the inner loop reads."""
    if not rows.is_cuda:
        return product
    device = torch.cuda.get_device_properties(rows.device)
    stage = (block_rows + blocks * product.columns) * product.inner * rows.element_size()
    stages = max(2, min(product.stages, device.shared_memory_per_block_optin // stage))
    return product._replace(stages=stages, tma=product.tma and device.major >= 9)


def _descriptor(matrices: Tensor, product: Product):
    """The experts' matrices, one below the other, for the copy engine of Hopper."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(matrices.view(-1, matrices.shape[-1]), [product.columns, product.inner])


@triton.jit
def _matrix_block(
    matrices, row, last_row, start, DEPTH: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Rows ``row...`` of the stacked matrices from column `start` on, [BLOCK_COLUMNS, BLOCK_DEPTH]."""
    if TMA:
        block = matrices.load([row, start])
    else:
        rows = row + tl.arange(0, BLOCK_COLUMNS)
        inner = start + tl.arange(0, BLOCK_DEPTH)
        pointers = matrices + rows[:, None].to(tl.int64) * DEPTH + inner[None, :]
        block = tl.load(pointers, mask=(rows < last_row)[:, None] & (inner < DEPTH)[None, :], other=0.0)
    return block


@triton.jit
def _gate_up(
    hidden_ptr,
    matrices,
    out_ptr,
    pairs_ptr,
    expert_ptr,
    first_ptr,
    last_ptr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    TMA: tl.constexpr,
):
    """``silu(x @ gate.T) * (x @ up.T)`` of one tile for some columns, into the rows of the tile."""
    blocks: tl.constexpr = (WIDTH + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    # Neighbouring programs share a tile and differ in columns, then share an expert: L2 holds what they share.
    tile = tl.program_id(0) // blocks
    column = (tl.program_id(0) % blocks) * BLOCK_COLUMNS
    expert = tl.load(expert_ptr + tile)
    if expert == NUM_EXPERTS:
        return
    row = tl.load(first_ptr + tile) + tl.arange(0, BLOCK_ROWS)
    filled = row < tl.load(last_ptr + tile)
    token = tl.load(pairs_ptr + row, mask=filled, other=0) // SLOTS
    inner = tl.arange(0, BLOCK_DEPTH)
    hidden_ptrs = hidden_ptr + token[:, None].to(tl.int64) * DEPTH + inner[None, :]
    gate_row = expert * (2 * WIDTH) + column
    gate = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    up = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for start in range(0, DEPTH, BLOCK_DEPTH):
        mask = filled[:, None] & (start + inner < DEPTH)[None, :]
        x = tl.load(hidden_ptrs + start, mask=mask, other=0.0)
        last_row = (expert + 1) * (2 * WIDTH)
        gates = _matrix_block(matrices, gate_row, last_row, start, DEPTH, BLOCK_COLUMNS, BLOCK_DEPTH, TMA)
        ups = _matrix_block(matrices, gate_row + WIDTH, last_row, start, DEPTH, BLOCK_COLUMNS, BLOCK_DEPTH, TMA)
        gate = tl.dot(x, gates.T, gate)
        up = tl.dot(x, ups.T, up)
    activated = gate * tl.sigmoid(gate) * up
    columns = column + tl.arange(0, BLOCK_COLUMNS)
    out_ptrs = out_ptr + row[:, None].to(tl.int64) * WIDTH + columns[None, :]
    tl.store(out_ptrs, activated.to(out_ptr.dtype.element_ty), mask=filled[:, None] & (columns < WIDTH)[None, :])


@triton.jit
def _down(
    rows_ptr,
    matrices,
    out_ptr,
    pairs_ptr,
    expert_ptr,
    first_ptr,
    last_ptr,
    weights_ptr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    TMA: tl.constexpr,
):
    """``weight * (rows @ down.T)`` of one tile for some columns, into the rows of the pairs."""
    blocks: tl.constexpr = (WIDTH + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    tile = tl.program_id(0) // blocks
    column = (tl.program_id(0) % blocks) * BLOCK_COLUMNS
    expert = tl.load(expert_ptr + tile)
    if expert == NUM_EXPERTS:
        return
    row = tl.load(first_ptr + tile) + tl.arange(0, BLOCK_ROWS)
    filled = row < tl.load(last_ptr + tile)
    pair = tl.load(pairs_ptr + row, mask=filled, other=0)
    inner = tl.arange(0, BLOCK_DEPTH)
    row_ptrs = rows_ptr + row[:, None].to(tl.int64) * DEPTH + inner[None, :]
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for start in range(0, DEPTH, BLOCK_DEPTH):
        x = tl.load(row_ptrs + start, mask=filled[:, None] & (start + inner < DEPTH)[None, :], other=0.0)
        downs = _matrix_block(
            matrices, expert * WIDTH + column, (expert + 1) * WIDTH, start, DEPTH, BLOCK_COLUMNS, BLOCK_DEPTH, TMA
        )
        total = tl.dot(x, downs.T, total)
    total *= tl.load(weights_ptr + pair, mask=filled, other=0.0).to(tl.float32)[:, None]
    columns = column + tl.arange(0, BLOCK_COLUMNS)
    out_ptrs = out_ptr + pair[:, None].to(tl.int64) * WIDTH + columns[None, :]
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=filled[:, None] & (columns < WIDTH)[None, :])


@triton.jit
def _add_slots(
    rows_ptr, index_ptr, out_ptr, width, SLOTS: tl.constexpr, NUM_EXPERTS: tl.constexpr, BLOCK: tl.constexpr
):
    """Sum of a token's filled slots, first to last."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for slot in tl.static_range(SLOTS):
        pair = token * SLOTS + slot
        expert = tl.load(index_ptr + pair)
        filled = (expert >= 0) & (expert < NUM_EXPERTS) & (columns < width)
        total += tl.load(rows_ptr + pair * width + columns, mask=filled, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * width + columns, total.to(out_ptr.dtype.element_ty), mask=columns < width)
