"""The experts of one or a few tokens: matrix times vector, each selected expert's weights read once.

With one token every filled slot has an expert of its own, so there is nothing to sort and nothing to share: the first
kernel takes a slot and some of the intermediate columns, the second some of the hidden columns and all slots in turn.
For several tokens the same is right, but an expert that two of them selected is read twice. A call is two launches:
where the device waits for the host, that is what counts.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bhlib.kernels.launch import quick


class VectorPlan(NamedTuple):
    """Rows of a matrix that a program takes, inner step and warps, for the gate-up and for the down product.

    And the columns of what stands in for dropped experts that a program makes beside the gate-up product.
    """

    gate_up_rows: int = 4
    gate_up_inner: int = 2048
    gate_up_warps: int = 2
    down_rows: int = 4
    down_inner: int = 1024
    down_warps: int = 2
    missing_columns: int = 128


def vector_forward(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    plan: VectorPlan = VectorPlan(),  # noqa: B008 (immutable)
    missing: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """Experts' forward over the filled slots of a few tokens; see `bhlib.kernels.grouped.grouped_forward`."""
    num_tokens, hidden = hidden_states.shape
    slots = top_k_index.shape[1]
    num_experts, _, intermediate = down_proj.shape
    activated = hidden_states.new_empty(num_tokens * slots, intermediate)
    rank, stands_in = -1, None
    if missing is not None:
        rank, stands_in = len(missing[1]), hidden_states.new_empty(num_tokens, hidden, dtype=torch.float32)
    total = torch.empty_like(hidden_states)
    gate_up_blocks, gate_up, down_blocks, down = _cut(hidden, intermediate, num_experts, slots, rank, plan)
    _gate_up_vector[(gate_up_blocks, num_tokens * (slots + (rank >= 0)))](
        hidden_states, gate_up_proj, top_k_index, activated,
        top_k_weights, *(missing or (None, None, None)), stands_in, **gate_up,
    )  # fmt: skip
    _down_vector[(down_blocks, num_tokens)](activated, down_proj, top_k_index, top_k_weights, total, stands_in, **down)
    return total


@functools.cache
def _cut(
    hidden: int, intermediate: int, num_experts: int, slots: int, rank: int, plan: VectorPlan
) -> tuple[int, dict, int, dict]:
    """Blocks of rows and constants of the two kernels."""
    shape = {"HIDDEN": hidden, "INTERMEDIATE": intermediate, "NUM_EXPERTS": num_experts, "SLOTS": slots, "RANK": rank}
    columns = min(plan.missing_columns, triton.next_power_of_2(hidden))
    return (
        max(triton.cdiv(intermediate, plan.gate_up_rows), triton.cdiv(hidden, columns) if rank >= 0 else 0),
        shape | {
            "COLUMNS": columns,
            "ROWS": plan.gate_up_rows,
            "INNER": min(plan.gate_up_inner, triton.next_power_of_2(hidden)),
            "num_warps": plan.gate_up_warps,
        },
        triton.cdiv(hidden, plan.down_rows),
        shape | {
            "ROWS": plan.down_rows,
            "INNER": min(plan.down_inner, triton.next_power_of_2(intermediate)),
            "num_warps": plan.down_warps,
        },
    )  # fmt: skip


@quick
@triton.jit
def _gate_up_vector(
    hidden_ptr,
    matrices_ptr,
    index_ptr,
    out_ptr,
    weights_ptr,
    means_ptr,
    to_few_ptr,
    from_few_ptr,
    missing_ptr,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    SLOTS: tl.constexpr,
    RANK: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
):
    """``silu(gate @ x) * (up @ x)`` of one slot for some rows of gate and up; in front of them, what stands in."""
    pair = tl.program_id(1)
    if RANK >= 0:
        num_tokens = tl.num_programs(1) // (SLOTS + 1)
        if pair < num_tokens:
            # In parts so small that it needs no more registers than the products, or fewer programs would run at once.
            if tl.program_id(0) * COLUMNS < HIDDEN:
                _missing_vector(
                    pair.to(tl.int64), hidden_ptr, index_ptr, weights_ptr, means_ptr, to_few_ptr, from_few_ptr,
                    missing_ptr, HIDDEN, NUM_EXPERTS, SLOTS, RANK, COLUMNS, ROWS // 2, INNER // 2,
                )  # fmt: skip
            return
        pair -= num_tokens
    expert = tl.load(index_ptr + pair).to(tl.int64)
    if (expert < 0) | (expert >= NUM_EXPERTS):
        return
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (row < INTERMEDIATE)[:, None]
    gate_ptrs = matrices_ptr + (expert * 2 * INTERMEDIATE + row)[:, None] * HIDDEN
    gate = tl.zeros([ROWS, INNER], tl.float32)
    up = tl.zeros([ROWS, INNER], tl.float32)
    for start in tl.static_range(0, HIDDEN, INNER):
        inner = start + tl.arange(0, INNER)
        mask = inside & (inner < HIDDEN)[None, :]
        x = tl.load(hidden_ptr + (pair // SLOTS).to(tl.int64) * HIDDEN + inner, mask=inner < HIDDEN, other=0.0)
        x = x.to(tl.float32)[None, :]
        gate += x * tl.load(gate_ptrs + inner[None, :], mask=mask, other=0.0).to(tl.float32)
        up += x * tl.load(gate_ptrs + INTERMEDIATE * HIDDEN + inner[None, :], mask=mask, other=0.0).to(tl.float32)
    gates = tl.sum(gate, axis=1)
    activated = gates * tl.sigmoid(gates) * tl.sum(up, axis=1)
    out_ptrs = out_ptr + pair.to(tl.int64) * INTERMEDIATE + row
    tl.store(out_ptrs, activated.to(out_ptr.dtype.element_ty), mask=row < INTERMEDIATE)


@triton.jit
def _missing_vector(
    token, hidden_ptr, index_ptr, weights_ptr, means_ptr, to_few_ptr, from_few_ptr, missing_ptr,
    HIDDEN: tl.constexpr, NUM_EXPERTS: tl.constexpr, SLOTS: tl.constexpr, RANK: tl.constexpr,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Some columns of what stands in for a token's dropped experts.

    Each program brings the hidden state to the few dimensions of the map again: the cache has what that reads, and
    there is time for it, while the others wait for experts.
    """
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    within = columns < HIDDEN
    total = tl.zeros([COLUMNS], tl.float32)
    mass = 0.0
    for slot in tl.static_range(SLOTS):
        expert = tl.load(index_ptr + token * SLOTS + slot).to(tl.int64)
        dropped = expert > NUM_EXPERTS
        weight = tl.load(weights_ptr + token * SLOTS + slot, mask=dropped, other=0.0).to(tl.float32)
        mean_ptrs = means_ptr + (expert - NUM_EXPERTS) * HIDDEN + columns
        total += weight * tl.load(mean_ptrs, mask=dropped & within, other=0.0).to(tl.float32)
        mass += weight
    if RANK > 0:
        mapped = tl.zeros([ROWS, COLUMNS], tl.float32)
        for first in range(0, RANK, ROWS):
            row = first + tl.arange(0, ROWS)
            there = (row < RANK)[:, None]
            products = tl.zeros([ROWS, INNER], tl.float32)
            for start in tl.static_range(0, HIDDEN, INNER):
                inner = start + tl.arange(0, INNER)
                x = tl.load(hidden_ptr + token * HIDDEN + inner, mask=inner < HIDDEN, other=0.0).to(tl.float32)
                ptrs = to_few_ptr + row[:, None] * HIDDEN + inner[None, :]
                products += x[None, :] * tl.load(ptrs, mask=there & (inner < HIDDEN)[None, :], other=0.0)
            ptrs = from_few_ptr + row[:, None] * HIDDEN + columns[None, :]
            from_few = tl.load(ptrs, mask=there & within[None, :], other=0.0).to(tl.float32)
            mapped += tl.sum(products, axis=1)[:, None] * from_few
        total += tl.sum(mapped, axis=0) * mass
    tl.store(missing_ptr + token * HIDDEN + columns, total, mask=within)


@quick
@triton.jit
def _down_vector(
    activated_ptr,
    matrices_ptr,
    index_ptr,
    weights_ptr,
    out_ptr,
    missing_ptr,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    SLOTS: tl.constexpr,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
):
    """Sum over a token's filled slots of ``weight * (down @ activated)`` for some rows of down, and what is missing."""
    token = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros([ROWS, INNER], tl.float32)
    if RANK >= 0:  # read ahead
        missing = tl.load(missing_ptr + token * HIDDEN + row, mask=row < HIDDEN, other=0.0)
    for slot in tl.static_range(SLOTS):
        pair = token * SLOTS + slot
        expert = tl.load(index_ptr + pair).to(tl.int64)
        filled = (expert >= 0) & (expert < NUM_EXPERTS)
        weight = tl.load(weights_ptr + pair).to(tl.float32)
        for start in tl.static_range(0, INTERMEDIATE, INNER):
            inner = start + tl.arange(0, INNER)
            within = filled & (inner < INTERMEDIATE)
            x = tl.load(activated_ptr + pair * INTERMEDIATE + inner, mask=within, other=0.0).to(tl.float32) * weight
            matrix_ptrs = matrices_ptr + (expert * HIDDEN + row)[:, None] * INTERMEDIATE + inner[None, :]
            matrix = tl.load(matrix_ptrs, mask=within[None, :] & (row < HIDDEN)[:, None], other=0.0)
            total += x[None, :] * matrix.to(tl.float32)
    out = tl.sum(total, axis=1)
    if RANK >= 0:
        out += missing
    tl.store(out_ptr + token * HIDDEN + row, out.to(out_ptr.dtype.element_ty), mask=row < HIDDEN)
