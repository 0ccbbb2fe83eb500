"""One rule on a text, sequence by sequence: losses, counts and pairs of experts, and what a bootstrap makes of them."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata
from torch import Tensor, nn

from bhlib.evaluation import score_tokens
from bhlib.patching import RoutingPatch
from bhlib.rules import Rule


@dataclass(frozen=True)
class Run:
    """What a patched model did on n sequences of equal length.

    Attributes
    ----------
    domain : ndarray [n], str
    loss : ndarray [n, length - 1], float32
        Cross-entropy of each token but the first, in nats.
    counts : ndarray [n, length, layers], int64
        Experts that each token got. Entry ``[:, t]`` belongs to the token that predicts ``loss[:, t]``.
    coactivation : ndarray [n, layers, experts, experts], int32
        Tokens of a sequence that used both experts; on the diagonal those that used the one (`Records.coactivation`).
    """

    domain: np.ndarray
    loss: np.ndarray
    counts: np.ndarray
    coactivation: np.ndarray


def observe(model: nn.Module, data: Mapping[str, Tensor], rule: Rule) -> Run:
    """Run a model under a rule on token ids by domain, each a Tensor [sequences, length]."""
    domains, losses, counts, pairs = [], [], [], []
    with RoutingPatch(model, rule, max_recorded_tokens=None) as patch:
        for domain, sequences in data.items():
            for sequence in sequences:
                patch.reset_stats()
                loss, _ = score_tokens(model, sequence[None].to(model.device))
                domains.append(domain)
                losses.append(loss[0].cpu().numpy())
                counts.append(patch.records.counts())
                pairs.append(patch.records.coactivation().astype(np.int32))
    return Run(np.array(domains), np.stack(losses), np.stack(counts), np.stack(pairs))


def resampled_means(values: np.ndarray, resamples: int = 2000, seed: int = 0) -> np.ndarray:
    """Means over sequences, of the sample and of bootstrap resamples of it.

    Parameters
    ----------
    values : ndarray [sequences, ...]
        A sequence is one independent unit, with all that was measured on it. The same seed and number of sequences
        give the same resamples, so that quantities from several calls are paired.

    Returns
    -------
    ndarray [1 + resamples, ...], float64
        Row 0 is the sample's own mean; statistics computed from each row give an estimate and its `interval`.
    """
    n = len(values)
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
    weights = np.vstack([np.ones(n), draws]) / n
    return np.tensordot(weights, np.asarray(values, dtype=float), axes=1)


def interval(statistic: np.ndarray) -> dict[str, float]:
    """``value`` of the sample and its 95 % percentile interval, from one number per row of `resampled_means`."""
    low, high = np.nanquantile(statistic[1:], [0.025, 0.975])
    return {"value": float(statistic[0]), "low": float(low), "high": float(high)}


def rank_correlation(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """Spearman's correlation of two quantities of tokens, with a 95 % interval over sequences.

    Parameters
    ----------
    x, y : ndarray [sequences, tokens]
        Ties get their mean rank. Tokens of a sequence depend on one another, so whole sequences are resampled; the
        ranks stay those among all tokens.
    """
    a, b = (rankdata(values).reshape(values.shape) for values in (x, y))
    a, b = a - a.mean(), b - b.mean()
    sums = np.stack([part.mean(axis=1) for part in (a, b, a * a, b * b, a * b)], axis=1)
    mean_a, mean_b, square_a, square_b, product = resampled_means(sums).T
    spread = np.sqrt((square_a - mean_a**2) * (square_b - mean_b**2))
    return interval((product - mean_a * mean_b) / spread)
