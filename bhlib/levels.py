"""The level at which a rule gives a wanted mean number of experts: how to compare rules at equal cost.

All searches start from router logits alone, so that one pass over a model serves any number of rules.

    logits = collect_router_logits(model, load_heldout("calibration"))
    rule = TopP(level_for_mean_experts(TopP, logits, 4.0))
    rule = BH(alpha_for_mean_experts(null, logits, 4.0), null)
"""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from bhlib.procedures import adjusted_pvalues
from bhlib.pvalues import PValueMaker
from bhlib.rules import Rule
from bhlib.weighting import probabilities


def mean_experts(rule: Rule, router_logits: Tensor) -> float:
    """Mean number of experts that a rule gives to tokens with these logits [layers, tokens, experts]."""
    counts = [rule(logits, layer).counts.sum() for layer, logits in enumerate(router_logits)]
    return int(sum(counts)) / router_logits.shape[:-1].numel()


def level_for_mean_experts(family: Callable[[float], Rule], router_logits: Tensor, mean_k: float) -> float:
    """The level at which a family of rules gives this many experts on average: how to compare rules at equal cost.

    For any rule. For `BH` without layer weights `alpha_for_mean_experts` finds it in one pass.

    Parameters
    ----------
    family : callable
        Makes a rule of a level in (0, 1), for instance ``TopP`` or ``lambda alpha: BH(alpha, method="by")``. Its number
        of experts has to rise with the level everywhere, or to fall.
    router_logits : Tensor [layers, tokens, experts]
        As `bhlib.calibration.collect_router_logits` returns them. A patched model sees somewhat other logits, so its
        mean will be close to `mean_k`, not equal.
    mean_k : float
        Wanted mean over tokens and layers.

    Returns
    -------
    float
        By bisection of its log-odds; where the number of experts jumps past `mean_k`, the level that gives more.

    Raises
    ------
    ValueError
        If no level gives this many.
    """

    def at(log_odds: float) -> tuple[float, float]:
        level = float(1 / (1 + np.exp(-log_odds)))
        return level, mean_experts(family(level), router_logits)

    low, high = -30.0, 30.0
    (_, few), (best, many) = at(low), at(high)
    if few > many:
        low, high, few, many, best = high, low, many, few, at(low)[0]
    if not few <= mean_k <= many:
        raise ValueError(f"no level gives {mean_k} experts on average: these rules give from {few:.2f} to {many:.2f}.")
    for _ in range(24):
        middle = (low + high) / 2
        level, mean = at(middle)
        if mean >= mean_k:
            best, high = level, middle
        else:
            low = middle
    return best


def entropy_thresholds(
    router_logits: Tensor, mean_k: float, *, slope: float = 1.0, max_k: int = 8
) -> tuple[float, ...]:
    """Thresholds for `EntropyK` with ks = 1, 2, ..., `max_k` that give `mean_k` experts on calibration logits.

    k is the offset plus `slope` times the entropy, rounded and cut to 1..`max_k`; the offset is found by bisection.

    Parameters
    ----------
    router_logits : Tensor [..., experts]
        Of any tokens and layers (`bhlib.calibration.collect_router_logits`).
    mean_k : float
        Wanted mean, strictly between 1 and `max_k`.
    slope : float
        Experts per nat of entropy, > 0.
    max_k : int
        Most experts of a token.

    Returns
    -------
    tuple of float
        ``max_k - 1`` entropies in nats, 1 / slope apart: ``EntropyK(thresholds, range(1, max_k + 1))``.

    Raises
    ------
    ValueError
        If `mean_k` or `slope` is out of range.
    """
    if not 1 < mean_k < max_k:
        raise ValueError(f"mean_k must lie strictly between 1 and max_k={max_k}, got {mean_k}.")
    if not 0 < slope < np.inf:
        raise ValueError(f"slope must be a finite number above 0, got {slope}.")
    entropy = np.sort(torch.special.entr(probabilities(router_logits)).sum(dim=-1).flatten().double().cpu().numpy())
    steps = (np.arange(1, max_k) - mean_k + 0.5) / slope

    def mean_at(shift: float) -> float:
        return 1 + (1 - np.searchsorted(entropy, steps + shift, side="right") / len(entropy)).sum()

    reach = max_k / slope + 1
    low, high = entropy[0] - reach, entropy[-1] + reach  # max_k experts for every token, and 1
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_at(middle) > mean_k else (low, middle)
    return tuple((steps + high).tolist())


def alpha_for_mean_experts(
    pvalues: PValueMaker,
    router_logits: Tensor,
    mean_experts: float,
    *,
    method: str = "bh",
    min_k: int = 1,
    max_k: int = 8,
) -> float:
    """The level at which `BH` gives tokens this many experts on average: how to compare p-values at equal cost.

    For any other rule there is `level_for_mean_experts`, which searches.

    Parameters
    ----------
    pvalues : PValueMaker
    router_logits : Tensor [layers, tokens, experts]
        As `bhlib.calibration.collect_router_logits` returns them. A patched model sees somewhat other logits, so its
        mean will be close to `mean_experts`, not equal.
    mean_experts : float
        Strictly between `min_k` and `max_k`.
    method : str
        A procedure that has adjusted p-values.
    min_k, max_k : int
        Bounds on the number of experts of a token, as in the rule.

    Returns
    -------
    float

    Raises
    ------
    ValueError
        If the mean is not between the bounds, or no level below 1 gives this many.

    Notes
    -----
    A procedure rejects at the level alpha what has an adjusted p-value of at most alpha. The mean number is therefore
    `min_k` plus the expected number of adjusted p-values up to alpha among the (min_k + 1)-th to max_k-th smallest of a
    token, and the level that is sought is a quantile of these.
    """
    if not min_k < mean_experts < max_k:
        raise ValueError(
            f"mean_experts is {mean_experts}, but must lie strictly between min_k={min_k} and max_k={max_k}"
        )
    share = (mean_experts - min_k) / (max_k - min_k)
    alpha = float(np.quantile(undecided_pvalues(pvalues, router_logits, method, min_k, max_k), share))
    if not 0 < alpha < 1:
        raise ValueError(
            f"no alpha strictly between 0 and 1 gives {mean_experts} experts on average with {pvalues!r} (it would be "
            f"{alpha:g}); choose a number further from the bounds, or another null"
        )
    return alpha


def undecided_pvalues(
    pvalues: PValueMaker, router_logits: Iterable[Tensor], method: str, min_k: int, max_k: int
) -> np.ndarray:
    """The (min_k + 1)-th to max_k-th smallest adjusted p-values of every token."""
    adjusted = [
        adjusted_pvalues(pvalues(logits, layer), method, check=False).topk(max_k, largest=False).values[:, min_k:]
        for layer, logits in enumerate(router_logits)
    ]
    return torch.cat(adjusted).flatten().double().cpu().numpy()
