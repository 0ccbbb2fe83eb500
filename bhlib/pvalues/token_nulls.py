"""Nulls that need no calibration: each token's logits say all."""

import functools
import math
import warnings

import numpy as np
import torch
from scipy.special import betainccinv
from scipy.stats import truncnorm
from torch import Tensor

from bhlib.procedures import is_whole
from bhlib.pvalues.maker import KernelForm, PValueMaker
from bhlib.pvalues.statistics import as_float32, check_temperature, log_prob, standardized


class SoftmaxPseudoWarning(UserWarning):
    """1 - softmax is used as if it were a p-value."""


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
        logits = as_float32(router_logits) / self.temperature
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
        the same alpha gives more experts; and the count depends less on the slope k/N of BH's line, and in the
        limit of large a not at all (a fixed threshold on the probability). 4 is the default since it loses least on
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
    statistic = "minus_log_p"
    whole_token = True

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

    def kernel_form(self, num_experts: int, thresholds: Tensor) -> KernelForm:
        """In probabilities of all other experts, which a kernel has without a logarithm."""
        return KernelForm("rest", 0, (self.probability(thresholds, num_experts) - 1).float())

    def null_logits(self, tokens, num_experts, exclude_top, generator):
        """Divisions of one from its own distribution."""
        return np.log(generator.standard_gamma(self.concentration, (tokens, num_experts)))

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
        self.whole_token = estimator == "truncated"  # all logits of a token are tested as one Gaussian sample

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

    def kernel_form(self, num_experts: int, thresholds: Tensor) -> KernelForm | None:
        return KernelForm(self.statistic, self.exclude_top, thresholds) if self.estimator == "trimmed" else None

    def null_logits(self, tokens, num_experts, exclude_top, generator):
        """Independent Gaussian logits; with "trimmed", below ``exclude_top`` experts out of reach."""
        logits = generator.standard_normal((tokens, num_experts))
        if not self.whole_token:
            logits[:, :exclude_top] += 100
        return logits

    def __repr__(self) -> str:
        return f"TokenGaussian(exclude_top={self.exclude_top}, estimator={self.estimator!r})"


@functools.cache
def _truncated_moments(share: float) -> tuple[float, float]:
    """Mean and standard deviation of the lowest ``share`` of a standard normal."""
    lower = truncnorm(-np.inf, truncnorm.ppf(share, -np.inf, np.inf))
    return float(lower.mean()), float(lower.std())
