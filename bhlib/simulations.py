"""False discovery rate and power of the procedures, by simulation, as tidy tables.

All simulations test normal means from one side: a test's score is ``z ~ N(effect, 1)``, its p-value the
survival function of N(0, 1) at ``z``, so a true null (effect 0) has an exactly uniform p-value. What varies
is how the scores depend on each other. Every procedure and level sees the same scores: comparisons between
rows of one table are paired, and more precise than the standard errors of the single rows suggest.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from bhlib.procedures import canonical_method, check_alpha, reject

METHODS = ("bh", "by", "storey", "tsbky", "tsbh", "bonferroni", "holm", "hochberg", "fixed")
"""Whose level is an error rate, of one kind or another: all but Higher Criticism."""

METHODS_1995 = ("bonferroni", "hochberg", "bh", "by", "storey")

CONFIGURATIONS_1995 = {"D": (4, 3, 2, 1), "E": (1, 1, 1, 1), "I": (1, 2, 3, 4)}
"""Relative numbers of false nulls at effects L/4, 2L/4, 3L/4 and L: decreasing, equal, increasing."""


# ------------------------------------------------------------------- tables


def simulate_fdr(
    alphas: Sequence[float] = (0.01, 0.05, 0.1, 0.2),
    methods: Sequence[str] = METHODS,
    dependence: str = "independent",
    *,
    num_tests: int = 64,
    num_null: int = 48,
    effect: float = 3.0,
    rho: float = 0.5,
    correlation: np.ndarray | None = None,
    repetitions: int = 10_000,
    seed: int = 0,
) -> pd.DataFrame:
    """Realised false discovery rate, familywise error rate and power, with Monte-Carlo standard errors.

    Parameters
    ----------
    alphas : sequence of float
        Levels, each strictly between 0 and 1.
    methods : sequence of str
        Names or aliases of `bhlib.procedures.PROCEDURES`.
    dependence : str
        ``"independent"``, ``"equicorrelated"`` (correlation `rho` between any two scores), or, with
        `correlation`, a name of your own for it.
    num_tests, num_null : int
        Number of tests ``m`` and of true nulls among them. The false nulls sit at random positions, drawn
        anew in each repetition, so with a given `correlation` no test is special.
    effect : float
        Mean of a false null's score, in standard deviations.
    rho : float
        For ``"equicorrelated"``; from ``-1 / (num_tests - 1)`` to 1.
    correlation : array [num_tests, num_tests], optional
        Correlation matrix of the scores: symmetric, unit diagonal, no negative eigenvalue.
    repetitions : int
        At least 2.
    seed : int

    Returns
    -------
    DataFrame
        One row per (alpha, method), columns ``dependence, method, alpha, fdr, fdr_se, fwer, fwer_se, power,
        power_se, num_tests, num_null, effect, repetitions, seed``. ``fdr`` is the mean over repetitions of
        false rejections / rejections (0 if there are none), ``fwer`` the fraction of repetitions with a false
        rejection, ``power`` the mean fraction of false nulls rejected (NaN if there are no false nulls);
        ``_se`` are their standard errors.

    Raises
    ------
    ValueError
        For an unknown dependence, a matrix that is no correlation matrix, or impossible counts.
    """
    _check_counts(num_tests, num_null, repetitions)
    methods = _check_levels_and_methods(alphas, methods)
    root = _square_root(_correlation(dependence, num_tests, rho, correlation))
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((repetitions, num_tests)) @ root.T
    is_null = rng.permuted(np.tile(np.arange(num_tests) < num_null, (repetitions, 1)), axis=1)
    pvals = _one_sided_pvalues(noise + effect * ~is_null)
    settings = {"num_tests": num_tests, "num_null": num_null, "effect": effect}
    rows = [
        {"dependence": dependence, "method": method, "alpha": alpha}
        | _error_rates(reject(pvals, alpha, method, check=False), torch.from_numpy(is_null))
        | settings
        for alpha in alphas
        for method in methods
    ]
    return pd.DataFrame(rows).assign(repetitions=repetitions, seed=seed)


def simulate_power_1995(
    num_tests: Sequence[int] = (4, 8, 16, 32, 64),
    null_fractions: Sequence[float] = (0.75, 0.5, 0.25, 0.0),
    configurations: Sequence[str] = ("D", "E", "I"),
    methods: Sequence[str] = METHODS_1995,
    *,
    largest_effect: float = 5.0,
    alpha: float = 0.05,
    repetitions: int = 20_000,
    seed: int = 0,
) -> pd.DataFrame:
    """Power in the setting of figure 1 of Benjamini & Hochberg (1995).

    There are ``m`` independent normal scores of unit variance, a fraction of them true nulls. The false nulls
    have the effects ``L/4, 2L/4, 3L/4, L``, in numbers that Decrease, are Equal or Increase with the effect.
    The paper has L = 5 and 10 and 20,000 repetitions. Choices made here where it leaves them open: tests are
    one-sided, and numbers of false nulls that cannot be divided as prescribed are divided so on average
    (`effects_1995`). Hence the mean effect does not depend on ``m``, and powers can be compared between them.

    Parameters
    ----------
    num_tests : sequence of int
        Numbers of tests ``m``.
    null_fractions : sequence of float
        Fractions of true nulls, each in [0, 1) and a whole number of tests for each ``m``.
    configurations : sequence of str
        Keys of `CONFIGURATIONS_1995`.
    methods : sequence of str
        Names or aliases of `bhlib.procedures.PROCEDURES`.
    largest_effect : float
        ``L``, in standard deviations.
    alpha : float
        Level.
    repetitions : int
        Per setting, at least 2. All settings share the same noise.
    seed : int

    Returns
    -------
    DataFrame
        One row per setting and method, columns ``num_tests, null_fraction, num_null, configuration, method,
        alpha, fdr, fdr_se, fwer, fwer_se, power, power_se, largest_effect, repetitions, seed``. Rates as in
        `simulate_fdr`; ``power`` is the paper's "average power".

    Raises
    ------
    ValueError
        For an unknown configuration, or a fraction that leaves no false null or part of a test.

    References
    ----------
    Benjamini & Hochberg (1995), J. R. Statist. Soc. B 57, 289-300, section 4.
    """
    methods = _check_levels_and_methods([alpha], methods)
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((repetitions, max(num_tests)))
    start = rng.random(repetitions)
    rows = []
    for m in num_tests:
        for null_fraction in null_fractions:
            num_null = _whole_number_of_nulls(m, null_fraction)
            _check_counts(m, num_null, repetitions)
            is_null = torch.arange(m, device="cpu") < num_null
            for configuration in configurations:
                scores = noise[:, :m].copy()
                scores[:, num_null:] += effects_1995(m - num_null, configuration, largest_effect, start)
                pvals = _one_sided_pvalues(scores)
                setting = {
                    "num_tests": m,
                    "null_fraction": null_fraction,
                    "num_null": num_null,
                    "configuration": configuration,
                }
                for method in methods:
                    rejected = reject(pvals, alpha, method, check=False)
                    rows.append(setting | {"method": method, "alpha": alpha} | _error_rates(rejected, is_null))
    return pd.DataFrame(rows).assign(largest_effect=largest_effect, repetitions=repetitions, seed=seed)


def effects_1995(
    num_false: int, configuration: str, largest_effect: float = 5.0, start: float | np.ndarray = 0.5
) -> np.ndarray:
    """Effects of the false nulls, nondecreasing along the last axis.

    They are quantiles of the distribution that `CONFIGURATIONS_1995` prescribes, at equal distances: at
    ``(i + start) / num_false`` for ``i = 0, ..., num_false - 1``. Over a uniformly random `start`, the
    expected number at each effect is the prescribed one, for any `num_false`, and the actual number differs
    from it by less than one.

    Parameters
    ----------
    num_false : int
    configuration : str
        ``"D"``, ``"E"`` or ``"I"``.
    largest_effect : float
        ``L``, in standard deviations.
    start : float or array [...]
        In [0, 1).

    Returns
    -------
    array [..., num_false], float64
        Values among ``L/4, 2L/4, 3L/4, L``.

    Examples
    --------
    >>> effects_1995(8, "D", largest_effect=4.0).tolist()
    [1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 3.0, 4.0]
    """
    if configuration not in CONFIGURATIONS_1995:
        known = ", ".join(map(repr, CONFIGURATIONS_1995))
        raise ValueError(f"configuration={configuration!r} is unknown; choose one of {known}")
    weights = np.array(CONFIGURATIONS_1995[configuration])
    inner_edges = weights.cumsum()[:-1] / weights.sum()
    quantiles = (np.arange(num_false) + np.asarray(start)[..., None]) / num_false
    group = np.searchsorted(inner_edges, quantiles, side="right")
    return largest_effect * (group + 1) / 4


# ------------------------------------------------------------------- scores


def _one_sided_pvalues(scores: np.ndarray) -> torch.Tensor:
    """Survival function of N(0, 1), float64: Phi(-z), never 1 - Phi(z)."""
    return torch.special.ndtr(-torch.from_numpy(scores))


def _correlation(dependence: str, num_tests: int, rho: float, correlation: np.ndarray | None) -> np.ndarray:
    """The correlation matrix [m, m] that `dependence` means."""
    if correlation is not None:
        if dependence in ("independent", "equicorrelated"):
            raise ValueError(
                f"dependence={dependence!r} has a correlation of its own; give yours another name, e.g. "
                "dependence='fitted'"
            )
        correlation = np.asarray(correlation, dtype=np.float64)
        if correlation.shape != (num_tests, num_tests):
            raise ValueError(
                f"correlation has shape {correlation.shape}; with num_tests={num_tests} it must be "
                f"{(num_tests, num_tests)}"
            )
        return correlation
    if dependence == "independent":
        return np.eye(num_tests)
    if dependence == "equicorrelated":
        return np.full((num_tests, num_tests), rho) + (1.0 - rho) * np.eye(num_tests)
    raise ValueError(
        f"dependence={dependence!r} is unknown; choose 'independent' or 'equicorrelated', or pass the "
        "correlation matrix that it stands for as correlation="
    )


def _square_root(correlation: np.ndarray) -> np.ndarray:
    """The symmetric matrix whose square is `correlation`; singular ones are fine.

    Unlike a product with the eigenvectors alone it is unique, so that a seed gives the same scores with every LAPACK.
    """
    if not np.allclose(correlation, correlation.T, atol=1e-8):
        raise ValueError("correlation is not symmetric; use (correlation + correlation.T) / 2")
    diagonal = np.diag(correlation)
    if not np.allclose(diagonal, 1.0, atol=1e-6):
        worst = diagonal[np.abs(diagonal - 1.0).argmax()]
        raise ValueError(
            f"correlation has {worst:.3g} on its diagonal, which must be 1; divide a covariance by the "
            "standard deviations, as numpy.corrcoef does"
        )
    eigenvalues, eigenvectors = np.linalg.eigh(correlation)
    if eigenvalues[0] < -1e-6:
        raise ValueError(
            f"correlation has the negative eigenvalue {eigenvalues[0]:.3g}, so no scores have it; estimate "
            "all its entries from the same complete data; if equicorrelated, keep rho between "
            "-1 / (num_tests - 1) and 1"
        )
    return (eigenvectors * np.sqrt(eigenvalues.clip(min=0.0))) @ eigenvectors.T


# ------------------------------------------------------------------- error rates


def _error_rates(rejected: torch.Tensor, is_null: torch.Tensor) -> dict[str, float]:
    """Means over repetitions and their standard errors.

    Parameters
    ----------
    rejected : Tensor [repetitions, m], bool
    is_null : Tensor [repetitions, m] or [m], bool
    """
    is_null = is_null.expand_as(rejected)
    false_rejections = (rejected & is_null).sum(dim=-1)
    false_nulls = (~is_null).sum(dim=-1)
    samples = {
        "fdr": false_rejections.double() / rejected.sum(dim=-1).clamp(min=1),
        "fwer": (false_rejections > 0).double(),
        # 0 / 0 = NaN where there is nothing to find
        "power": (rejected & ~is_null).sum(dim=-1).double() / false_nulls,
    }
    rates = {}
    for name, sample in samples.items():
        rates[name] = sample.mean().item()
        rates[f"{name}_se"] = (sample.std() / len(sample) ** 0.5).item()
    return rates


# ------------------------------------------------------------------- checks


def _check_levels_and_methods(alphas: Sequence[float], methods: Sequence[str]) -> list[str]:
    """Canonical names of `methods`; errors come before the simulation, not after it."""
    for alpha in alphas:
        check_alpha(alpha)
    return [canonical_method(method) for method in methods]


def _check_counts(num_tests: int, num_null: int, repetitions: int) -> None:
    if num_tests < 1:
        raise ValueError(f"num_tests={num_tests} must be at least 1")
    if not 0 <= num_null <= num_tests:
        raise ValueError(f"num_null={num_null} must lie between 0 and num_tests={num_tests}")
    if repetitions < 2:
        raise ValueError(f"repetitions={repetitions} must be at least 2, for a standard error")


def _whole_number_of_nulls(num_tests: int, null_fraction: float) -> int:
    num_null = null_fraction * num_tests
    if not 0 <= null_fraction < 1 or num_null != round(num_null):
        raise ValueError(
            f"null_fraction={null_fraction} of num_tests={num_tests} is {num_null:g} true nulls; it must be "
            "a whole number from 0 to num_tests - 1, so that there is a false null to find"
        )
    return round(num_null)
