"""`BH`: multiple testing per token."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from bhlib import kernels
from bhlib.procedures import ascending, canonical_method, check_alpha, critical_values, reject
from bhlib.pvalues import DirichletNull, PValueMaker, make_pvalues
from bhlib.rules.base import Forms, Level, Rule, by_token, each, tokens_each
from bhlib.weighting import find_weighting

#: Procedures whose decision compares the k-th smallest p-value with a constant: no p-values are needed then.
_CONSTANT_CRITICAL_VALUES = ("bh", "by", "hochberg", "bonferroni", "fixed")

#: Tokens whose float32 logits take a megabyte, for 64 experts.
_CACHED_TOKENS = 4096


@dataclass(frozen=True)
class BH(Rule):
    """Multiple testing per token: keep the experts whose p-values the procedure rejects at level `alpha`.

    Parameters
    ----------
    alpha : float or sequence of float
        Level of the procedure, in (0, 1); or one for each sequence of a batch (`Rule`).
    pvalues : PValueMaker or str
        Maker of the p-values (`bhlib.pvalues`), or the name of one that needs no calibration; kept as a maker.
    method : str
        Procedure, see `bhlib.procedures`; ``"bh"`` by default.
    layer_weights : sequence of float, optional
        A factor per MoE layer on the odds of `alpha`: layer l is tested at ``w a / (1 - a + w a)``. A layer with a
        weight above 1 gets more experts. The weights are chosen beforehand, on calibration text
        (`bhlib.tuning.choose_layer_weights`). Each token and layer is still a test by itself, at its layer's level;
        nothing is promised over the layers together. This is not the weighted BH procedure of Genovese, Roeder and
        Wasserman (2006), which is one step-up over pooled hypotheses with weights of arithmetic mean 1.

    Notes
    -----
    Where the null is shared by all experts and the procedure has constant critical values, the decision is made
    by comparing the k-th largest statistic with the statistic whose p-value is the k-th critical value. The
    decisions are the same as with p-values (tested), and no p-value is computed.

    `max_k` truncates after the procedure has run on all experts: a token for which 12 are significant gets its
    best `max_k`.
    """

    alpha: Level = 0.05
    pvalues: PValueMaker = field(default_factory=DirichletNull)
    method: str = "bh"
    layer_weights: Sequence[float] | None = None
    _thresholds: dict = field(default_factory=dict, init=False, repr=False, compare=False)
    _cuts: dict = field(default_factory=dict, init=False, repr=False, compare=False)

    level_name = "alpha"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "method", canonical_method(self.method))
        object.__setattr__(self, "pvalues", make_pvalues(self.pvalues))
        self.pvalues.check()
        if self.layer_weights is not None:
            weights = tuple(float(weight) for weight in self.layer_weights)
            if not weights or not all(0 < weight < float("inf") for weight in weights):
                raise ValueError(
                    f"layer_weights must hold one finite number above 0 per MoE layer, got {self.layer_weights!r}; "
                    f"None treats all layers alike."
                )
            object.__setattr__(self, "layer_weights", weights)

    def _checked(self, level: Level) -> float | tuple[float, ...]:
        levels = super()._checked(level)
        return levels if isinstance(levels, tuple) else float(levels)

    def _check_level(self, level: float) -> None:
        check_alpha(level)

    def layer_levels(self, layer: int | None) -> tuple[float, ...]:
        """The levels at which a layer is tested, by itself: each `alpha`, its odds times the layer's weight.

        One number, or one for each sequence of the batch if `alpha` is several.
        """
        alphas = each(self.alpha)
        if self.layer_weights is None:
            return alphas
        if layer is None or not 0 <= layer < len(self.layer_weights):
            raise ValueError(f"layer must lie in 0..{len(self.layer_weights) - 1} for layer_weights, got {layer}.")
        weight = self.layer_weights[layer]
        # Where rounding carries it to 1, a large weight on a high level, it is the largest number below.
        return tuple(min(weight * alpha / (1 - alpha + weight * alpha), 1 - 2**-53) for alpha in alphas)

    def select(self, router_logits: Tensor, scores: Tensor, layer: int | None) -> tuple[Tensor, Tensor]:
        if self.pvalues.shared:
            order = torch.topk(scores, self.max_k, dim=-1).indices
            # On a CPU in pieces that stay in its cache: twice as fast.
            size = _CACHED_TOKENS if router_logits.device.type == "cpu" else max(len(router_logits), 1)
            counts = torch.cat(list(self._num_significant(router_logits, layer, size)))
        else:
            pvals = self.pvalues(router_logits, layer)
            parts = zip(self.layer_levels(layer), self._by_level(pvals), strict=True)
            counts = torch.cat([reject(part, level, self.method, check=False).sum(dim=-1) for level, part in parts])
            # Smallest p-value first; among equals (p = 0, conformal steps) the better-scored expert.
            by_score = torch.argsort(scores, dim=-1, descending=True, stable=True)
            by_pvalue = torch.argsort(pvals.gather(-1, by_score), dim=-1, stable=True)
            order = by_score.gather(-1, by_pvalue)[:, : self.max_k]
        return order, counts.clamp(self.min_k, self.max_k)

    @property
    def is_prefix(self) -> bool:  # type: ignore[override]
        return self.pvalues.shared

    def check_model(self, num_layers: int, num_experts: int) -> None:
        super().check_model(num_layers, num_experts)
        self.pvalues.check_model(num_layers, num_experts)
        if self.layer_weights is not None and len(self.layer_weights) != num_layers:
            raise ValueError(
                f"layer_weights has {len(self.layer_weights)} entries for a model of {num_layers} MoE layers: "
                f"give one for each layer."
            )

    def prepare(self, num_experts: int, layer: int, device: torch.device) -> None:
        if self.has_thresholds:
            self._ranked_thresholds(num_experts, layer, device)
        if not self.pvalues.shared:
            self.pvalues(torch.zeros(1, num_experts, device=device), layer)  # what it keeps of the layer on the device
        self.kernel_cuts(num_experts, layer, device)

    def _by_kernel(
        self,
        router_logits: Tensor,
        layer: int | None,
        weighting: str,
        temperature: float,
        dtype: torch.dtype,
        exact: bool,
        own_k: int = 0,
    ) -> Forms | None:
        """Of a statistic and a weighting that the kernel knows, where no gradient is wanted."""
        if kernels.gradients_wanted(router_logits) or own_k and self.max_k > own_k:
            return None
        code, num_experts = find_weighting(weighting).kernel, router_logits.shape[-1]
        if code is None or router_logits.dtype == torch.float64:
            return None
        form = self.kernel_cuts(num_experts, layer, router_logits.device)
        if form is None:
            return None
        from bhlib.kernels.routing import bh_route  # imports Triton, which not everybody has

        statistic, exclude_top, cuts = form
        if cuts.dim() == 2:
            tokens_each(len(router_logits), len(cuts))
        more = exact and (dtype != torch.float32 or own_k > 0)
        weights, experts, counts, *full = bh_route(
            router_logits,
            cuts,
            statistic=statistic,
            exclude_top=exclude_top,
            min_k=self.min_k,
            max_k=self.max_k,
            weighting=code,
            temperature=temperature,
            weights_dtype=dtype,
            empty=num_experts,
            exact=more,
            own_k=own_k,
        )
        return Forms(weights, experts, counts, full[0] if more else weights if exact else None)

    def kernel_cuts(self, num_experts: int, layer: int | None, device: torch.device) -> tuple[str, int, Tensor] | None:
        """What the routing kernel compares with what (`bhlib.kernels.routing.cut_table`); computed once.

        None if it cannot run on the device, or cannot decide as this rule does.
        """
        layer = self._own_layer(layer)
        key = (num_experts, layer, str(device))
        if key not in self._cuts:
            form = None
            if kernels.run_on(device) and self.has_thresholds:
                from bhlib.kernels.routing import cut_table  # imports Triton, which not everybody has

                form = cut_table(self.pvalues, self.thresholds(num_experts, layer, device), num_experts)
            self._cuts[key] = form
        return self._cuts[key]

    @property
    def has_thresholds(self) -> bool:
        """Whether the decision compares ordered statistics with constants: a shared null, constant critical values."""
        return self.pvalues.shared and self.method in _CONSTANT_CRITICAL_VALUES

    def thresholds(self, num_experts: int, layer: int | None = None, device: torch.device | str = "cpu") -> Tensor:
        """What the ordered statistics of a token are compared with.

        Parameters
        ----------
        num_experts : int
        layer : int, optional
            Index of the MoE layer, where the null or the level differs by layer.
        device : torch.device or str

        Returns
        -------
        Tensor [experts] or, for several levels, [levels, experts]
            The expert with the k-th largest statistic (`pvalues.statistic_of`) passes at entry k - 1 or above. The
            procedure keeps all up to the last one that passes.

        Raises
        ------
        ValueError
            If the rule has none (`has_thresholds`).
        """
        return self._ranked_thresholds(num_experts, layer, torch.device(device))[0]

    def _num_significant(self, router_logits: Tensor, layer: int | None, size: int) -> Iterator[Tensor]:
        """Number of rejections per token, for a null shared by all experts: in pieces of up to `size` tokens."""
        if not self.has_thresholds:
            for level, part in zip(self.layer_levels(layer), self._by_level(router_logits), strict=True):
                for piece in part.split(size):
                    yield reject(self.pvalues(piece, layer), level, self.method, check=False).sum(dim=-1)
            return
        threshold, rank = self._ranked_thresholds(router_logits.shape[-1], layer, router_logits.device)
        pieces = router_logits.split(size)
        several = threshold.dim() == 2
        thresholds = by_token(threshold, len(router_logits)).split(size) if several else (threshold,) * len(pieces)
        for piece, passed in zip(pieces, thresholds, strict=True):
            statistic = self.pvalues.statistic_of(piece, top=ascending(piece.float()).flip(-1))
            # Step-up: the largest k whose k-th largest statistic passes the k-th threshold.
            yield (rank * (statistic >= passed)).amax(dim=-1).long()

    def _by_level(self, values: Tensor) -> tuple[Tensor, ...]:
        """What stands for the tokens of a batch [tokens, ...], parted by their level."""
        num_levels = len(each(self.alpha))
        return values.unflatten(0, (num_levels, tokens_each(len(values), num_levels))).unbind(0)

    def _prepare_like(self, other: Self) -> None:
        super()._prepare_like(other)
        for num_experts, layer, device in other._thresholds:
            self._ranked_thresholds(num_experts, layer, torch.device(device))
        for num_experts, layer, device in other._cuts:
            self.kernel_cuts(num_experts, layer, torch.device(device))

    def _ranked_thresholds(self, num_experts: int, layer: int | None, device: torch.device) -> tuple[Tensor, Tensor]:
        """`thresholds`, and the ranks from 1 on [experts]; computed once per layer."""
        if not self.has_thresholds:
            raise ValueError(
                f"{self!r} has no thresholds: they need one null for all experts and a procedure among "
                f"{', '.join(_CONSTANT_CRITICAL_VALUES)}."
            )
        layer = self._own_layer(layer)
        key = num_experts, layer, str(device)
        if key not in self._thresholds:
            critical = []
            for level in self.layer_levels(layer):
                self.pvalues.check_resolution(level, num_experts)
                critical.append(critical_values(num_experts, level, self.method))
            threshold = self.pvalues.critical_statistics(torch.cat(critical), layer).to(device)
            if isinstance(self.alpha, tuple):
                threshold = threshold.view(-1, num_experts)
            self._thresholds[key] = threshold, torch.arange(1, num_experts + 1, dtype=torch.int16, device=device)
        return self._thresholds[key]

    def _own_layer(self, layer: int | None) -> int | None:
        """The layer, or None if all are decided alike."""
        return None if self.layer_weights is None and self.pvalues.num_layers is None else layer
