"""P-values of "this expert contributes next to nothing": what they are, what they promise, what is refused."""

import numpy as np
import pytest
import torch

from bhlib import BHRoutingIntegration, load_calibration
from bhlib.calibration import name_of
from bhlib.contributions import measure_contributions
from bhlib.loading import load_demo, load_heldout
from bhlib.pvalues import ContributionNull, ResolutionWarning, load_null
from bhlib.rules import BH


def simulated_documents(documents, tokens, seed, experts=16):
    """Contributions and logits [1, documents * tokens, experts], and the document of each token.

    A document has one mood for all its tokens, which decides how well the router's logits tell contributions: tokens of
    one document are far from independent, and so are the experts of one token.
    """
    generator = torch.Generator().manual_seed(seed)
    mood = torch.randn(documents, 1, 1, generator=generator)
    of_token = torch.randn(documents, tokens, 1, generator=generator)
    signal = torch.randn(documents, tokens, experts, generator=generator) + 0.3 * of_token
    noise = torch.randn(documents, tokens, experts, generator=generator)
    logits = 2 * signal
    contributions = (signal + (0.8 * mood).exp() * noise - 1.5).clamp(max=5).exp()
    shape = 1, documents * tokens, experts
    return contributions.view(shape), logits.view(shape), np.repeat(np.arange(documents), tokens)


def fit(documents=20, tokens=8, seed=0, **options):
    contributions, logits, numbers = simulated_documents(documents, tokens, seed)
    return ContributionNull.from_contributions(
        contributions, logits, numbers, model_name="simulated", **{"largest": 0.5, "max_k": 4} | options
    )


def test_pvalues_are_those_of_the_definition():
    """A loop over documents and pairs, without cells: equal up to the width of a cell, never smaller."""
    contributions, logits, numbers = simulated_documents(6, 5, seed=1)
    null = ContributionNull.from_contributions(
        contributions, logits, numbers, model_name="simulated", largest=0.5, max_k=4
    )
    log_probs, tested = logits[0].double().log_softmax(-1), simulated_documents(1, 9, seed=2)[1]

    def definition(s):
        shares = []
        for document in range(6):
            counted = pairs = 0
            for token in np.flatnonzero(numbers == document):
                best = log_probs[token].topk(4).indices.tolist()
                for expert in range(16):
                    useless = contributions[0, token, expert] <= 0.5 or expert not in best
                    counted += bool(useless and log_probs[token, expert] >= s)
                    pairs += 1
            shares.append(counted / pairs)
        return (min(np.exp(-s), 4) / 16 + sum(shares)) / 7

    pvals = null(tested, 0)[0]
    for p, s in zip(pvals.flatten().tolist(), tested[0].double().log_softmax(-1).flatten().tolist(), strict=True):
        assert definition(s) * (1 - 1e-6) <= p <= definition(s - 1.01 / 256) * (1 + 1e-6)


@pytest.mark.parametrize("level", [0.02, 0.05, 0.1])
def test_a_useless_expert_seldom_has_a_small_pvalue(level):
    """P(useless, among the best, p <= a) <= a, over calibration sets of only 12 documents, a new document for each."""
    shares = []
    for trial in range(300):
        null = fit(documents=12, seed=2 * trial)
        contributions, logits, _ = simulated_documents(1, 8, seed=2 * trial + 1)
        best = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, logits.topk(4).indices, True)
        small = (contributions <= 0.5) & best & (null(logits, 0) <= level)
        shares.append(small.double().mean().item())
    # 3 standard errors of the mean over independent trials: a wrong alarm in one of 700 runs.
    assert np.mean(shares) <= level + 3 * np.std(shares) / np.sqrt(len(shares))
    assert np.mean(shares) > level / 20  # the bound is not kept by rejecting nothing


def test_tokens_of_a_document_are_no_units():
    """With tokens for documents the bound is broken where documents differ much: its excess in standard errors."""
    excess = {}
    for units in ("documents", "tokens"):
        shares = []
        for trial in range(300):
            contributions, logits, numbers = steep_documents(1, 2 * trial)
            numbers = numbers if units == "documents" else np.arange(len(numbers))
            null = ContributionNull.from_contributions(
                contributions, logits, numbers, model_name="simulated", largest=0.5, max_k=4
            )
            contributions, logits, _ = steep_documents(1, 2 * trial + 1)
            best = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, logits.topk(4).indices, True)
            shares.append(((contributions <= 0.5) & best & (null(logits, 0) <= 0.01)).double().mean().item())
        excess[units] = (np.mean(shares) - 0.01) / (np.std(shares) / np.sqrt(len(shares)) + 1e-12)
    assert excess["documents"] < 3 < 5 < excess["tokens"]


def steep_documents(documents, seed, tokens=50, experts=16):
    """As `simulated_documents`, where in every second document all experts are useless."""
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(documents, tokens, experts, generator=generator)
    is_useless = torch.rand(documents, 1, 1, generator=generator) < 1 / 2
    contributions = torch.where(is_useless, 0.1, 1.0).expand_as(logits)
    shape = 1, documents * tokens, experts
    return contributions.reshape(shape), logits.view(shape), np.repeat(np.arange(documents), tokens)


@pytest.mark.parametrize("alpha", [0.2, 0.4])
def test_false_discoveries_stay_below_the_proven_bound(alpha):
    """BH over the best four, at alpha / (1 + 1/2 + 1/3 + 1/4): the mean false discovery proportion is at most alpha."""
    level = alpha / (1 + 1 / 2 + 1 / 3 + 1 / 4)
    proportions, kept_some = [], 0
    for trial in range(200):
        null = fit(documents=25, seed=2 * trial)
        contributions, logits, _ = simulated_documents(1, 8, seed=2 * trial + 1)
        best = logits.topk(4).indices
        passed = null(logits, 0).gather(-1, best) <= level * torch.arange(1, 5) / 16
        counts = (passed * torch.arange(1, 5)).amax(-1, keepdim=True)
        useless = (contributions.gather(-1, best) <= 0.5) & (torch.arange(4) < counts)
        proportions.append((useless.sum(-1) / counts[..., 0].clamp(min=1)).double().mean().item())
        kept_some += int((counts > 0).sum())
    assert np.mean(proportions) <= alpha + 3 * np.std(proportions) / np.sqrt(len(proportions))
    assert kept_some > 100


def test_rules_decide_by_critical_statistics_as_by_pvalues():
    null, logits = fit(), simulated_documents(2, 30, seed=9)[1][0]
    for method in ("bh", "by", "fixed"):
        rule = BH(0.3, null, method, min_k=0, max_k=16)
        pvals = null(logits, 0)
        ordered = pvals.sort(-1).values
        rank = torch.arange(1, 17)
        critical = {"bh": 0.3 * rank / 16, "by": 0.3 * rank / 16 / (1 / rank).sum(), "fixed": 0.3 * rank.sign()}
        assert torch.equal(rule(logits, 0).counts, ((ordered <= critical[method]) * rank).amax(-1)), method


def test_a_null_of_the_demo_is_saved_loaded_and_routes(tmp_path):
    model, tokenizer = load_demo()
    text = load_heldout("calibration", length=32, max_sequences=3)
    measured = measure_contributions(model, text, progress=False)
    null = ContributionNull.from_contributions(measured.r, measured.logits, measured.units, model_name=name_of(model))
    null.save(tmp_path / "null.safetensors")
    loaded = load_calibration(tmp_path / "null.safetensors", model)
    assert isinstance(loaded, ContributionNull)
    assert (loaded.largest, loaded.header) == (0.1, null.header)
    assert all(torch.equal(loaded(logits, i), null(logits, i)) for i, logits in enumerate(measured.logits))
    with BHRoutingIntegration(model, alpha=0.1, pvalues=loaded) as bh:
        model(**tokenizer("def mean(values):", return_tensors="pt"))
    assert 1 < bh.get_routing_stats()["mean_experts_per_token"] < 8


def test_pvalues_at_the_ends_and_of_nan():
    null = fit()
    ends = null.survival(torch.tensor([0.0, 1e-9, -1e9, -16.01, torch.nan]), 0)
    floor = (1 / 16) / 21  # a probability of 1, in none of 20 documents
    assert ends[:4].tolist() == pytest.approx([floor, floor, 1, 1], rel=1e-5)
    assert ends[4].isnan()


def test_check_resolution_counts_documents():
    null = fit(documents=19)
    assert null.check_resolution(0.05, 16)
    with pytest.warns(ResolutionWarning, match="19 calibration documents .* Measure contributions on 24 documents"):
        assert not null.check_resolution(0.04, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"largest": 0.0}, "largest is 0.0, but must be a finite number above 0"),
        ({"max_k": 17}, r"max_k is 17, but must be a whole number in 1\.\.16"),
    ],
)
def test_settings_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        fit(**options)


def test_samples_that_are_refused():
    contributions, logits, numbers = simulated_documents(3, 4, seed=0)

    def refused(message, *arguments):
        with pytest.raises(ValueError, match=message):
            ContributionNull.from_contributions(*arguments, model_name="simulated")

    refused(r"both must be \[layers, tokens, experts\]", contributions[0], logits, numbers)
    refused(
        r"documents has shape \(11,\), but must name the document of each of the 12", contributions, logits, numbers[1:]
    )
    refused("contributions has 192 values that are negative", -contributions, logits, numbers)
    refused("router_logits has 192 values that are NaN", contributions, logits * torch.nan, numbers)
    with pytest.raises(TypeError, match="fitted to measured contributions, not to logits alone"):
        ContributionNull.fit([[0.0, 1.0]], model_name="simulated", num_experts=16, exclude_top=0)


def test_a_damaged_file_is_refused(tmp_path):
    null, path = fit(), tmp_path / "null.safetensors"
    for table, message in (
        (lambda sf: sf.flip(-1), "sf is no survival function"),
        (lambda sf: sf[:, 1:], "sf is torch.float32"),
    ):
        ContributionNull({"sf.0": table(null.tensors["sf.0"]).contiguous()}, null.header).save(path)
        with pytest.raises(ValueError, match=f"in layer 0 {message}"):
            load_null(path)
    ContributionNull(null.tensors, null.header | {"largest": -1.0}).save(path)
    with pytest.raises(ValueError, match="its header has the largest -1.0"):
        load_null(path)
