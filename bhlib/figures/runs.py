"""One rule on a text, sequence by sequence: losses, counts and pairs of experts, and what a bootstrap makes of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.stats import rankdata
from torch import Tensor, nn

from bhlib.comparisons import Resamples, resample
from bhlib.discovery import input_device
from bhlib.evaluation import score_tokens
from bhlib.patching import RoutingPatch
from bhlib.rules import Rule


@dataclass(frozen=True)
class Run:
    """What a patched model did on n sequences of equal length.

    Attributes
    ----------
    domain : ndarray [n], str
    document : ndarray [n], int64
        Number of the document that a sequence is of, in its domain.
    loss : ndarray [n, length - 1], float32
        Cross-entropy of each token but the first, in nats.
    counts : ndarray [n, length, layers], int64
        Experts that each token got. Entry ``[:, t]`` belongs to the token that predicts ``loss[:, t]``.
    coactivation : ndarray [n, layers, experts, experts], int32
        Tokens of a sequence that used both experts; on the diagonal those that used the one (`Records.coactivation`).
    """

    domain: np.ndarray
    document: np.ndarray
    loss: np.ndarray
    counts: np.ndarray
    coactivation: np.ndarray

    @cached_property
    def drawn(self) -> Resamples:
        """Resamples of the documents: the same ones for all runs on the same text, whose results are so paired."""
        return resample(self.domain, self.document)

    def drawn_within(self, domain: str) -> Resamples:
        """Resamples of the documents of one domain."""
        inside = self.domain == domain
        return resample(self.domain[inside], self.document[inside])


def observe(model: nn.Module, data: Mapping[str, Tensor], documents: Mapping[str, np.ndarray], rule: Rule) -> Run:
    """Run a model under a rule on token ids by domain, each a Tensor [sequences, length] of `documents` [sequences]."""
    domains, numbers, losses, counts, pairs = [], [], [], [], []
    with RoutingPatch(model, rule, max_recorded_tokens=None) as patch:
        for domain, sequences in data.items():
            for sequence, document in zip(sequences, documents[domain], strict=True):
                patch.reset_stats()
                loss, _ = score_tokens(model, sequence[None].to(input_device(model)))
                domains.append(domain)
                numbers.append(document)
                losses.append(loss[0].cpu().numpy())
                counts.append(patch.records.counts())
                pairs.append(patch.records.coactivation().astype(np.int32))
    return Run(np.array(domains), np.array(numbers), np.stack(losses), np.stack(counts), np.stack(pairs))


def interval(statistic: np.ndarray, drawn: Resamples) -> dict[str, float]:
    """``value`` of the sample and its 95 % interval, from a statistic of each row of `Resamples.means`."""
    low, high = drawn.interval(statistic)
    return {"value": float(statistic[0]), "low": low, "high": high}


def rank_correlation(x: np.ndarray, y: np.ndarray, drawn: Resamples) -> dict[str, float]:
    """Spearman's correlation of two quantities of tokens, with a 95 % interval.

    Parameters
    ----------
    x, y : ndarray [sequences, tokens]
        Ties get their mean rank.
    drawn : Resamples
        Of the sequences. The ranks stay those among all tokens.
    """
    a, b = (rankdata(values).reshape(values.shape) for values in (x, y))
    a, b = a - a.mean(), b - b.mean()
    sums = np.stack([part.mean(axis=1) for part in (a, b, a * a, b * b, a * b)], axis=1)
    mean_a, mean_b, square_a, square_b, product = drawn.means(sums).T
    spread = np.sqrt((square_a - mean_a**2) * (square_b - mean_b**2))
    return interval((product - mean_a * mean_b) / spread, drawn)
