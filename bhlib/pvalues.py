"""From router logits to p-values: a *statistic* of the logits, and a *null* for it, chosen independently.

A p-value maker is an object that is called like a function::

    pvals = TokenGaussian()(router_logits)                    # no calibration
    pvals = load_null("null.safetensors")(router_logits, layer=3)

``pvals`` has the shape of ``router_logits`` ([..., num_experts]), is float32 whatever the dtype of the logits, and is
small where an expert stands out. Three steps are public, so that a rule can skip the one that it does not need:

``statistic_of(router_logits)``
    the statistic, strictly increasing in the logit within one token;
``survival(statistics, layer)``
    the p-value of a statistic, never increasing in it;
``critical_statistics(critical_p, layer)``
    the smallest statistic whose p-value is at most ``critical_p``: where the null is shared by all experts, comparing
    the k-th largest statistic with the k-th critical value makes the decisions of a step-up procedure with no p-value.

What is guaranteed, and what is not. A p-value of a fitted null is valid for a value that is exchangeable with the
calibration sample; the conformal one exactly and at any sample size, the kernel one as far as the density estimate is
right. A router's logits are neither independent between the experts of a token nor identically distributed between
tokens, and "an expert that the model would not select" is defined by the same logits that are tested. The level alpha
is therefore a dial with a meaning under the null that each class states, not a proven false discovery rate.
"""

import functools
import json
import math
import numbers
import reprlib
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from scipy.interpolate import CubicHermiteSpline
from scipy.special import betainccinv, expit, ndtr
from scipy.special import logit as logit_of
from scipy.stats import gaussian_kde, truncnorm
from torch import Tensor

from bhlib.procedures import is_whole

__all__ = [
    "NULLS",
    "STATISTICS",
    "ConformalNull",
    "DirichletNull",
    "FittedNull",
    "KDENull",
    "PValueMaker",
    "ResolutionWarning",
    "SoftmaxPseudo",
    "SoftmaxPseudoWarning",
    "TableNull",
    "TokenGaussian",
    "check_logits",
    "check_temperature",
    "load_null",
    "make_pvalues",
    "null_values",
]

FORMAT = 1  # version of the calibration file
SMALLEST_SCALE = 1e-30  # instead of a deviation of 0: keeps every statistic finite for logits below 1e8


class SoftmaxPseudoWarning(UserWarning):
    """1 - softmax is used as if it were a p-value."""


class ResolutionWarning(UserWarning):
    """The calibration sample is too small for the level that is asked of it."""


# ---------------------------------------------------------------------------------------------------- the logits


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
    _float32(router_logits)
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


def _float32(router_logits: Tensor, exclude_top: int = 0) -> Tensor:
    if not isinstance(router_logits, Tensor):
        raise TypeError(f"router_logits is a {type(router_logits).__name__}; pass a floating-point torch.Tensor")
    if not router_logits.is_floating_point():
        raise TypeError(f"router_logits has dtype {router_logits.dtype}; pass a floating-point tensor of raw logits")
    num_experts = router_logits.shape[-1] if router_logits.ndim else 0
    if num_experts < 2:
        raise ValueError(f"router_logits has shape {tuple(router_logits.shape)}; the last axis needs 2 experts or more")
    _check_exclude_top(exclude_top, num_experts)
    return router_logits.float()


def _check_exclude_top(exclude_top: int, num_experts: int) -> None:
    if not 0 <= exclude_top <= num_experts - 2:
        raise ValueError(
            f"exclude_top is {exclude_top}, but must lie in 0..{num_experts - 2}, "
            f"so that at least 2 of the {num_experts} experts are left"
        )


# ------------------------------------------------------------------------------------------------ the statistics
# In place where a result is not needed twice: for 16,384 tokens, new memory costs more than the arithmetic.
# One signature: (router_logits [..., experts], exclude_top, top) -> float32. `top` holds the m largest logits of each
# token in descending order, as `topk` gives them; the statistic of these alone is then returned ([..., m]), which is
# all that routing needs.


def logit(router_logits: Tensor, exclude_top: int = 8, top: Tensor | None = None) -> Tensor:
    """The raw logit. It sees a shift common to all experts of a token, which softmax and the model's weights do not."""
    logits = _float32(router_logits, exclude_top)
    return logits if top is None else top.float()


def log_prob(router_logits: Tensor, exclude_top: int = 8, top: Tensor | None = None) -> Tensor:
    """Log-softmax, in nats: shift-invariant, the logarithm of the weight that the model itself would use."""
    logits = _float32(router_logits, exclude_top)
    tested = logits if top is None else top.float()
    largest = logits.amax(-1, keepdim=True) if top is None else tested[..., :1]
    return (tested - largest).sub_((logits - largest).exp_().sum(-1, keepdim=True).log())


def centered(router_logits: Tensor, exclude_top: int = 8, top: Tensor | None = None) -> Tensor:
    """Logit minus the mean of the token's background, in nats: shift-invariant, and unlike the log-probability it does
    not fall for one expert because another one rose."""
    logits = _float32(router_logits, exclude_top)
    tested = logits if top is None else top.float()
    pivot, mean, _ = _background(logits, exclude_top, top)
    return (tested - pivot).sub_(mean)


def standardized(router_logits: Tensor, exclude_top: int = 8, top: Tensor | None = None) -> Tensor:
    """Logit minus the mean of the token's background, over its deviation: invariant to shift and to scale, so that
    confident and hesitant tokens are measured with one ruler."""
    logits = _float32(router_logits, exclude_top)
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


def _check_statistic(name: str) -> str:
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
    logits = _float32(router_logits, exclude_top)
    values = STATISTICS[_check_statistic(statistic)](logits, exclude_top)
    experts = logits.topk(logits.shape[-1] - exclude_top, largest=False).indices
    return values.gather(-1, experts), experts


# ---------------------------------------------------------------------------------------------- makers of p-values


class PValueMaker:
    """Router logits -> p-values. Subclasses give ``statistic_of`` and ``survival``.

    Attributes
    ----------
    name : str
        Which null.
    statistic : str
        Which statistic of the logits.
    shared : bool
        True if the null does not depend on the expert, so that within one token p falls as the logit rises.
    num_layers : int or None
        How many layers it was fitted on; None if it needs no calibration, and ``layer`` is then ignored.

    A maker of your own is held to this when it is put into a rule (``check``) and into a model (``check_model``). For a
    survival function that you have as a table there is `TableNull`.
    """

    name: str
    statistic: str
    shared: bool = True
    num_layers: int | None = None

    def __call__(self, router_logits: Tensor, layer: int | None = None) -> Tensor:
        """P-values [..., num_experts], float32, of ``router_logits`` [..., num_experts] of any float dtype."""
        return self.survival(self.statistic_of(router_logits), layer)

    def statistic_of(self, router_logits: Tensor, top: Tensor | None = None) -> Tensor:
        """The statistic, float32: of every expert, or of the ``top`` alone.

        Parameters
        ----------
        router_logits : Tensor, [..., num_experts]
        top : Tensor, [..., m], optional
            Each token's m largest logits in descending order (``router_logits.topk(m).values``). Only these get a
            statistic, equal to the bit to the one they get without ``top``.
        """
        raise NotImplementedError

    def survival(self, statistics: Tensor, layer: int | None = None) -> Tensor:
        """P(statistic of a null expert >= the value), float32, elementwise. NaN gives NaN."""
        raise NotImplementedError

    def check_resolution(self, alpha: float, num_experts: int) -> bool:
        """Whether one expert alone can be rejected at level ``alpha`` (always, unless the p-values have a floor)."""
        return True

    def check(self) -> None:
        """Raise a ValueError unless ``survival`` is one: in [0, 1], and never increasing. At some thousand statistics,
        for every layer; where the null differs by expert, ``check_model`` does it."""
        if self.shared:
            for layer in [None] if self.num_layers is None else range(self.num_layers):
                self._check_survival(_probe(), layer)

    def check_model(self, num_layers: int, num_experts: int) -> None:
        """Raise a ValueError if a model of so many MoE layers and experts cannot be routed by these p-values."""
        if self.num_layers not in (None, num_layers):
            raise ValueError(
                f"{type(self).__name__} is for {self.num_layers} MoE layers, but the model has {num_layers}: "
                "make p-values for each of them"
            )
        statistics = _probe() if self.shared else _probe()[:, None].expand(-1, num_experts)
        for layer in range(num_layers):
            self._check_survival(statistics, layer)

    def _check_survival(self, statistics: Tensor, layer: int | None) -> None:
        where = f"survival of {type(self).__name__}{'' if layer is None else f' for layer {layer}'}"
        try:
            pvals = self.survival(statistics, layer)
        except Exception as error:
            raise ValueError(f"{where} fails with {type(error).__name__}: {error}") from error
        if not isinstance(pvals, Tensor):
            raise ValueError(f"{where} gives a {type(pvals).__name__}; return a Tensor")
        if pvals.shape != statistics.shape:
            raise ValueError(
                f"{where} gives p-values of shape {tuple(pvals.shape)} for statistics of shape "
                f"{tuple(statistics.shape)}; return one for each"
            )
        outside = ~((pvals >= 0) & (pvals <= 1))
        if outside.any():
            raise ValueError(
                f"{where} gives the p-value {pvals[outside][0]:g}, outside [0, 1], at the statistic "
                f"{statistics[outside][0]:g}; clamp it, if rounding is the reason"
            )
        rises = pvals[1:] > 1.0001 * pvals[:-1]  # not a rounded last digit
        if rises.any():
            raise ValueError(
                f"{where} is none: p-values rise from {pvals[:-1][rises][0]:g} to {pvals[1:][rises][0]:g} at the "
                f"statistic {statistics[1:][rises][0]:g}; return P(statistic >= value), that is 1 - cdf and not the cdf"
            )

    def critical_statistics(self, critical_p: Tensor, layer: int | None = None) -> Tensor:
        """The smallest float32 statistic with a p-value of at most ``critical_p``, elementwise.

        Parameters
        ----------
        critical_p : Tensor, [m], float32 or float64
            For instance ``critical_values(num_experts, alpha, "bh")``.
        layer : int, optional
            Needed if the null was fitted on more than one layer.

        Returns
        -------
        float32 Tensor, [m], on the device of ``critical_p``
            t with: ``survival(s) <= critical_p`` exactly if ``s >= t``, for every finite s. Infinity where no statistic
            is extreme enough.

        Raises
        ------
        ValueError
            If the null differs between experts: the ranks of the statistics are then not those of the p-values.

        Notes
        -----
        Bisection over the ordered float32 numbers themselves, with ``survival`` as the judge: at most 32 steps, no
        tolerance, and nothing to prove but that ``survival`` never increases.
        """
        if not self.shared:
            raise ValueError(
                f"{self!r} has a null per expert, so no one statistic is critical for all; compare p-values instead"
            )
        levels = _round_down(critical_p)
        high = torch.full(levels.shape, _LARGEST_RANK, dtype=torch.int64, device=levels.device)
        low = -1 - high
        reachable = self.survival(_float_of_rank(high), layer) <= levels
        while (low < high).any():
            middle = (low + high).div(2, rounding_mode="floor")
            small = self.survival(_float_of_rank(middle), layer) <= levels
            low, high = torch.where(small, low, middle + 1), torch.where(small, middle, high)
            low = torch.minimum(low, high)
        return torch.where(reachable, _float_of_rank(high), torch.inf)


def _probe() -> Tensor:
    """Some thousand statistics in increasing order: close to each other from -64 to 64, and of every magnitude."""
    ranks = torch.linspace(-1, 1, 2001, dtype=torch.float64, device="cpu").mul(_LARGEST_RANK).long()
    return torch.cat([torch.linspace(-64, 64, 4097, device="cpu"), _float_of_rank(ranks)]).sort().values


_LARGEST_RANK = int(np.array(np.finfo(np.float32).max).view(np.int32))


def _float_of_rank(rank: Tensor) -> Tensor:
    """The float32 number of a given rank: 0 is +0.0, 1 the smallest number above it, -1 is -0.0, and so on."""
    bits = torch.where(rank >= 0, rank, -(2**31) - 1 - rank)
    return bits.to(torch.int32).view(torch.float32)


def _round_down(values: Tensor) -> Tensor:
    """To float32, never upwards, so that a float32 p-value passes the same comparison before and after."""
    nearest = values.to(torch.float32)
    return torch.where(nearest > values, nearest.nextafter(torch.full_like(nearest, -torch.inf)), nearest)


class SoftmaxPseudo(PValueMaker):
    """p = 1 - softmax(logits / temperature): the classical first idea, kept as an option with a label.

    These are not p-values, since nothing makes them uniform under any null, and BH cannot use them.

    Theorem. With N experts and alpha < 1 - 1/N, BH on p = 1 - softmax rejects at most one expert, and that one only if
    its probability is at least 1 - alpha/N.

    Proof. BH rejects k hypotheses only if the k-th smallest p-value is at most alpha k/N, that is, if the k-th largest
    probability q is at least 1 - alpha k/N. But k probabilities of at least q sum to at most 1, so q <= 1/k. Both hold
    only if alpha >= N (k - 1)/k^2. For k >= 2 the right side falls as k grows, so it is smallest at k = N, where it is
    1 - 1/N; hence no k >= 2 is left. Temperature changes the probabilities, not the argument.

    Parameters
    ----------
    temperature : float, positive
        Divides the logits.

    Warns
    -----
    SoftmaxPseudoWarning
        When constructed.

    Notes
    -----
    1 - softmax is computed as the share of all the others, which keeps its digits where softmax rounds to 1.
    The statistic is minus the p-value.
    """

    name = "softmax"
    statistic = "softmax"

    def __init__(self, temperature: float = 1.0):
        check_temperature(temperature)
        self.temperature = float(temperature)
        warnings.warn(
            "1 - softmax is not a p-value: with N experts and alpha < 1 - 1/N, Benjamini-Hochberg on it rejects at "
            "most one expert, and only one whose probability is at least 1 - alpha/N. Use TokenGaussian() or a "
            "fitted null",
            SoftmaxPseudoWarning,
            stacklevel=2,
        )

    def statistic_of(self, router_logits: Tensor, top: Tensor | None = None) -> Tensor:
        logits = _float32(router_logits) / self.temperature
        tested = logits if top is None else top.float() / self.temperature
        largest, where = logits.max(-1, keepdim=True)
        odds = (logits - largest).exp()  # of each expert against the largest one
        rest = odds.scatter(-1, where, 0).sum(-1, keepdim=True)
        return -(rest - (tested - largest).expm1()) / (rest + 1)

    def survival(self, statistics: Tensor, layer: int | None = None) -> Tensor:
        return (-statistics).clamp(0, 1)

    def __repr__(self) -> str:
        return f"SoftmaxPseudo(temperature={self.temperature})"


class DirichletNull(PValueMaker):
    """A router without a preference: its probabilities divide one at random. The default; needs no calibration.

    Null hypothesis of a token: the probabilities of its N experts (softmax of the logits) are one draw from a symmetric
    Dirichlet distribution with concentration a, as if one were divided into N equal shares that then fluctuate, the
    less the larger a is. Then each probability x is Beta(a, (N - 1) a) distributed, and for a whole a the p-value of an
    expert is a sum of a terms, the lower tail of a binomial distribution with n = N a - 1 trials:

        P(X >= x) = sum over j < a of C(n, j) x**j (1 - x)**(n - j).

    It is exactly uniform under the null. With a = 1 the Dirichlet distribution is flat, a stick broken at N - 1 random
    places, and the p-value is (1 - x)**(N - 1): Fisher's for the largest ordinate of a periodogram.

    Parameters
    ----------
    concentration : int
        a, from 1 to 8. It says how much a router without a preference fluctuates: the standard deviation of an expert's
        probability is about its mean 1/N over the root of a. A larger a calls less of the variation noise, so that
        the same alpha gives more experts; and the count depends less on the slope k/N of the line of BH, which for a
        to infinity it does not see at all (a fixed probability threshold). 4 is the default since it loses least on
        validation text among those whose levels stay usable (figure ``families_tried``).

    Notes
    -----
    Reads what the model's weights see, the probabilities, so that a shift common to all logits changes nothing. Since p
    depends on the expert's own probability alone, BH at a level is a constant for each rank of the probabilities: with
    64 experts at alpha = 0.05, 0.0514 for the largest down to 0.0413 for the eighth (`probability` computes them).
    Expects nothing of other tokens or layers. The p-values of a token are negatively dependent, since its probabilities
    sum to one: more so than the proofs for BH allow, but an expert with a small p-value makes those of the others
    larger. That real routers are Dirichlet where they have no preference is a convention, not a finding.

    References
    ----------
    R. A. Fisher (1929), Tests of significance in harmonic analysis, Proc. R. Soc. A 125, 54-59.
    """

    name = "dirichlet"
    statistic = "log_prob"

    def __init__(self, concentration: int = 4):
        if not is_whole(concentration) or not 1 <= concentration <= 8:
            raise ValueError(f"concentration must be an int from 1 to 8, got {concentration!r}; the default is 4.")
        self.concentration = int(concentration)

    def statistic_of(self, router_logits: Tensor, top: Tensor | None = None) -> Tensor:
        """-log p, float32. Increases with the logit; exponential under the null."""
        trials = router_logits.shape[-1] * self.concentration - 1
        log_x = log_prob(router_logits, exclude_top=0, top=top)
        rest = torch.expm1(log_x).neg_()  # 1 - x, no cancellation near x = 1
        statistic = rest.log().mul_(self.concentration - 1 - trials)
        if self.concentration == 1:
            return statistic
        # sum over j of C(n, j) x**j (1 - x)**(a - 1 - j) by Horner: all terms positive, so nothing cancels.
        x = log_x.exp_()
        power, total = x.clone(), rest.add(x, alpha=trials)
        for j in range(2, self.concentration):
            total.mul_(rest).add_(power.mul_(x), alpha=float(math.comb(trials, j)))
        return statistic.sub_(total.log_())

    def survival(self, statistics: Tensor, layer: int | None = None) -> Tensor:
        return torch.exp(-statistics.clamp(min=0).double()).float()

    def probability(self, statistics: Tensor, num_experts: int) -> Tensor:
        """The probability of an expert with a given statistic, float64: the inverse of `statistic_of`."""
        tail = np.exp(-statistics.double().clamp(min=0).cpu().numpy())
        shape = self.concentration, (num_experts - 1) * self.concentration
        return torch.from_numpy(betainccinv(*shape, tail)).to(statistics.device)

    def __repr__(self) -> str:
        return f"DirichletNull(concentration={self.concentration})"


class TokenGaussian(PValueMaker):
    """Gaussian tail with centre and scale from the token's own lower logits: no calibration either.

    Efron's empirical null, one token at a time: most experts are of no interest to a token, so the bulk of its logits
    shows what "of no interest" looks like. The ``exclude_top`` largest logits are left out of the estimate, which
    makes it robust to the very experts that it is to find: they may be as large as they like.

    Parameters
    ----------
    exclude_top : int
        How many of the largest logits are left out. OLMoE selects 8.
    estimator : {"trimmed", "truncated"}
        What the logits left over are taken for.

        "trimmed" : the null itself. Centre and scale are their mean and standard deviation. An expert is tested against
        "looks like those that the model does not select", the same null hypothesis as that of a null fitted with
        ``exclude_top``. Since something always is the largest, pure noise gets rejections too: with 64 independent
        Gaussian logits BH at alpha = 0.05 rejects something in 47 % of the tokens.

        "truncated" : the lower part of a Gaussian sample of *all* experts. Mean and deviation are corrected by those of
        a standard normal cut at its 1 - exclude_top/num_experts quantile. An expert is tested against "all logits of
        this token are one Gaussian sample", Efron's null. On Gaussian noise P(p <= a) is a within 7 % for a from 0.01
        to 0.3, and BH at alpha = 0.05 rejects something in 7 % of the tokens, where 5 % would be exact.

        The two are related by z -> 0.821 z - 0.235 (64 experts, top 8): the same order, another reading of alpha.

    Notes
    -----
    Heuristic: that the bulk is Gaussian, and that its estimated scale (some 10 % of noise from 56 values) is the true
    one. Both matter most in the far tail: with "truncated", P(p <= 7.8e-4) is 1.5 times too large on Gaussian noise.
    The tail itself is erfc in float32: relative error below 2e-5 down to p = 1e-30.

    References
    ----------
    B. Efron (2004), Large-scale simultaneous hypothesis testing: the choice of a null hypothesis, JASA 99, 96-104.
    """

    name = "gaussian"
    statistic = "standardized"

    def __init__(self, exclude_top: int = 8, estimator: str = "trimmed"):
        if estimator not in ("trimmed", "truncated"):
            raise ValueError(f"estimator is {estimator!r}, but must be 'trimmed' or 'truncated'")
        if exclude_top < 0:
            raise ValueError(f"exclude_top is {exclude_top}, but must be 0 or more, such as 8")
        self.exclude_top = exclude_top
        self.estimator = estimator

    def check_model(self, num_layers: int, num_experts: int) -> None:
        """Raise a ValueError if `exclude_top` leaves fewer than two of the experts."""
        self._check_num_experts(num_experts)

    def _check_num_experts(self, num_experts: int) -> None:
        if self.exclude_top > num_experts - 2:
            raise ValueError(
                f"pvalues=TokenGaussian(exclude_top={self.exclude_top}) needs {self.exclude_top + 2} experts or more "
                f"to estimate centre and scale, but {num_experts} experts are routed: leave out as many as the model "
                f"selects, for instance pvalues=TokenGaussian(exclude_top={min(2, num_experts - 2)})"
            )

    def statistic_of(self, router_logits: Tensor, top: Tensor | None = None) -> Tensor:
        self._check_num_experts(router_logits.shape[-1])
        z = standardized(router_logits, self.exclude_top, top)
        if self.estimator == "trimmed":
            return z
        mean, deviation = _truncated_moments(1 - self.exclude_top / router_logits.shape[-1])
        return z * deviation + mean

    def survival(self, statistics: Tensor, layer: int | None = None) -> Tensor:
        # Not torch.special.ndtr(-z): in float32 it is 1 - cdf here and there, and 0 from z = 6 on.
        return torch.special.erfc(statistics * math.sqrt(0.5)) / 2

    def __repr__(self) -> str:
        return f"TokenGaussian(exclude_top={self.exclude_top}, estimator={self.estimator!r})"


@functools.cache
def _truncated_moments(share: float) -> tuple[float, float]:
    """Mean and standard deviation of the lowest ``share`` of a standard normal."""
    lower = truncnorm(-np.inf, truncnorm.ppf(share, -np.inf, np.inf))
    return float(lower.mean()), float(lower.std())


# ------------------------------------------------------------------------------------------------- fitted nulls


class FittedNull(PValueMaker):
    """A null estimated from calibration values, per layer and if wanted per expert. Make one with ``fit``.

    Attributes
    ----------
    header : dict
        What the file's header holds: null, statistic, exclude_top, model_name, num_layers, num_experts, per_expert,
        sample_sizes ([layers] or [layers][experts]), seed, what the subclass adds, and the levels of ``alpha_for``.
    tensors : dict of Tensor
        What the file holds, on the CPU, named ``"what.layer"``.
    """

    parts: tuple[str, ...]  # names of a layer's tensors
    header_types: dict[str, Callable[[object], bool]] = {}  # what the subclass adds to the header

    def __init__(self, tensors: dict[str, Tensor], header: dict):
        with torch.inference_mode(False):  # a copy that a backward pass may save, whatever it was made in
            self.tensors = {name: table.clone() if table.is_inference() else table for name, table in tensors.items()}
        self.header = header
        self.statistic = _check_statistic(header["statistic"])
        self.exclude_top: int = header["exclude_top"]
        self.model_name: str = header["model_name"]
        self.num_layers: int = header["num_layers"]
        self.num_experts: int = header["num_experts"]
        self.shared = not header["per_expert"]
        self._on_device: dict = {}

    def __getstate__(self) -> dict:
        """Without the tables on devices, which are made anew."""
        return vars(self) | {"_on_device": {}}

    @classmethod
    def fit(
        cls,
        samples,
        *,
        model_name: str,
        num_experts: int,
        statistic: str = "log_prob",
        exclude_top: int = 8,
        per_expert: bool = False,
        seed: int | None = None,
        **options,
    ) -> "FittedNull":
        """Fit one null per layer, or per layer and expert.

        Parameters
        ----------
        samples : sequence over layers of 1-D arrays
            Statistic values of null experts, as ``null_values`` gives them. With ``per_expert``, a sequence over layers
            of sequences over experts of 1-D arrays.
        model_name : str
            Whose logits these are. Checked on loading.
        num_experts : int
        statistic, exclude_top
            How the values were computed; logits get the same statistic later.
        per_expert : bool
            Whether each expert has a null of its own.
        seed : int, optional
            Of the sampling, kept for the record.
        **options
            Of the subclass: ``KDENull`` takes ``bw_method`` and ``weights``.

        Raises
        ------
        ValueError
            If a sample is empty, not 1-D, not finite, or not there for every expert; the message says which.
        """
        columns = _columns(samples, num_experts, per_expert)
        sizes = [[len(values) for values in layer] for layer in columns]
        header = cls._header(sizes, model_name, num_experts, statistic, exclude_top, per_expert, seed)
        tensors, extra = cls._fit_layers(columns, **options)
        return cls(tensors, header | extra)

    @classmethod
    def _header(
        cls,
        sizes: list[list[int]],
        model_name: str,
        num_experts: int,
        statistic: str,
        exclude_top: int,
        per_expert: bool = False,
        seed: int | None = None,
    ) -> dict:
        """What every file says, checked; `sizes` are the sample sizes [layers][1 or experts]."""
        _check_statistic(statistic)
        if not isinstance(model_name, str) or not model_name:
            raise ValueError(f"model_name is {model_name!r}; name the model whose logits these are")
        _check_exclude_top(exclude_top, num_experts)
        return dict(
            format=FORMAT,
            null=cls.name,
            statistic=statistic,
            exclude_top=int(exclude_top),
            model_name=model_name,
            num_layers=len(sizes),
            num_experts=int(num_experts),
            per_expert=bool(per_expert),
            sample_sizes=sizes if per_expert else [layer[0] for layer in sizes],
            seed=None if seed is None else int(seed),
        )

    @classmethod
    def _fit_layers(cls, columns: list[list[np.ndarray]], **options) -> tuple[dict[str, Tensor], dict]:
        raise NotImplementedError

    def alpha_for(self, mean_experts: float) -> float:
        """The level at which BH with these p-values gives tokens so many experts on average, from 1 to 8 each.

        One alpha means different numbers of experts with different nulls: ``alpha=null.alpha_for(4.0)`` asks for the
        number. `bhlib.calibrate` and `bhlib.calibration.fit_null` measure it on a sample of the calibration tokens and
        keep it in the header, at steps of half an expert; between these the log-odds are interpolated. On the demo, a
        kernel null of the log-probability reaches 6.2 experts at alpha = 0.05 already, 4 at 8e-4, and 3 at 2e-5 (the
        Dirichlet null: 4 at 0.01, 5 at 0.08). Levels below num_experts/n are read from the tail of the kernels, beyond
        what n values can tell: as good as any to set a number of experts, but no error rate.

        Parameters
        ----------
        mean_experts : float
            Over tokens and layers, with the rule's own bounds ``min_k=1`` and ``max_k=8`` (or all experts, if fewer).

        Raises
        ------
        ValueError
            If the null brings no levels, since it was made of samples or a table alone, or none for so many experts.
            `bhlib.calibration.alpha_for_mean_experts` finds the level for any p-values, bounds and procedure.
        """
        levels = self.header.get("levels")
        if levels is None:
            raise ValueError(
                f"{self!r} brings no levels; find one with "
                f"bhlib.calibration.alpha_for_mean_experts(null, router_logits, {mean_experts:g})"
            )
        means, alphas = np.array(levels["mean_experts"]), np.array(levels["alpha"])
        if not means[0] <= mean_experts <= means[-1]:
            raise ValueError(
                f"mean_experts is {mean_experts:g}, but the levels of this null are for {means[0]:g} to {means[-1]:g} "
                "experts; bhlib.calibration.alpha_for_mean_experts takes other bounds"
            )
        return float(expit(np.interp(mean_experts, means, logit_of(alphas))))

    @property
    def smallest_sample(self) -> int:
        """Calibration values of the layer (and expert) that has the fewest."""
        return int(np.min(np.concatenate([np.atleast_1d(sizes) for sizes in self.header["sample_sizes"]])))

    def check_model(self, num_layers: int, num_experts: int) -> None:
        """Raise a ValueError if it was fitted on a model of another number of MoE layers or experts."""
        if (num_layers, num_experts) != (self.num_layers, self.num_experts):
            raise ValueError(
                f"the calibration of {self.model_name!r} is for {self.num_layers} layers of {self.num_experts} "
                f"experts, but the model has {num_layers} MoE layers of {num_experts} experts: calibrate on the model "
                "that you route, null = bhlib.calibrate(model, token_ids)"
            )

    def statistic_of(self, router_logits: Tensor, top: Tensor | None = None) -> Tensor:
        if router_logits.shape[-1] != self.num_experts:
            raise ValueError(
                f"router_logits has shape {tuple(router_logits.shape)}, but {self!r} was fitted on "
                f"{self.num_experts} experts; calibrate on the model that you route"
            )
        return STATISTICS[self.statistic](router_logits, self.exclude_top, top)

    def survival(self, statistics: Tensor, layer: int | None = None) -> Tensor:
        if not self.shared and statistics.shape[-1] != self.num_experts:
            raise ValueError(
                f"statistics has shape {tuple(statistics.shape)}, but {self!r} has a null per expert; "
                f"the last axis must hold all {self.num_experts} experts"
            )
        tables = self._tables(self._check_layer(layer), statistics.device)
        return self._survival(statistics.float(), *tables)

    def _check_layer(self, layer: int | None) -> int:
        if layer is None and self.num_layers == 1:
            return 0
        if layer is None or not 0 <= layer < self.num_layers:
            raise ValueError(
                f"layer is {layer}, but this null holds {self.num_layers} layers; pass layer=0..{self.num_layers - 1}"
            )
        return layer

    def _tables(self, layer: int, device: torch.device) -> tuple[Tensor, ...]:
        """What ``_survival`` needs, moved to the device once."""
        if (layer, device) not in self._on_device:
            parts = [self.tensors[f"{part}.{layer}"] for part in self.parts]
            # They outlive the pass that asks first; made in inference mode they would be of no use in training.
            with torch.inference_mode(False):
                self._on_device[layer, device] = tuple(table.to(device) for table in self._make_tables(*parts))
        return self._on_device[layer, device]

    def _make_tables(self, *parts: Tensor) -> tuple[Tensor, ...]:
        return parts

    def _survival(self, statistics: Tensor, *tables: Tensor) -> Tensor:
        raise NotImplementedError

    @classmethod
    def _damage(cls, sizes: list[int], **parts: Tensor) -> str | None:
        """What keeps the tables of a layer from being a survival function, None if nothing does.

        Parameters
        ----------
        sizes : list of int
            Sample sizes that the header announces, one per row of the tables.
        **parts : Tensor [rows, ...]
            The layer's tensors, by the names in `cls.parts`.

        Returns
        -------
        str or None
            Begins with the name of a part.
        """
        raise NotImplementedError

    def save(self, path: str | Path) -> None:
        """Write one safetensors file: the tables, and in its header what they were fitted on."""
        save_file(self.tensors, path, metadata={"bhlib": json.dumps(self.header, sort_keys=True)})

    def __repr__(self) -> str:
        sizes = self.smallest_sample
        return (
            f"{type(self).__name__}({self.statistic} without top {self.exclude_top}, {self.num_layers} layers, "
            f"{'shared by' if self.shared else 'one for each of'} {self.num_experts} experts, "
            f"{sizes:,} values or more each, fitted on {self.model_name!r}, seed {self.header['seed']})"
        )


def _columns(samples, num_experts: int, per_expert: bool) -> list[list[np.ndarray]]:
    """[layers][1 or experts] float64 arrays, checked."""
    layers = [list(layer) if per_expert else [layer] for layer in samples]
    if not layers:
        raise ValueError("samples is empty; pass one sample of statistic values per layer")
    columns = []
    for index, layer in enumerate(layers):
        if per_expert and len(layer) != num_experts:
            raise ValueError(
                f"samples[{index}] holds {len(layer)} experts, but num_experts is {num_experts}; "
                "with per_expert=True pass one sample per expert"
            )
        places = [f"samples[{index}]" + (f"[{expert}]" if per_expert else "") for expert in range(len(layer))]
        columns.append([_check_sample(values, place) for values, place in zip(layer, places, strict=True)])
    return columns


def _check_sample(values, place: str) -> np.ndarray:
    values = torch.as_tensor(values, device="cpu").detach().to(torch.float64).numpy()
    if values.ndim != 1:
        raise ValueError(f"{place} has shape {values.shape}, but must be 1-D: the statistic values of null experts")
    if len(values) == 0:
        raise ValueError(
            f"{place} is empty: no token left this expert out of its top. "
            "Calibrate on more tokens, or with per_expert=False or exclude_top=0"
        )
    if not np.isfinite(values).all():
        raise ValueError(f"{place} has {int((~np.isfinite(values)).sum())} values that are NaN or infinite")
    return values


class KDENull(FittedNull):
    """Survival function of ``scipy.stats.gaussian_kde``, through a table.

    ``fit(..., bw_method=None, weights=None)`` passes both to ``gaussian_kde``; ``weights`` (kernel weights) has the
    structure of ``samples``.

    The bandwidth. scipy's default, Scott's factor n**(-1/5), is the right order for a density. What is used here is the
    survival function, for which a narrower kernel is better, of the order n**(-1/3) (Azzalini, 1981):
    ``bw_method="survival"`` takes the factor (4/n)**(1/3), the best for a Gaussian sample. It matters where a few
    values lie in a clump far out. With 50,000 values, 50 of them in a clump, Scott's p is off by a factor of up to 1.3
    down to p = 1e-3 and of 4 down to 1e-4; that of ``"survival"`` by 1.1 and 2.8; that of ``bw_method=0.02`` by 1.1 and
    1.8, about what five values at 1e-4 can tell. `bhlib.calibration.tail_factors` measures it on your logits.

    The table. The logarithm of the survival function and its slope are exact at nodes at most 1/8 bandwidth apart, and
    refined 16-fold by cubic Hermite interpolation in float64; between the refined nodes p itself is interpolated
    linearly in float32. The table reaches from 6 bandwidths below the sample, where p = 1, to 15 above, where p
    underflows: the tail beyond the sample is the Gaussian one of the outermost kernels. Linear interpolation is a few
    sums and products, rounded alike on every device, and never increases from one float32 statistic to the next.

    Guarantee: relative error against ``integrate_box_1d`` below 1e-3 down to p = 1e-8 (what it is at 200 points of each
    table is measured when fitting: ``header["table_error"]``). That the density estimate is right is not guaranteed: a
    kernel estimate is too wide by the bandwidth, hence conservative in the tail, and far beyond the sample it is a
    Gaussian of the bandwidth, whatever the truth.

    References
    ----------
    A. Azzalini (1981), A note on the estimation of a distribution function and quantiles by a kernel method,
    Biometrika 68, 326-328.
    """

    name = "kde"
    parts = ("grid", "log_survival", "slope")
    header_types = {
        "bw_method": lambda value: value is None or isinstance(value, (str, float)),
        "weighted": lambda value: isinstance(value, bool),
        "table_error": lambda value: isinstance(value, float),
    }

    @classmethod
    def _fit_layers(cls, columns, bw_method=None, weights=None):
        tensors, worst = {}, 0.0
        for layer, samples in enumerate(columns):
            densities = _densities(samples, bw_method, weights if weights is None else weights[layer], layer)
            parts = _survival_nodes(densities, layer)
            worst = max(worst, _table_error(densities, _refined(*parts)))
            tensors |= {f"{part}.{layer}": tensor for part, tensor in zip(cls.parts, parts, strict=True)}
        if callable(bw_method):
            bw_method = getattr(bw_method, "__name__", repr(bw_method))
        elif bw_method is not None and not isinstance(bw_method, str):
            bw_method = float(bw_method)
        return tensors, dict(bw_method=bw_method, weighted=weights is not None, table_error=worst)

    def _make_tables(self, grid: Tensor, log_survival: Tensor, slope: Tensor) -> tuple[Tensor, ...]:
        return _refined(grid, log_survival, slope)

    def _survival(self, statistics: Tensor, low: Tensor, cells: Tensor, pvals: Tensor) -> Tensor:
        return _interpolate(statistics, low, cells, pvals)

    @classmethod
    def _damage(cls, sizes, grid, log_survival, slope):
        if grid.dtype != torch.float64 or grid.shape != (len(sizes), 2):
            return f"grid is {_kind(grid)}, not torch.float64 [{len(sizes)}, 2]"
        low, span = grid[:, 0], grid[:, 1] - grid[:, 0]
        # Within these bounds, which are far from any logit, no float32 product in `_interpolate` overflows.
        if not ((low.abs() < 1e18) & (span > 1e-18) & (span < 1e18)).all():
            return "grid does not go from a lowest statistic to a highest one"
        for name, table in (("log_survival", log_survival), ("slope", slope)):
            if table.dtype != torch.float32 or table.ndim != 2 or len(table) != len(sizes) or table.shape[1] < 2:
                return f"{name} is {_kind(table)}, not torch.float32 [{len(sizes)}, nodes]"
            if not ((table <= 0) & table.isfinite()).all():
                return f"{name} has values above 0, infinite or NaN"
        if slope.shape != log_survival.shape:
            return f"slope has shape {tuple(slope.shape)}, but log_survival has {tuple(log_survival.shape)}"
        return "log_survival rises" if (log_survival.diff(dim=-1) > 0).any() else None

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, table error {self.header['table_error']:.1e})"


_NODES_PER_BANDWIDTH = 8
_REFINEMENT = 16
_MOST_NODES = 2**16
_REACH = 9  # bandwidths beyond which a kernel is all on one side: ndtr(-9) = 1e-19


def _densities(samples: list[np.ndarray], bw_method, weights, layer: int) -> list[gaussian_kde]:
    """One density for each sample of a layer."""
    if weights is None:
        weights = [None] * len(samples)
    elif len(samples) == 1:
        weights = [weights]
    densities = []
    for expert, (values, kernel_weights) in enumerate(zip(samples, weights, strict=True)):
        place = f"layer {layer}, expert {expert}" if len(samples) > 1 else f"layer {layer}"
        if kernel_weights is not None:
            kernel_weights = np.asarray(kernel_weights, dtype=np.float64)
            if kernel_weights.shape != values.shape:
                raise ValueError(
                    f"the weights of {place} have shape {kernel_weights.shape}, but its sample has {values.shape}; "
                    "pass one kernel weight per value"
                )
            values, kernel_weights = values[kernel_weights > 0], kernel_weights[kernel_weights > 0]
        if len(np.unique(values)) < 2:
            raise ValueError(
                f"the sample of {place} has no spread ({len(values)} values); a density needs two different ones. "
                "Calibrate on more tokens, or use ConformalNull"
            )
        method = _survival_factor if isinstance(bw_method, str) and bw_method == "survival" else bw_method
        densities.append(gaussian_kde(values, bw_method=method, weights=kernel_weights))
    return densities


def _survival_factor(kde: gaussian_kde) -> float:
    """The bandwidth, over the standard deviation, with the least integrated squared error of the survival function of a
    Gaussian: h**3 = r / (n R), with r = 1/sqrt(pi) for the kernel, and R = 1/(4 sqrt(pi)) for the squared slope of the
    density, integrated."""
    return (4 / kde.neff) ** (1 / 3)


def _bandwidth(kde: gaussian_kde) -> float:
    return math.sqrt(kde.covariance.item())


def _exact_survival(kde: gaussian_kde, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Survival function and density at increasing points: sums over the kernels, with nothing to cancel.

    A kernel further than 9 bandwidths above a point counts in full. One further below is left out, as long as a kernel
    at least 9 bandwidths closer is counted: its share is then below 1e-17.
    """
    order = kde.dataset[0].argsort()
    values, weights, bandwidth = kde.dataset[0][order], kde.weights[order], _bandwidth(kde)
    weight_from = np.append(weights[::-1].cumsum()[::-1], 0)
    first = values.searchsorted(np.minimum(points, values[-1]) - _REACH * bandwidth)
    last = values.searchsorted(points + _REACH * bandwidth)
    survival, density = np.empty((2, len(points)))
    for i, point in enumerate(points):
        near = slice(first[i], last[i])
        z = (values[near] - point) / bandwidth
        # Not a dot product: BLAS would start threads for each, at several times the cost.
        survival[i] = (weights[near] * ndtr(z)).sum() + weight_from[last[i]]
        density[i] = (weights[near] * np.exp(-0.5 * z * z)).sum()
    return survival, density / (bandwidth * math.sqrt(2 * math.pi))


def _survival_nodes(densities: list[gaussian_kde], layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """First and last node [columns, 2], log-survival and its derivative [columns, nodes]."""
    bandwidths = np.array([_bandwidth(kde) for kde in densities])
    low = np.array([kde.dataset.min() for kde in densities]) - 6 * bandwidths
    high = np.array([kde.dataset.max() for kde in densities]) + 15 * bandwidths
    low = low.astype(np.float32).astype(np.float64)  # the very number that float32 statistics are counted from
    num_nodes = math.ceil(((high - low) / bandwidths).max() * _NODES_PER_BANDWIDTH) + 1
    if num_nodes > _MOST_NODES:
        raise ValueError(
            f"the bandwidth of layer {layer} is {bandwidths.min():.3g} for values from {low.min():.3g} to "
            f"{high.max():.3g}: its table would need {num_nodes:,} nodes, and {_MOST_NODES:,} are allowed. "
            "Pass a larger bw_method, or look for outliers in the sample"
        )
    log_survival, slope = np.empty((2, len(densities), num_nodes), dtype=np.float32)
    for column, kde in enumerate(densities):
        survival, density = _exact_survival(kde, np.linspace(low[column], high[column], num_nodes))
        log_survival[column] = np.log(survival)
        slope[column] = -density / survival
    return torch.from_numpy(np.stack([low, high], axis=-1)), torch.from_numpy(log_survival), torch.from_numpy(slope)


def _refined(grid: Tensor, log_survival: Tensor, slope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Lowest statistic [columns], cells per unit of it [columns], and p at every refined node [columns, nodes]."""
    num_nodes = log_survival.shape[-1]
    num_cells = _REFINEMENT * (num_nodes - 1)
    low, high = grid.T.numpy()
    # Counted in nodes from the lowest one, all columns share one grid; slopes are then per node as well.
    per_node = slope.double() * ((grid[:, 1:] - grid[:, :1]) / (num_nodes - 1))
    spline = CubicHermiteSpline(np.arange(num_nodes), log_survival.double().numpy(), per_node.numpy(), axis=-1)
    pvals = np.exp(spline(np.arange(num_cells + 1) / _REFINEMENT)).clip(0, 1)
    pvals = np.minimum.accumulate(pvals, axis=-1)
    return tuple(torch.from_numpy(part.astype(np.float32)) for part in (low, num_cells / (high - low), pvals))


def _table_error(densities: list[gaussian_kde], tables: tuple[Tensor, Tensor, Tensor]) -> float:
    """Largest relative error of the table at 200 points of each column, evenly spread over log p from 1 to 1e-8."""
    levels = torch.logspace(0, -8, 200, dtype=torch.float32, device="cpu")
    worst = 0.0
    for kde, low, cells, pvals in zip(densities, *tables, strict=True):
        # The middle of the cell in which p passes a level: that is where a straight line errs most.
        points = low + (torch.searchsorted(-pvals, -levels) - 0.5) / cells
        found = _interpolate(points, low, cells, pvals[None]).double().numpy()
        exact, _ = _exact_survival(kde, points.double().numpy())
        worst = max(worst, float(np.abs(found / exact - 1).max()))
    return worst


def _interpolate(statistics: Tensor, low: Tensor, cells: Tensor, pvals: Tensor) -> Tensor:
    """p at each statistic [..., columns], or [...] if there is one column; never increasing in the statistic."""
    position = (statistics - low) * cells
    cell = position.nan_to_num(nan=0.0).clamp(0, pvals.shape[-1] - 2).long()
    share = (position - cell).clamp(0, 1)
    row = cell + torch.arange(len(pvals), device=pvals.device) * pvals.shape[-1]
    left, right = pvals.take(row), pvals.take(row + 1)
    # Neighbouring nodes differ by less than a factor of 2, so their difference is exact, and rounding never carries the
    # sum past the right end: p does not increase from the last number of one cell to the first of the next.
    return left + share * (right - left)


class ConformalNull(FittedNull):
    """p = (1 + the number of calibration values >= the statistic) / (n + 1): empirical p-values.

    Guarantee: if the statistic is exchangeable with the n calibration values, P(p <= a) <= a for every a, at any n and
    for any distribution, ties included. It holds on average over calibration samples; given one sample of independent
    values, p is off by some 1/sqrt(n). P-values that share a calibration sample are positively dependent in the sense
    that BH needs (PRDS, Bates et al. 2023) if the calibration values and the tested ones are all independent.

    Neither condition holds for a router. All the unselected experts of a token may be in the sample, 56 in OLMoE, and
    the tokens of a document besides: values of one token resemble each other more than they do those of another token,
    so that a tested token is not exchangeable with them, and the sample tells less than its size n says. The experts
    of the tested token depend on each other, too. So neither P(p <= a) <= a nor BH's bound is proven here.

    The price is a floor: p >= 1/(n + 1), see ``check_resolution``.

    References
    ----------
    V. Vovk, A. Gammerman, G. Shafer (2005), Algorithmic learning in a random world, chapter 2.
    S. Bates, E. Candes, L. Lei, Y. Romano, M. Sesia (2023), Testing for outliers with conformal p-values,
    Annals of Statistics 51, 149-178.
    """

    name = "conformal"
    parts = ("sample", "size")

    @classmethod
    def _fit_layers(cls, columns):
        tensors = {}
        for layer, samples in enumerate(columns):
            sizes = [len(values) for values in samples]
            # Infinity pads where experts have unequal samples: it is above every statistic, so never counted below.
            table = torch.full((len(samples), max(sizes)), torch.inf, dtype=torch.float32, device="cpu")
            for row, values in zip(table, samples, strict=True):
                row[: len(values)] = torch.from_numpy(np.sort(values))
            tensors[f"sample.{layer}"] = table
            tensors[f"size.{layer}"] = torch.tensor(sizes, device="cpu")
        return tensors, {}

    def _survival(self, statistics: Tensor, sample: Tensor, size: Tensor) -> Tensor:
        if self.shared:
            below = torch.searchsorted(sample[0], statistics.contiguous())
        else:
            per_expert = statistics.reshape(-1, len(size)).T.contiguous()
            below = torch.searchsorted(sample, per_expert).T.reshape(statistics.shape)
        pvals = (1 + size - below).float() / (1 + size)
        return torch.where(statistics.isnan(), torch.nan, pvals)

    @classmethod
    def _damage(cls, sizes, sample, size):
        if sample.dtype != torch.float32 or sample.shape != (len(sizes), max(sizes)):
            return f"sample is {_kind(sample)}, not torch.float32 [{len(sizes)}, {max(sizes)}]"
        if size.dtype != torch.int64 or size.tolist() != sizes:
            return f"size is {_kind(size)}, not the sample sizes of the header"
        is_value = torch.arange(max(sizes)) < size[:, None]
        if not (sample.isfinite() == is_value).all() or not (sample[~is_value] == torch.inf).all():
            return "sample has values that are NaN or infinite"
        return "sample is not in increasing order" if (sample.diff(dim=-1) < 0).any() else None

    def check_resolution(self, alpha: float, num_experts: int) -> bool:
        """Warn if BH at level ``alpha`` can never reject one expert alone, because 1/(n + 1) > alpha/num_experts.

        Parameters
        ----------
        alpha : float in (0, 1)
        num_experts : int
            How many hypotheses are tested at once.

        Returns
        -------
        bool
            True if every layer (and expert) has n >= num_experts/alpha - 1 values. At equality float32 rounding
            decides, and the answer is what it decides.

        Warns
        -----
        ResolutionWarning
            Otherwise, with the numbers.
        """
        floor, needed = float(np.float32(1 / (self.smallest_sample + 1))), alpha / num_experts
        if floor <= needed:
            return True
        warnings.warn(
            f"{self.smallest_sample:,} calibration values give no p-value below {floor:.2g}, which exceeds "
            f"alpha/num_experts = {needed:.2g}: one expert alone can never be rejected at alpha = {alpha:g}. "
            f"Calibrate on {math.ceil(num_experts / alpha):,} values or more, or use KDENull",
            ResolutionWarning,
            stacklevel=2,
        )
        return False


class TableNull(FittedNull):
    """A survival function that you have as a table: of another study, a theory, a larger sample.

    Make one with ``from_survival``; it saves, loads and routes as a fitted null does. Between two points p is
    interpolated linearly, which is cautious where the survival function is convex, as in a tail. Below the first point
    p is 1, and from the last point on it stays at the last value: what the table does not say is not made up.
    """

    name = "table"
    parts = ("x", "sf")

    @classmethod
    def from_survival(
        cls,
        x,
        sf,
        *,
        model_name: str,
        num_experts: int,
        statistic: str,
        exclude_top: int = 0,
        num_layers: int | None = None,
    ) -> "TableNull":
        """A null from points of its survival function.

        Parameters
        ----------
        x : 1-D array, or sequence over layers of 1-D arrays
            Values of the statistic, increasing. One array serves all layers.
        sf : 1-D array, or sequence over layers of 1-D arrays
            P(statistic of a null expert >= x), never increasing, in [0, 1]. One array is the null of every layer.
            From a distribution function pass ``1 - cdf``, with its loss: the smallest p-value above 0 is then some
            6e-8 for a cdf in float32, and one over the sample size for that of a sample, whatever the number of points.
        model_name : str
            Whose logits these are. Checked on loading.
        num_experts : int
        statistic : a name in ``STATISTICS``
            What `x` are values of, for instance ``"logit"``.
        exclude_top : int
            For the statistics ``"centered"`` and ``"standardized"``: how many of the largest logits their background
            leaves out.
        num_layers : int, optional
            How many MoE layers share the one array `sf`, 1 by default.

        Raises
        ------
        ValueError
            If the points are no survival function or do not belong together; the message says where.

        Examples
        --------
        >>> grids = [{"x": np.linspace(-6, 6, 10_000), "cdf": np.linspace(0, 1, 10_000)}] * 16
        >>> null = TableNull.from_survival(
        ...     [grid["x"] for grid in grids], [1 - grid["cdf"] for grid in grids],
        ...     model_name="allenai/OLMoE-1B-7B-0924", num_experts=64, statistic="logit")
        >>> null
        TableNull(logit, 16 layers, 10,000 points or more each, of 'allenai/OLMoE-1B-7B-0924')
        """
        xs, tails = _by_layer(x, "x"), _by_layer(sf, "sf")
        if len(tails) == 1 and num_layers is not None:
            tails *= num_layers
        if num_layers not in (None, len(tails)):
            raise ValueError(f"num_layers is {num_layers}, but sf holds {len(tails)} layers; leave num_layers out")
        if len(xs) == 1:
            xs *= len(tails)
        if len(xs) != len(tails):
            raise ValueError(f"x holds {len(xs)} layers, but sf {len(tails)}; pass one x for all, or one for each sf")
        tensors = {}
        for layer, (points, tail) in enumerate(zip(xs, tails, strict=True)):
            _check_points(points, tail, layer)
            tensors[f"x.{layer}"], tensors[f"sf.{layer}"] = points.float()[None], tail.float()[None]
        sizes = [[len(tail)] for tail in tails]
        return cls(tensors, cls._header(sizes, model_name, num_experts, statistic, exclude_top))

    @classmethod
    def _fit_layers(cls, columns, **options):
        raise TypeError("a TableNull is not fitted to samples; make one with TableNull.from_survival(x, sf, ...)")

    def _survival(self, statistics: Tensor, x: Tensor, sf: Tensor) -> Tensor:
        x, sf = x[0], sf[0]
        cell = (torch.searchsorted(x, statistics.contiguous(), right=True) - 1).clamp(0, len(x) - 2)
        left, right = sf[cell], sf[cell + 1]
        share = ((statistics - x[cell]) / (x[cell + 1] - x[cell])).clamp(0, 1)
        # Rounding may carry the sum past the right end, and p must not rise to the next cell.
        pvals = torch.maximum(left + share * (right - left), right)
        return torch.where(statistics < x[0], 1.0, pvals)

    @classmethod
    def _damage(cls, sizes, x, sf):
        if len(sizes) > 1:
            return "x is a table per expert"
        for name, table in (("x", x), ("sf", sf)):
            if table.dtype != torch.float32 or table.shape != (1, sizes[0]) or sizes[0] < 2:
                return f"{name} is {_kind(table)}, not torch.float32 [1, {sizes[0]}], of two points or more"
        if not (x.abs() < 1e18).all() or not (x.diff() > 0).all():
            return "x does not increase"
        return None if ((sf >= 0) & (sf <= 1)).all() and (sf.diff() <= 0).all() else "sf is no survival function"

    def check_resolution(self, alpha: float, num_experts: int) -> bool:
        """Warn (ResolutionWarning) if a layer's table has no p-value above 0 as small as alpha/num_experts, the largest
        with which one expert alone is rejected; return whether each has."""
        tails = [self.tensors[f"sf.{layer}"] for layer in range(self.num_layers)]
        floor, needed = max(float(tail[tail > 0].min()) for tail in tails if (tail > 0).any()), alpha / num_experts
        if floor <= needed:
            return True
        warnings.warn(
            f"the smallest p-value above 0 in a layer's table is {floor:.2g}, which exceeds alpha/num_experts = "
            f"{needed:.2g}: whether one expert alone is rejected at alpha = {alpha:g} is beyond the table. Pass one "
            "that resolves its tail, computed as a survival function",
            ResolutionWarning,
            stacklevel=2,
        )
        return False

    def __repr__(self) -> str:
        return (
            f"TableNull({self.statistic}, {self.num_layers} layers, {self.smallest_sample:,} points or more each, "
            f"of {self.model_name!r})"
        )


def _by_layer(values, name: str) -> list[Tensor]:
    """A float64 array per layer; one if there is but one."""
    values = list(values)
    if not values:
        raise ValueError(f"{name} is empty; pass two points or more")
    if np.ndim(values[0]) == 0:
        values = [values]
    tables = [torch.as_tensor(np.asarray(table, dtype=np.float64)) for table in values]
    for layer, table in enumerate(tables):
        if table.ndim != 1:
            raise ValueError(f"{name}[{layer}] has shape {tuple(table.shape)}, but must be 1-D: a value for each point")
    return tables


def _check_points(x: Tensor, sf: Tensor, layer: int) -> None:
    """Raise unless sf [points] is a survival function of x [points], also in float32."""
    if len(x) != len(sf):
        raise ValueError(f"layer {layer} has {len(x)} points in x, but {len(sf)} in sf; pass a value for each point")
    if len(x) < 2:
        raise ValueError(f"the table of layer {layer} has {len(x)} points, but must have two or more")
    if not (x.abs() < 1e18).all():
        raise ValueError(f"x of layer {layer} has values that are NaN or infinite, or above 1e18")
    stays = x.float().diff() <= 0
    if stays.any():
        raise ValueError(
            f"x of layer {layer} must increase, in float32 as well, but {x[1:][stays][0]:.9g} follows "
            f"{x[:-1][stays][0]:.9g}; sort the points and leave out those too close"
        )
    outside = ~((sf >= 0) & (sf <= 1))
    if outside.any():
        value, place = sf[outside][0], x[outside][0]
        raise ValueError(f"sf of layer {layer} has the value {value:g}, outside [0, 1], at x = {place:g}")
    rises = sf.diff() > 0
    if rises.any():
        raise ValueError(
            f"sf of layer {layer} rises from {sf[:-1][rises][0]:g} to {sf[1:][rises][0]:g} at x = {x[1:][rises][0]:g}; "
            "if it is a distribution function, pass 1 - cdf"
        )


NULLS = {null.name: null for null in (KDENull, ConformalNull)}
"""Nulls that are fitted to a sample, by name."""

_SAVED = NULLS | {TableNull.name: TableNull}


# ------------------------------------------------------------------------------------------------------ loading


def load_null(
    path: str | Path,
    model_name: str | None = None,
    num_layers: int | None = None,
    num_experts: int | None = None,
    statistic: str | None = None,
) -> FittedNull:
    """Load what ``FittedNull.save`` wrote, refusing a calibration made for something else.

    Parameters
    ----------
    path : str or Path
    model_name, num_layers, num_experts, statistic : optional
        What the calibration must have been made for. None accepts anything.

    Returns
    -------
    KDENull, ConformalNull or TableNull
        With p-values equal to the bit to those of the null that was saved.

    Raises
    ------
    OSError
        If there is no such file, or it cannot be read.
    ValueError
        If the file is not a calibration, is damaged, is of another format version, or was made for another model,
        number of layers or experts, or statistic; the message says what was found and what was expected. Damage is
        noticed where it leaves no survival function; a digit that changed within one is not.
    """
    tensors, header = _read(path)
    expected = dict(model_name=model_name, num_layers=num_layers, num_experts=num_experts, statistic=statistic)
    for key, value in expected.items():
        if value is not None and header[key] != value:
            raise ValueError(
                f"{path} is a calibration with {key} {header[key]!r}, but {key} {value!r} is expected. P-values of "
                "another calibration mean nothing here: calibrate again, or load the file made for this model"
            )
    null = _SAVED[header["null"]]
    _check_tables(null, tensors, header, path)
    return null(tensors, header)


def _read(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); save the calibration again") from error
    if "bhlib" not in metadata:
        raise ValueError(f"{path} is a safetensors file, but no calibration: write one with .save(path)")
    try:
        header = json.loads(metadata["bhlib"])
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise _damaged(path, "its header is no JSON object")
    _check_header(header, path)
    return tensors, header


def _damaged(path: str | Path, what: str) -> ValueError:
    return ValueError(f"{path} is damaged: {what}; save the calibration again, or calibrate again")


#: What a header must hold, and what it may be.
_HEADER_TYPES = {
    "statistic": lambda value: isinstance(value, str) and value in STATISTICS,
    "exclude_top": lambda value: is_whole(value) and value >= 0,
    "model_name": lambda value: isinstance(value, str) and value != "",
    "num_layers": lambda value: is_whole(value) and value >= 1,
    "num_experts": lambda value: is_whole(value) and value >= 2,
    "per_expert": lambda value: isinstance(value, bool),
    "sample_sizes": lambda value: isinstance(value, list),
    "seed": lambda value: value is None or is_whole(value),
}


def _are_levels(levels: object) -> bool:
    """Whether `alpha_for` can read them: as many numbers of experts as levels, both increasing, levels in (0, 1)."""
    if not isinstance(levels, dict) or levels.keys() != {"mean_experts", "alpha"}:
        return False
    means, alphas = levels["mean_experts"], levels["alpha"]
    for values in (means, alphas):
        if not isinstance(values, list) or not values or not all(isinstance(value, float) for value in values):
            return False
        if not np.isfinite(values).all() or not (np.diff(values) > 0).all():
            return False
    return len(means) == len(alphas) and 0 < alphas[0] and alphas[-1] < 1


def _check_header(header: dict, path: str | Path) -> None:
    """Every key is there, and of the right kind."""

    def value_of(key: str) -> object:
        if key not in header:
            raise _damaged(path, f"its header lacks {key}")
        return header[key]

    if value_of("format") != FORMAT:
        raise ValueError(f"{path} has format version {header['format']!r}, but {FORMAT} is read here; calibrate again")
    if not isinstance(value_of("null"), str) or header["null"] not in _SAVED:
        raise ValueError(f"{path} holds a null {header['null']!r}, but must be one of {', '.join(map(repr, _SAVED))}")
    for key, fits in (_HEADER_TYPES | _SAVED[header["null"]].header_types).items():
        if not fits(value_of(key)):
            raise _damaged(path, f"its header has the {key} {reprlib.repr(header[key])}")
    if "levels" in header and not _are_levels(header["levels"]):
        raise _damaged(path, f"its header has the levels {reprlib.repr(header['levels'])}")
    if header["exclude_top"] > header["num_experts"] - 2:
        raise _damaged(path, f"its exclude_top is {header['exclude_top']} of {header['num_experts']} experts")


def _check_tables(null: type[FittedNull], tensors: dict[str, Tensor], header: dict, path: str | Path) -> None:
    """The tensors must be those that the header announces, and tables of a survival function."""
    num_layers, columns = header["num_layers"], header["num_experts"] if header["per_expert"] else 1
    if num_layers > len(tensors):  # before anything as long as it says is made
        raise _damaged(path, f"its header announces {num_layers:,} layers, but it holds {len(tensors)} tables")
    wanted = {f"{part}.{layer}" for layer in range(num_layers) for part in null.parts}
    if wanted != tensors.keys():
        odd = ", ".join(sorted(wanted ^ tensors.keys()))
        raise _damaged(path, f"the header and the tables disagree on {odd}")
    for name, tensor in tensors.items():
        if tensor.ndim == 0 or len(tensor) != columns:
            raise _damaged(path, f"{name} is {_kind(tensor)}, but {columns} rows are announced")
    if len(header["sample_sizes"]) != num_layers:
        raise _damaged(path, f"its header has sample_sizes of {len(header['sample_sizes'])} layers, not {num_layers}")
    for layer, announced in enumerate(header["sample_sizes"]):
        sizes = announced if header["per_expert"] else [announced]
        if not isinstance(sizes, list) or len(sizes) != columns or not all(is_whole(n) and n >= 1 for n in sizes):
            raise _damaged(path, f"its header has the sample_sizes {reprlib.repr(announced)} for layer {layer}")
        what = null._damage(sizes, **{part: tensors[f"{part}.{layer}"] for part in null.parts})
        if what is not None:
            raise _damaged(path, f"in layer {layer} {what}")


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"


# ------------------------------------------------------------------------------------------------------ by name


def make_pvalues(pvalues: PValueMaker | str, temperature: float = 1.0) -> PValueMaker:
    """A maker of p-values: itself, or one that needs no calibration by its name.

    Parameters
    ----------
    pvalues : PValueMaker or {"dirichlet", "gaussian", "softmax"}
        ``"dirichlet"`` for `DirichletNull`, ``"gaussian"`` for `TokenGaussian`, ``"softmax"`` for `SoftmaxPseudo`.
    temperature : float
        Of the softmax of ``"softmax"``; the others ignore it.
    """
    if isinstance(pvalues, PValueMaker):
        return pvalues
    if pvalues == "softmax":
        return SoftmaxPseudo(temperature)
    if pvalues in ("dirichlet", "gaussian"):
        return DirichletNull() if pvalues == "dirichlet" else TokenGaussian()
    raise ValueError(
        f"pvalues={pvalues!r} must be 'dirichlet', 'gaussian', 'softmax' or a PValueMaker such as KDENull.fit(...) "
        f"or load_null(path)"
    )
