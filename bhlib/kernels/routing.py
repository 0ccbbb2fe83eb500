"""Benjamini-Hochberg routing of a token in one launch: logits in, weights, experts and counts out.

The same launch can write the weights a second time, as they were computed.

A program takes a few tokens. It sorts each token's logits once, as integers that carry the expert's index in their last
byte; everything else is then a running look at the sorted row: the softmax, the statistic, and the step-up decision,
which compares the k-th largest statistic with the k-th entry of a table made beforehand (`cut_table`).
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from bhlib.kernels import on_device
from bhlib.kernels.launch import quick
from bhlib.pvalues import KernelForm, PValueMaker
from bhlib.weighting import KERNEL_NORMALIZED, KERNEL_PLAIN

MOST_EXPERTS = 256

#: Statistics that the kernel computes, by the number that it knows them by.
_STATISTICS = {"rest": 0, "log_prob": 1, "logit": 2, "centered": 3, "standardized": 4}


def cut_table(pvalues: PValueMaker, thresholds: Tensor, num_experts: int) -> KernelForm | None:
    """What the kernel compares with what, so that it decides as the critical statistics of a p-value maker do.

    Parameters
    ----------
    pvalues : PValueMaker
        A maker whose null is shared by all experts.
    thresholds : Tensor [experts] or [levels, experts], float32
        ``pvalues.critical_statistics(critical_values(...), layer)``, for one level or for several.
    num_experts : int

    Returns
    -------
    KernelForm or None
        With cuts of the shape of `thresholds`. None if the maker has no such form, or the kernel does not know its
        statistic.
    """
    if not pvalues.shared or num_experts > MOST_EXPERTS:
        return None
    forms = [pvalues.kernel_form(num_experts, row) for row in thresholds.view(-1, num_experts)]
    first = forms[0]
    if first is None or first.statistic not in _STATISTICS:
        return None
    cuts = torch.stack([form.cuts for form in forms if form is not None])
    return first._replace(cuts=cuts.view(thresholds.shape))


def bh_route(
    router_logits: Tensor,
    cuts: Tensor,
    *,
    statistic: str = "rest",
    exclude_top: int = 0,
    min_k: int = 1,
    max_k: int = 8,
    weighting: int = KERNEL_PLAIN,
    temperature: float = 1.0,
    weights_dtype: torch.dtype = torch.float32,
    empty: int = -1,
    exact: bool = False,
    own_k: int = 0,
) -> tuple[Tensor, ...]:
    """Route tokens by a step-up procedure.

    Parameters
    ----------
    router_logits : Tensor [tokens, experts], any float dtype, on a CUDA device
        At most 256 experts. Decisions are made in float32.
    cuts : Tensor [experts] or [sequences, experts], float32
        Of all tokens, or of each sequence of a batch: the first of as many equal parts of the tokens, and so on.
    statistic, exclude_top
        See `cut_table`, which gives all three.
    min_k, max_k : int
        Bounds on the number of experts per token; `max_k` cuts after the procedure has looked at all experts.
    weighting : int
        `bhlib.weighting.KERNEL_PLAIN` or `KERNEL_NORMALIZED`, as ``Weighting.kernel`` says it.
    temperature : float
        Divides the logits in the softmax of the weights.
    weights_dtype : torch.dtype
    empty : int
        What stands in an empty slot.
    exact : bool
        Whether to return the weights as they were computed too.
    own_k : int
        If not 0, at least `max_k`: the model's own top-k, of which what is dropped is marked as
        `bhlib.rules.routing.mark_dropped` does it.

    Returns
    -------
    weights : Tensor [tokens, max_k or own_k]
        0 in an empty slot.
    experts : Tensor [tokens, max_k or own_k], int64
        Largest logit first; of equal logits the lower index, where ``torch.topk`` leaves the order open.
    counts : Tensor [tokens], int64
    exact_weights : Tensor [tokens, max_k or own_k], float32, only with `exact`
        0 for what was dropped.

    Raises
    ------
    ValueError
        If `weighting` is no code that the kernel knows, or the tokens cannot be divided among the cuts.
    """
    if weighting not in (KERNEL_PLAIN, KERNEL_NORMALIZED):
        raise ValueError(
            f"weighting must be {KERNEL_PLAIN} (plain) or {KERNEL_NORMALIZED} (normalized), got {weighting!r}: the "
            f"kernel computes no other weights. Call the rule itself, which routes in plain torch."
        )
    if cuts.dim() == 2 and len(router_logits) % len(cuts):
        raise ValueError(
            f"{len(router_logits)} tokens cannot be divided among {len(cuts)} rows of cuts: give one row for each "
            f"sequence of the batch, or cuts [experts] for all."
        )
    # See `bhlib.kernels.forward.experts_forward`.
    route = _route_operator if torch.compiler.is_compiling() else _launch
    routed = route(
        router_logits, cuts, _STATISTICS[statistic], exclude_top, min_k, max_k, weighting == KERNEL_NORMALIZED,
        temperature, weights_dtype, empty, exact, own_k,
    )  # fmt: skip
    return routed if exact else routed[:3]


def _launch(
    router_logits: Tensor,
    cuts: Tensor,
    statistic: int,
    exclude_top: int,
    min_k: int,
    max_k: int,
    normalize: bool,
    temperature: float,
    weights_dtype: torch.dtype,
    empty: int,
    exact: bool,
    own_k: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_tokens, num_experts = router_logits.shape
    router_logits = router_logits if router_logits.stride(1) == 1 else router_logits.contiguous()
    weights, experts, counts, exact_weights = _outputs(router_logits, own_k or max_k, weights_dtype, exact)
    programs, width, rows, warps = _cut(num_tokens, num_experts)
    if num_tokens:
        with on_device(router_logits.device):
            _route[(programs,)](
                router_logits,
                cuts,
                weights,
                experts,
                counts,
                exact_weights if exact else None,
                num_tokens,
                num_tokens // len(cuts) if cuts.dim() == 2 else num_tokens,
                router_logits.stride(0),
                temperature,
                NUM_EXPERTS=num_experts,
                WIDTH=width,
                ROWS=rows,
                MIN_K=min_k,
                MAX_K=max_k,
                OWN_K=own_k,
                EMPTY=empty,
                STATISTIC=statistic,
                EXCLUDE_TOP=exclude_top,
                NORMALIZE=normalize,
                TEMPERED=temperature != 1.0,
                num_warps=warps,
            )
    return weights, experts, counts, exact_weights


def _outputs(
    router_logits: Tensor, slots: int, weights_dtype: torch.dtype, exact: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Room for the weights, the experts, the counts and, if they are wanted, the exact weights."""
    num_tokens = router_logits.shape[0]
    return (
        router_logits.new_empty(num_tokens, slots, dtype=weights_dtype),
        router_logits.new_empty(num_tokens, slots, dtype=torch.int64),
        router_logits.new_empty(num_tokens, dtype=torch.int64),
        router_logits.new_empty(num_tokens if exact else 0, slots, dtype=torch.float32),
    )


_route_operator = torch.library.custom_op("bhlib::route", _launch, mutates_args=())


@_route_operator.register_fake
def _(
    router_logits, cuts, statistic, exclude_top, min_k, max_k, normalize, temperature, weights_dtype, empty, exact,
    own_k,
):  # fmt: skip
    return _outputs(router_logits, own_k or max_k, weights_dtype, exact)


@functools.lru_cache(1024)
def _cut(num_tokens: int, num_experts: int) -> tuple[int, int, int, int]:
    """Programs; experts, with those that are none, and tokens of each; its warps.

    Few tokens: one each, to spread them; many: as much as registers hold.
    """
    width = triton.next_power_of_2(num_experts)
    rows = 1 if num_tokens <= 1024 else max(1, 256 // width)
    return triton.cdiv(num_tokens, rows), width, rows, 1


@quick
@triton.jit(do_not_specialize=["num_tokens", "tokens_each"])
def _route(
    logits_ptr,
    cuts_ptr,
    weights_ptr,
    experts_ptr,
    counts_ptr,
    exact_ptr,
    num_tokens,
    tokens_each,  # of the tokens that share a row of cuts
    row_stride,
    temperature,
    NUM_EXPERTS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    MIN_K: tl.constexpr,
    MAX_K: tl.constexpr,
    OWN_K: tl.constexpr,
    EMPTY: tl.constexpr,
    STATISTIC: tl.constexpr,
    EXCLUDE_TOP: tl.constexpr,
    NORMALIZE: tl.constexpr,
    TEMPERED: tl.constexpr,
):
    token = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    rank = tl.arange(0, WIDTH)[None, :]  # of a logit after sorting, and of an expert before
    valid = rank < NUM_EXPERTS
    inside = (token < num_tokens) & valid
    logits = tl.load(logits_ptr + token.to(tl.int64) * row_stride + rank, mask=inside, other=float("-inf"))
    logits = logits.to(tl.float32) + 0.0  # the sum turns -0 into +0, its equal

    # As integers, floats are ordered like themselves once the magnitude bits of the negative ones are flipped.
    bits = logits.to(tl.int32, bitcast=True)
    bits = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC00000, bits)  # a NaN with a sign would sort below -inf
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = tl.sort((ordered.to(tl.int64) << 8) | (255 - rank), descending=True)
    expert = 255 - (key & 255)
    ordered = (key >> 8).to(tl.int32)
    logits = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)

    largest = tl.max(logits, axis=1)[:, None]
    below = tl.where(valid, logits - largest, float("-inf"))
    odds = tl.exp(below)  # of each expert against the largest one, whose odds are exactly 1
    others = tl.sum(tl.where(rank == 0, 0.0, odds), axis=1)[:, None]
    total = others + 1.0

    if STATISTIC == 0:
        # The probability of all others, with nothing to cancel: 1 - odds is exact where it matters.
        value = -tl.where(rank == 0, others, others + (1.0 - odds)) / total
    elif STATISTIC == 1:
        value = below - tl.log(total)
    elif STATISTIC == 2:
        value = logits
    else:
        background = valid & (rank >= EXCLUDE_TOP)
        pivot = tl.sum(tl.where(rank == EXCLUDE_TOP, logits, 0.0), axis=1)[:, None]
        depth = tl.where(background, logits - pivot, 0.0)
        size: tl.constexpr = NUM_EXPERTS - EXCLUDE_TOP
        mean = tl.sum(depth, axis=1)[:, None] / size
        value = logits - pivot - mean
        if STATISTIC == 4:
            squares = tl.where(background, (depth - mean) * (depth - mean), 0.0)
            value /= tl.maximum(tl.sqrt(tl.sum(squares, axis=1)[:, None] / (size - 1)), 1e-30)

    # Step-up: the largest k whose k-th largest statistic passes the k-th cut.
    cut = tl.load(cuts_ptr + token // tokens_each * NUM_EXPERTS + rank, mask=inside, other=float("inf"))
    significant = tl.max(tl.where(valid & (value >= cut), rank + 1, 0), axis=1)
    count = tl.minimum(tl.maximum(significant, MIN_K), MAX_K)
    kept = rank < count[:, None]
    slots: tl.constexpr = OWN_K or MAX_K
    weighted = kept if OWN_K == 0 else rank < OWN_K

    if TEMPERED:
        odds = tl.exp(below / temperature)
        total = tl.sum(odds, axis=1)[:, None]
    if NORMALIZE:
        total = tl.sum(tl.where(weighted, odds, 0.0), axis=1)[:, None]
        total = tl.where(total == 0.0, 1.0, total)
    weight = tl.where(weighted, odds / total, 0.0)
    slot = token.to(tl.int64) * slots + rank
    written = (token < num_tokens) & (rank < slots)
    dropped = EMPTY if OWN_K == 0 else NUM_EXPERTS + 1 + expert
    tl.store(weights_ptr + slot, weight.to(weights_ptr.dtype.element_ty), mask=written)
    tl.store(experts_ptr + slot, tl.where(kept, expert, dropped).to(tl.int64), mask=written)
    if exact_ptr is not None:
        tl.store(exact_ptr + slot, tl.where(kept, weight, 0.0), mask=written)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tl.store(counts_ptr + row, count.to(tl.int64), mask=row < num_tokens)
