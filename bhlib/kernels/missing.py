"""What stands in for dropped experts, added to the experts' output in one launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bhlib.kernels import on_device
from bhlib.kernels.launch import quick

#: Up to this many tokens a program takes one, to spread them; of more it takes as many as a product needs.
FEW_TOKENS = 64


def add_missing(
    output: Tensor, hidden_states: Tensor, index: Tensor, weights: Tensor, means: Tensor, down: Tensor, up: Tensor
) -> Tensor:
    """The twin of ``output + LayerCompensation(means, down, up).missing(hidden_states, index, weights)``.

    Parameters
    ----------
    output : Tensor [tokens, hidden], bfloat16 or float16 (or float32), on a CUDA device
        Of a layer's experts.
    hidden_states, index, weights, means, down, up
        As there, all in the dtype of `output` but for the index.

    Returns
    -------
    Tensor [tokens, hidden]
        Sums are taken in float32, and rounded once; the product with `down` is rounded too.
    """
    low = torch.nn.functional.linear(hidden_states, down)
    add = _add_operator if torch.compiler.is_compiling() else _add
    return add(output.contiguous(), low, index.contiguous(), weights.contiguous(), means, up)


def _add(output: Tensor, low: Tensor, index: Tensor, weights: Tensor, means: Tensor, up: Tensor) -> Tensor:
    (num_tokens, hidden), slots, rank = output.shape, index.shape[1], up.shape[1]
    out = torch.empty_like(output)
    rows = 1 if num_tokens <= FEW_TOKENS else 16
    block = min(256, triton.next_power_of_2(hidden))
    if num_tokens:
        with on_device(output.device):
            _add_missing[(triton.cdiv(num_tokens, rows), triton.cdiv(hidden, block))](
                output, low, index, weights, means, up, out, num_tokens, hidden,
                SLOTS=slots, NUM_EXPERTS=len(means) - 1, RANK=rank,
                WIDTH=max(16, triton.next_power_of_2(rank)), ROWS=rows, BLOCK=block, num_warps=4,
            )  # fmt: skip
    return out


_add_operator = torch.library.custom_op("bhlib::add_missing", _add, mutates_args=())


@_add_operator.register_fake
def _(output, low, index, weights, means, up):
    return torch.empty_like(output)


@quick
@triton.jit(do_not_specialize=["num_tokens"])
def _add_missing(
    output_ptr, low_ptr, index_ptr, weights_ptr, means_ptr, up_ptr, out_ptr, num_tokens, hidden,
    SLOTS: tl.constexpr, NUM_EXPERTS: tl.constexpr, RANK: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, within = token < num_tokens, columns < hidden
    place = token[:, None] * hidden + columns[None, :]
    total = tl.load(output_ptr + place, mask=inside[:, None] & within[None, :], other=0.0).to(tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    for slot in tl.static_range(SLOTS):
        row = tl.load(index_ptr + token * SLOTS + slot, mask=inside, other=0) - NUM_EXPERTS
        marked = row > 0
        weight = tl.load(weights_ptr + token * SLOTS + slot, mask=marked, other=0.0).to(tl.float32)
        mean_ptrs = means_ptr + row[:, None] * hidden + columns[None, :]
        mean = tl.load(mean_ptrs, mask=marked[:, None] & within[None, :], other=0.0).to(tl.float32)
        total += weight[:, None] * mean
        mass += weight
    if RANK:
        inner = tl.arange(0, WIDTH)
        low_ptrs = low_ptr + token[:, None] * RANK + inner[None, :]
        low = tl.load(low_ptrs, mask=inside[:, None] & (inner < RANK)[None, :], other=0.0)
        up_ptrs = up_ptr + columns[:, None].to(tl.int64) * RANK + inner[None, :]
        up = tl.load(up_ptrs, mask=within[:, None] & (inner < RANK)[None, :], other=0.0)
        if ROWS == 1:
            mapped = tl.sum(low.to(tl.float32) * up.to(tl.float32), axis=1)[None, :]
        else:
            mapped = tl.dot(low, up.T)
        total += mass[:, None] * mapped
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=inside[:, None] & within[None, :])
