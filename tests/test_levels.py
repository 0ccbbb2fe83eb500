"""Levels at which rules give a wanted mean number of experts: measured on the rules themselves."""

import numpy as np
import pytest
import torch

from bhlib.levels import alpha_for_mean_experts, entropy_thresholds, level_for_mean_experts, mean_experts
from bhlib.pvalues import TokenGaussian
from bhlib.rules import BH, EntropyK, MinP, Threshold, TopP, WeightRatio, benjamini_hochberg_routing


def random_logits(*shape, seed=0):
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_mean_experts_counts_every_layer_alike():
    logits = random_logits(3, 500, 64)
    counts = torch.stack([BH(0.05)(layer).counts for layer in logits])
    assert mean_experts(BH(0.05), logits) == pytest.approx(counts.double().mean().item())


@pytest.mark.parametrize("family", [BH, TopP, MinP, Threshold, WeightRatio, lambda a: BH(a, method="by")])
@pytest.mark.parametrize("mean_k", [2.5, 4, 5.5])
def test_level_gives_the_mean_whichever_way_it_runs(family, mean_k):
    logits = random_logits(2, 1000, 64)
    level = level_for_mean_experts(family, logits, mean_k)
    assert mean_experts(family(level), logits) == pytest.approx(mean_k, abs=0.01)


def test_level_that_nothing_gives_is_refused():
    with pytest.raises(ValueError, match=r"no level gives 9 experts on average: these rules give from 1\.00 to 8\.00"):
        level_for_mean_experts(TopP, random_logits(2, 100, 64), 9)


@pytest.mark.parametrize(
    ("method", "min_k", "max_k", "wanted"), [("bh", 1, 8, 4.0), ("by", 0, 64, 3.0), ("holm", 2, 6, 3.5)]
)
def test_alpha_gives_the_wanted_mean(method, min_k, max_k, wanted):
    logits = 2 * torch.randn(2, 3000, 64, generator=torch.Generator().manual_seed(0))
    maker = TokenGaussian()
    bounds = dict(method=method, min_k=min_k, max_k=max_k)
    alpha = alpha_for_mean_experts(maker, logits, wanted, **bounds)
    counts = [benjamini_hochberg_routing(logits, level, pvalues=maker, **bounds)[2] for level in (alpha, 0.9 * alpha)]
    assert counts[0].double().mean() == pytest.approx(wanted, abs=0.01)
    assert counts[1].double().mean() < wanted - 0.01


def test_impossible_means_are_refused():
    logits = torch.randn(1, 50, 64)
    with pytest.raises(ValueError, match="mean_experts is 8, but must lie strictly between min_k=1 and max_k=8"):
        alpha_for_mean_experts(TokenGaussian(), logits, 8)
    with pytest.raises(ValueError, match=r"no alpha strictly between 0 and 1 gives 7\.5 experts .*TokenGaussian"):
        alpha_for_mean_experts(TokenGaussian(), logits, 7.5, method="bonferroni", max_k=60, min_k=7)


@pytest.mark.parametrize("mean_k", [1.5, 4, 7.5])
@pytest.mark.parametrize("slope", [0.5, 1.0, 4.0])
def test_entropy_thresholds_give_the_mean(mean_k, slope):
    spread = torch.linspace(0.3, 4, 500)[:, None]
    logits = torch.randn(2, 500, 64, generator=torch.Generator().manual_seed(0)) * spread
    thresholds = entropy_thresholds(logits, mean_k, slope=slope)
    np.testing.assert_allclose(np.diff(thresholds), 1 / slope)
    rule = EntropyK(thresholds, range(1, 9))
    counts = rule(logits.flatten(0, 1)).counts
    assert counts.double().mean().item() == pytest.approx(mean_k, abs=0.01)
    assert counts[:100].double().mean() >= counts[400:500].double().mean()  # flat probabilities, then peaked ones


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mean_k": 1}, "mean_k must lie strictly between 1 and max_k=8, got 1"),
        ({"mean_k": 4, "max_k": 4}, "mean_k must lie strictly between 1 and max_k=4, got 4"),
        ({"mean_k": 4, "slope": 0.0}, "slope must be a finite number above 0, got 0.0"),
    ],
)
def test_entropy_thresholds_name_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        entropy_thresholds(torch.randn(5, 64), **arguments)
