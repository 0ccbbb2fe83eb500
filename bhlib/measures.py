"""Measures beyond the mean loss: accuracy, calibration, the distance from the unpatched model, the worst of the text.

    table = measure(model, {"top-4": (TopK(4), {}), "BH": (BH(0.01), {})}, text, documents, against="top-4")

A rule that is better on average may be worse where it counts: on one domain, or on the tokens that are hard anyway.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from bhlib.comparisons import Resamples, resample
from bhlib.discovery import find_moe_layers, input_device
from bhlib.patching import RoutingPatch
from bhlib.rules import Rule, TopK

#: Bins of equal width that confidences are put in for the expected calibration error (Guo et al. 2017).
BINS = 15

#: Share of the tokens, those with the largest losses, whose mean loss is a measure.
WORST = 0.05

MEASURES = ("loss", "accuracy", "kl", "agreement", "ece", "worst domain", "worst domain's rise", "worst 5 % of tokens")


class Scores(NamedTuple):
    """What is kept of each of n sequences under one rule.

    Attributes
    ----------
    loss : ndarray [n, length - 1], float32
        Nats per token.
    gap : ndarray [n, BINS]
        By bin of confidence: correct guesses less the sum of confidences, over the tokens of the sequence.
    accuracy, kl, agreement, mean_k : ndarray [n]
        Share of right guesses; KL(unpatched || patched) in nats per token; share of guesses that are the unpatched
        model's; experts per token and layer.
    """

    loss: np.ndarray
    gap: np.ndarray
    accuracy: np.ndarray
    kl: np.ndarray
    agreement: np.ndarray
    mean_k: np.ndarray


@torch.no_grad()
def measure(
    model: nn.Module,
    rules: Mapping[str, tuple[Rule, Mapping[str, Any]]],
    data: Mapping[str, Tensor],
    documents: Mapping[str, np.ndarray],
    *,
    against: Mapping[str, str] | None = None,
    batch_size: int = 8,
) -> pd.DataFrame:
    """Measure rules on a text, with intervals over documents.

    Parameters
    ----------
    model : nn.Module
        Unpatched, in evaluation mode.
    rules : mapping of str to (Rule, mapping)
        By name, and with what else the model is patched (`RoutingPatch`).
    data : mapping of str to Tensor [sequences, length]
        Token ids by domain.
    documents : mapping of str to ndarray [sequences]
        The document of each sequence.
    against : mapping of str to str, optional
        The rule that a rule is compared with, by its name: one at the same cost.
    batch_size : int

    Returns
    -------
    pandas.DataFrame
        A row per rule and name in `MEASURES`: ``rule``, ``mean_k``, ``measure``, ``value``, ``low``, ``high`` (95 %,
        bootstrap over documents); if it is compared, ``against``, and the ``difference`` (rule minus that one, on the
        same resamples) with ``difference_low`` and ``difference_high``; ``sequences``, ``units``.

        "ece" is the expected calibration error of the best guess. "worst domain" is the mean loss of the domain with
        the largest one; its "rise" is the largest, over domains, of the loss above that of the model's own top-k.
        "worst 5 % of tokens" is the mean loss of those with the largest losses under the rule itself, whichever they
        are.
    """
    own = TopK(find_moe_layers(model)[0].top_k)
    places = [(domain, number) for domain in data for number in documents[domain]]
    domain, document = (np.array(part) for part in zip(*places, strict=True))
    drawn = resample(domain, document)
    scores = _score_all(model, {"": (own, {})} | dict(rules), data, batch_size)
    unpatched = _by_domain(scores.pop(""), domain, drawn)
    found = {name: _statistics(one, domain, drawn, unpatched) for name, one in scores.items()}
    rows = []
    for name, statistics in found.items():
        rival = (against or {}).get(name)
        for what, values in statistics.items():
            low, high = drawn.interval(values)
            row = {"rule": name, "mean_k": scores[name].mean_k.mean(), "measure": what}
            row |= {"value": values[0], "low": low, "high": high}
            if rival is not None:
                difference = values - found[rival][what]
                low, high = drawn.interval(difference)
                row |= {"against": rival, "difference": difference[0], "difference_low": low, "difference_high": high}
            rows.append(row | {"sequences": len(domain), "units": drawn.units})
    return pd.DataFrame(rows)


def _score_all(
    model: nn.Module,
    rules: Mapping[str, tuple[Rule, Mapping[str, Any]]],
    data: Mapping[str, Tensor],
    batch_size: int,
) -> dict[str, Scores]:
    kept: dict[str, list[Scores]] = {name: [] for name in rules}
    for sequences in data.values():
        for batch in sequences.to(input_device(model)).split(batch_size):
            unpatched = model(input_ids=batch, use_cache=False).logits[:, :-1].float().log_softmax(dim=-1)
            for name, (rule, options) in rules.items():
                with RoutingPatch(model, rule, max_recorded_tokens=None, **options) as patch:
                    log_p = model(input_ids=batch, use_cache=False).logits[:, :-1].float().log_softmax(dim=-1)
                    counts = patch.records.counts()
                kept[name].append(_score(log_p, unpatched, batch[:, 1:], counts))
    return {name: Scores(*map(np.concatenate, zip(*some, strict=True))) for name, some in kept.items()}


def _score(log_p: Tensor, unpatched: Tensor, targets: Tensor, counts: np.ndarray) -> Scores:
    """Scores of the sequences of a batch, from log-probabilities [sequences, tokens, vocabulary]."""
    top, guess = log_p.max(dim=-1)
    right, confidence = (guess == targets).double(), top.exp().double()
    place = (confidence * BINS).long().clamp(max=BINS - 1)
    gap = torch.zeros(len(targets), BINS, dtype=torch.float64, device=targets.device)
    gap.scatter_add_(1, place, right - confidence)
    parts = (
        -log_p.gather(-1, targets[..., None])[..., 0],
        gap / targets.shape[1],
        right.mean(dim=1),
        (unpatched.exp() * (unpatched - log_p)).sum(dim=-1).mean(dim=1),
        (guess == unpatched.argmax(dim=-1)).double().mean(dim=1),
    )
    return Scores._make([*(part.cpu().numpy() for part in parts), counts.reshape(len(targets), -1).mean(axis=1)])


def _by_domain(scores: Scores, domain: np.ndarray, drawn: Resamples) -> np.ndarray:
    """Mean loss of each domain, [1 + resamples, domains]."""
    means = []
    for name in np.unique(domain):
        weights = drawn.weights[:, domain == name]
        means.append(weights @ scores.loss[domain == name].mean(axis=1) / weights.sum(axis=1))
    return np.stack(means, axis=1)


def _statistics(scores: Scores, domain: np.ndarray, drawn: Resamples, unpatched: np.ndarray) -> dict[str, np.ndarray]:
    """`MEASURES` in the sample and its resamples, each [1 + resamples]."""
    loss = scores.loss.astype(float)
    # The mean of the largest values is the least, over cuts, of this mean (Rockafellar & Uryasev 2000): its derivative
    # by the cut is 0 there, so that resamples may keep the sample's cut.
    cut = np.quantile(loss, 1 - WORST)
    tail = cut + np.maximum(loss - cut, 0).mean(axis=1) / WORST
    domains = _by_domain(scores, domain, drawn)
    values = (
        drawn.means(loss.mean(axis=1)),
        drawn.means(scores.accuracy),
        drawn.means(scores.kl),
        drawn.means(scores.agreement),
        np.abs(drawn.means(scores.gap)).sum(axis=1),
        domains.max(axis=1),
        (domains - unpatched).max(axis=1),
        drawn.means(tail),
    )
    return dict(zip(MEASURES, values, strict=True))
