"""Benjamini-Hochberg routing of a token in one launch: logits in, weights, experts and counts out.

The same launch can write the weights a second time, as they were computed.

A program takes a few tokens. It sorts each token's logits once, as integers that carry the expert's index in their last
byte; everything else is then a running look at the sorted row: the softmax, the statistic, and the step-up decision,
which compares the k-th largest statistic with the k-th entry of a table made beforehand (`cut_table`).

Where norms of the experts' outputs are guessed (`bhlib.norms`), what is sorted and compared is the logits with the
logarithms of the norms added. The guess needs the edge, for which the logits themselves are sorted too, and a product
with a table of experts by experts; weights come from the logits, read again where the experts have come to stand.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from bhlib.kernels import MOST_EXPERTS, on_device
from bhlib.kernels.launch import quick
from bhlib.pvalues import KernelForm, PValueMaker
from bhlib.weighting import KERNEL_NORMALIZED, KERNEL_PLAIN, KERNEL_SHARES

#: Up to this many tokens, each has a program of its own.
ONE_EACH = 1024

#: Statistics that the kernel computes, by the number that it knows them by.
_STATISTICS = {"rest": 0, "log_prob": 1, "logit": 2, "centered": 3, "standardized": 4, "prob": 5}


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
    norms: tuple[Tensor, Tensor, Tensor] | None = None,
    near: int = 0,
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
        `bhlib.weighting.KERNEL_PLAIN`, `KERNEL_NORMALIZED` or `KERNEL_SHARES`, as ``Weighting.kernel`` says it. With
        `own_k` the last two are one: weights are those among the model's own.
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
    norms : tuple of Tensor, optional
        How large the outputs of experts are, on the device, float32: constant [experts], slope [experts] and table
        [experts, experts] of a `bhlib.norms.LayerNorms`. Experts are selected by weight times norm; with `own_k`,
        `max_k` may then be any.
    near : int
        How many of a token's largest logits that guess looks at, fewer than there are experts.

    Returns
    -------
    weights : Tensor [tokens, slots]
        0 in an empty slot. There are `max_k` slots; with `own_k` as many as that, and with `norms` too `max_k` more for
        what was selected from outside the model's own.
    experts : Tensor [tokens, slots], int64
        Largest logit first, or largest logit and log norm; of equal ones the lower index, where ``torch.topk`` leaves
        the order open. With `own_k` the model's own come first, by their logits.
    counts : Tensor [tokens], int64
    exact_weights : Tensor [tokens, slots], float32, only with `exact`
        0 for what was dropped.

    Raises
    ------
    ValueError
        If `weighting` is no code that the kernel knows, or the tokens cannot be divided among the cuts.
    """
    if weighting not in (KERNEL_PLAIN, KERNEL_NORMALIZED, KERNEL_SHARES):
        raise ValueError(
            f"weighting must be {KERNEL_PLAIN} (plain), {KERNEL_NORMALIZED} (normalized) or {KERNEL_SHARES} (shares of "
            f"the best max_k), got {weighting!r}: the kernel computes no other weights. Call the rule itself, which "
            f"routes in plain torch."
        )
    if cuts.dim() == 2 and len(router_logits) % len(cuts):
        raise ValueError(
            f"{len(router_logits)} tokens cannot be divided among {len(cuts)} rows of cuts: give one row for each "
            f"sequence of the batch, or cuts [experts] for all."
        )
    # See `bhlib.kernels.forward.experts_forward`.
    route = _route_operator if torch.compiler.is_compiling() else _launch
    routed = route(
        router_logits, cuts, _STATISTICS[statistic], exclude_top, min_k, max_k, weighting, temperature, weights_dtype,
        empty, exact, own_k, *(norms or (None, None, None)), near,
    )  # fmt: skip
    return routed if exact else routed[:3]


def _launch(
    router_logits: Tensor,
    cuts: Tensor,
    statistic: int,
    exclude_top: int,
    min_k: int,
    max_k: int,
    weighting: int,
    temperature: float,
    weights_dtype: torch.dtype,
    empty: int,
    exact: bool,
    own_k: int,
    constant: Tensor | None,
    slope: Tensor | None,
    table: Tensor | None,
    near: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_tokens, num_experts = router_logits.shape
    router_logits = router_logits if router_logits.stride(1) == 1 else router_logits.contiguous()
    with_norms = constant is not None
    slots = _slots(max_k, own_k, with_norms)
    weights, experts, counts, exact_weights = _outputs(router_logits, slots, weights_dtype, exact)
    programs, width, rows, warps = _cut(num_tokens, num_experts, with_norms and near > 0)
    if num_tokens:
        with on_device(router_logits.device):
            _route[(programs,)](
                router_logits,
                cuts,
                weights,
                experts,
                counts,
                exact_weights if exact else None,
                constant,
                slope,
                table,
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
                NORMALIZE=weighting != KERNEL_PLAIN,
                SHARES=weighting == KERNEL_SHARES and not own_k,
                TEMPERED=temperature != 1.0,
                NEAR=near if with_norms else -1,
                STEP=min(width, max(16, 2048 // width)),
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
    router_logits, cuts, statistic, exclude_top, min_k, max_k, weighting, temperature, weights_dtype, empty, exact,
    own_k, constant, slope, table, near,
):  # fmt: skip
    return _outputs(router_logits, _slots(max_k, own_k, constant is not None), weights_dtype, exact)


def _slots(max_k: int, own_k: int, with_norms: bool) -> int:
    """Slots of a token."""
    return own_k + max_k if own_k and with_norms else own_k or max_k


@functools.lru_cache(1024)
def _cut(num_tokens: int, num_experts: int, by_product: bool) -> tuple[int, int, int, int]:
    """Programs; experts, with those that are none, and tokens of each; its warps.

    Few tokens: one each, to spread them; many: as much as registers hold, or what tensor cores take.
    """
    width = triton.next_power_of_2(num_experts)
    rows, warps = 1, 1
    if num_tokens > ONE_EACH and by_product:
        width, rows, warps = max(16, width), max(16, 256 // width), 4
    elif num_tokens > ONE_EACH:
        rows = max(1, 256 // width)
    return triton.cdiv(num_tokens, rows), width, rows, warps


@triton.jit
def _keys(logits, expert):
    """Logits as integers ordered like them, with the expert in the last byte: of equal ones the first leads."""
    # As integers, floats are ordered like themselves once the magnitude bits of the negative ones are flipped.
    bits = logits.to(tl.int32, bitcast=True)
    bits = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC00000, bits)  # a NaN with a sign would sort below -inf
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 8) | (255 - expert)


@triton.jit
def _logits_of(keys):
    ordered = (keys >> 8).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _at_rank(keys, rank, wanted):
    """Of sorted keys [rows, experts] those of one rank: [rows, 1]."""
    return tl.sum(tl.where(rank == wanted, keys, 0), axis=1)[:, None]


@triton.jit
def _log_norms(
    logits_ptr, constant_ptr, slope_ptr, table_ptr, token, num_tokens, row_stride, edge,
    NUM_EXPERTS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, NEAR: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The guess of `bhlib.norms.LayerNorms`, [ROWS, WIDTH]."""
    column = tl.arange(0, WIDTH)[None, :]
    valid = column < NUM_EXPERTS
    total = tl.load(constant_ptr + column, mask=valid, other=0.0)
    if NEAR > 0:
        # Of all experts: those below the edge have no excess, and to find the others would take longer.
        said = tl.zeros([ROWS, WIDTH], tl.float32)
        if ROWS == 1:
            for start in range(0, NUM_EXPERTS, 64):
                for step in tl.static_range(min(NUM_EXPERTS, 64)):
                    near = start + step
                    there = near < NUM_EXPERTS
                    x = tl.load(logits_ptr + tl.program_id(0).to(tl.int64) * row_stride + near, mask=there, other=0.0)
                    excess = tl.maximum(x.to(tl.float32) - edge, 0.0)
                    rows = tl.load(
                        table_ptr + near * NUM_EXPERTS + column, mask=valid & there & (excess > 0), other=0.0
                    )
                    said += excess * rows
        else:
            for start in tl.static_range(0, WIDTH, STEP):
                near = start + tl.arange(0, STEP)
                there = (token < num_tokens) & (near < NUM_EXPERTS)[None, :]
                x_ptrs = logits_ptr + token.to(tl.int64) * row_stride + near[None, :]
                excess = tl.maximum(tl.load(x_ptrs, mask=there, other=float("-inf")).to(tl.float32) - edge, 0.0)
                rows_ptrs = table_ptr + near[:, None] * NUM_EXPERTS + column
                rows = tl.load(rows_ptrs, mask=(near < NUM_EXPERTS)[:, None] & valid, other=0.0)
                said = tl.dot(excess, rows, said, input_precision="tf32x3")  # as exact as in float32
        total = total + edge * tl.load(slope_ptr + column, mask=valid, other=0.0) + said
    return total


@quick
@triton.jit(do_not_specialize=["num_tokens", "tokens_each"])
def _route(
    logits_ptr,
    cuts_ptr,
    weights_ptr,
    experts_ptr,
    counts_ptr,
    exact_ptr,
    constant_ptr,
    slope_ptr,
    table_ptr,
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
    SHARES: tl.constexpr,  # by the sum of the best MAX_K by the logits, kept or not
    TEMPERED: tl.constexpr,
    NEAR: tl.constexpr,  # -1 without norms
    STEP: tl.constexpr,
):
    token = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    rank = tl.arange(0, WIDTH)[None, :]  # of a logit after sorting, and of an expert before
    valid = rank < NUM_EXPERTS
    inside = (token < num_tokens) & valid
    logits = tl.load(logits_ptr + token.to(tl.int64) * row_stride + rank, mask=inside, other=float("-inf"))
    logits = logits.to(tl.float32) + 0.0  # the sum turns -0 into +0, its equal

    if NEAR >= 0:
        own = _keys(logits, rank)
        edge = 0.0
        if NEAR > 0 or OWN_K > 0 or SHARES:
            own = tl.sort(own, descending=True)
            edge = _logits_of(_at_rank(own, rank, NEAR))
        logits += _log_norms(
            logits_ptr, constant_ptr, slope_ptr, table_ptr, token, num_tokens, row_stride, edge,
            NUM_EXPERTS, WIDTH, ROWS, NEAR, STEP,
        )  # fmt: skip
    key = tl.sort(_keys(logits, rank), descending=True)
    expert = 255 - (key & 255)
    logits = _logits_of(key)

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
    elif STATISTIC == 5:
        value = odds / total
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
    beside: tl.constexpr = NEAR >= 0 and OWN_K > 0  # what is selected need not be the model's own, in either order
    if NEAR >= 0:  # weights are those of the logits without norms
        logits_ptrs = logits_ptr + token.to(tl.int64) * row_stride + expert
        logits = tl.load(logits_ptrs, mask=inside, other=float("-inf")).to(tl.float32) + 0.0
        below = tl.where(valid, logits - tl.max(logits, axis=1)[:, None], float("-inf"))
        odds = tl.exp(below)
        total = tl.sum(odds, axis=1)[:, None]
    if beside:
        mine = _keys(logits, expert)
        place = tl.zeros([ROWS, WIDTH], tl.int32)  # rank by the logits, where it is below OWN_K
        for better in tl.static_range(OWN_K):
            place += (_at_rank(own, rank, better) > mine).to(tl.int32)
        weighted = valid & (place < OWN_K)
    elif OWN_K > 0:
        weighted = rank < OWN_K
    else:
        weighted = kept

    if TEMPERED:
        odds = tl.exp(below / temperature)
        total = tl.sum(odds, axis=1)[:, None]
    if NORMALIZE:
        if not SHARES:
            summed = tl.where(weighted, odds, 0.0)
        elif NEAR >= 0:
            best = _logits_of(own)
            best = tl.where(valid, best - tl.max(best, axis=1)[:, None], float("-inf"))
            summed = tl.where(rank < MAX_K, tl.exp(best / temperature), 0.0)
        else:
            summed = tl.where(rank < MAX_K, odds, 0.0)
        total = tl.sum(summed, axis=1)[:, None]
        total = tl.where(total == 0.0, 1.0, total)
    if beside:
        slots: tl.constexpr = OWN_K + MAX_K
        first = token.to(tl.int64) * slots
        _store(
            weights_ptr, experts_ptr, exact_ptr, first + place, odds / total,
            tl.where(kept, expert, NUM_EXPERTS + 1 + expert), kept, inside & weighted,
        )  # fmt: skip
        others = kept & ~weighted
        _store(
            weights_ptr, experts_ptr, exact_ptr, first + OWN_K + rank, tl.where(others, odds / total, 0.0),
            tl.where(others, expert, EMPTY), others, (token < num_tokens) & (rank < MAX_K),
        )  # fmt: skip
    else:
        slots: tl.constexpr = OWN_K or MAX_K
        dropped = EMPTY if OWN_K == 0 else NUM_EXPERTS + 1 + expert
        _store(
            weights_ptr, experts_ptr, exact_ptr, token.to(tl.int64) * slots + rank,
            tl.where(weighted, odds / total, 0.0), tl.where(kept, expert, dropped), kept,
            (token < num_tokens) & (rank < slots),
        )  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tl.store(counts_ptr + row, count.to(tl.int64), mask=row < num_tokens)


@triton.jit
def _store(weights_ptr, experts_ptr, exact_ptr, slot, weight, expert, kept, written):
    """Fill slots; `exact_ptr` may be None."""
    tl.store(weights_ptr + slot, weight.to(weights_ptr.dtype.element_ty), mask=written)
    tl.store(experts_ptr + slot, expert.to(tl.int64), mask=written)
    if exact_ptr is not None:
        tl.store(exact_ptr + slot, tl.where(kept, weight, 0.0), mask=written)
