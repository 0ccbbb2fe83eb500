"""A null of which one has the survival function, as a table."""

import warnings

import numpy as np
import torch
from torch import Tensor

from bhlib.pvalues.fitted import FittedNull, ResolutionWarning, kind_of


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
            From a distribution function pass ``1 - cdf``, at a loss: the smallest p-value above 0 is then some
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
        return cls(tensors, cls.make_header(sizes, model_name, num_experts, statistic, exclude_top))

    @classmethod
    def fit_layers(cls, columns, **options):
        raise TypeError("a TableNull is not fitted to samples; make one with TableNull.from_survival(x, sf, ...)")

    def layer_survival(self, statistics: Tensor, x: Tensor, sf: Tensor) -> Tensor:  # type: ignore[override]
        x, sf = x[0], sf[0]
        cell = (torch.searchsorted(x, statistics.contiguous(), right=True) - 1).clamp(0, len(x) - 2)
        left, right = sf[cell], sf[cell + 1]
        share = ((statistics - x[cell]) / (x[cell + 1] - x[cell])).clamp(0, 1)
        # Rounding may carry the sum past the right end, and p must not rise to the next cell.
        pvals = torch.maximum(left + share * (right - left), right)
        return torch.where(statistics < x[0], 1.0, pvals)

    @classmethod
    def damage(cls, sizes, x, sf):
        if len(sizes) > 1:
            return "x is a table per expert"
        for name, table in (("x", x), ("sf", sf)):
            if table.dtype != torch.float32 or table.shape != (1, sizes[0]) or sizes[0] < 2:
                return f"{name} is {kind_of(table)}, not torch.float32 [1, {sizes[0]}], of two points or more"
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
    tables = [torch.as_tensor(np.asarray(table, dtype=np.float64), device="cpu") for table in values]
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
