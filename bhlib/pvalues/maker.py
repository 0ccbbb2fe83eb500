"""What every maker of p-values is: a statistic, a survival function, and what follows from the two."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bhlib.procedures import round_down


class KernelForm(NamedTuple):
    """What a kernel needs to decide as the critical statistics of a p-value maker do.

    Attributes
    ----------
    statistic : str
        A statistic that is computed from the sorted logits: a name in `bhlib.pvalues.STATISTICS`, or ``"rest"``, minus
        the probability of all other experts.
    exclude_top : int
        How many of the largest logits the background of the statistic leaves out.
    cuts : Tensor [experts], float32
        Rank k passes if its statistic is at least ``cuts[k - 1]``.
    """

    statistic: str
    exclude_top: int
    cuts: Tensor


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
    whole_token : bool
        True if the null hypothesis is about all the experts of a token: those outside the token's top are then not a
        random part of them. False if it is about an expert outside the top, as that of a fitted null is.

    A maker of your own is held to this when it is put into a rule (``check``) and into a model (``check_model``). For a
    survival function that you have as a table there is `TableNull`.
    """

    name: str
    statistic: str
    shared: bool = True
    num_layers: int | None = None
    whole_token: bool = False

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
        """Raise a ValueError unless ``survival`` is one: in [0, 1] and never increasing, at some thousand statistics,
        for every layer; where the null differs by expert, ``check_model`` does it."""
        if self.shared:
            for layer in [None] if self.num_layers is None else range(self.num_layers):
                self._check_survival(_probe(), layer)

    def check_model(self, num_layers: int, num_experts: int) -> None:
        """Raise a ValueError if a model of this many MoE layers and experts cannot be routed by these p-values."""
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
                f"{where} is no survival function: p-values rise from {pvals[:-1][rises][0]:g} to "
                f"{pvals[1:][rises][0]:g} at the statistic {statistics[1:][rises][0]:g}; return P(statistic >= value), "
                f"that is 1 - cdf and not the cdf"
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
        levels = round_down(critical_p, torch.float32)
        high = torch.full(levels.shape, _LARGEST_RANK, dtype=torch.int64, device=levels.device)
        low = -1 - high
        reachable = self.survival(_float_of_rank(high), layer) <= levels
        while (low < high).any():
            middle = (low + high).div(2, rounding_mode="floor")
            small = self.survival(_float_of_rank(middle), layer) <= levels
            low, high = torch.where(small, low, middle + 1), torch.where(small, middle, high)
            low = torch.minimum(low, high)
        return torch.where(reachable, _float_of_rank(high), torch.inf)

    def kernel_form(self, num_experts: int, thresholds: Tensor) -> KernelForm | None:
        """How a kernel makes these decisions, None if only ``statistic_of`` can: routing then takes the path of torch.

        Whoever overrides ``statistic_of`` in a subclass of a maker that has a kernel form overrides this too.

        Parameters
        ----------
        num_experts : int
        thresholds : Tensor [experts], float32
            The critical statistics of the ranks, for instance
            ``critical_statistics(critical_values(num_experts, alpha, "bh"), layer)``.
        """
        return None

    def null_logits(
        self, tokens: int, num_experts: int, exclude_top: int, generator: np.random.Generator
    ) -> np.ndarray | None:
        """Simulated logits, float64 [tokens, num_experts], for which the null hypothesis is true.

        If it is about the experts outside the top (not ``whole_token``), the first ``exclude_top`` columns hold logits
        out of the others' reach. None if the maker says nothing of how a token comes about, as a fitted null does not.
        """
        return None


def _probe() -> Tensor:
    """Some thousand statistics in increasing order: close to each other from -64 to 64, and of every magnitude."""
    ranks = torch.linspace(-1, 1, 2001, dtype=torch.float64, device="cpu").mul(_LARGEST_RANK).long()
    return torch.cat([torch.linspace(-64, 64, 4097, device="cpu"), _float_of_rank(ranks)]).sort().values


_LARGEST_RANK = int(np.array(np.finfo(np.float32).max).view(np.int32))


def _float_of_rank(rank: Tensor) -> Tensor:
    """The float32 number of a given rank: 0 is +0.0, 1 the smallest number above it, -1 is -0.0, and so on."""
    bits = torch.where(rank >= 0, rank, -(2**31) - 1 - rank)
    return bits.to(torch.int32).view(torch.float32)
