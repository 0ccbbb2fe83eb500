"""Multiple testing on tensors of p-values: which hypotheses does a procedure reject?

Every procedure has one signature and tests along the last axis, each vector of p-values on its own::

    reject = benjamini_hochberg(pvals, alpha=0.05)      # [..., m] float -> [..., m] bool

For a router, ``m`` is the number of experts, one vector is one token in one layer, and a rejected hypothesis
("this expert does not stand out") is an expert that is switched on.

Conventions
-----------
*Comparison.* A p-value equal to its critical value is rejected (``<=``), as in scipy and statsmodels. A
critical value is a float64 number, with statsmodels' order of operations: ``(k / m) * alpha`` for
Benjamini-Hochberg.

*Precision.* float64 is compared as float64, everything narrower as float32 or wider. Critical values for
float32 are rounded down from float64, so a float32 p-value gets the decision that the same number gets in
float64. What half precision lost before it came here stays lost: compute p-values in float32.

*Ties.* Equal p-values of one vector get equal decisions.

*Empty.* ``m = 0`` gives an empty result.

*Speed.* ``check=True`` looks for NaN and out-of-range p-values, which waits for the GPU. ``check=False``
never waits; a NaN is then never rejected.
"""

import functools
import math
import numbers
from collections.abc import Callable

import numpy as np
import torch

ALIASES = {
    "benjamini_hochberg": "bh", "fdr_bh": "bh", "fdr_i": "bh", "fdr_p": "bh", "fdri": "bh", "fdrp": "bh",
    "benjamini_yekutieli": "by", "fdr_by": "by", "fdr_n": "by", "fdr_c": "by", "fdrn": "by", "fdrcorr": "by",
    "two_stage_bh": "tsbky", "fdr_tsbky": "tsbky", "fdr_2sbky": "tsbky", "fdr_twostage": "tsbky",
    "fdr_tsbh": "tsbh", "fdr_2sbh": "tsbh",
    "b": "bonferroni", "bonf": "bonferroni",
    "h": "holm",
    "sh": "hochberg", "simes-hochberg": "hochberg",
    "fixed_cut": "fixed", "uncorrected": "fixed",
    "higher_criticism": "hc",
}  # fmt: skip
"""Other names of the procedures: those of ``statsmodels.stats.multitest.multipletests`` and the long ones."""

STOREY_LAMBDA = 0.5
"""P-values above it count as true nulls' in `storey`, unless said otherwise."""


# --------------------------------------------------------------------------------------- procedures


def benjamini_hochberg(pvals: torch.Tensor, alpha: float = 0.05, *, check: bool = True) -> torch.Tensor:
    """Benjamini-Hochberg step-up procedure: controls the false discovery rate (FDR).

    With the p-values sorted, ``p_(1) <= ... <= p_(m)``, rejects the ``K`` smallest, ``K`` being the largest
    ``k`` such that ``p_(k) <= k / m * alpha``.

    Parameters
    ----------
    pvals : Tensor [..., m], any floating dtype, on any device
        P-values in [0, 1]; the last axis is tested.
    alpha : float
        Level, strictly between 0 and 1.
    check : bool
        Whether to look for NaN and out-of-range p-values (see `check_pvalues`).

    Returns
    -------
    Tensor [..., m], bool
        True where the hypothesis is rejected.

    Raises
    ------
    TypeError
        If `pvals` is not a floating-point tensor or `alpha` is not a number.
    ValueError
        If `pvals` has no axis to test, if `alpha` is outside (0, 1), or, with `check`, if a p-value is NaN or
        outside [0, 1].

    Notes
    -----
    Guarantee: the FDR is at most ``alpha * m0 / m``, with ``m0`` the number of true nulls, if the true nulls'
    p-values are (super-)uniform and independent, of each other and of the false nulls' [1]_, or positively
    dependent (PRDS: larger values of any one true null's p-value make larger values of all the others likelier)
    [2]_. It is equal to this bound for independent and exactly uniform null p-values. Under other dependence the
    bound is larger by a factor of up to ``1 + 1/2 + ... + 1/m``, and there are distributions that attain it.

    References
    ----------
    .. [1] Benjamini & Hochberg (1995), J. R. Statist. Soc. B 57, 289-300.
    .. [2] Benjamini & Yekutieli (2001), Ann. Statist. 29, 1165-1188.

    Examples
    --------
    >>> benjamini_hochberg(torch.tensor([0.001, 0.02, 0.03, 0.9]), alpha=0.05)
    tensor([ True,  True,  True, False])
    """
    pvals = _prepare(pvals, alpha, check)
    return _step_up(pvals, _critical_values_like(pvals, alpha, "bh"))


def benjamini_yekutieli(pvals: torch.Tensor, alpha: float = 0.05, *, check: bool = True) -> torch.Tensor:
    """Benjamini-Yekutieli step-up procedure: controls the FDR under any dependence.

    Benjamini-Hochberg at level ``alpha / (1 + 1/2 + ... + 1/m)``; for 64 tests this is ``alpha / 4.74``.
    Parameters, result and errors as for `benjamini_hochberg`.

    Notes
    -----
    Guarantee: FDR at most ``alpha * m0 / m`` whatever the dependence [1]_.

    References
    ----------
    .. [1] Benjamini & Yekutieli (2001), Ann. Statist. 29, 1165-1188, theorem 1.3.
    """
    pvals = _prepare(pvals, alpha, check)
    return _step_up(pvals, _critical_values_like(pvals, alpha, "by"))


def storey(
    pvals: torch.Tensor, alpha: float = 0.05, *, lambda_: float = STOREY_LAMBDA, check: bool = True
) -> torch.Tensor:
    """Storey's adaptive Benjamini-Hochberg: estimates the fraction of true nulls and spends what it leaves.

    Benjamini-Hochberg at level ``alpha / pi0``, with ``pi0`` from `storey_null_fraction`, rejecting no
    p-value above `lambda_`. Other parameters, result and errors as for `benjamini_hochberg`.

    Parameters
    ----------
    lambda_ : float
        P-values above it are taken to be nulls', strictly between 0 and 1.

    Notes
    -----
    Guarantee: FDR at most ``alpha`` for independent uniform null p-values, in finite samples [1]_. The proof
    needs the ``+ 1`` in the estimate, the restriction to p-values up to `lambda_`, and an estimate that is
    not capped at one: a cap would keep the excess of estimates that are too low and drop the caution of those
    that are too high. Under positive dependence the estimate is unstable and the FDR can exceed ``alpha``.

    References
    ----------
    .. [1] Storey, Taylor & Siegmund (2004), J. R. Statist. Soc. B 66, 187-205, theorem 3.
    """
    pvals = _prepare(pvals, alpha, check).double()
    level = _divide(alpha, storey_null_fraction(pvals, lambda_=lambda_, check=False))
    return _step_up(pvals, (_fractions(pvals) * level.unsqueeze(-1)).clamp(max=lambda_))


def two_stage_bh(pvals: torch.Tensor, alpha: float = 0.05, *, check: bool = True) -> torch.Tensor:
    """Two-stage adaptive Benjamini-Hochberg of Benjamini, Krieger & Yekutieli (``fdr_tsbky``).

    The first stage is Benjamini-Hochberg at ``alpha' = alpha / (1 + alpha)``. If it rejects ``r`` hypotheses,
    ``0 < r < m``, the second stage is Benjamini-Hochberg at ``alpha' * m / (m - r)``.
    Parameters, result and errors as for `benjamini_hochberg`.

    Notes
    -----
    Guarantee: FDR at most ``alpha`` for independent uniform null p-values [1]_. Under positive dependence it
    is, in the authors' simulations, the most robust of the adaptive procedures; there is no proof.

    References
    ----------
    .. [1] Benjamini, Krieger & Yekutieli (2006), Biometrika 93, 491-507, definition 6.
    """
    pvals = _prepare(pvals, alpha, check)
    return _two_stage(pvals, float(alpha) / (1.0 + float(alpha)))


def two_stage_bh_full_level(pvals: torch.Tensor, alpha: float = 0.05, *, check: bool = True) -> torch.Tensor:
    """Two-stage adaptive Benjamini-Hochberg whose first stage spends all of `alpha` (``fdr_tsbh``).

    As `two_stage_bh`, with ``alpha' = alpha``: more rejections, but the proof of FDR control for
    `two_stage_bh` rests on the smaller level and does not cover it.
    Parameters, result and errors as for `benjamini_hochberg`.
    """
    pvals = _prepare(pvals, alpha, check)
    return _two_stage(pvals, float(alpha))


def bonferroni(pvals: torch.Tensor, alpha: float = 0.05, *, check: bool = True) -> torch.Tensor:
    """Bonferroni: reject p-values up to ``alpha / m``. Controls the familywise error rate, any dependence.

    Parameters, result and errors as for `benjamini_hochberg`.
    """
    pvals = _prepare(pvals, alpha, check)
    return pvals <= _critical_values_like(pvals, alpha, "bonferroni")


def holm(pvals: torch.Tensor, alpha: float = 0.05, *, check: bool = True) -> torch.Tensor:
    """Holm's step-down procedure: controls the familywise error rate under any dependence.

    Rejects ``p_(1), p_(2), ...`` until the first ``k`` with ``p_(k) > alpha / (m - k + 1)``. Rejects whatever
    Bonferroni rejects, under the same assumptions [1]_.
    Parameters, result and errors as for `benjamini_hochberg`.

    References
    ----------
    .. [1] Holm (1979), Scand. J. Statist. 6, 65-70.
    """
    pvals = _prepare(pvals, alpha, check)
    return _step_down(pvals, _critical_values_like(pvals, alpha, "hochberg"))


def hochberg(pvals: torch.Tensor, alpha: float = 0.05, *, check: bool = True) -> torch.Tensor:
    """Hochberg's step-up procedure: controls the familywise error rate under independence or PRDS.

    Rejects the ``K`` smallest p-values, ``K`` the largest ``k`` with ``p_(k) <= alpha / (m - k + 1)`` [1]_.
    Parameters, result and errors as for `benjamini_hochberg`.

    References
    ----------
    .. [1] Hochberg (1988), Biometrika 75, 800-802.
    """
    pvals = _prepare(pvals, alpha, check)
    return _step_up(pvals, _critical_values_like(pvals, alpha, "hochberg"))


def fixed_cut(pvals: torch.Tensor, alpha: float = 0.05, *, check: bool = True) -> torch.Tensor:
    """No correction: reject p-values up to `alpha`. Controls the error rate of each single test, no more.

    Parameters, result and errors as for `benjamini_hochberg`.
    """
    pvals = _prepare(pvals, alpha, check)
    return pvals <= _critical_values_like(pvals, alpha, "fixed")


def higher_criticism(pvals: torch.Tensor, alpha: float = 0.05, *, check: bool = True) -> torch.Tensor:
    """Higher Criticism thresholding of Donoho & Jin: reject up to where the p-values are most surprising.

    The score of the ``i``-th smallest p-value is its distance from what uniform p-values would show, in
    standard deviations: ``sqrt(m) * (i/m - p_(i)) / sqrt(i/m * (1 - i/m))``. Rejects the p-values up to the
    one with the highest score (the largest such p-value if several share it), if that score is positive.
    Parameters, result and errors as for `benjamini_hochberg`, except for `alpha`.

    Parameters
    ----------
    alpha : float
        **Not an error rate.** The fraction ``alpha_0`` of the smallest p-values among which the highest score
        is searched: the first ``floor(alpha * m)``, at least one, never all ``m``. It is thus a cap on the
        number of rejections (apart from ties with the last one rejected); the paper uses 0.1. A larger
        `alpha` never rejects less.

    Notes
    -----
    Guarantee: none on error rates; the threshold is asymptotically optimal for classification when signals
    are rare and weak [1]_. A single test (``m = 1``) has no score and is not rejected.

    References
    ----------
    .. [1] Donoho & Jin (2008), Proc. Natl. Acad. Sci. 105, 14790-14795.
    """
    pvals = _prepare(pvals, alpha, check).double()
    num_tests = pvals.shape[-1]
    # The small term keeps e.g. 0.29 * 100 = 28.999999999999996 from losing its 29th p-value.
    searched = min(max(1, math.floor(alpha * num_tests + 1e-9)), num_tests - 1)
    if searched < 1:
        return torch.zeros_like(pvals, dtype=torch.bool)
    ordered = ascending(pvals)[..., :searched]
    expected = _fractions(pvals)[:searched]
    score = (expected - ordered) / (expected * (1.0 - expected)).sqrt()  # sqrt(m) does not move the maximum
    best = score.amax(dim=-1, keepdim=True)
    return _reject_up_to_last(pvals, ordered, (score == best) & (best > 0))


PROCEDURES: dict[str, Callable[..., torch.Tensor]] = {
    "bh": benjamini_hochberg,
    "by": benjamini_yekutieli,
    "storey": storey,
    "tsbky": two_stage_bh,
    "tsbh": two_stage_bh_full_level,
    "bonferroni": bonferroni,
    "holm": holm,
    "hochberg": hochberg,
    "fixed": fixed_cut,
    "hc": higher_criticism,
}
"""Canonical name -> procedure."""


# --------------------------------------------------------------------------------------- by name


def canonical_method(name: str) -> str:
    """Canonical name of a procedure, e.g. ``"fdr_bh" -> "bh"``; case does not matter.

    Raises
    ------
    ValueError
        If there is no procedure of that name; the message lists those that exist.
    """
    key = str(name).lower()
    key = ALIASES.get(key, key)
    if key not in PROCEDURES:
        aliases = ", ".join(f"{alias!r}" for alias in sorted(ALIASES))
        raise ValueError(
            f"method={name!r} is not a procedure; choose one of {', '.join(map(repr, PROCEDURES))} "
            f"(also known as {aliases})"
        )
    return key


def reject(pvals: torch.Tensor, alpha: float = 0.05, method: str = "bh", *, check: bool = True) -> torch.Tensor:
    """Decisions of the procedure called `method`; parameters, result and errors as for `benjamini_hochberg`.

    Parameters
    ----------
    method : str
        A key of `PROCEDURES` or of `ALIASES`.
    """
    return PROCEDURES[canonical_method(method)](pvals, alpha, check=check)


def critical_values(
    num_tests: int,
    alpha: float = 0.05,
    method: str = "bh",
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """The constants ``c`` such that the decision only compares ``p_(k)`` with ``c[k - 1]``.

    The procedure rejects the ``K`` smallest p-values, ``K`` the largest ``k`` with ``p_(k) <= c[k - 1]``.
    Knowing them in advance, a router can compare statistics instead and needs no p-values.

    Parameters
    ----------
    num_tests : int
        Number of hypotheses ``m``, at least 0.
    alpha : float
        Level, strictly between 0 and 1.
    method : str
        ``"bh"``, ``"by"``, ``"hochberg"``, ``"bonferroni"`` or ``"fixed"``, or an alias of one of these.
    dtype : torch.float64 or torch.float32
        float32 values are rounded down, which keeps every decision on float32 p-values.

    Returns
    -------
    Tensor [num_tests], `dtype`
        Nondecreasing in ``k``.

    Raises
    ------
    ValueError
        If the decision of `method` is not of this form, because its thresholds depend on the p-values
        (Storey, two-stage, Higher Criticism) or because it steps down (Holm).
    """
    check_alpha(alpha)
    name = canonical_method(method)
    if name not in _FORMULAS:
        raise ValueError(
            f"method={method!r} is not a comparison of the k-th smallest p-value with a constant, largest k "
            f"first; critical values exist for {', '.join(map(repr, _FORMULAS))}. "
            f"Use reject(pvals, alpha, {name!r})."
        )
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype={dtype} is too narrow for p-values; use torch.float32 or torch.float64")
    if num_tests < 0:
        raise ValueError(f"num_tests={num_tests} must be at least 0")
    return _critical_values(int(num_tests), float(alpha), name, dtype, torch.device(device)).clone()


def adjusted_pvalues(pvals: torch.Tensor, method: str = "bh", *, check: bool = True) -> torch.Tensor:
    """Adjusted p-values: for each hypothesis, the smallest level at which `method` rejects it.

    ``adjusted_pvalues(p, method) <= alpha`` agrees with ``reject(p, alpha, method)`` except where the two
    sides differ in the last digits only. For decisions call `reject`, whose convention is exact.

    Parameters
    ----------
    pvals : Tensor [..., m], any floating dtype
    method : str
        ``"bh"``, ``"by"``, ``"storey"`` (q-values), ``"bonferroni"``, ``"holm"``, ``"hochberg"``, ``"fixed"``
        (the p-values themselves), or an alias of one of these.

    Returns
    -------
    Tensor [..., m], float32, or float64 if `pvals` is
        At most 1.

    Raises
    ------
    ValueError
        If `method` has no adjusted p-values: those of a two-stage procedure are specific to one level, and
        Higher Criticism has no level.
    """
    name = canonical_method(method)
    if name not in _ADJUSTMENTS:
        raise ValueError(
            f"method={method!r} has no adjusted p-values; they exist for "
            f"{', '.join(map(repr, _ADJUSTMENTS))}. "
            f"Use reject(pvals, alpha, {name!r}) at the levels of interest."
        )
    pvals = _as_pvalues(pvals, check)
    if pvals.shape[-1] == 0:
        return pvals.clone()
    ordered, order = pvals.sort(dim=-1)
    adjusted = _ADJUSTMENTS[name](ordered).clamp(max=1.0)
    return torch.empty_like(adjusted).scatter(-1, order, adjusted)


def storey_null_fraction(pvals: torch.Tensor, *, lambda_: float = STOREY_LAMBDA, check: bool = True) -> torch.Tensor:
    """Storey's estimate of the fraction of true nulls, ``(1 + #{p > lambda_}) / (m * (1 - lambda_))``.

    Can exceed one (see `storey`): a true fraction cannot, so cap it for display.

    Parameters
    ----------
    pvals : Tensor [..., m], any floating dtype
    lambda_ : float
        Strictly between 0 and 1.

    Returns
    -------
    Tensor [...], float64
        Infinite if there is no hypothesis (``m = 0``).

    Raises
    ------
    ValueError
        If `lambda_` is outside (0, 1), or, with `check`, a p-value is NaN or outside [0, 1].
    """
    if not 0.0 < lambda_ < 1.0:
        raise ValueError(f"lambda_={lambda_!r} must lie strictly between 0 and 1; 0.5 is the usual choice")
    pvals = _as_pvalues(pvals, check)
    above = (pvals.double() > lambda_).sum(dim=-1).double()
    return _divide(1.0 + above, pvals.shape[-1] * (1.0 - lambda_))


# --------------------------------------------------------------------------------------- checks


def check_pvalues(pvals: torch.Tensor) -> None:
    """Refuse what is not a p-value, saying where it is. Waits for the GPU.

    Raises
    ------
    TypeError
        If `pvals` is not a floating-point tensor.
    ValueError
        If there is no axis to test, or an entry is NaN or outside [0, 1]: the message has the first one's
        index and value, and how many there are.
    """
    _check_tensor(pvals)
    pvals = _widen(pvals)
    bad = ~((pvals >= 0) & (pvals <= 1))  # the negation catches NaN, which fails both comparisons
    if not bad.any():
        return
    index = tuple(bad.nonzero()[0].tolist())
    value = pvals[index].item()
    kind = "NaN" if math.isnan(value) else f"{value:g}, outside [0, 1]"
    raise ValueError(
        f"pvals[{', '.join(map(str, index))}] is {kind} ({int(bad.sum())} of {pvals.numel()} entries are not "
        "p-values); compute p-values in float32 or wider, as a survival function, and clamp them to [0, 1]"
    )


def check_alpha(alpha: float) -> None:
    """Refuse a level that is not a number (TypeError) or not strictly between 0 and 1 (ValueError)."""
    if not isinstance(alpha, numbers.Real) or isinstance(alpha, bool):
        raise TypeError(f"alpha must be a number, not {type(alpha).__name__}; use float(alpha)")
    if not 0.0 < alpha < 1.0:
        raise ValueError(f"alpha={alpha!r} must lie strictly between 0 and 1, e.g. alpha=0.05")


def is_whole(value: object) -> bool:
    """Whether it is a whole number, Python's or numpy's; True and False are not."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _check_tensor(pvals: torch.Tensor) -> None:
    if not isinstance(pvals, torch.Tensor):
        kind = type(pvals).__name__
        raise TypeError(f"pvals must be a torch.Tensor, not {kind}; use torch.as_tensor(pvals)")
    if not pvals.is_floating_point():
        raise TypeError(f"pvals must be floating point, not {pvals.dtype}; use pvals.float()")
    if pvals.ndim == 0:
        raise ValueError("pvals is a single number without an axis to test along; use pvals.reshape(1)")


def _prepare(pvals: torch.Tensor, alpha: float, check: bool) -> torch.Tensor:
    """`alpha` checked, and `pvals` ready for the comparison."""
    check_alpha(alpha)
    return _as_pvalues(pvals, check)


def _as_pvalues(pvals: torch.Tensor, check: bool) -> torch.Tensor:
    """`pvals` checked, cut from any autograd graph, in float32 or float64."""
    if check:
        check_pvalues(pvals)
    else:
        _check_tensor(pvals)
    return _widen(pvals)


def _widen(pvals: torch.Tensor) -> torch.Tensor:
    return pvals.detach().to(torch.float64 if pvals.dtype == torch.float64 else torch.float32)


# --------------------------------------------------------------------------------------- decisions


def ascending(values: torch.Tensor) -> torch.Tensor:
    """`values` sorted along the last axis, NaN last, outside autograd: a new tensor, which may be written to.

    On a CPU numpy sorts, with vector instructions: some twenty times as fast as torch for rows of 64.
    """
    if values.device.type == "cpu" and not torch.compiler.is_compiling():
        return torch.from_numpy(np.sort(values.detach().numpy(), axis=-1))
    return values.detach().sort(dim=-1).values


def _step_up(pvals: torch.Tensor, critical: torch.Tensor) -> torch.Tensor:
    """Reject the K smallest, K the largest k with ``p_(k) <= critical[..., k-1]`` (nondecreasing in k)."""
    if pvals.shape[-1] == 0:
        return torch.zeros_like(pvals, dtype=torch.bool)
    passed = ascending(pvals) <= critical
    # A p-value beyond the K-th exceeds its own critical value, and so the K-th one too: no rank is needed any more.
    return pvals <= torch.where(passed, critical, -math.inf).amax(dim=-1, keepdim=True)


def _step_down(pvals: torch.Tensor, critical: torch.Tensor) -> torch.Tensor:
    """Reject the K smallest, K + 1 the first k with ``p_(k) > critical[..., k-1]`` (nondecreasing in k)."""
    ordered = ascending(pvals)
    failures_so_far = (~(ordered <= critical)).cumsum(dim=-1)
    return _reject_up_to_last(pvals, ordered, failures_so_far == 0)


def _reject_up_to_last(pvals: torch.Tensor, ordered: torch.Tensor, passed: torch.Tensor) -> torch.Tensor:
    """Reject p-values up to the largest of `ordered` that passed; none passed, none rejected. Overwrites `ordered`."""
    if ordered.shape[-1] == 0:
        return torch.zeros_like(pvals, dtype=torch.bool)
    return pvals <= ordered.masked_fill_(~passed, -math.inf).amax(dim=-1, keepdim=True)


def _two_stage(pvals: torch.Tensor, first_level: float) -> torch.Tensor:
    pvals = pvals.double()
    fractions = _fractions(pvals)
    num_tests = pvals.shape[-1]
    found = _step_up(pvals, fractions * first_level).sum(dim=-1, keepdim=True).double()
    # If all were rejected, the second level is infinite and rejects all again.
    second_level = _divide(first_level * num_tests, num_tests - found)
    return _step_up(pvals, fractions * second_level) & (found > 0)


def _fractions(pvals: torch.Tensor) -> torch.Tensor:
    """``k / m`` for k = 1 ... m, in the dtype and on the device of `pvals`."""
    num_tests = pvals.shape[-1]
    return _divide(torch.arange(1, num_tests + 1, dtype=pvals.dtype, device=pvals.device), num_tests)


def _divide(numerator: float | torch.Tensor, denominator: float | torch.Tensor) -> torch.Tensor:
    """The quotient, rounded once. Between a tensor and a Python number, torch may multiply with a reciprocal
    instead, which rounds twice and moves a critical value by its last bit."""
    if not isinstance(numerator, torch.Tensor):
        assert isinstance(denominator, torch.Tensor)
        return torch.full_like(denominator, numerator) / denominator
    if not isinstance(denominator, torch.Tensor):
        denominator = torch.full_like(numerator, denominator)
    return numerator / denominator


# --------------------------------------------------------------------------------------- constants


def _harmonic(num_tests: int) -> float:
    """1 + 1/2 + ... + 1/m, summed in numpy's order so that it is statsmodels' number to the last bit."""
    return float(np.sum(1.0 / np.arange(1, num_tests + 1)))


_FORMULAS: dict[str, Callable[[torch.Tensor, int, float], torch.Tensor]] = {
    "bh": lambda k, m, alpha: _divide(k, m) * alpha,
    "by": lambda k, m, alpha: _divide(_divide(k, m), _harmonic(m)) * alpha,
    "hochberg": lambda k, m, alpha: _divide(alpha, m - k + 1),
    "bonferroni": lambda k, m, alpha: torch.full_like(k, alpha / max(m, 1)),
    "fixed": lambda k, m, alpha: torch.full_like(k, alpha),
}
"""Critical value of ``p_(k)``, from ranks ``k`` (float64), their number ``m`` and the level."""


@functools.lru_cache(maxsize=256)
def _critical_values(num_tests: int, alpha: float, name: str, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """`critical_values` without checks. Kept between calls: callers must not write to it."""
    ranks = torch.arange(1, num_tests + 1, dtype=torch.float64, device=device)
    return round_down(_FORMULAS[name](ranks, num_tests, alpha), dtype)


def _critical_values_like(pvals: torch.Tensor, alpha: float, name: str) -> torch.Tensor:
    # A compiler traces with tensors that hold no values; those must not be kept.
    build = _critical_values.__wrapped__ if torch.compiler.is_compiling() else _critical_values
    return build(pvals.shape[-1], float(alpha), name, pvals.dtype, pvals.device)


def round_down(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The largest numbers of `dtype` that do not exceed the numbers `exact`, float64 or float32, so that a p-value of
    that `dtype` passes the same comparison before and after."""
    rounded = exact.to(dtype)
    below = torch.nextafter(rounded, torch.full_like(rounded, -torch.inf))
    return torch.where(rounded > exact, below, rounded)


# --------------------------------------------------------------------------------------- adjustments


def _running_minimum_from_top(raw: torch.Tensor) -> torch.Tensor:
    """A step-up procedure that rejects ``p_(k)`` rejects all smaller ones too."""
    return raw.flip(-1).cummin(dim=-1).values.flip(-1)


def _remaining(ordered: torch.Tensor) -> torch.Tensor:
    """``m - k + 1`` for k = 1 ... m: the hypotheses that are left when the k-th is tested."""
    return torch.arange(ordered.shape[-1], 0, -1, dtype=ordered.dtype, device=ordered.device)


def _adjust_bh(ordered: torch.Tensor) -> torch.Tensor:
    return _running_minimum_from_top(ordered / _fractions(ordered))


def _adjust_by(ordered: torch.Tensor) -> torch.Tensor:
    return _adjust_bh(ordered) * _harmonic(ordered.shape[-1])


def _adjust_storey(ordered: torch.Tensor) -> torch.Tensor:
    wide = ordered.double()
    null_fraction = storey_null_fraction(wide, check=False).unsqueeze(-1)
    raw = wide / _fractions(wide) * null_fraction
    raw = raw.masked_fill(wide > STOREY_LAMBDA, 1.0)  # rejected at no level
    return _running_minimum_from_top(raw).to(ordered.dtype)


def _adjust_hochberg(ordered: torch.Tensor) -> torch.Tensor:
    return _running_minimum_from_top(ordered * _remaining(ordered))


def _adjust_holm(ordered: torch.Tensor) -> torch.Tensor:
    return (ordered * _remaining(ordered)).cummax(dim=-1).values


_ADJUSTMENTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "bh": _adjust_bh,
    "by": _adjust_by,
    "storey": _adjust_storey,
    "bonferroni": lambda ordered: ordered * ordered.shape[-1],
    "holm": _adjust_holm,
    "hochberg": _adjust_hochberg,
    "fixed": lambda ordered: ordered,
}
"""Sorted p-values [..., m] -> adjusted ones in the same order, not yet capped at 1."""
