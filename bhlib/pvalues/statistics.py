"""The statistics of a token's logits that nulls are for, and what is checked of the logits."""

import math
import numbers

import torch
from torch import Tensor

SMALLEST_SCALE = 1e-30  # instead of a deviation of 0: keeps every statistic finite for logits below 1e8


def check_logits(router_logits: Tensor) -> None:
    """Raise if the logits cannot be routed: wrong type, wrong shape, NaN or infinite.

    Parameters
    ----------
    router_logits : Tensor, [..., num_experts]

    Raises
    ------
    TypeError
        If it is not a floating-point tensor.
    ValueError
        If there are fewer than two experts, or a logit is not finite (the message says where).

    Notes
    -----
    Looking for NaN waits for the device, so the makers below do not do it: call this once, at the boundary.
    """
    as_float32(router_logits)
    finite = torch.isfinite(router_logits)
    if not finite.all():
        first = tuple((~finite).nonzero()[0].tolist())
        raise ValueError(
            f"router_logits has {int((~finite).sum())} values that are NaN or infinite, the first at index {first}: "
            f"{router_logits[first].item()}; every logit must be finite. Look at the hidden states that the router read"
        )


def check_temperature(temperature: float) -> None:
    """Raise a TypeError unless the temperature is a number, and a ValueError unless 0 < temperature < inf."""
    if not isinstance(temperature, numbers.Real) or isinstance(temperature, bool):
        raise TypeError(f"temperature must be a number, got {temperature!r} of type {type(temperature).__name__}.")
    if not 0 < temperature < math.inf:
        raise ValueError(
            f"temperature must be a finite number above 0, got {temperature!r}; 1.0 leaves the softmax as it is."
        )


def as_float32(router_logits: Tensor, exclude_top: int = 0) -> Tensor:
    if not isinstance(router_logits, Tensor):
        raise TypeError(f"router_logits is a {type(router_logits).__name__}; pass a floating-point torch.Tensor")
    if not router_logits.is_floating_point():
        raise TypeError(f"router_logits has dtype {router_logits.dtype}; pass a floating-point tensor of raw logits")
    num_experts = router_logits.shape[-1] if router_logits.ndim else 0
    if num_experts < 2:
        raise ValueError(f"router_logits has shape {tuple(router_logits.shape)}; the last axis needs 2 experts or more")
    check_exclude_top(exclude_top, num_experts)
    return router_logits.float()


def check_exclude_top(exclude_top: int, num_experts: int) -> None:
    if not 0 <= exclude_top <= num_experts - 2:
        raise ValueError(
            f"exclude_top is {exclude_top}, but must lie in 0..{num_experts - 2}, "
            f"so that at least 2 of the {num_experts} experts are left"
        )


# In place where a result is not needed twice: for 16,384 tokens, new memory costs more than the arithmetic.
# One signature: (router_logits [..., experts], exclude_top, top) -> float32. `top` holds the m largest logits of each
# token in descending order, as `topk` gives them; the statistic of these alone is then returned ([..., m]), which is
# all that routing needs.


def logit(router_logits: Tensor, exclude_top: int = 8, top: Tensor | None = None) -> Tensor:
    """The raw logit. It sees a shift common to all experts of a token, which softmax and the model's weights do not."""
    logits = as_float32(router_logits, exclude_top)
    return logits if top is None else top.float()


def log_prob(router_logits: Tensor, exclude_top: int = 8, top: Tensor | None = None) -> Tensor:
    """Log-softmax, in nats: shift-invariant, the logarithm of the weight that the model itself would use."""
    logits = as_float32(router_logits, exclude_top)
    tested = logits if top is None else top.float()
    largest = logits.amax(-1, keepdim=True) if top is None else tested[..., :1]
    return (tested - largest).sub_((logits - largest).exp_().sum(-1, keepdim=True).log())


def centered(router_logits: Tensor, exclude_top: int = 8, top: Tensor | None = None) -> Tensor:
    """Logit minus the mean of the token's background, in nats: shift-invariant, and unlike the log-probability it does
    not fall for one expert because another one rose."""
    logits = as_float32(router_logits, exclude_top)
    tested = logits if top is None else top.float()
    pivot, mean, _ = _background(logits, exclude_top, top)
    return (tested - pivot).sub_(mean)


def standardized(router_logits: Tensor, exclude_top: int = 8, top: Tensor | None = None) -> Tensor:
    """Logit minus the mean of the token's background, over its deviation: invariant to shift and to scale, so that
    confident and hesitant tokens are measured with one ruler."""
    logits = as_float32(router_logits, exclude_top)
    tested = logits if top is None else top.float()
    pivot, mean, deviation = _background(logits, exclude_top, top)
    return (tested - pivot).sub_(mean).div_(deviation)


def _background(logits: Tensor, exclude_top: int, top: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Largest value, mean (counted from it) and standard deviation of each token's logits without its top.

    The logits are counted from the largest one of the background and cut there: what is above, and any tie with it,
    adds exactly 0 to both sums, so no sorting and no mask is needed and a common shift costs no digits.
    """
    if top is None or top.shape[-1] <= exclude_top:
        top = logits.topk(exclude_top + 1).values
    pivot = top[..., exclude_top : exclude_top + 1].float()
    size = logits.shape[-1] - exclude_top
    below = (logits - pivot).clamp_(max=0)
    mean = below.sum(-1, keepdim=True) / size
    variance = (below.square_().sum(-1, keepdim=True) - size * mean.square()) / (size - 1)
    return pivot, mean, variance.clamp(min=0).sqrt().clamp(min=SMALLEST_SCALE)


STATISTICS = {"logit": logit, "log_prob": log_prob, "centered": centered, "standardized": standardized}


def check_statistic(name: str) -> str:
    if name not in STATISTICS:
        raise ValueError(f"statistic is {name!r}, but must be one of {', '.join(map(repr, STATISTICS))}")
    return name


def null_values(router_logits: Tensor, statistic: str = "log_prob", exclude_top: int = 8) -> tuple[Tensor, Tensor]:
    """The statistics of the experts outside each token's top ``exclude_top``: what a null is fitted on.

    Parameters
    ----------
    router_logits : Tensor, [..., num_experts]
    statistic : a name in ``STATISTICS``
    exclude_top : int
        How many of each token's largest logits to leave out; 0 keeps all.

    Returns
    -------
    values : float32 Tensor, [..., num_experts - exclude_top]
        In increasing order within each token.
    experts : int64 Tensor, the same shape
        Which expert each value belongs to.
    """
    logits = as_float32(router_logits, exclude_top)
    values = STATISTICS[check_statistic(statistic)](logits, exclude_top)
    experts = logits.topk(logits.shape[-1] - exclude_top, largest=False).indices
    return values.gather(-1, experts), experts
