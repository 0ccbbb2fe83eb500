"""A null with measured truth behind it: conformal p-values of "this expert contributes next to nothing"."""

import math
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from bhlib.procedures import is_whole
from bhlib.pvalues.fitted import FittedNull, ResolutionWarning, kind_of
from bhlib.pvalues.statistics import check_logits, log_prob

STEPS = 256  #: cells per nat of the log-probability; a power of two, so that a cell is found without rounding
CELLS = 16 * STEPS  #: down to a probability of exp(-16); p is 1 below


class ContributionNull(FittedNull):
    """P-values of the hypothesis that an expert's contribution to a token is at most ``largest``: that it is useless.

    Whether a hypothesis is true was *measured* on calibration text (`bhlib.contributions`): all experts were computed,
    and the contribution of each is the norm of its weighted output over the norm of the layer's output. This is
    conformal selection (Jin & Candès 2023) with documents as units, for each layer by itself. An expert with the
    log-probability s gets ::

        p(s) = (u(s) + sum over calibration documents d of G_d(s)) / (documents + 1)

    ``G_d(s)`` is the share of all pairs of a token and an expert of document d that have a log-probability of s or more
    and are useless, or not among the ``max_k`` best of their token. ``u(s) = min(exp(-s), max_k) / num_experts`` stands
    for the share of useless ones among the max_k best in the document that is tested, which nobody knows: since
    probabilities add up to 1, no more than ``exp(-s)`` experts of a token have one of ``exp(s)`` or more. (With a 1 in
    its place, as in the usual conformal p-value, sixty documents would not let BH reject one expert of 64 alone.)

    What is proven, without any assumption on the tokens of a document or on the experts of a token:

    1. If the tested document is exchangeable with the calibration documents, then for a token of it and an expert, each
       drawn uniformly, ``P(the expert is useless, among the max_k best, and p <= a) <= a``, for every a and any number
       of documents. Proof: let M(s) be the share of pairs with these two properties and a log-probability of s or more,
       averaged over the calibration documents and the tested one. M(s) is at most p(s). Which of all these documents
       is the tested one is uniform, so ``P(useless, among the max_k best, and M <= a)`` is the share, averaged over
       all of them, of such pairs that have no more than a share a at or above them: at most a.
    2. If BH looks at the max_k best experts only, the mean over a document's tokens of the false discovery proportion
       (the share of useless experts among those kept) is expected to be at most ``alpha (1 + 1/2 + ... + 1/max_k)``,
       2.72 alpha for 8. Proof (Benjamini & Yekutieli 2001): a useless expert that is kept adds at most 1/c, where
       c = ceil(p num_experts / alpha) is at most max_k; by 1. the mean of that is at most alpha / num_experts times
       the sum. So at the level alpha / 2.72 it is at most alpha.

    What is not proven:

    - That BH keeps to alpha without that factor. On the demo it does (`figures/realised_alpha.csv`).
    - Anything for single tokens or domains, or for documents of another kind of text. Documents count alike, however
      long they are. Whoever passes the number of each token as ``documents`` gets smaller p-values, and assumes
      that tokens are exchangeable, which those of one document are not.
    - Anything about `BH` with its bounds. ``min_k=1`` keeps an expert where none is significant, and `BH` keeps the
      ``max_k`` best where it rejects beyond that rank, which may be more than in 2. On the demo's validation split at
      alpha = .05/.1/.2 the first concerns 21/4/1 % of the tokens and adds .0017/.0011/.0004 to the false discovery
      proportion, since a token's best expert is hardly ever useless; the second concerns .07/.3/.9 %.
      `bhlib.evidence.realised` measures the rule as it is, and `bhlib.guarantees` has a promise about it as it is.
    - Anything about a patched model: contributions and logits are those of the model with its own top-k. Where fewer
      experts are computed, later layers see other hidden states.

    Make one with ``from_contributions``; it saves, loads and routes as a fitted null does.

    References
    ----------
    Y. Jin, E. J. Candès (2023), Selection by prediction with conformal p-values, JMLR 24, 1-41.
    Y. Benjamini, D. Yekutieli (2001), The control of the false discovery rate under dependency, Annals of Statistics
    29, 1165-1188.
    """

    name = "contribution"
    parts = ("sf",)
    header_types = {
        "largest": lambda value: isinstance(value, float) and 0 < value < math.inf,
        "max_k": lambda value: is_whole(value) and isinstance(value, int) and value >= 1,
    }

    @classmethod
    def from_contributions(
        cls,
        contributions: Tensor,
        router_logits: Tensor,
        documents: Sequence | np.ndarray,
        *,
        model_name: str,
        largest: float = 0.1,
        max_k: int = 8,
    ) -> "ContributionNull":
        """Fit to measured contributions.

        Parameters
        ----------
        contributions, router_logits : Tensor [layers, tokens, experts]
            Of calibration text: norm of weight times output over the norm of the layer's output, of all experts; and
            the logits.
        documents : sequence or ndarray [tokens]
            Which document each token is of: anything that tells them apart. Take about as many tokens of each, in the
            way in which those are taken that are routed later.
        model_name : str
            Whose contributions these are. Checked on loading.
        largest : float
            Up to which contribution an expert counts as useless, above 0.
        max_k : int
            The most experts that the rule may keep of a token.

        Raises
        ------
        ValueError
            If shapes do not agree, a value is not finite, `largest` is not above 0 or `max_k` is not possible.
        """
        names, unit = np.unique(np.asarray(documents), return_inverse=True)
        _check(contributions, router_logits, unit, largest, max_k)
        num_layers, _, num_experts = router_logits.shape
        weight = torch.from_numpy(1 / (np.bincount(unit) * num_experts))[unit]  # each document has a share of 1
        tensors = {
            f"sf.{layer}": _survival(r <= largest, logits, weight, len(names), max_k)[None]
            for layer, (r, logits) in enumerate(zip(contributions.cpu(), router_logits.cpu(), strict=True))
        }
        header = cls.make_header([[len(names)]] * num_layers, model_name, num_experts, "log_prob", 0)
        return cls(tensors, header | {"largest": float(largest), "max_k": int(max_k)})

    @classmethod
    def fit_layers(cls, columns, **options):
        raise TypeError(
            "a ContributionNull is fitted to measured contributions, not to logits alone; make one with "
            "ContributionNull.from_contributions(contributions, router_logits, documents, ...)"
        )

    @property
    def largest(self) -> float:
        """Up to which contribution an expert counts as useless."""
        return self.header["largest"]

    def layer_survival(self, statistics: Tensor, sf: Tensor) -> Tensor:  # type: ignore[override]
        cell = _cell(statistics.nan_to_num(0))
        pvals = torch.where(cell < 0, 1.0, sf[0][cell.clamp(min=0)])
        return torch.where(statistics.isnan(), torch.nan, pvals)

    @classmethod
    def damage(cls, sizes, sf):
        if sf.dtype != torch.float32 or sf.shape != (1, CELLS + 1):
            return f"sf is {kind_of(sf)}, not torch.float32 [1, {CELLS + 1}]"
        return None if ((sf > 0) & (sf <= 1)).all() and (sf.diff() <= 0).all() else "sf is no survival function"

    def check_resolution(self, alpha: float, num_experts: int) -> bool:
        """Warn (ResolutionWarning) if BH at level ``alpha`` can never reject one expert alone; return whether it can.

        It can with 1/alpha - 1 documents or more: if the expert has a probability of nearly 1.
        """
        if 1 / (self.smallest_sample + 1) <= alpha:
            return True
        warnings.warn(
            f"{self.smallest_sample:,} calibration documents give no p-value below "
            f"{1 / (self.smallest_sample + 1) / num_experts:.2g}, which exceeds alpha/num_experts = "
            f"{alpha / num_experts:.2g}: one expert alone can never be rejected at alpha = {alpha:g}. Measure "
            f"contributions on {math.ceil(1 / alpha) - 1:,} documents or more",
            ResolutionWarning,
            stacklevel=2,
        )
        return False

    def __repr__(self) -> str:
        return (
            f"ContributionNull(contribution of at most {self.largest:g}, {self.num_layers} layers, "
            f"{self.smallest_sample:,} documents, max_k={self.header['max_k']}, of {self.model_name!r})"
        )


def _cell(statistics: Tensor) -> Tensor:
    """The cell of each log-probability, int64: CELLS for 0, negative below exp(-16)."""
    return (statistics.clamp(-17, 0) * STEPS).floor().long() + CELLS


def _survival(useless: Tensor, router_logits: Tensor, weight: Tensor, documents: int, max_k: int) -> Tensor:
    """p at the lower end of each cell, the largest in it: [cells + 1] float32, rounded up.

    `useless` and `router_logits` are [tokens, experts]; `weight` [tokens] is that of a pair of the token.
    """
    num_experts = router_logits.shape[-1]
    statistics = log_prob(router_logits, exclude_top=0)
    best = torch.zeros_like(useless).scatter(-1, statistics.topk(max_k).indices, True)
    counted = useless | ~best
    cells = _cell(statistics)[counted].clamp(min=0)
    mass = torch.bincount(cells, weight[:, None].expand_as(counted)[counted], minlength=CELLS + 1)
    above = mass.flip(0).cumsum(0).flip(0)
    lower_end = (torch.arange(CELLS + 1, dtype=torch.float64, device="cpu") - CELLS) / STEPS
    unknown = lower_end.neg().exp().clamp(max=max_k) / num_experts
    exact = ((unknown + above) / (documents + 1)).clamp(max=1)
    rounded = exact.float()
    return torch.where(rounded < exact, torch.nextafter(rounded, torch.full_like(rounded, 2)), rounded).clamp(max=1)


def _check(contributions: Tensor, router_logits: Tensor, unit: np.ndarray, largest: float, max_k: int) -> None:
    if not 0 < largest < math.inf:
        raise ValueError(f"largest is {largest}, but must be a finite number above 0; 0.1 is a tenth of the output")
    if router_logits.ndim != 3 or contributions.shape != router_logits.shape or not router_logits.numel():
        raise ValueError(
            f"contributions has shape {tuple(contributions.shape)} and router_logits {tuple(router_logits.shape)}; "
            "both must be [layers, tokens, experts], of one token or more"
        )
    if not is_whole(max_k) or not 1 <= max_k <= router_logits.shape[-1]:
        raise ValueError(f"max_k is {max_k!r}, but must be a whole number in 1..{router_logits.shape[-1]}")
    if unit.shape != (router_logits.shape[1],):
        raise ValueError(
            f"documents has shape {unit.shape}, but must name the document of each of the "
            f"{router_logits.shape[1]:,} tokens"
        )
    check_logits(router_logits)
    wrong = ~(contributions >= 0) | contributions.isinf()
    if wrong.any():
        raise ValueError(f"contributions has {int(wrong.sum())} values that are negative, NaN or infinite")
