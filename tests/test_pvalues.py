"""P-values: statistics and nulls against slow twins, their guarantees by simulation, and the calibration file."""

import json
import math
import time
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from models import tiny_olmoe
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scipy import stats

from bhlib import BHRoutingIntegration
from bhlib.procedures import benjamini_hochberg, critical_values, reject
from bhlib.pvalues import (
    STATISTICS,
    ConformalNull,
    DirichletNull,
    KDENull,
    PValueMaker,
    ResolutionWarning,
    SoftmaxPseudo,
    SoftmaxPseudoWarning,
    TableNull,
    TokenGaussian,
    check_logits,
    load_null,
    make_pvalues,
    null_values,
)
from bhlib.rules import BH

NUM_EXPERTS = 64
SHIFT_INVARIANT = ("log_prob", "centered", "standardized")


def random_logits(*shape, spread=2.0, shift=-1.0):
    """Gaussian logits, a few of each token raised: what a trained router looks like."""
    logits = spread * torch.randn(*shape) + shift
    logits[..., :6] += 2 * spread * torch.rand(*shape[:-1], 6)
    return logits


def softmax_pseudo(temperature=1.0):
    with pytest.warns(SoftmaxPseudoWarning):
        return SoftmaxPseudo(temperature)


def fit(null, samples, statistic="standardized", **options):
    """Fit a null; most samples below are standard normal, as standardized logits about are."""
    return null.fit(samples, statistic=statistic, model_name="tiny", num_experts=NUM_EXPERTS, **options)


def fit_per_expert(null, tokens=400, layers=2):
    """A null for each of 64 experts, from samples of unequal sizes."""
    samples = []
    for _ in range(layers):
        logits = random_logits(tokens, NUM_EXPERTS) + torch.linspace(0, 3, NUM_EXPERTS)
        values, experts = null_values(logits, "standardized")
        samples.append([values[experts == expert] for expert in range(NUM_EXPERTS)])
    return fit(null, samples, per_expert=True)


def all_makers():
    values, _ = null_values(random_logits(200, NUM_EXPERTS), "standardized")
    sample = values.flatten()
    return {
        "softmax": softmax_pseudo(),
        "trimmed": TokenGaussian(),
        "truncated": TokenGaussian(estimator="truncated"),
        "kde": fit(KDENull, [sample]),
        "conformal": fit(ConformalNull, [sample]),
        "table": standard_normal_table(),
    }


def standard_normal_table():
    x = np.linspace(-6, 12, 3000)
    options = dict(model_name="tiny", num_experts=NUM_EXPERTS, statistic="standardized", exclude_top=8)
    return TableNull.from_survival(x, stats.norm.sf(x), **options)


MAKERS = ("softmax", "trimmed", "truncated", "kde", "conformal", "table")


# ------------------------------------------------------------------------------------------------- logits, statistics


@pytest.mark.parametrize(
    ("logits", "error", "message"),
    [
        ([0.0, 1.0], TypeError, "list.*torch.Tensor"),
        (torch.zeros(3, 4, dtype=torch.int64), TypeError, "torch.int64.*floating-point"),
        (torch.tensor(1.0), ValueError, r"shape \(\).*2 experts"),
        (torch.zeros(3, 1), ValueError, r"shape \(3, 1\).*2 experts"),
        (torch.tensor([[0.0, 1.0], [2.0, torch.nan]]), ValueError, r"1 values.*\(1, 1\): nan"),
        (torch.tensor([[torch.inf, 1.0], [2.0, torch.nan]]), ValueError, r"2 values.*\(0, 0\): inf"),
    ],
)
def test_logits_that_cannot_be_routed(logits, error, message):
    with pytest.raises(error, match=message):
        check_logits(logits)


def test_good_logits_pass():
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        check_logits(torch.randn(2, 3, 8).to(dtype))


def statistic_by_hand(name, token, exclude_top):
    """One token's statistics, in float64."""
    background = np.sort(token)[: len(token) - exclude_top]
    return {
        "logit": lambda: token,
        "log_prob": lambda: token - np.log(np.exp(token).sum()),
        "centered": lambda: token - background.mean(),
        "standardized": lambda: (token - background.mean()) / background.std(ddof=1),
    }[name]()


@pytest.mark.parametrize("exclude_top", [0, 8, 62])
@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_are_their_definitions(name, exclude_top):
    logits = random_logits(50, NUM_EXPERTS)
    logits[0] = logits[0].round()  # ties, also across the border of the top
    found = STATISTICS[name](logits, exclude_top)
    expected = [statistic_by_hand(name, token, exclude_top) for token in logits.double().numpy()]
    np.testing.assert_allclose(found.numpy(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_rise_with_the_logit(name):
    logits = random_logits(1000, NUM_EXPERTS).sort(-1).values.bfloat16()
    found = STATISTICS[name](logits)
    assert found.dtype == torch.float32
    assert ((found.diff(dim=-1) > 0) == (logits.float().diff(dim=-1) > 0)).all()


@pytest.mark.parametrize("maker", MAKERS)
def test_statistics_of_the_top_alone_have_the_same_bits(maker):
    logits = random_logits(500, NUM_EXPERTS).bfloat16()
    maker = all_makers()[maker]
    for size in (1, 4, 9, NUM_EXPERTS):
        top = logits.topk(size)
        assert torch.equal(maker.statistic_of(logits, top.values), maker.statistic_of(logits).gather(-1, top.indices))


@pytest.mark.parametrize("name", STATISTICS)
def test_only_the_raw_logit_sees_a_common_shift(name):
    logits = random_logits(200, NUM_EXPERTS)
    shift = 50 * torch.randn(200, 1)
    moved = (STATISTICS[name](logits + shift) - STATISTICS[name](logits)).abs().max()
    assert (moved < 1e-4) == (name in SHIFT_INVARIANT)


@pytest.mark.parametrize("name", STATISTICS)
def test_only_the_standardized_statistic_ignores_the_scale(name):
    logits = random_logits(200, NUM_EXPERTS)
    moved = (STATISTICS[name](logits * 8) - STATISTICS[name](logits)).abs().max()
    assert (moved < 1e-5) == (name == "standardized")


def test_the_background_does_not_see_the_top():
    logits = random_logits(100, NUM_EXPERTS)
    raised = logits + 1e6 * torch.zeros_like(logits).scatter(-1, logits.topk(8).indices, 1)
    lower = logits.topk(56, largest=False).indices
    for name in ("centered", "standardized"):
        before, after = STATISTICS[name](logits).gather(-1, lower), STATISTICS[name](raised).gather(-1, lower)
        assert torch.equal(before, after)


def test_a_token_without_spread_stays_finite():
    logits = torch.full((1, NUM_EXPERTS), 3.0)
    logits[0, 5] = 40.0
    pvals = TokenGaussian()(logits)[0]
    assert pvals[5] == 0 and (pvals[torch.arange(NUM_EXPERTS) != 5] == 0.5).all()
    assert torch.isfinite(TokenGaussian().statistic_of(logits)).all()


@pytest.mark.parametrize("exclude_top", [-1, 63])
def test_exclude_top_must_leave_two_experts(exclude_top):
    with pytest.raises(ValueError, match=rf"exclude_top is {exclude_top}.*0\.\.62"):
        null_values(random_logits(3, NUM_EXPERTS), exclude_top=exclude_top)
    with pytest.raises(ValueError, match=rf"exclude_top is {exclude_top}.*0\.\.62"):
        fit(KDENull, [torch.randn(9)], exclude_top=exclude_top)


@pytest.mark.parametrize("exclude_top", [0, 8])
def test_null_values_are_those_outside_the_top(exclude_top):
    logits = random_logits(40, NUM_EXPERTS)
    values, experts = null_values(logits, "log_prob", exclude_top)
    for token in range(40):
        order = logits[token].argsort()[: NUM_EXPERTS - exclude_top]
        assert experts[token].tolist() == order.tolist()
        torch.testing.assert_close(values[token], logits.log_softmax(-1)[token, order], rtol=1e-5, atol=1e-6)


def test_an_unknown_statistic():
    with pytest.raises(ValueError, match="'loggit'.*'logit', 'log_prob', 'centered', 'standardized'"):
        null_values(random_logits(3, NUM_EXPERTS), "loggit")


# ---------------------------------------------------------------------------------------------------- every maker


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("maker", MAKERS)
def test_pvalues_are_float32_whatever_the_logits(maker, dtype):
    maker = all_makers()[maker]
    logits = random_logits(2, 30, NUM_EXPERTS).to(dtype)
    pvals = maker(logits)
    assert pvals.dtype == torch.float32 and pvals.shape == logits.shape
    assert torch.equal(pvals, maker(logits.float()))
    assert ((pvals >= 0) & (pvals <= 1)).all()


@pytest.mark.parametrize("maker", ["softmax", "trimmed", "truncated", "kde"])
def test_bfloat16_logits_resolve_one_in_a_million(maker):
    """One p-value for each bfloat16 logit where p is about 1e-6; p in bfloat16 is 0.0078 or 0 if made as 1 - cdf."""
    logits = random_logits(1, NUM_EXPERTS).repeat(4000, 1)
    logits[:, 0] = torch.linspace(0, 40, 4000)
    logits = logits.bfloat16()
    pvals = all_makers()[maker](logits)[:, 0]
    small = (pvals > 1e-8) & (pvals < 1e-4)
    distinct = logits[small, 0].unique()
    assert len(distinct) >= 10
    assert len(pvals[small].unique()) == len(distinct)


@pytest.mark.parametrize("maker", MAKERS)
def test_pvalues_fall_as_the_logit_rises(maker):
    logits = random_logits(300, NUM_EXPERTS).sort(-1).values
    assert (all_makers()[maker](logits).diff(dim=-1) <= 0).all()


@pytest.mark.parametrize("maker", MAKERS)
def test_nan_stays_nan(maker):
    logits = random_logits(2, NUM_EXPERTS)
    logits[0, 3] = torch.nan
    pvals = all_makers()[maker](logits)
    assert pvals[0, 3].isnan() and pvals[1].isfinite().all()


@pytest.mark.parametrize("method", ["bh", "by", "hochberg", "bonferroni", "fixed"])
@pytest.mark.parametrize("maker", MAKERS)
def test_critical_statistics_decide_as_the_pvalues_do(maker, method):
    """On a million statistics, and on the float32 numbers next to each critical one."""
    maker = all_makers()[maker]
    for alpha in (0.01, 0.05, 0.5):
        critical_p = critical_values(NUM_EXPERTS, alpha, method)
        critical = maker.critical_statistics(critical_p)
        assert critical.dtype == torch.float32 and (critical[1:] <= critical[:-1]).all()
        random = maker.statistic_of(random_logits(5500, NUM_EXPERTS)).flatten()
        finite = critical[critical.isfinite()]
        below, above = (finite.nextafter(torch.full_like(finite, side)) for side in (-torch.inf, torch.inf))
        statistics = torch.cat([random, finite, below, above])
        pvals = maker.survival(statistics).double()
        for k in {0, 1, 7, 8, 31, 63} if method not in ("bonferroni", "fixed") else {0}:
            assert torch.equal(statistics >= critical[k], pvals <= critical_p[k])


def test_critical_statistics_reach_the_ends():
    kde = all_makers()["kde"]
    everything, nothing = kde.critical_statistics(torch.tensor([1.0, 0.0]))
    assert everything == torch.finfo(torch.float32).min
    assert kde.survival(nothing) == 0 and kde.survival(nothing.nextafter(torch.tensor(-torch.inf))) > 0
    conformal = fit(ConformalNull, [torch.randn(9)])
    assert conformal.critical_statistics(torch.tensor([0.099])) == torch.inf
    assert conformal.critical_statistics(torch.tensor([0.101])) == conformal.tensors["sample.0"].max().nextafter(
        torch.tensor(torch.inf)
    )


def test_float64_critical_values_are_not_rounded_up():
    maker = TokenGaussian()
    statistics = torch.linspace(2, 5, 1000)
    exact = maker.survival(statistics).double()
    for critical_p in (exact, exact * (1 - 1e-12), exact * (1 + 1e-12)):
        critical = maker.critical_statistics(critical_p)
        assert torch.equal(statistics >= critical, exact <= critical_p)


def test_makers_say_what_a_kernel_compares():
    logits, num_experts = random_logits(200, NUM_EXPERTS), NUM_EXPERTS
    for maker in (DirichletNull(), TokenGaussian(5), standard_normal_table()):
        thresholds = maker.critical_statistics(critical_values(num_experts, 0.05))
        statistic, exclude_top, cuts = maker.kernel_form(num_experts, thresholds)
        if statistic == "rest":
            values = logits.softmax(-1) - 1
        else:
            values = STATISTICS[statistic](logits, exclude_top)
        passed = values.sort(dim=-1, descending=True).values >= cuts
        counts = (passed * torch.arange(1, num_experts + 1)).amax(-1)
        assert counts.tolist() == benjamini_hochberg(maker(logits), 0.05).sum(-1).tolist() and counts.float().std() > 0
    for maker in (TokenGaussian(estimator="truncated"), softmax_pseudo()):
        assert maker.kernel_form(num_experts, thresholds) is None


@pytest.mark.parametrize("maker", MAKERS)
def test_ranks_against_critical_statistics_make_bh_decisions(maker):
    """What routing does: sort the statistics, compare with the table, count."""
    maker = all_makers()[maker]
    logits = random_logits(3000, NUM_EXPERTS).bfloat16()
    ordered = maker.statistic_of(logits, logits.sort(-1, descending=True).values)
    for alpha in (0.05, 0.3):
        passed = ordered >= maker.critical_statistics(critical_values(NUM_EXPERTS, alpha))
        counts = (passed * torch.arange(1, NUM_EXPERTS + 1)).amax(-1)
        assert torch.equal(counts, benjamini_hochberg(maker(logits), alpha).sum(-1))


# -------------------------------------------------------------------------------------------- softmax pseudo p-values


def test_softmax_pseudo_warns_with_the_theorem():
    with pytest.warns(SoftmaxPseudoWarning, match="alpha < 1 - 1/N.*rejects at most one expert"):
        SoftmaxPseudo()


def test_softmax_pseudo_is_the_share_of_the_others():
    logits = random_logits(50, NUM_EXPERTS, spread=8.0)
    found = softmax_pseudo(0.5)(logits).double()
    shares = (logits.double() / 0.5).softmax(-1)
    for expert in range(NUM_EXPERTS):
        others = torch.cat([shares[:, :expert], shares[:, expert + 1 :]], dim=-1).sum(-1)
        torch.testing.assert_close(found[:, expert], others, rtol=1e-5, atol=1e-38)
    assert found.min() < 1e-10  # where 1 - softmax in float32 is 0


@given(
    logits=hnp.arrays(np.float32, st.tuples(st.just(50), st.integers(2, 70)), elements=st.floats(-60, 60, width=32)),
    share=st.floats(1e-4, 0.999),
    temperature=st.floats(0.05, 20),
)
def test_softmax_theorem(logits, share, temperature):
    """Whatever the logits and the temperature: at most one rejection while alpha < 1 - 1/N."""
    num_experts = logits.shape[-1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SoftmaxPseudoWarning)
        pvals = SoftmaxPseudo(temperature)(torch.from_numpy(logits))
    alpha = share * (1 - 1 / num_experts)
    rejected = benjamini_hochberg(pvals, alpha)
    assert rejected.sum(-1).max() <= 1
    assert (1 - pvals[rejected] >= (1 - alpha / num_experts) * (1 - 1e-6)).all()


def test_softmax_theorem_is_sharp():
    maker = softmax_pseudo()
    one = torch.zeros(64)
    one[0] = 20.0
    assert benjamini_hochberg(maker(one), 0.05).sum() == 1
    assert benjamini_hochberg(maker(torch.zeros(64)), 1 - 1 / 64 - 1e-4).sum() == 0
    assert benjamini_hochberg(maker(torch.zeros(64)), 1 - 1 / 64 + 1e-4).sum() == 64


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_softmax_temperature_must_be_positive(temperature):
    with pytest.raises(ValueError, match=f"temperature must be a finite number above 0, got {temperature}"):
        SoftmaxPseudo(temperature)
    with pytest.raises(TypeError, match=f"temperature must be a number, got '{temperature}' of type str"):
        SoftmaxPseudo(str(temperature))


# ------------------------------------------------------------------------------------------------------ token Gaussian


def test_gaussian_tail_down_to_1e_30():
    z = torch.linspace(-6, 11.5, 100_001)
    found = TokenGaussian().survival(z).double().numpy()
    expected = stats.norm.sf(z.double().numpy())
    assert expected.min() < 1e-30
    np.testing.assert_allclose(found, expected, rtol=2e-5)


def test_gaussian_tail_never_rises():
    """Over every float32 number from 2 to 8: nothing else is asked of it by the critical statistics."""
    bits = torch.arange(torch.tensor(2.0).view(torch.int32), torch.tensor(8.0).view(torch.int32), dtype=torch.int32)
    assert (TokenGaussian().survival(bits.view(torch.float32)).diff() <= 0).all()


def test_truncated_estimator_is_calibrated_on_gaussian_noise():
    """Efron's null: p-values of pure noise are uniform, but for the far tail; 40,000 tokens x 64 p-values."""
    pvals = TokenGaussian(estimator="truncated")(5 * torch.randn(40_000, NUM_EXPERTS) + 3)
    for a in (0.01, 0.05, 0.1, 0.2, 0.3):
        assert (pvals <= a).float().mean() == pytest.approx(a, rel=0.08)
    assert (pvals <= 7.8e-4).float().mean() == pytest.approx(1.5 * 7.8e-4, rel=0.15)


@pytest.mark.parametrize(("estimator", "share"), [("trimmed", 0.47), ("truncated", 0.07)])
def test_share_of_noise_tokens_with_a_rejection(estimator, share):
    """The numbers of the docstring, within 4 standard errors of 20,000 tokens."""
    pvals = TokenGaussian(estimator=estimator)(torch.randn(20_000, NUM_EXPERTS))
    found = benjamini_hochberg(pvals, 0.05).any(-1).float().mean()
    assert found == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 20_000))


def test_estimators_agree_when_nothing_is_excluded():
    logits = random_logits(100, NUM_EXPERTS)
    trimmed, truncated = (TokenGaussian(0, estimator).statistic_of(logits) for estimator in ("trimmed", "truncated"))
    torch.testing.assert_close(trimmed, truncated)


def test_estimators_differ_by_the_map_of_the_docstring():
    logits = random_logits(100, NUM_EXPERTS)
    trimmed, truncated = (TokenGaussian(8, estimator).statistic_of(logits) for estimator in ("trimmed", "truncated"))
    torch.testing.assert_close(truncated, 0.821 * trimmed - 0.235, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("estimator", ["trimmed", "truncated"])
def test_both_estimators_select_adaptively(estimator):
    """On tokens that raise 1 to 8 experts, at the usual level: between 1 and 8 of them, more where more are raised."""
    raised = torch.arange(NUM_EXPERTS) < torch.randint(1, 9, (5000, 1))
    logits = torch.randn(5000, NUM_EXPERTS) + 5 * raised
    counts = benjamini_hochberg(TokenGaussian(estimator=estimator)(logits), 0.05).sum(-1).float()
    assert 1 < counts.mean() < 8 and counts.std() > 1
    assert torch.corrcoef(torch.stack([counts, raised.sum(-1).float()]))[0, 1] > 0.8


def test_token_gaussian_refuses():
    with pytest.raises(ValueError, match="'mad'.*'trimmed' or 'truncated'"):
        TokenGaussian(estimator="mad")
    with pytest.raises(ValueError, match="exclude_top is -1"):
        TokenGaussian(exclude_top=-1)
    with pytest.raises(ValueError, match=r"exclude_top=8\) needs 10 experts or more.*8 experts are routed"):
        TokenGaussian()(torch.randn(5, 8))


# ------------------------------------------------------------------------------------------------------------ KDE null


def kde_cases():
    rng = np.random.default_rng(1)
    outlier = np.append(rng.normal(size=3000), [9.0, 14.0])
    return {
        "gaussian": (rng.normal(size=5000), None, None),
        "small": (rng.normal(size=40), None, None),
        "heavy tail": (rng.standard_t(3, size=5000), None, None),
        "two bumps, far from 0": (np.append(rng.normal(100, 0.2, 900), rng.normal(112, 2, 600)), "silverman", None),
        "outliers, narrow kernels": (outlier, 0.05, None),
        "weights": (outlier, None, rng.exponential(size=3002) ** 3),
        "a weight of almost nothing": (outlier, None, np.append(np.ones(3001), 1e-7)),
        "atoms": (rng.integers(0, 4, size=1000).astype(float), 0.2, None),
    }


@pytest.mark.parametrize("case", kde_cases())
def test_table_against_integrate_box_1d(case):
    """Relative error below 1e-3 wherever p >= 1e-8, at 2,000 statistics between the nodes."""
    sample, bw_method, weights = kde_cases()[case]
    null = fit(KDENull, [sample], bw_method=bw_method, weights=None if weights is None else [weights])
    kde = stats.gaussian_kde(sample, bw_method=bw_method, weights=weights)
    lowest, highest = null.critical_statistics(torch.tensor([1 - 1e-6, 1e-8]))
    points = lowest + (highest - lowest) * torch.rand(2000)
    found = null.survival(points).double().numpy()
    expected = np.array([kde.integrate_box_1d(point, np.inf) for point in points.double().numpy()])
    assert found.min() < 1e-6
    error = np.abs(found / expected - 1).max()
    assert error < 1e-3
    assert error < 1.5 * null.header["table_error"] + 1e-5  # fitting measures what there is


def test_tail_beyond_the_sample_is_gaussian():
    """To the end of float32: one kernel is left, and its tail is known in closed form."""
    null = fit(KDENull, [np.array([-1.0, 1.0])])
    bandwidth = math.sqrt(stats.gaussian_kde([-1.0, 1.0]).covariance.item())
    points = torch.linspace(5, 12, 500) * bandwidth + 1
    z = (points.double().numpy() - np.array([[1.0], [-1.0]])) / bandwidth
    expected = stats.norm.sf(z).mean(0)
    assert expected.min() < 1e-30
    np.testing.assert_allclose(null.survival(points).double().numpy(), expected, rtol=3e-3)
    assert (null.survival(points).diff() < 0).all()


def test_ends_of_the_table():
    null = fit(KDENull, [np.random.default_rng(0).normal(size=500)])
    ends = torch.tensor([-torch.inf, -1e30, -50.0, 50.0, 1e30, torch.inf])
    torch.testing.assert_close(null.survival(ends), torch.tensor([1.0, 1, 1, 0, 0, 0]), rtol=1e-6, atol=0)


def test_table_never_rises_between_neighbouring_numbers():
    null = fit(KDENull, [np.random.default_rng(0).standard_t(3, size=500)])
    for start in (-0.1, 1.0, 4.0):
        first = torch.tensor(start).view(torch.int32)
        bits = torch.arange(first, first + 2**20, dtype=torch.int32)
        bits = bits.flip(0) if start < 0 else bits
        assert (null.survival(bits.view(torch.float32)).diff() <= 0).all()


@pytest.mark.parametrize("case", kde_cases())
def test_neighbouring_nodes_are_within_a_factor_of_two(case):
    """What makes their difference exact in float32; numbers below 2e-38 have exact differences anyway."""
    sample, bw_method, weights = kde_cases()[case]
    null = fit(KDENull, [sample], bw_method=bw_method, weights=None if weights is None else [weights])
    pvals = null._tables(0, torch.device("cpu"))[-1][0].double()
    assert ((pvals[1:] >= pvals[:-1] / 2) | (pvals[:-1] < 2e-38)).all()
    assert pvals[0] > 1 - 1e-6 and pvals[-1] == 0


def test_each_expert_has_its_own_density():
    null = fit_per_expert(KDENull)
    assert not null.shared and null.header["table_error"] < 1e-3
    statistics = 3 * torch.randn(4, 5, NUM_EXPERTS)
    found = null.survival(statistics, layer=1)
    values, experts = null_values_of_layer(1)
    for expert in (0, 17, 63):
        kde = stats.gaussian_kde(values[experts == expert].double().numpy())
        exact = [kde.integrate_box_1d(point, np.inf) for point in statistics[..., expert].flatten().double().numpy()]
        np.testing.assert_allclose(found[..., expert].flatten(), exact, rtol=1e-3, atol=1e-8)


def null_values_of_layer(layer, tokens=400):
    """The values that `fit_per_expert` fitted on, drawn again from the seed of the test."""
    torch.manual_seed(0)
    for _ in range(layer + 1):
        logits = random_logits(tokens, NUM_EXPERTS) + torch.linspace(0, 3, NUM_EXPERTS)
        drawn = null_values(logits, "standardized")
    return drawn


@pytest.mark.parametrize(
    ("samples", "options", "message"),
    [
        ([np.ones(5)], {}, "layer 0 has no spread.*5 values"),
        ([np.arange(5.0), np.ones(1)], {}, "layer 1 has no spread.*1 values"),
        ([np.arange(5.0)], {"weights": [np.ones(4)]}, r"layer 0 have shape \(4,\).*\(5,\)"),
        ([np.append(np.arange(50.0), 1e6)], {"bw_method": 1e-6}, "bandwidth of layer 0.*larger bw_method"),
        ([], {}, "samples is empty"),
        ([np.zeros((2, 2))], {}, r"samples\[0\] has shape \(2, 2\)"),
        ([np.array([0.0, np.nan])], {}, r"samples\[0\] has 1 values that are NaN"),
        ([[np.arange(3.0)] * 3], {"per_expert": True}, r"samples\[0\] holds 3 experts.*64"),
        ([[np.arange(3.0)] * 63 + [[]]], {"per_expert": True}, r"samples\[0\]\[63\] is empty.*exclude_top=0"),
        ([np.arange(5.0)], {"statistic": "t"}, "statistic is 't'"),
    ],
)
def test_samples_that_make_no_density(samples, options, message):
    with pytest.raises(ValueError, match=message):
        fit(KDENull, samples, **options)


def test_a_null_needs_the_name_of_its_model():
    with pytest.raises(ValueError, match="model_name is ''"):
        KDENull.fit([np.arange(5.0)], model_name="", num_experts=4)


# ------------------------------------------------------------------------------------------------------ conformal null


def test_conformal_is_a_count():
    sample = torch.randn(301).round(decimals=1)  # with ties
    found = fit(ConformalNull, [sample]).survival(torch.linspace(-4, 4, 161).round(decimals=1))
    for statistic, pval in zip(torch.linspace(-4, 4, 161).round(decimals=1), found, strict=True):
        assert pval == torch.tensor((1 + int((sample >= statistic).sum())) / 302)


def test_conformal_is_a_count_for_each_expert():
    null = fit_per_expert(ConformalNull)
    statistics = 2 * torch.randn(3, 7, NUM_EXPERTS)
    found = null.survival(statistics, layer=1)
    values, experts = null_values_of_layer(1)
    sizes = [int((experts == expert).sum()) for expert in range(NUM_EXPERTS)]
    assert len(set(sizes)) > 1 and null.header["sample_sizes"][1] == sizes
    for expert in range(NUM_EXPERTS):
        sample = values[experts == expert]
        for index in np.ndindex(3, 7):
            counted = int((sample >= statistics[index][expert]).sum())
            assert found[index][expert] == torch.tensor((1 + counted) / (1 + sizes[expert]))


@pytest.mark.parametrize("kind", ["heavy tail", "ties", "dependent"])
def test_conformal_pvalues_are_valid(kind):
    """P(p <= a) <= a for exchangeable values, whatever their distribution: 40,000 calibrations of 59 values each."""
    repetitions, n = 40_000, 59
    drawn = torch.distributions.StudentT(2.0).sample((repetitions, n + 1))
    drawn = {"heavy tail": drawn, "ties": drawn.round(), "dependent": drawn + 5 * torch.randn(repetitions, 1)}[kind]
    # Each repetition is an "expert" with a calibration sample of its own.
    null = ConformalNull.fit([drawn[:, :n]], model_name="noise", num_experts=repetitions, per_expert=True)
    pvals = null.survival(drawn[:, n])
    for a in (1 / 60, 0.05, 0.2, 0.5):
        found, error = (pvals <= a).float().mean(), math.sqrt(a * (1 - a) / repetitions)
        assert found <= a + 4 * error
        if kind != "ties":  # without ties p is uniform on its 60 values, so nothing is given away
            assert found >= a - 4 * error


def test_conformal_validity_is_lost_where_calibration_values_come_in_tokens():
    """Values of one token share a component, and the tested token has another: p below 1/20 comes too often."""
    repetitions, tokens, experts = 5000, 2, 56
    shared, own = torch.randn(repetitions, tokens + 1, 1), torch.randn(repetitions, tokens + 1, experts)
    drawn = shared + own
    found = {}
    for name, sample in {
        "tokens": drawn[:, :tokens].flatten(1),
        "independent": 2**0.5 * torch.randn(repetitions, tokens * experts),
    }.items():
        null = ConformalNull.fit([sample], model_name="noise", num_experts=repetitions, per_expert=True)
        found[name] = (null.survival(drawn[:, tokens, 0]) <= 0.05).float().mean().item()
    assert found["independent"] <= 0.05 + 4 * math.sqrt(0.05 * 0.95 / repetitions)
    assert found["tokens"] > 0.08


@pytest.mark.parametrize(("alpha", "enough"), [(0.05, 1280), (0.1, 640), (0.3, 214)])
def test_resolution(alpha, enough):
    """One clear expert among 64 is rejected exactly if the check is content."""
    for n in (enough // 2, enough - 2, enough):
        null = fit(ConformalNull, [torch.randn(n)])
        pvals = null.survival(torch.cat([torch.tensor([99.0]), torch.full((63,), -99.0)]))
        if n == enough:
            assert null.check_resolution(alpha, NUM_EXPERTS)
        else:
            with pytest.warns(
                ResolutionWarning, match=f"{n:,} calibration values.*alpha = {alpha:g}.*{enough:,} values"
            ):
                assert not null.check_resolution(alpha, NUM_EXPERTS)
        assert benjamini_hochberg(pvals, alpha).sum() == (n == enough)


def test_resolution_is_that_of_the_smallest_sample():
    with pytest.warns(ResolutionWarning, match="100 calibration values"):
        fit(ConformalNull, [torch.randn(5000), torch.randn(100)]).check_resolution(0.05, NUM_EXPERTS)


def test_continuous_nulls_have_no_floor():
    assert TokenGaussian().check_resolution(1e-9, NUM_EXPERTS)
    assert fit(KDENull, [torch.randn(50)]).check_resolution(1e-9, NUM_EXPERTS)


# -------------------------------------------------------------------------------------------------- tables of one's own


def own_table(points=10_000):
    """Marginal distributions of three layers' logits, as another study might have kept them: keys x and cdf."""
    x = np.linspace(-6, 9, points)
    return [{"x": x, "cdf": stats.norm(loc, 1.5).cdf(x)} for loc in (-1, 0, 1)]


def table_null(tables, **options):
    options = dict(model_name="tiny", num_experts=NUM_EXPERTS, statistic="logit") | options
    return TableNull.from_survival([t["x"] for t in tables], [1 - t["cdf"] for t in tables], **options)


def test_a_survival_table_is_looked_up_on_straight_lines():
    null = TableNull.from_survival(
        [0.0, 1.0, 3.0], [1.0, 0.5, 0.1], model_name="tiny", num_experts=4, statistic="logit"
    )
    statistics = torch.tensor([-9.0, -0.001, 0.0, 0.5, 1.0, 2.0, 3.0, 3.001, 1e30, torch.nan])
    expected = torch.tensor([1.0, 1.0, 1.0, 0.75, 0.5, 0.3, 0.1, 0.1, 0.1, torch.nan])
    torch.testing.assert_close(null.survival(statistics), expected, equal_nan=True)


def test_a_table_that_starts_below_one_is_taken_to_start_at_one():
    null = TableNull.from_survival([0.0, 1.0], [0.4, 0.0], model_name="tiny", num_experts=4, statistic="logit")
    torch.testing.assert_close(null.survival(torch.tensor([-0.1, 0.0, 0.5, 2.0])), torch.tensor([1.0, 0.4, 0.2, 0.0]))


def test_a_survival_table_of_each_layer():
    null = table_null(own_table())
    assert null.num_layers == 3
    statistics = torch.linspace(-5, 8, 1001)
    for layer, loc in enumerate((-1, 0, 1)):
        expected = stats.norm(loc, 1.5).sf(statistics.double().numpy())
        np.testing.assert_allclose(null.survival(statistics, layer).numpy(), expected, rtol=1e-3, atol=1e-7)


def test_one_table_for_all_layers_and_one_grid_for_all_tables():
    table = own_table()[1]
    options = dict(model_name="tiny", num_experts=NUM_EXPERTS, statistic="logit")
    shared = TableNull.from_survival(table["x"], 1 - table["cdf"], num_layers=3, **options)
    grid = TableNull.from_survival(table["x"], [1 - t["cdf"] for t in own_table()], **options)
    logits = random_logits(20, NUM_EXPERTS)
    assert torch.equal(shared(logits, 2), shared(logits, 0)) and shared.num_layers == 3
    assert torch.equal(grid(logits, 2), table_null(own_table())(logits, 2))


def test_a_survival_table_routes_as_its_pvalues_do():
    null = table_null(own_table())
    logits = random_logits(500, NUM_EXPERTS)
    for method in ("bh", "holm"):
        counts = BH(0.2, null, method, min_k=0, max_k=64)(logits, layer=1).counts
        assert torch.equal(counts, reject(null(logits, 1), 0.2, method).sum(-1)) and counts.float().std() > 0.5
    assert null.critical_statistics(torch.tensor([0.05]), 1).item() == pytest.approx(1.645 * 1.5, abs=0.01)


def test_a_coarse_survival_table_warns_of_its_resolution():
    null = TableNull.from_survival([0.0, 1.0, 2.0], [1.0, 0.01, 0.0], model_name="m", num_experts=64, statistic="logit")
    with pytest.warns(ResolutionWarning, match=r"smallest p-value above 0 .* is 0\.01.*alpha/num_experts = 0\.00078"):
        assert not null.check_resolution(0.05, 64)
    assert table_null(own_table()).check_resolution(0.05, 64)


@pytest.mark.parametrize(
    ("x", "sf", "options", "message"),
    [
        ([0, 1, 2], [1, 0.5, 0.6], {}, r"sf of layer 0 rises from 0.5 to 0.6 at x = 2"),
        ([0, 1], [0.0, 1.0], {}, r"sf of layer 0 rises.*pass 1 - cdf"),
        ([0, 1], [1.5, 0.5], {}, r"sf of layer 0 .* 1.5, outside \[0, 1\]"),
        ([0, 1], [0.5, -1e-9], {}, r"sf of layer 0 .* -1e-09, outside \[0, 1\]"),
        ([0, 1], [np.nan, 0.5], {}, r"sf of layer 0 .* nan, outside \[0, 1\]"),
        ([0, 0, 1], [1, 0.5, 0.1], {}, r"x of layer 0 must increase.*0 follows 0"),
        ([0, np.inf], [1, 0.5], {}, r"x of layer 0 .* NaN or infinite"),
        ([0, 1, 2], [1, 0.5], {}, r"layer 0 has 3 points in x, but 2 in sf"),
        ([0], [1], {}, "layer 0 has 1 points.*two or more"),
        ([[0, 1], [0, 1]], [[1, 0.5]], {}, "x holds 2 layers, but sf 1"),
        ([0, 1], [[1, 0.5]] * 3, {"num_layers": 2}, "num_layers is 2, but sf holds 3 layers"),
        ([0, 1], [1, 0.5], {"statistic": "rank"}, "statistic is 'rank'"),
        ([0, 1], [1, 0.5], {"model_name": ""}, "model_name is ''"),
        ([0, 1], [1, 0.5], {"exclude_top": 63}, "exclude_top is 63"),
        ([0, 1 + 1e-12, 1 + 2e-12], [1, 0.5, 0.1], {}, "x of layer 0 must increase, in float32"),
        ([[0, 1], [[0]]], [[1, 0], [1, 0]], {}, r"x\[1\] has shape \(1, 1\)"),
    ],
)
def test_tables_of_ones_own_that_are_no_survival_function(x, sf, options, message):
    with pytest.raises(ValueError, match=message):
        TableNull.from_survival(x, sf, **dict(model_name="tiny", num_experts=64, statistic="logit") | options)


def test_a_survival_table_is_not_fitted():
    with pytest.raises(TypeError, match="TableNull is not fitted to samples.*TableNull.from_survival"):
        fit(TableNull, [torch.randn(50)])


# -------------------------------------------------------------------------------------------- makers of one's own


class OwnMaker(PValueMaker):
    """As a user might write one: a function of the logit for each layer."""

    name, statistic = "own", "logit"

    def __init__(self, *functions, num_layers=None, shared=True):
        self.functions, self.num_layers, self.shared = functions, num_layers, shared

    def statistic_of(self, router_logits, top=None):
        return (router_logits if top is None else top).float()

    def survival(self, statistics, layer=None):
        return self.functions[0 if layer is None else layer](statistics)


def falling(statistics):
    return torch.sigmoid(-statistics)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.sigmoid, r"p-values rise from .* to .* at the statistic"),
        (lambda s: 2 * torch.sigmoid(-s), r"gives the p-value 2, outside \[0, 1\]"),
        (lambda s: falling(s) - 0.1, r"gives the p-value -.*, outside \[0, 1\]"),
        (lambda s: falling(s) * torch.nan, r"gives the p-value nan, outside \[0, 1\]"),
        (lambda s: falling(s)[..., :3], r"gives p-values of shape \(3,\) for statistics of shape \(\d+,\)"),
        (lambda s: falling(s).numpy(), "gives a ndarray"),
        (lambda s: [falling][1](s), "fails with IndexError: list index out of range"),
    ],
)
def test_a_maker_that_gives_no_pvalues_is_refused_by_the_rule(wrong, message):
    with pytest.raises(ValueError, match=f"survival of OwnMaker.* {message}"):
        BH(0.05, OwnMaker(wrong))
    with pytest.raises(ValueError, match=f"survival of OwnMaker.*layer 1.* {message}"):
        BH(0.05, OwnMaker(falling, wrong, num_layers=2))


def test_a_maker_is_held_against_the_model():
    model = tiny_olmoe(num_hidden_layers=4)
    three = OwnMaker(falling, falling, falling, num_layers=3)
    with pytest.raises(ValueError, match="OwnMaker.* is for 3 MoE layers, but the model has 4"):
        BHRoutingIntegration(model, pvalues=three)
    with pytest.raises(ValueError, match="survival of OwnMaker.*layer 3.* fails with IndexError"):
        BHRoutingIntegration(model, pvalues=OwnMaker(falling, falling, falling))
    per_expert = OwnMaker(lambda s: falling(s - torch.zeros(16)), shared=False)
    with pytest.raises(ValueError, match="survival of OwnMaker.* fails with RuntimeError.*16"):
        BHRoutingIntegration(tiny_olmoe(num_hidden_layers=1), pvalues=per_expert)
    BHRoutingIntegration(tiny_olmoe(num_hidden_layers=1, num_experts=16), pvalues=per_expert)
    BHRoutingIntegration(model, pvalues=OwnMaker(*[falling] * 4, num_layers=4))
    with pytest.raises(ValueError, match="calibration of 'tiny' is for 3 layers of 64 experts"):
        BHRoutingIntegration(model, pvalues=table_null(own_table()))


# --------------------------------------------------------------------------------------------- layers, experts, files

SAVED = [(KDENull, False), (KDENull, True), (ConformalNull, False), (ConformalNull, True)]


def test_a_file_of_a_survival_table_gives_back_the_same_bits(tmp_path):
    saved, path = table_null(own_table()), tmp_path / "null.safetensors"
    saved.save(path)
    loaded = load_null(path, model_name="tiny", num_layers=3, num_experts=64, statistic="logit")
    logits = random_logits(100, NUM_EXPERTS)
    assert all(torch.equal(loaded(logits, layer), saved(logits, layer)) for layer in range(3))
    assert type(loaded) is TableNull and loaded.header == saved.header
    assert repr(loaded) == "TableNull(logit, 3 layers, 10,000 points or more each, of 'tiny')" == repr(saved)


@pytest.mark.parametrize("layer", [None, -1, 3])
def test_a_layer_must_be_named(layer):
    null = fit(KDENull, [torch.randn(50) for _ in range(3)])
    with pytest.raises(ValueError, match=rf"layer is {layer}.*3 layers; pass layer=0\.\.2"):
        null(random_logits(2, NUM_EXPERTS), layer)


def test_layers_differ_and_one_layer_needs_no_name():
    logits = random_logits(5, NUM_EXPERTS)
    both = fit(KDENull, [torch.randn(50), torch.randn(50) + 2])
    assert (both(logits, 1) > both(logits, 0)).float().mean() > 0.9
    one = fit(KDENull, [torch.randn(50)])
    assert torch.equal(one(logits), one(logits, 0))


def test_nulls_refuse_another_number_of_experts():
    with pytest.raises(ValueError, match=r"shape \(2, 8\).*64 experts"):
        fit(KDENull, [torch.randn(50)])(torch.randn(2, 8))


def test_a_null_per_expert_has_no_common_critical_statistic():
    null = fit_per_expert(ConformalNull)
    with pytest.raises(ValueError, match="null per expert.*compare p-values"):
        null.critical_statistics(torch.tensor([0.05]), layer=0)
    with pytest.raises(ValueError, match=r"shape \(3, 8\).*all 64 experts"):
        null.survival(torch.zeros(3, 8), layer=0)


def test_tables_are_moved_to_a_device_once():
    null = fit(KDENull, [torch.randn(50), torch.randn(50)])
    first = null._tables(1, torch.device("cpu"))
    null(random_logits(3, NUM_EXPERTS), 1)
    assert null._tables(1, torch.device("cpu")) is first


@pytest.mark.parametrize("made_in", [False, True])
@pytest.mark.parametrize("method", ["bh", "storey"])
@pytest.mark.parametrize(("null", "per_expert"), SAVED)
def test_a_null_first_used_in_inference_mode_can_be_trained_through(null, per_expert, method, made_in, tmp_path):
    logits = random_logits(6, NUM_EXPERTS)
    made = fit_per_expert(null) if per_expert else fit(null, [torch.randn(800), torch.randn(700)])
    made.save(tmp_path / "null.safetensors")
    with torch.inference_mode(made_in):
        maker = load_null(tmp_path / "null.safetensors")
    rule = BH(0.1, maker, method)
    with torch.inference_mode():
        expected = rule(logits, layer=1)
        pvals = maker(logits, layer=1)
    trained = logits.clone().requires_grad_()
    found = rule(trained, layer=1)
    found.weights.sum().backward()
    assert torch.equal(found.experts, expected.experts) and trained.grad.abs().sum() > 0
    assert torch.equal(maker(trained, layer=1), pvals)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares a CUDA device with the CPU")
@pytest.mark.parametrize("maker", ["kde", "conformal", "table"])
def test_fitted_nulls_have_the_same_bits_on_a_gpu(maker):
    maker = all_makers()[maker]
    statistics = 3 * torch.randn(1000, NUM_EXPERTS)
    assert torch.equal(maker.survival(statistics.cuda()).cpu(), maker.survival(statistics))


@pytest.mark.parametrize(("null", "per_expert"), SAVED)
def test_a_file_gives_back_the_same_bits(null, per_expert, tmp_path):
    path = tmp_path / "null.safetensors"
    saved = (
        fit_per_expert(null)
        if per_expert
        else fit(null, [torch.randn(300), torch.randn(200)], statistic="log_prob", exclude_top=4, seed=7)
    )
    saved.save(path)
    loaded = load_null(path, model_name="tiny", num_layers=2, num_experts=64, statistic=saved.statistic)
    logits = random_logits(100, NUM_EXPERTS)
    for layer in range(2):
        assert torch.equal(loaded(logits, layer), saved(logits, layer))
    assert type(loaded) is null and loaded.header == saved.header and repr(loaded) == repr(saved)
    assert (loaded.statistic, loaded.exclude_top, loaded.shared) == (saved.statistic, saved.exclude_top, not per_expert)
    loaded.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_the_header_tells_the_story(tmp_path):
    path = tmp_path / "null.safetensors"
    fit(KDENull, [torch.randn(300), torch.randn(200)], seed=7, bw_method="silverman").save(path)
    with safe_open(path, framework="np") as file:
        header = json.loads(file.metadata()["bhlib"])
    assert header.pop("table_error") < 1e-3
    assert header == dict(
        format=1,
        null="kde",
        statistic="standardized",
        exclude_top=8,
        model_name="tiny",
        num_layers=2,
        num_experts=64,
        per_expert=False,
        sample_sizes=[300, 200],
        seed=7,
        bw_method="silverman",
        weighted=False,
    )


def test_repr_tells_the_story():
    null = fit(KDENull, [torch.randn(3000), torch.randn(2000)], seed=7)
    assert repr(null).startswith(
        "KDENull(standardized without top 8, 2 layers, shared by 64 experts, 2,000 values or more each, "
        "fitted on 'tiny', seed 7, table error "
    )


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ({"model_name": "allenai/OLMoE"}, "model_name 'tiny', but model_name 'allenai/OLMoE' is expected"),
        ({"num_layers": 16}, "num_layers 1, but num_layers 16 is expected"),
        ({"num_experts": 8}, "num_experts 64, but num_experts 8 is expected"),
        ({"statistic": "logit"}, "statistic 'standardized', but statistic 'logit' is expected"),
    ],
)
def test_a_calibration_for_something_else_is_refused(expected, message, tmp_path):
    path = tmp_path / "null.safetensors"
    fit(ConformalNull, [torch.randn(30)]).save(path)
    load_null(path)
    with pytest.raises(ValueError, match=message):
        load_null(path, **expected)


def test_files_that_are_no_calibration(tmp_path):
    path = tmp_path / "null.safetensors"
    with pytest.raises(FileNotFoundError):
        load_null(path)
    path.write_bytes(b"not a safetensors file")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_null(path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="no calibration"):
        load_null(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 99}, "format version 99, but 1 is read"),
        ({"null": "cauchy"}, "null 'cauchy'.*'kde', 'conformal'"),
        ({"num_layers": 3}, r"damaged.*sample\.2, size\.2"),
        ({"per_expert": True}, r"damaged.*\[1, 30\], but 64 rows"),
        ({"sample_sizes": [30, 31]}, r"layer 1 sample is torch.float32 \[1, 30\], not torch.float32 \[1, 31\]"),
    ],
)
def test_a_header_that_does_not_fit_its_tables(change, message, tmp_path):
    path = tmp_path / "null.safetensors"
    null = fit(ConformalNull, [torch.randn(30), torch.randn(30)])
    null.save(path)
    save_file(load_file(path), path, metadata={"bhlib": json.dumps(null.header | change)})
    with pytest.raises(ValueError, match=message):
        load_null(path)


def saved_bytes(null, path):
    null.save(path)
    return path.read_bytes()


def with_header(null, path, header):
    """The file of a null with another header: an object, or a text that is none."""
    text = header if isinstance(header, str) else json.dumps(header)
    save_file(null.tensors, path, metadata={"bhlib": text})
    return path


@pytest.mark.parametrize("null", [KDENull, ConformalNull])
def test_each_key_of_the_header_is_needed(null, tmp_path):
    null = fit(null, [torch.randn(30), torch.randn(30)])
    for key in null.header:
        rest = {name: value for name, value in null.header.items() if name != key}
        with pytest.raises(ValueError, match=f"damaged: its header lacks {key}"):
            load_null(with_header(null, tmp_path / "null.safetensors", rest))


@pytest.mark.parametrize("text", ["[1, 2]", '"kde"', "null", "3", "{", "", "[" * 100_000, '{"format": 1'])
def test_a_header_that_is_no_object(text, tmp_path):
    null = fit(ConformalNull, [torch.randn(30)])
    with pytest.raises(ValueError, match="damaged: its header is no JSON object"):
        load_null(with_header(null, tmp_path / "null.safetensors", text))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("null", ["kde"]),
        ("statistic", {}),
        ("statistic", "rank"),
        ("exclude_top", 63),
        ("exclude_top", 1.5),
        ("model_name", None),
        ("model_name", ""),
        ("num_layers", 0),
        ("num_layers", "1"),
        ("num_layers", True),
        ("num_experts", 1),
        ("num_experts", 64.0),
        ("per_expert", 0),
        ("sample_sizes", 30),
        ("sample_sizes", [-30]),
        ("sample_sizes", [[30]]),
        ("sample_sizes", [30, 30]),
        ("sample_sizes", ["30"]),
        ("table_error", "small"),
        ("weighted", None),
        ("levels", None),
        ("levels", {"mean_experts": [2.0, 3.0]}),
        ("levels", {"mean_experts": [2.0, 3.0], "alpha": [0.01]}),
        ("levels", {"mean_experts": [2.0, 3.0], "alpha": [0.01, "0.1"]}),
        ("levels", {"mean_experts": [2.0, 3.0], "alpha": [0.1, 0.01]}),
        ("levels", {"mean_experts": [2.0, 3.0], "alpha": [0.1, 1.0]}),
        ("levels", {"mean_experts": [2.0, math.nan], "alpha": [0.1, 0.2]}),
        ("levels", {"mean_experts": [], "alpha": []}),
    ],
)
def test_a_header_with_a_wrong_value(key, value, tmp_path):
    null = fit(KDENull, [torch.randn(30)])
    with pytest.raises(ValueError, match=f"{key}|null"):
        load_null(with_header(null, tmp_path / "null.safetensors", null.header | {key: value}))


def test_a_small_file_that_announces_much_is_refused_at_once(tmp_path):
    null = fit(ConformalNull, [torch.randn(2)])
    for change in ({"num_layers": 10**9}, {"num_layers": 10**9, "sample_sizes": []}, {"num_experts": 10**9}):
        path = with_header(null, tmp_path / "null.safetensors", null.header | change)
        started = time.perf_counter()
        if "num_experts" in change:
            load_null(path)  # a null that all experts share is the same for any number of them
        else:
            with pytest.raises(ValueError, match="damaged.*1,000,000,000 layers"):
                load_null(path)
        assert time.perf_counter() - started < 1


@pytest.mark.parametrize(
    ("null", "tensor", "change"),
    [
        (KDENull, "grid.0", lambda grid: grid.flip(-1)),
        (KDENull, "grid.0", lambda grid: grid * torch.inf),
        (KDENull, "grid.0", lambda grid: grid[:, :1]),
        (KDENull, "log_survival.0", lambda table: table.flip(-1)),
        (KDENull, "log_survival.0", lambda table: table + 1),
        (KDENull, "slope.0", lambda slope: slope[:, :-1]),
        (KDENull, "log_survival.0", lambda table: table.double()),
        (KDENull, "log_survival.0", lambda table: table[:, 0]),
        (KDENull, "slope.0", lambda slope: -slope),
        (KDENull, "slope.0", lambda slope: slope * torch.nan),
        (ConformalNull, "sample.0", lambda sample: sample.flip(-1)),
        (ConformalNull, "sample.0", lambda sample: sample * torch.nan),
        (ConformalNull, "sample.0", lambda sample: sample.half()),
        (ConformalNull, "sample.0", lambda sample: sample[:, :-1]),
        (ConformalNull, "size.0", lambda size: size.int()),
        (ConformalNull, "size.0", lambda size: size - 1),
        (ConformalNull, "size.0", lambda size: size[0]),
        (TableNull, "x.0", lambda x: x.flip(-1)),
        (TableNull, "x.0", lambda x: x * torch.nan),
        (TableNull, "x.0", lambda x: x[:, :-1]),
        (TableNull, "sf.0", lambda sf: sf.flip(-1)),
        (TableNull, "sf.0", lambda sf: 2 * sf),
        (TableNull, "sf.0", lambda sf: sf.double()),
    ],
)
def test_tables_that_are_no_survival_function(null, tensor, change, tmp_path):
    null = table_null(own_table(9)[:1]) if null is TableNull else fit(null, [torch.randn(30)])
    null.tensors[tensor] = change(null.tensors[tensor]).contiguous()
    null.save(tmp_path / "null.safetensors")
    with pytest.raises(ValueError, match=rf"damaged: (in layer 0 {tensor[:-2]}|{tensor})\b"):
        load_null(tmp_path / "null.safetensors")


WHOLE_FILES = {}


def whole_file(kind, folder):
    """Bytes of a small null of each kind that is saved, made once."""
    if kind not in WHOLE_FILES:
        null, per_expert = (SAVED + [(TableNull, False)])[kind]
        rng = np.random.default_rng(kind)
        if null is TableNull:
            made = table_null(own_table(points=20), num_experts=4)
            WHOLE_FILES[kind] = saved_bytes(made, folder / "whole.safetensors")
            return WHOLE_FILES[kind]
        if per_expert:
            samples = [[rng.normal(size=5 + expert) for expert in range(4)] for _ in range(2)]
        else:
            samples = [rng.normal(size=20), rng.normal(size=25)]
        made = null.fit(samples, model_name="tiny", num_experts=4, exclude_top=1, per_expert=per_expert)
        made.header["levels"] = {"mean_experts": [1.5, 2.0], "alpha": [0.01, 0.1]}
        WHOLE_FILES[kind] = saved_bytes(made, folder / "whole.safetensors")
    return WHOLE_FILES[kind]


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["kde", 10**9]),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=3), values, max_size=2),
    max_leaves=5,
)


@st.composite
def damaged_files(draw, folder):
    """A saved null with a few bytes changed, a piece cut out, or something else in its header or for a tensor."""
    kind = draw(st.integers(0, len(SAVED)))
    content = bytearray(whole_file(kind, folder))
    damage = draw(st.sampled_from(["bytes", "start", "cut", "header", "tensor"]))
    if damage in ("bytes", "start"):
        end = len(content) if damage == "bytes" else 1200  # the header lies at the start
        for place in draw(st.lists(st.integers(0, min(end, len(content)) - 1), min_size=1, max_size=4)):
            content[place] = draw(st.integers(0, 255))
    elif damage == "cut":
        first, last = sorted(draw(st.lists(st.integers(0, len(content)), min_size=2, max_size=2)))
        del content[first:last]
    else:
        path = folder / "whole.safetensors"
        path.write_bytes(content)
        null = load_null(path)
        if damage == "header":
            key = draw(st.sampled_from(sorted(null.header)))
            null.header[key] = draw(JSON_VALUES)
        else:
            name = draw(st.sampled_from(sorted(null.tensors)))
            dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.int64, torch.bool, torch.bfloat16]))
            shape = draw(st.lists(st.integers(0, 5), max_size=3))
            value = draw(st.sampled_from([-1e30, -1.0, 0.0, 1.0] + [torch.nan] * dtype.is_floating_point))
            null.tensors[name] = torch.full(shape, value).to(dtype)
        content = saved_bytes(null, path)
    return bytes(content)


@settings(max_examples=2500)
@given(data=st.data())
def test_damaged_files_are_refused_or_still_a_null(data, tmp_path_factory):
    """Whatever the damage: a ValueError that says so, or p-values that fall from 1 to 0, and a file as good again."""
    folder = tmp_path_factory.getbasetemp()
    path = folder / "damaged.safetensors"
    path.write_bytes(data.draw(damaged_files(folder)))
    try:
        null = load_null(path)
    except ValueError as error:
        assert str(path) in str(error)
        return
    statistics = torch.linspace(-60, 60, 121)
    for layer in range(null.num_layers):
        shown = statistics if null.shared else statistics[:, None].expand(-1, null.num_experts)
        pvals = null.survival(shown, layer)
        assert ((pvals >= 0) & (pvals <= 1)).all() and (pvals.diff(dim=0) <= 0).all()
    repr(null)
    if "levels" in null.header:
        assert 0 < null.alpha_for(null.header["levels"]["mean_experts"][0]) < 1
    null.save(path)
    assert load_null(path).header == null.header


# ------------------------------------------------------------------------------------------------------------- by name


def test_makers_by_name():
    assert isinstance(make_pvalues("gaussian"), TokenGaussian)
    assert isinstance(make_pvalues("dirichlet"), DirichletNull)
    with pytest.warns(SoftmaxPseudoWarning):
        assert make_pvalues("softmax", temperature=2.0).temperature == 2.0
    maker = TokenGaussian(exclude_top=4)
    assert make_pvalues(maker) is maker
    with pytest.raises(ValueError, match="'magic'.*'dirichlet', 'gaussian', 'softmax'"):
        make_pvalues("magic")


# ---------------------------------------------------------------------------------------------- the Dirichlet null


def dirichlet_logits(tokens, concentration, num_experts=NUM_EXPERTS):
    """Logits of routers without a preference, each token's shifted by its own constant."""
    shares = torch.full((num_experts,), float(concentration), dtype=torch.float64)
    probabilities = torch.distributions.Dirichlet(shares).sample((tokens,))
    return probabilities.log() + 5 * torch.randn(tokens, 1, dtype=torch.float64)


each_concentration = pytest.mark.parametrize("concentration", [1, 2, 4, 8])


@each_concentration
def test_dirichlet_null_is_the_beta_tail(concentration):
    logits = random_logits(500, NUM_EXPERTS)
    shape = concentration, concentration * (NUM_EXPERTS - 1)
    expected = stats.beta.sf(torch.softmax(logits.double(), -1).numpy(), *shape)
    np.testing.assert_allclose(DirichletNull(concentration)(logits).numpy(), expected, rtol=1e-4, atol=1e-15)


@pytest.mark.parametrize("num_experts", [8, 64])
@each_concentration
def test_dirichlet_null_is_uniform_under_its_hypothesis(num_experts, concentration):
    """One expert of each token, so that the p-values tested are independent."""
    pvals = DirichletNull(concentration)(dirichlet_logits(20_000, concentration, num_experts))[:, 0]
    assert stats.kstest(pvals.numpy(), "uniform").pvalue > 0.001


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.2])
@pytest.mark.parametrize("concentration", [1, 4])
def test_bh_on_dirichlet_tokens_errs_at_alpha(alpha, concentration):
    """All hypotheses are true, so any rejection is an error: in a fraction alpha of the tokens, within 4 s.e."""
    tokens = 20_000
    pvals = DirichletNull(concentration)(dirichlet_logits(tokens, concentration))
    errors = benjamini_hochberg(pvals, alpha).any(-1).double().mean().item()
    assert abs(errors - alpha) < 4 * math.sqrt(alpha * (1 - alpha) / tokens)


@each_concentration
def test_dirichlet_probability_is_the_inverse_of_the_statistic(concentration):
    maker, logits = DirichletNull(concentration), random_logits(200, NUM_EXPERTS)
    statistics, probabilities = maker.statistic_of(logits), torch.softmax(logits.double(), -1)
    # For a p-value near 1, -log p holds too few digits; from 600 on p underflows even in float64.
    in_reach = (statistics > 0.05) & (statistics < 600)
    torch.testing.assert_close(
        maker.probability(statistics, NUM_EXPERTS)[in_reach], probabilities[in_reach], rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("wrong", [0, 9, 2.5, True, "4"])
def test_dirichlet_concentration_is_a_whole_number(wrong):
    with pytest.raises(ValueError, match=f"concentration must be an int from 1 to 8, got {wrong!r}"):
        DirichletNull(wrong)


@each_concentration
def test_dirichlet_null_far_tails_and_flat_tokens(concentration):
    logits = torch.zeros(2, NUM_EXPERTS)
    logits[1, 0] = 60.0  # probability one in float32
    pvals = DirichletNull(concentration)(logits)
    assert torch.isfinite(pvals).all() and pvals[1, 0] == 0 and (pvals[1, 1:] == 1).all()
    expected = stats.beta.sf(1 / NUM_EXPERTS, concentration, concentration * (NUM_EXPERTS - 1))
    torch.testing.assert_close(pvals[0], torch.full((NUM_EXPERTS,), expected, dtype=torch.float32))
