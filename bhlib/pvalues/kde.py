"""A null from a kernel density estimate, through a table of its survival function."""

import math

import numpy as np
import torch
from scipy.interpolate import CubicHermiteSpline
from scipy.special import ndtr
from scipy.stats import gaussian_kde
from torch import Tensor

from bhlib.pvalues.fitted import FittedNull, kind_of


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
    def fit_layers(cls, columns, bw_method=None, weights=None):
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

    def make_tables(self, grid: Tensor, log_survival: Tensor, slope: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return _refined(grid, log_survival, slope)

    def layer_survival(self, statistics: Tensor, low: Tensor, cells: Tensor, pvals: Tensor) -> Tensor:  # type: ignore[override]
        return _interpolate(statistics, low, cells, pvals)

    @classmethod
    def damage(cls, sizes, grid, log_survival, slope):
        if grid.dtype != torch.float64 or grid.shape != (len(sizes), 2):
            return f"grid is {kind_of(grid)}, not torch.float64 [{len(sizes)}, 2]"
        low, span = grid[:, 0], grid[:, 1] - grid[:, 0]
        # Within these bounds, which are far from any logit, no float32 product in `_interpolate` overflows.
        if not ((low.abs() < 1e18) & (span > 1e-18) & (span < 1e18)).all():
            return "grid does not go from a lowest statistic to a highest one"
        for name, table in (("log_survival", log_survival), ("slope", slope)):
            if table.dtype != torch.float32 or table.ndim != 2 or len(table) != len(sizes) or table.shape[1] < 2:
                return f"{name} is {kind_of(table)}, not torch.float32 [{len(sizes)}, nodes]"
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
        log_survival[column] = np.minimum(np.log(survival), 0)  # rounding carries it past 1
        slope[column] = -density / survival
    return torch.from_numpy(np.stack([low, high], axis=-1)), torch.from_numpy(log_survival), torch.from_numpy(slope)


def _refined(grid: Tensor, log_survival: Tensor, slope: Tensor) -> tuple[Tensor, ...]:
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
