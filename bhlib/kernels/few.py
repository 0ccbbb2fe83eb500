"""The few dimensions of a map of small rank: a product so narrow that it is read, not multiplied.

It is no kernel of its own, but some programs more of one that leaves most of the device idle (`bhlib.kernels.pairs`):
that saves a launch, and what it reads is read meanwhile.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Few(NamedTuple):
    """``hidden_states @ down.T``, to be made.

    Attributes
    ----------
    hidden_states : Tensor [tokens, hidden], contiguous
    down : Tensor [rank, hidden], contiguous, in their dtype
    out : Tensor [tokens, rank], float32
        Room for the product.
    """

    hidden_states: Tensor
    down: Tensor
    out: Tensor

    def cut(self) -> tuple[int, dict[str, int]]:
        """Programs that make it, and their constants."""
        num_tokens, hidden = self.hidden_states.shape
        rank = len(self.down)
        # Few tokens: spread over the device, in long steps; many: rows that share what they read of `down`.
        rows, step = (16, 256) if num_tokens <= 4096 else (32, 128)
        constants = {
            "HIDDEN": hidden,
            "RANK": rank,
            "RANK_WIDTH": max(16, triton.next_power_of_2(rank)),
            "FEW_ROWS": rows,
            "FEW_STEP": min(step, triton.next_power_of_2(max(hidden, 16))),
        }
        return triton.cdiv(num_tokens, rows) if rank else 0, constants


def room_for_few(hidden_states: Tensor, down: Tensor) -> Few:
    """The product, with room for it."""
    return Few(hidden_states, down, hidden_states.new_empty(len(hidden_states), len(down), dtype=torch.float32))


@triton.jit
def few_block(
    program, hidden_ptr, down_ptr, few_ptr, num_tokens,
    HIDDEN: tl.constexpr, RANK: tl.constexpr, RANK_WIDTH: tl.constexpr,
    FEW_ROWS: tl.constexpr, FEW_STEP: tl.constexpr,
):  # fmt: skip
    """The few dimensions of FEW_ROWS tokens."""
    token = program.to(tl.int64) * FEW_ROWS + tl.arange(0, FEW_ROWS)
    inner = tl.arange(0, RANK_WIDTH)
    columns = tl.arange(0, FEW_STEP)
    inside, within = token < num_tokens, inner < RANK
    total = tl.zeros([FEW_ROWS, RANK_WIDTH], tl.float32)
    for start in range(0, HIDDEN, FEW_STEP):
        there = (start + columns < HIDDEN)[None, :]
        x = tl.load(hidden_ptr + token[:, None] * HIDDEN + start + columns, mask=inside[:, None] & there, other=0.0)
        down = tl.load(down_ptr + inner[:, None] * HIDDEN + start + columns, mask=within[:, None] & there, other=0.0)
        total = tl.dot(x, down.T, total)
    few_ptrs = few_ptr + token[:, None] * RANK + inner[None, :]
    tl.store(few_ptrs, total, mask=inside[:, None] & within[None, :])
