"""Procedures against scipy, statsmodels, and loops that anyone can read."""

import gc
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import false_discovery_control
from statsmodels.stats.multitest import multipletests, multitest_alias

from bhlib.procedures import (
    ALIASES,
    PROCEDURES,
    adjusted_pvalues,
    canonical_method,
    check_pvalues,
    critical_values,
    reject,
    round_down,
    storey,
    storey_null_fraction,
)

VECTORS_PER_BATCH = 1000
BATCHES = 102  # together more than the 100,000 vectors that each comparison asserts

STATSMODELS_NAMES = {
    "bh": "fdr_bh",
    "by": "fdr_by",
    "tsbky": "fdr_tsbky",
    "tsbh": "fdr_tsbh",
    "bonferroni": "bonferroni",
    "holm": "holm",
    "hochberg": "simes-hochberg",
}

BENJAMINI_HOCHBERG_1995 = torch.tensor(
    [0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344, 0.0459]
    + [0.3240, 0.4262, 0.5719, 0.6528, 0.7590, 1.0000],
    dtype=torch.float64,
)
"""Section 3.2 of the paper: 15 hypotheses on the treatment of myocardial infarction."""

# Seeded by hypothesis from the test's own name: the same vectors on every run.
batch_settings = settings(max_examples=BATCHES, deadline=None, derandomize=True, database=None)
levels = st.one_of(st.sampled_from([0.01, 0.05, 0.1, 0.2, 0.29, 0.5]), st.floats(0.001, 0.999))


def critical_points(num_tests: int, alpha: float) -> np.ndarray:
    """Numbers at which some procedure changes its mind, and their neighbours in float64."""
    k = np.arange(1, num_tests + 1)
    exact = np.concatenate(
        [
            k / num_tests * alpha,
            alpha * k / num_tests,  # the same in real numbers, not always in floating point
            k / num_tests * (alpha / (1 + alpha)),
            k / num_tests / np.sum(1 / k) * alpha,
            alpha / k,
            [alpha, 0.5],
        ]
    )
    return np.concatenate([exact, np.nextafter(exact, 0), np.nextafter(exact, 1)]).clip(0, 1)


@st.composite
def batches(draw) -> tuple[torch.Tensor, float]:
    """1000 vectors of p-values [1000, m] and a level: ties, zeros, ones, critical values, length one."""
    num_tests = draw(st.one_of(st.just(1), st.integers(2, 12), st.integers(13, 64)), label="num_tests")
    alpha = draw(levels, label="alpha")
    dtype = draw(st.sampled_from([torch.float64] * 3 + [torch.float32, torch.bfloat16, torch.float16]))
    power = draw(st.sampled_from([1, 3, 8]), label="skew to small p-values")
    num_values = draw(st.sampled_from([None, 2, 5, 100]), label="distinct values")
    special = draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]), label="fraction of critical values, zeros and ones")
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1), label="seed"))

    shape = (VECTORS_PER_BATCH, num_tests)
    pvals = rng.random(shape) ** power
    if num_values is not None:
        pvals = np.round(pvals * num_values) / num_values
    specials = np.concatenate([critical_points(num_tests, alpha), [0.0, 1.0]])
    pvals = np.where(rng.random(shape) < special, rng.choice(specials, shape), pvals)
    return torch.from_numpy(pvals).to(dtype), alpha


def vectors_that_differ(expected: np.ndarray, found: torch.Tensor) -> int:
    return int((expected != found.numpy()).any(axis=-1).sum())


def statsmodels_results(pvals: torch.Tensor, alpha: float, method: str) -> tuple[np.ndarray, np.ndarray]:
    """Decisions and adjusted p-values, vector by vector."""
    gc.freeze()  # statsmodels collects garbage in every call: hide from it what exists so far
    try:
        results = [multipletests(row, alpha, method=STATSMODELS_NAMES[method])[:2] for row in pvals.double().numpy()]
    finally:
        gc.unfreeze()
    decisions, adjusted = zip(*results, strict=True)
    return np.stack(decisions), np.stack(adjusted)


# ------------------------------------------------------------------- decisions against references


@pytest.mark.parametrize("method", STATSMODELS_NAMES)
def test_decisions_are_those_of_statsmodels(method):
    compared = differing = rejections = 0

    @batch_settings
    @given(batches())
    def compare(batch):
        nonlocal compared, differing, rejections
        pvals, alpha = batch
        expected, _ = statsmodels_results(pvals, alpha, method)
        compared += len(pvals)
        differing += vectors_that_differ(expected, reject(pvals, alpha, method))
        rejections += int(expected.sum())

    compare()
    print(f"{method} against statsmodels: {compared} vectors, {differing} differ")
    assert compared >= 100_000
    assert rejections > compared / 2, "too few rejections for the comparison to mean anything"
    assert differing == 0


@pytest.mark.parametrize("method", ["bh", "by"])
def test_decisions_are_those_of_scipy(method):
    compared = differing = undecided = entries = 0

    @batch_settings
    @given(batches())
    def compare(batch):
        nonlocal compared, differing, undecided, entries
        pvals, alpha = batch
        adjusted = false_discovery_control(pvals.double().numpy(), axis=-1, method=method)
        # scipy returns p * m / k, which rounds differently from k / m * alpha: where it equals alpha up to
        # rounding, it decides nothing. statsmodels does, and is compared there too.
        decided = np.abs(adjusted - alpha) > 1e-12
        found = reject(pvals, alpha, method).numpy()
        compared += len(pvals)
        differing += int(((adjusted <= alpha) != found)[decided].sum())
        undecided += int((~decided).sum())
        entries += decided.size

    compare()
    print(f"{method} against scipy: {compared} vectors, {differing} of {entries} p-values differ,"
          f" {undecided} left out")  # fmt: skip
    assert compared >= 100_000
    assert undecided < entries / 20
    assert differing == 0


def storey_loop(pvals: list[float], alpha: float) -> list[bool]:
    num_tests = len(pvals)
    above = sum(p > 0.5 for p in pvals)
    null_fraction = (1 + above) / (num_tests * (1 - 0.5))
    cutoff = -1.0
    for k, p in enumerate(sorted(pvals), start=1):
        if p <= k / num_tests * (alpha / null_fraction) and p <= 0.5:
            cutoff = p
    return [p <= cutoff for p in pvals]


def higher_criticism_loop(pvals: list[float], alpha: float) -> list[bool]:
    num_tests = len(pvals)
    candidates = max(1, math.floor(round(alpha * num_tests, 9)))
    best, cutoff = 0.0, -1.0
    for i, p in enumerate(sorted(pvals), start=1):
        if i > candidates or i == num_tests:
            break
        score = (i / num_tests - p) / math.sqrt(i / num_tests * (1 - i / num_tests))
        if score > 0 and score >= best:
            best, cutoff = score, p
    return [p <= cutoff for p in pvals]


def test_higher_criticism_searches_the_fraction_alpha():
    # 0.29 * 100 is 28.999999999999996 in floating point.
    pvals = torch.cat([torch.arange(40) * 1e-6, torch.linspace(0.5, 1.0, 60)])
    assert reject(pvals, 0.29, "hc").sum() == 29
    assert reject(pvals, 0.9, "hc").sum() == 40


def fixed_loop(pvals: list[float], alpha: float) -> list[bool]:
    return [p <= alpha for p in pvals]


@pytest.mark.parametrize(
    ("method", "loop"), [("storey", storey_loop), ("hc", higher_criticism_loop), ("fixed", fixed_loop)]
)
def test_decisions_are_those_of_a_readable_loop(method, loop):
    compared = differing = rejections = 0

    @batch_settings
    @given(batches())
    def compare(batch):
        nonlocal compared, differing, rejections
        pvals, alpha = batch
        expected = np.array([loop(row, alpha) for row in pvals.double().tolist()])
        compared += len(pvals)
        differing += vectors_that_differ(expected, reject(pvals, alpha, method))
        rejections += int(expected.sum())

    compare()
    print(f"{method} against a loop: {compared} vectors, {differing} differ")
    assert compared >= 100_000
    assert rejections > compared / 2, "too few rejections for the comparison to mean anything"
    assert differing == 0


def test_every_procedure_is_compared_with_something():
    assert set(PROCEDURES) == {*STATSMODELS_NAMES, "storey", "hc", "fixed"}


@pytest.mark.parametrize(
    ("method", "rejections"),
    [("bonferroni", 3), ("holm", 3), ("hochberg", 3), ("bh", 4), ("by", 3), ("fixed", 9)],
)
def test_the_example_of_benjamini_and_hochberg_1995(method, rejections):
    found = reject(BENJAMINI_HOCHBERG_1995, 0.05, method)
    assert found.tolist() == [True] * rejections + [False] * (15 - rejections)


# ------------------------------------------------------------------- properties


@pytest.mark.parametrize("method", PROCEDURES)
@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(batch=batches(), other_alpha=levels)
def test_a_larger_alpha_never_rejects_less(method, batch, other_alpha):
    pvals, alpha = batch
    low, high = sorted([alpha, other_alpha])
    lost = reject(pvals, low, method) & ~reject(pvals, high, method)
    assert not lost.any()


@pytest.mark.parametrize("method", PROCEDURES)
@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(batch=batches())
def test_order_and_ties_do_not_matter(method, batch):
    pvals, alpha = batch
    found = reject(pvals, alpha, method)
    order = torch.randperm(pvals.shape[-1], generator=torch.Generator().manual_seed(0))
    assert torch.equal(reject(pvals[:, order], alpha, method), found[:, order])
    equal = pvals.unsqueeze(-1) == pvals.unsqueeze(-2)
    assert torch.equal(equal & found.unsqueeze(-1), equal & found.unsqueeze(-2))


def test_which_procedure_rejects_more():
    pvals = torch.rand(5000, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) ** 4
    chain = ["bonferroni", "holm", "hochberg", "bh", "fixed"]
    for stricter, laxer in [*zip(chain, chain[1:], strict=False), ("by", "bh"), ("tsbky", "tsbh")]:
        few, more = reject(pvals, 0.1, stricter), reject(pvals, 0.1, laxer)
        assert not (few & ~more).any(), f"{stricter} rejects what {laxer} does not"
        assert few.sum() < more.sum(), f"{stricter} and {laxer} cannot be told apart here"


@pytest.mark.parametrize("method", PROCEDURES)
def test_any_leading_axes(method):
    pvals = torch.rand(2, 3, 5, 16, generator=torch.Generator().manual_seed(0)) ** 3
    found = reject(pvals, 0.2, method)
    assert found.shape == pvals.shape and found.dtype == torch.bool
    for index in np.ndindex(2, 3, 5):
        assert torch.equal(found[index], reject(pvals[index], 0.2, method))


@pytest.mark.parametrize("method", PROCEDURES)
@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 4)])
def test_nothing_to_test(method, shape):
    found = reject(torch.empty(shape), 0.05, method)
    assert found.shape == shape and found.dtype == torch.bool


@pytest.mark.parametrize("method", PROCEDURES)
def test_a_single_test(method):
    # Storey: (1 + 0) / (1 * 0.5) = 2 halves the level. Two stages: alpha / (1 + alpha). HC: nothing to score.
    level = {"storey": 0.025, "tsbky": 0.05 / 1.05, "hc": -1.0}.get(method, 0.05)
    pvals = torch.tensor([0.0, 0.02, 0.0249, 0.0251, 0.047, 0.048, 0.05, 0.051, 1.0], dtype=torch.float64)
    assert torch.equal(reject(pvals.unsqueeze(-1), 0.05, method).squeeze(-1), pvals <= level)


@pytest.mark.parametrize("method", PROCEDURES)
def test_the_input_is_left_alone(method):
    pvals = torch.rand(4, 8, requires_grad=True)
    before = pvals.detach().clone()
    found = reject(pvals, 0.3, method)
    assert torch.equal(pvals.detach(), before) and not found.requires_grad


# ------------------------------------------------------------------- precision


def test_float32_gets_the_decisions_of_the_same_numbers_in_float64():
    # 0.05 in float32 is 0.0500000007..., above 0.05; torch by itself would compare it with a rounded 0.05.
    rounded = torch.tensor([0.05], dtype=torch.float32)
    assert rounded.double().item() > 0.05
    assert not reject(rounded, 0.05, "fixed").item()
    assert reject(torch.nextafter(rounded, torch.zeros(1)), 0.05, "fixed").item()
    # 0.7 in float32 is below 0.7: nothing to round down.
    assert reject(torch.tensor([0.7]), 0.7, "fixed").item()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_compared_in_float32(dtype):
    # Compared in half precision, 0.001 and alpha / m = 0.05 / 50 would be one number.
    pvals = torch.ones(50, dtype=dtype)
    pvals[0] = 0.001
    assert reject(pvals, 0.05, "bonferroni")[0].item() == (pvals[0].double().item() <= 0.001)
    above = torch.nextafter(pvals[0], pvals[1])
    assert not reject(torch.cat([above.reshape(1), pvals[1:]]), 0.05, "bonferroni").any()


# ------------------------------------------------------------------- critical values, adjusted p-values


@pytest.mark.parametrize("method", ["bh", "by", "hochberg", "bonferroni", "fixed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_critical_values_make_the_decision(method, dtype):
    num_tests, alpha = 24, 0.1
    critical = critical_values(num_tests, alpha, method, dtype=dtype)
    assert critical.shape == (num_tests,) and critical.dtype == dtype
    pvals = torch.rand(3000, num_tests, dtype=dtype, generator=torch.Generator().manual_seed(0)) ** 3
    ordered = pvals.sort(dim=-1).values
    ranks = torch.arange(1, num_tests + 1)
    rejected = torch.where(ordered <= critical, ranks, 0).amax(dim=-1)
    assert torch.equal(rejected, reject(pvals, alpha, method).sum(dim=-1))


def test_critical_values_are_the_callers_own():
    critical_values(8, 0.05).zero_()
    assert critical_values(8, 0.05)[-1].item() == 0.05


@pytest.mark.parametrize("method", ["storey", "tsbky", "holm", "hc"])
def test_no_critical_values_where_the_decision_is_not_of_that_form(method):
    with pytest.raises(ValueError, match=rf"method='{method}'.*exist for 'bh', 'by'.*reject\(pvals, alpha"):
        critical_values(8, 0.05, method)


def test_critical_values_refuse_half_precision_and_negative_counts():
    with pytest.raises(ValueError, match="torch.bfloat16 is too narrow.*torch.float32"):
        critical_values(8, 0.05, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="num_tests=-1 must be at least 0"):
        critical_values(-1, 0.05)


@pytest.mark.parametrize("method", ["bh", "by", "bonferroni", "holm", "hochberg"])
@settings(max_examples=10, deadline=None, derandomize=True, database=None)
@given(batch=batches())
def test_adjusted_pvalues_are_those_of_statsmodels(method, batch):
    pvals = batch[0].double()[:200]
    _, expected = statsmodels_results(pvals, 0.05, method)
    np.testing.assert_allclose(adjusted_pvalues(pvals, method).numpy(), expected, rtol=1e-12)
    narrow = adjusted_pvalues(pvals.float(), method)
    assert narrow.dtype == torch.float32
    np.testing.assert_allclose(narrow.numpy(), expected, rtol=1e-5, atol=1e-37)  # below: subnormal in float32


@pytest.mark.parametrize("method", ["bh", "by", "storey", "bonferroni", "holm", "hochberg", "fixed"])
@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(batch=batches())
def test_adjusted_pvalues_are_the_smallest_level_that_rejects(method, batch):
    pvals, alpha = batch[0].double(), batch[1]
    adjusted = adjusted_pvalues(pvals, method)
    clear = (adjusted - alpha).abs() > 1e-12
    assert torch.equal((adjusted <= alpha)[clear], reject(pvals, alpha, method)[clear])
    assert (adjusted <= 1).all() and adjusted.shape == pvals.shape


@pytest.mark.parametrize("method", ["tsbky", "tsbh", "hc"])
def test_no_adjusted_pvalues_where_there_are_none(method):
    with pytest.raises(ValueError, match=f"method='{method}' has no adjusted p-values; they exist for 'bh'"):
        adjusted_pvalues(torch.rand(4), method)


def test_adjusted_pvalues_of_nothing():
    assert adjusted_pvalues(torch.empty(3, 0)).shape == (3, 0)


# ------------------------------------------------------------------- Storey's estimate


def test_storey_null_fraction_by_hand():
    pvals = torch.tensor([[0.1, 0.5, 0.6, 0.9], [0.0, 0.1, 0.2, 0.3], [0.6, 0.7, 0.8, 1.0]])
    # (1 + number above 0.5) / (4 * 0.5); a p-value of exactly 0.5 is not above.
    assert storey_null_fraction(pvals).tolist() == [1.5, 0.5, 2.5]
    assert storey_null_fraction(pvals, lambda_=0.75).tolist() == [2.0, 1.0, 3.0]


def test_storey_is_exact_because_its_estimate_is_not_capped_at_one():
    # Four true nulls at alpha = 0.2: the FDR is the probability of any rejection, (1 - 0.5^4) * 0.2 = 0.1875.
    alpha, repetitions = 0.2, 200_000
    rng = np.random.default_rng(0)
    pvals = torch.from_numpy(rng.random((repetitions, 4)))
    standard_error = math.sqrt(0.1875 * 0.8125 / repetitions)
    uncapped = storey(pvals, alpha).any(dim=-1).double().mean().item()
    assert abs(uncapped - 0.1875) < 4 * standard_error
    # With the cap, vectors whose estimate exceeds one would be tested by plain Benjamini-Hochberg instead.
    too_high = (storey_null_fraction(pvals) > 1).unsqueeze(-1)
    capped = torch.where(too_high, reject(pvals, alpha, "bh"), storey(pvals, alpha))
    assert capped.any(dim=-1).double().mean().item() > alpha + 10 * standard_error


@pytest.mark.parametrize("lambda_", [0.0, 1.0, -0.5])
def test_storey_refuses_lambda(lambda_):
    with pytest.raises(ValueError, match=f"lambda_={lambda_} must lie strictly between 0 and 1"):
        storey(torch.rand(4), 0.05, lambda_=lambda_)


# ------------------------------------------------------------------- names


def test_aliases_of_statsmodels_mean_the_same_here():
    known = {statsmodels: ours for ours, statsmodels in STATSMODELS_NAMES.items()}
    checked = 0
    for name, aliases in multitest_alias_groups().items():
        for alias in aliases:
            if name in known:
                assert canonical_method(alias) == known[name]
                checked += 1
    assert checked >= len(known)


def multitest_alias_groups() -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for alias, name in multitest_alias.items():
        groups.setdefault(name, []).append(alias)
    return groups


def test_every_alias_leads_to_a_procedure():
    assert set(ALIASES.values()) <= set(PROCEDURES)
    assert not set(ALIASES) & set(PROCEDURES)
    assert canonical_method("FDR_BH") == canonical_method("benjamini_hochberg") == "bh"


def test_long_names_are_names_of_functions():
    for name, procedure in PROCEDURES.items():
        assert canonical_method(ALIASES.get(procedure.__name__, name)) == name


@pytest.mark.parametrize("call", [canonical_method, lambda name: reject(torch.rand(3), 0.05, name)])
def test_an_unknown_method_is_answered_with_those_that_exist(call):
    with pytest.raises(ValueError, match="method='sidak' is not a procedure; choose one of 'bh', 'by'"):
        call("sidak")


# ------------------------------------------------------------------- refused input


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (math.nan, r"pvals\[1, 0, 2\] is NaN \(1 of 12 entries"),
        (1.5, r"pvals\[1, 0, 2\] is 1.5, outside \[0, 1\]"),
        (-0.25, r"pvals\[1, 0, 2\] is -0.25, outside \[0, 1\].*clamp"),
        (math.inf, r"pvals\[1, 0, 2\] is inf, outside \[0, 1\]"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_what_is_not_a_pvalue_is_located(value, message, dtype):
    pvals = torch.full((2, 2, 3), 0.5, dtype=dtype)
    pvals[1, 0, 2] = value
    for refuse in [check_pvalues, reject, adjusted_pvalues, storey_null_fraction]:
        with pytest.raises(ValueError, match=message):
            refuse(pvals)


@pytest.mark.parametrize("method", PROCEDURES)
def test_without_the_check_nan_is_not_rejected(method):
    pvals = torch.tensor([math.nan, 0.0, 0.001, 1.0])
    found = reject(pvals, 0.5, method, check=False)
    assert not found[0] and found[1]
    assert not reject(torch.full((3,), math.nan), 0.5, method, check=False).any()


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, 5, math.nan])
@pytest.mark.parametrize("method", PROCEDURES)
def test_alpha_outside_the_open_interval(method, alpha):
    with pytest.raises(ValueError, match=rf"alpha={alpha} must lie strictly between 0 and 1"):
        reject(torch.rand(3), alpha, method)


@pytest.mark.parametrize("alpha", ["0.05", None, True, torch.tensor(0.05)])
def test_alpha_of_another_type(alpha):
    with pytest.raises(TypeError, match=r"alpha must be a number, not \w+; use float\(alpha\)"):
        reject(torch.rand(3), alpha)


@pytest.mark.parametrize("check", [True, False])
def test_what_is_not_a_tensor_of_pvalues(check):
    with pytest.raises(TypeError, match=r"not list; use torch.as_tensor\(pvals\)"):
        reject([0.1, 0.2], check=check)
    with pytest.raises(TypeError, match=r"not torch.int64; use pvals.float\(\)"):
        reject(torch.tensor([0, 1]), check=check)
    with pytest.raises(ValueError, match=r"without an axis to test along; use pvals.reshape\(1\)"):
        reject(torch.tensor(0.1), check=check)


# ------------------------------------------------------------------- where it runs


@pytest.mark.parametrize("method", ["bh", "by", "holm", "tsbky"])
def test_a_compiler_can_trace_it_whole(method):
    torch.compiler.reset()
    pvals = torch.rand(64, 16, generator=torch.Generator().manual_seed(0)) ** 3
    traced = torch.compile(PROCEDURES[method], backend="eager", fullgraph=True)
    assert torch.equal(traced(pvals, 0.123, check=False), reject(pvals, 0.123, method))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", PROCEDURES)
@pytest.mark.parametrize("num_tests", [1, 49, 64])
def test_gpu_decides_like_cpu_without_waiting(method, num_tests):
    # 49 and 0.05 divide badly: a quotient that is rounded twice would show at the critical values.
    rng = np.random.default_rng(0)
    pvals = rng.random((4096, num_tests)) ** 3
    critical = rng.choice(critical_points(num_tests, 0.05), pvals.shape)
    pvals = torch.from_numpy(np.where(rng.random(pvals.shape) < 0.3, critical, pvals))
    for dtype in [torch.float64, torch.float32, torch.bfloat16, torch.float16]:
        on_cpu = pvals.to(dtype)
        on_gpu = on_cpu.cuda()
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = reject(on_gpu, 0.05, method, check=False)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(found.cpu(), reject(on_cpu, 0.05, method))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_down_never_rounds_up(dtype):
    exact = torch.cat([torch.linspace(-2, 2, 4001, dtype=torch.float64), torch.tensor([0.0, torch.inf])])
    rounded = round_down(exact, dtype)
    assert (rounded <= exact).all() and (rounded.nextafter(torch.full_like(rounded, torch.inf)) > exact)[:-1].all()
    assert torch.equal(round_down(rounded.double(), dtype), rounded)
