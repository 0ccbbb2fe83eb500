"""The figure of cuts that fall or rise with the number of experts kept."""

import pytest
import torch

from bhlib import figures
from bhlib.figures.cut_slope import SLOPES, SlopedCut
from bhlib.procedures import reject
from bhlib.rules import Threshold


@pytest.fixture(scope="module")
def study():
    """The embedded model on a few short texts, as if they were all of the test split."""
    study = figures.Study()
    study.sequences_per_domain, study.window = 1, 64
    study.whole_test = {domain: study.test[domain][:, :64] for domain in ("manuals", "novels", "python", "scripture")}
    study.whole_test_documents = {domain: study.test_documents[domain] for domain in study.whole_test}
    return study


@pytest.fixture(scope="module")
def logits():
    return 1.5 * torch.randn(200, 64, generator=torch.Generator().manual_seed(0))


def test_slope_zero_is_the_threshold(logits):
    assert torch.equal(SlopedCut(0.03, 0.0)(logits).experts, Threshold(0.03)(logits).experts)


def test_a_positive_slope_is_bh_on_a_power_of_the_probability(logits):
    slope, alpha = 0.25, 0.05
    pvalues = (64 * logits.softmax(-1)).clamp(min=1) ** (-1 / slope)
    # The k-th p-value is at most alpha * k / 64 where the probability is at least (alpha * k / 64) ** -slope / 64.
    found = SlopedCut((alpha / 64) ** -slope / 64, slope)(logits).counts
    expected = reject(pvalues, alpha).sum(dim=-1).clamp(1, 8)
    assert torch.equal(found, expected) and found.double().std() > 0.3


def test_a_negative_slope_keeps_the_most_experts_that_reach_their_cut():
    probabilities = torch.tensor([[0.5, 0.2, 0.15, 0.1, 0.05]])
    # cuts .1, .1 * sqrt(2) = .14, .17, .2, .22: the second reaches its own, the third does not
    assert SlopedCut(0.1, -0.5, max_k=5)(probabilities.log()).counts.tolist() == [2]


def test_the_table_and_its_drawing(study):
    table = figures.compute_cut_slope(study)
    assert len(table) == len(SLOPES) * len(study.mean_ks)
    assert table["mean_k"].sub(table["wanted_k"]).abs().max() < 1
    assert (table["joint_high"] >= table["high"]).all()
    figures.draw_cut_slope(table)
