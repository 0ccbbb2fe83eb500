"""A null that is the calibration sample itself: empirical p-values."""

import math
import warnings

import numpy as np
import torch
from torch import Tensor

from bhlib.pvalues.fitted import FittedNull, ResolutionWarning, kind_of


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
    def fit_layers(cls, columns):
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

    def layer_survival(self, statistics: Tensor, sample: Tensor, size: Tensor) -> Tensor:  # type: ignore[override]
        if self.shared:
            below = torch.searchsorted(sample[0], statistics.contiguous())
        else:
            per_expert = statistics.reshape(-1, len(size)).T.contiguous()
            below = torch.searchsorted(sample, per_expert).T.reshape(statistics.shape)
        pvals = (1 + size - below).float() / (1 + size)
        return torch.where(statistics.isnan(), torch.nan, pvals)

    @classmethod
    def damage(cls, sizes, sample, size):
        if sample.dtype != torch.float32 or sample.shape != (len(sizes), max(sizes)):
            return f"sample is {kind_of(sample)}, not torch.float32 [{len(sizes)}, {max(sizes)}]"
        if size.dtype != torch.int64 or size.tolist() != sizes:
            return f"size is {kind_of(size)}, not the sample sizes of the header"
        is_value = torch.arange(max(sizes), device="cpu") < size[:, None]
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
