"""Each kernel against its twin in plain torch: on a CUDA device, else in Triton's interpreter.

    python -m pytest tests/test_kernels.py -m gpu        # with a CUDA device

`make kernels` runs them anywhere.
"""

import os
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

CUDA = torch.cuda.is_available()
if not CUDA and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("without a CUDA device the kernels run in Triton's interpreter: make kernels", allow_module_level=True)
pytest.importorskip("triton", reason="the kernels need Triton, which comes with torch for CUDA on Linux")

from triton.runtime import interpreter  # noqa: E402
from triton.runtime.jit import KernelInterface  # noqa: E402

from bhlib.compensation import LayerCompensation  # noqa: E402
from bhlib.kernels.forward import experts_forward  # noqa: E402
from bhlib.kernels.grouped import PLANS, Plan, grouped_forward  # noqa: E402
from bhlib.kernels.launch import QuickKernel  # noqa: E402
from bhlib.kernels.pairs import most_tiles, tile_pairs  # noqa: E402
from bhlib.kernels.routing import _cut, bh_route, cut_table  # noqa: E402
from bhlib.kernels.vector import vector_forward  # noqa: E402
from bhlib.norms import LayerGuess, LayerNorms  # noqa: E402
from bhlib.procedures import critical_values  # noqa: E402
from bhlib.pvalues import KDENull, TokenGaussian, null_values  # noqa: E402
from bhlib.rules import BH, Threshold  # noqa: E402
from bhlib.rules.routing import mark_dropped  # noqa: E402
from bhlib.weighting import find_weighting, of_top  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"
DTYPE, TOLERANCE = (torch.bfloat16, 1e-2) if CUDA else (torch.float32, 1e-5)
TOKENS = 64 if CUDA else 5


@pytest.fixture(autouse=True)
def ranges_of_loaded_numbers(monkeypatch):
    """Triton 3.6's interpreter takes ``int()`` of arrays with one element, which numpy refuses from 2.4 on."""
    own = interpreter._patch_lang_tensor

    def patch(tensor, scope):
        own(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch)


# ------------------------------------------------------------------------------------------------------- routing


@pytest.mark.parametrize("code", [3, None, "softmax"])
def test_the_kernel_refuses_weights_that_it_does_not_know(code):
    with pytest.raises(ValueError, match=r"weighting must be 0 \(plain\), 1 \(normalized\) or 2 \(.*\), got "):
        bh_route(spread_logits(3, 64), torch.zeros(64), weighting=code)


def kernel_route(rule, logits, layer=None, **options):
    """The kernel's routing with the decisions that a rule asks for."""
    options["weighting"] = find_weighting(options.get("weighting", "softmax")).kernel
    thresholds = rule.thresholds(logits.shape[-1], layer, logits.device)
    statistic, exclude_top, cuts = cut_table(rule.pvalues, thresholds, logits.shape[-1])
    return bh_route(
        logits, cuts, statistic=statistic, exclude_top=exclude_top, min_k=rule.min_k, max_k=rule.max_k, **options
    )


def clear_cut(rule, logits, margin=1e-4):
    """Tokens whose statistics all keep away from the thresholds: there, rounding cannot change a decision."""
    thresholds = rule.pvalues.critical_statistics(critical_values(logits.shape[-1], rule.alpha, rule.method).cpu(), 0)
    statistics = rule.pvalues.statistic_of(logits).sort(dim=-1, descending=True).values.cpu()
    return ((statistics - thresholds).abs() > margin * (1 + thresholds.abs())).all(dim=-1)


def check_route(rule, logits, weighting="softmax", temperature=1.0):
    """Same counts and experts as the rule wherever the decision is no matter of rounding, and weights within 1e-5."""
    expected = rule(logits, 0, weighting=weighting, temperature=temperature)
    weights, experts, counts = kernel_route(rule, logits, 0, weighting=weighting, temperature=temperature)
    sure = clear_cut(rule, logits).to(logits.device)
    assert sure.float().mean() > 0.9
    assert torch.equal(counts[sure], expected.counts[sure])
    assert torch.equal(experts[sure], expected.experts[sure])
    torch.testing.assert_close(weights[sure], expected.weights[sure], rtol=1e-5, atol=1e-7)
    return counts


def spread_logits(num_tokens, num_experts, seed=0, scale=1.8, dtype=torch.float32):
    """Random logits without ties."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(num_tokens, num_experts, generator=generator)
    return logits.to(DEVICE, dtype)


@pytest.mark.parametrize(("num_experts", "max_k"), [(8, 5), (60, 1), (64, 8), (256, 8)])
def test_routes_as_the_rule(num_experts, max_k):
    logits = spread_logits(TOKENS, num_experts, scale=3)
    counts = check_route(BH(alpha=0.2, max_k=max_k), logits)
    assert max_k == 1 or counts.unique().numel() > 1


@pytest.mark.parametrize(
    ("weighting", "temperature", "min_k"),
    [
        ("softmax", 1.7, 2), ("normalized", 1.0, 0), ("softmax_selected", 1.7, 0), (of_top("normalized"), 1.0, 0),
        (of_top("softmax_selected"), 1.7, 2),
    ],
)  # fmt: skip
def test_weights_follow_the_model(weighting, temperature, min_k):
    check_route(BH(alpha=0.05, min_k=min_k), spread_logits(TOKENS, 64, scale=1.2), weighting, temperature)


@pytest.mark.parametrize("statistic", ["log_prob", "logit", "centered", "standardized"])
def test_every_statistic(statistic):
    logits = spread_logits(64, 64)
    values, _ = null_values(logits.cpu(), statistic)
    null = KDENull.fit([values.flatten().numpy()], model_name="noise", num_experts=64, statistic=statistic)
    check_route(BH(alpha=0.5, pvalues=null), logits[:TOKENS])


@pytest.mark.parametrize(
    ("weighting", "own_k"), [("softmax", 8), ("normalized", 8), ("softmax_selected", 6), (of_top("normalized"), 8)]
)
def test_what_is_dropped_of_the_models_own_is_marked(weighting, own_k):
    rule, logits = BH(alpha=0.2, max_k=6), spread_logits(TOKENS, 64)
    sure = clear_cut(rule, logits).to(DEVICE)
    weights, experts, counts, exact = kernel_route(rule, logits, 0, weighting=weighting, own_k=own_k, exact=True)
    kept = rule(logits, 0, weighting=weighting)
    expected = mark_dropped(
        kept.experts.masked_fill(kept.experts < 0, 64), logits, own_k,
        weighting=weighting, temperature=1.0, is_prefix=True,
    )  # fmt: skip
    assert (experts > 64).any() and torch.equal(counts[sure], kept.counts[sure])
    assert torch.equal(experts[sure], expected[1][sure])
    for got, wanted in ((weights, expected[0]), (exact, expected[2])):
        torch.testing.assert_close(got[sure], wanted[sure], rtol=1e-5, atol=1e-7)


def test_gaussian_null():
    check_route(BH(alpha=0.1, pvalues=TokenGaussian()), spread_logits(TOKENS, 64))
    truncated = TokenGaussian(estimator="truncated")
    assert cut_table(truncated, torch.zeros(64), 64) is None


def test_equal_logits_go_by_index():
    logits = torch.tensor([[-0.0, 3.0, 0.0, 3.0, -0.0, 3.0, -9.0, -9.0]], device=DEVICE)
    _, experts, counts = kernel_route(BH(alpha=0.01, min_k=6, max_k=6), logits)
    assert experts.tolist() == [[1, 3, 5, 0, 2, 4]] and counts.tolist() == [6]


def test_half_precision_logits_and_empty_slots():
    logits = spread_logits(TOKENS, 64, dtype=torch.float16)
    rule = BH(alpha=0.05)
    weights, experts, counts = kernel_route(rule, logits, weights_dtype=torch.float16, empty=64)
    assert torch.equal((experts < 64).sum(-1), counts) and torch.equal(counts, rule(logits.float()).counts)
    assert weights.dtype == torch.float16 and not weights[experts == 64].any()


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_nan_is_the_largest_logit_whatever_its_sign(sign):
    """As in ``torch.topk``; a negative one, as a quotient 0 / 0 gives, would be sorted below what pads 60 to 64."""
    nan = torch.tensor(float("nan"), device=DEVICE).copysign(torch.tensor(sign, device=DEVICE))
    logits = torch.cat([spread_logits(2, 60), nan.expand(1, 60)])
    logits[0, 7] = nan
    _, experts, counts = kernel_route(BH(alpha=0.05, min_k=60, max_k=60), logits)
    assert counts.tolist() == [60, 60, 60]
    assert (experts.sort(dim=-1).values == torch.arange(60, device=DEVICE)).all()
    assert experts[0, 0] == 7 and experts[2].tolist() == list(range(60))


# one launch for a batch at several levels, and for a model and its records


def test_two_levels_in_one_launch():
    """Each sequence as it would be alone, to the bit; the sequences' ends do not fall on those of programs."""
    logits = spread_logits(6, 60)
    both = kernel_route(BH(alpha=(0.01, 0.3)), logits)
    alone = [kernel_route(BH(alpha), part) for alpha, part in zip((0.01, 0.3), logits.split(3), strict=True)]
    for found, parts in zip(both, zip(*alone, strict=True), strict=True):
        assert torch.equal(found, torch.cat(parts))
    assert both[2][:3].sum() < both[2][3:].sum()


@pytest.mark.skipif(not CUDA, reason="takes long in the interpreter: needs a CUDA device")
def test_two_levels_of_many_tokens():
    logits = spread_logits(3002, 64)
    both = kernel_route(BH(alpha=(0.01, 0.3)), logits)
    alone = [kernel_route(BH(alpha), part) for alpha, part in zip((0.01, 0.3), logits.split(1501), strict=True)]
    for found, parts in zip(both, zip(*alone, strict=True), strict=True):
        assert torch.equal(found, torch.cat(parts))


@pytest.mark.parametrize("alpha", [0.1, (0.01, 0.3)])
def test_a_launch_writes_for_a_model_and_for_records(alpha):
    rule, logits = BH(alpha, max_k=6), spread_logits(TOKENS // 2 * 2, 64, dtype=torch.float16)
    options = {"dtype": torch.float16, "weighting": "normalized", "temperature": 1.3}
    found = rule.forms(logits, 0, exact=True, fused=True, **options)
    weights, experts, counts = kernel_route(rule, logits, 0, weighting="normalized", temperature=1.3)
    assert torch.equal(found.exact, weights) and weights.dtype == torch.float32
    assert torch.equal(found.weights, weights.half()) and torch.equal(found.counts, counts)
    assert torch.equal(found.experts, torch.where(experts < 0, 64, experts)) and (found.experts == 64).any()
    without = rule.forms(logits, 0, fused=True, **options)
    assert all(torch.equal(one, other) for one, other in zip(without[:3], found[:3], strict=True))
    assert without.exact is None


def test_tokens_that_cannot_be_divided_among_levels_are_refused():
    rule, logits = BH(), spread_logits(6, 64)
    for several in (rule.at((0.1, 0.2, 0.3, 0.4)).fused, rule.at((0.1, 0.2, 0.3, 0.4))):
        with pytest.raises(ValueError, match="6 tokens cannot be divided among 4 levels"):
            several(logits)
    with pytest.raises(ValueError, match="6 tokens cannot be divided among 4 rows of cuts"):
        bh_route(logits, torch.zeros(4, 64, device=DEVICE))


@pytest.mark.parametrize("exact", [False, True])
def test_compiled_code_takes_a_moved_level_as_it_is(exact):
    rule, logits = BH(0.05), spread_logits(4, 64)
    rule.prepare(64, 0, logits.device)
    holder, counter = SimpleNamespace(rule=rule), CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()

    def route(logits):
        return holder.rule.forms(logits, 0, dtype=torch.float16, exact=exact, fused=True)

    compiled = torch.compile(route, backend=counter, fullgraph=True)
    for alpha in (0.05, 0.3, 0.001):
        holder.rule = rule.at(alpha)
        found, expected = compiled(logits), route(logits)
        assert all(
            torch.equal(one, other) for one, other in zip(found[: 3 + exact], expected[: 3 + exact], strict=True)
        )
    assert counter.frame_count == 1


@pytest.mark.parametrize("level", [0.05, (0.02, 0.3)])
def test_a_threshold_is_the_same_cut_for_every_rank(level):
    logits, rule = spread_logits(TOKENS // 2 * 2, 60), Threshold(level)
    sure = clear_threshold(rule, logits)
    found, expected = rule.fused(logits), rule(logits)
    assert sure.float().mean() > 0.9 and rule.kernel_cuts(60, None, logits.device) is not None
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got[sure], wanted[sure], rtol=1e-5, atol=1e-7)
    moved = rule.at(0.9).fused(logits)
    assert torch.equal(moved.counts, torch.ones_like(moved.counts))  # `min_k`


# norms of outputs, guessed in the launch


def guess(num_experts, near, seed=3):
    """A guess in which every part counts."""
    generator = torch.Generator().manual_seed(seed)
    rows = num_experts if near else 0
    parts = (torch.randn(shape, generator=generator) for shape in (num_experts, num_experts, (rows, num_experts)))
    scales = 0.4, 0.2, 0.1
    return LayerGuess(LayerNorms(*((scale * part).to(DEVICE) for scale, part in zip(scales, parts, strict=True))), near)


def clear_threshold(rule, shown, margin=1e-5):
    probs = shown.float().softmax(-1)
    return ((probs - rule.level_for(probs)).abs() > margin).all(dim=-1)


def check_guess(rule, logits, norms, clear, **options):
    """The same forms as in plain torch wherever neither an order nor a decision is a matter of rounding."""
    options = {"dtype": torch.float32, "exact": True, "norms": norms} | options
    assert rule.kernel_cuts(logits.shape[-1], 0, logits.device) is not None
    found, expected = (rule.forms(logits, 0, fused=fused, **options) for fused in (True, False))
    shown = logits + norms.log_norms(logits)
    gaps = shown.sort(dim=-1).values.diff(dim=-1).amin(dim=-1)
    sure = clear(rule, shown).to(logits.device) & (gaps > 1e-5)
    assert sure.float().mean() > 0.8
    for got, wanted in zip(found, expected, strict=True):
        rtol = 2e-5 if got.dtype != torch.float16 else 1e-3  # the same number may be rounded either way
        torch.testing.assert_close(got[sure], wanted[sure], rtol=rtol, atol=1e-7)
    assert not torch.equal(rule(logits, 0).experts, rule(shown, 0).experts), "the norms change nothing"


@pytest.mark.parametrize(
    ("num_experts", "near", "weighting"),
    [
        (8, 3, "normalized"),
        (60, 16, "softmax_selected"),
        (64, 0, "softmax"),
        (64, 63, "softmax"),
        (100, 5, "softmax"),
        (60, 0, of_top("normalized")),
        (64, 5, of_top("softmax_selected")),
    ],
)
def test_norms_are_guessed_as_in_torch(num_experts, near, weighting):
    logits = spread_logits(TOKENS, num_experts, scale=3, dtype=torch.float16).contiguous()
    norms = guess(num_experts, near)
    check_guess(BH(0.2, max_k=6), logits, norms, clear_cut, weighting=weighting, temperature=1.3)
    check_guess(Threshold(0.05, max_k=6), logits, norms, clear_threshold, weighting=weighting)


@pytest.mark.parametrize("statistic", ["log_prob", "logit", "centered", "standardized"])
def test_every_statistic_is_one_of_weight_times_norm(statistic):
    logits = spread_logits(64, 64)
    values, _ = null_values(logits.cpu(), statistic)
    null = KDENull.fit([values.flatten().numpy()], model_name="noise", num_experts=64, statistic=statistic)
    check_guess(BH(0.5, pvalues=null), logits[:TOKENS], guess(64, 16), clear_cut)


@pytest.mark.parametrize(
    ("near", "own_k", "max_k", "weighting"),
    [(0, 8, 3, "normalized"), (16, 8, 8, "softmax"), (5, 3, 9, "normalized"), (16, 8, 3, of_top("normalized"))],
)
def test_with_norms_what_is_dropped_is_marked_and_what_is_beside_comes_behind(near, own_k, max_k, weighting):
    logits, norms = spread_logits(TOKENS, 64), guess(64, near)
    options = {"own_k": own_k, "weighting": weighting, "dtype": torch.float16}
    check_guess(Threshold(0.03, max_k=max_k), logits, norms, clear_threshold, **options)
    check_guess(BH(0.3, max_k=max_k), logits, norms, clear_cut, **options)
    forms = BH(0.3, min_k=3, max_k=max_k).forms(logits, 0, fused=True, norms=norms, **options)
    assert forms.experts.shape == (TOKENS, own_k + max_k) and (forms.experts[:, :own_k] > 64).any()
    assert own_k > 3 or (forms.experts[:, own_k:] < 64).any()


@pytest.mark.parametrize(("near", "own_k"), [(0, 0), (16, 8)])
def test_norms_of_many_tokens(near, own_k, monkeypatch):
    """A program then takes several."""
    monkeypatch.setattr("bhlib.kernels.routing.ONE_EACH", 2)
    _cut.cache_clear()
    try:
        logits = spread_logits(18, 64)
        assert _cut(18, 64, near > 0)[2] > 1
        check_guess(Threshold((0.02, 0.1)), logits, guess(64, near), clear_threshold, own_k=own_k)
    finally:
        _cut.cache_clear()


def test_no_tokens():
    weights, experts, counts = kernel_route(BH(), spread_logits(0, 64))
    assert weights.shape == experts.shape == (0, 8) and counts.shape == (0,)


# ------------------------------------------------------------------------------------------------- pairs by expert


def routed(num_tokens, slots, num_experts, load="random", seed=1):
    """Indices and weights [tokens, slots]; an empty slot has the index ``num_experts`` or -1."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(num_tokens, num_experts, generator=generator)
    if load == "few":  # most experts get nothing
        order[:, slots + 1 :] = -1
    index = order.argsort(dim=-1, descending=True)[:, :slots]
    counts = torch.randint(0, slots + 1, (num_tokens, 1), generator=generator)
    if load == "one":  # all tokens to one expert
        index, counts = torch.full_like(index, 3), torch.ones_like(counts)
    counts = {"none": counts * 0, "all": counts * 0 + slots}.get(load, counts)
    vacant = torch.arange(slots) >= counts
    index = torch.where(vacant, torch.where(torch.arange(num_tokens)[:, None] % 2 == 0, num_experts, -1), index)
    weights = torch.rand(num_tokens, slots, generator=generator).masked_fill(vacant, 0.0)
    return index.to(DEVICE), weights.to(DEVICE)


LOADS = ["random", "few", "one", "none", "all"]


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "chunk"), [(3, 8, None), (40, 60, 64), (40, 60, 512), (40, 60, 4)]
)
def test_pairs_are_a_stable_sort(load, num_tokens, num_experts, chunk):
    index, _ = routed(num_tokens, 7, num_experts, load)
    tiles = tile_pairs(index, num_experts, 16, chunk)
    flat = index.flatten().cpu()
    filled = (flat >= 0) & (flat < num_experts)
    expected = torch.where(filled, flat, num_experts).argsort(stable=True)[: int(filled.sum())]
    assert tiles.pairs[: len(expected)].tolist() == expected.tolist()
    assert len(tiles.expert) == most_tiles(index.numel(), num_experts, 16)
    assert int(tiles.used) == (tiles.expert < num_experts).sum()
    covered, places = [], []
    for tile, (expert, first, last) in enumerate(zip(*(table.tolist() for table in tiles[2:5]), strict=True)):
        if expert < num_experts:
            assert 0 < last - first <= 16
            assert (flat[expected[first:last]] == expert).all()
            covered += range(first, last)
            places += range(16 * tile, 16 * tile + last - first)
    assert covered == list(range(len(expected)))
    assert tiles.places[expected].tolist() == places


# ------------------------------------------------------------------------------------------------------- experts


def by_expert(hidden, gate_up, down, index, weights):
    """What the forward pass means: one expert after the other, in float32 or wider."""
    hidden, gate_up, down, weights = (tensor.float() for tensor in (hidden, gate_up, down, weights))
    out = torch.zeros_like(hidden)
    for expert in range(len(down)):
        token, slot = torch.nonzero(index == expert, as_tuple=True)
        gate, up = (hidden[token] @ gate_up[expert].T).chunk(2, dim=-1)
        rows = (torch.nn.functional.silu(gate) * up) @ down[expert].T
        out.index_add_(0, token, rows * weights[token, slot, None])
    return out


def tensors(num_tokens, hidden, intermediate, num_experts, dtype):
    generator = torch.Generator(DEVICE).manual_seed(0)
    shapes = (num_tokens, hidden), (num_experts, 2 * intermediate, hidden), (num_experts, hidden, intermediate)
    scales = 1.0, hidden**-0.5, intermediate**-0.5
    draws = [torch.randn(shape, generator=generator, device=DEVICE) for shape in shapes]
    return [(scale * draw).to(dtype) for scale, draw in zip(scales, draws, strict=True)]


def relative_error(got, expected):
    return float((got.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("forward", [vector_forward, grouped_forward])
def test_experts_agree_with_a_loop(forward, load):
    hidden, gate_up, down = tensors(6, 24, 16, 9, DTYPE)
    index, weights = routed(6, 3, 9, load)
    got = forward(hidden, gate_up, down, index, weights)
    assert relative_error(got, by_expert(hidden, gate_up, down, index, weights)) < TOLERANCE


LARGE = PLANS[-1][1]


def large_plan(**changes):
    """The plan for many pairs as it is where something is missing, with small tiles: a program gets several blocks."""
    gate_up, down = (product._replace(columns=16, inner=16, **changes) for product in LARGE[1:])
    return Plan(16, gate_up, down)


@pytest.mark.parametrize("load", ["random", "none"])
@pytest.mark.parametrize(
    "plan",
    [*(plan for _, plan in PLANS), large_plan(), large_plan(persistent=False), large_plan(persistent=False, tma=False)],
    ids=["16 rows", "64 rows", "128 rows", "Hopper", "not persistent", "no copy engine"],
)
def test_every_plan(plan, load):
    hidden, gate_up, down = tensors(40, 72, 24, 5, DTYPE)
    index, weights = routed(40, 3, 5, load)
    got = grouped_forward(hidden, gate_up, down, index, weights, plan)
    assert relative_error(got, by_expert(hidden, gate_up, down, index, weights)) < TOLERANCE


def test_every_launch_is_on_the_device_of_its_tensors(monkeypatch):
    """Triton launches on the current device: with several GPUs, each launch has to stand in `on_device`."""
    inside, launched = [], {}

    @contextmanager
    def on_device(device):
        inside.append(device)
        yield
        inside.pop()

    def launch(kernel, grid, own=KernelInterface.__getitem__):
        launched[kernel.fn.__name__] = list(inside)
        return own(kernel, grid)

    monkeypatch.setattr("bhlib.kernels.forward.on_device", on_device)
    monkeypatch.setattr("bhlib.kernels.routing.on_device", on_device)
    monkeypatch.setattr(KernelInterface, "__getitem__", launch)
    monkeypatch.setattr(QuickKernel, "__getitem__", lambda quick, grid: quick.kernel[grid])
    kernel_route(BH(), spread_logits(3, 64))
    for num_tokens in (1, 40):
        hidden, gate_up, down = tensors(num_tokens, 24, 16, 9, DTYPE)
        module = SimpleNamespace(gate_up_proj=gate_up, down_proj=down)
        for missing in (None, stand_in(24, 2)):
            experts_forward(module, hidden, *routed(num_tokens, 3, 9), missing)
    names = "_route _gate_up_vector _down_vector _count_loads _list_pairs _gate_up _down _add_slots _add_up"
    assert launched == {name: [hidden.device] for name in names.split()}


def stand_in(hidden, rank, num_experts=9):
    """Means and a map, of which nothing is zero but the first row."""
    generator = torch.Generator().manual_seed(0)
    shapes = (num_experts + 1, hidden), (rank, hidden), (rank, hidden)
    means, down, up = (0.3 * torch.randn(*shape, generator=generator) for shape in shapes)
    means[0] = 0
    return LayerCompensation(*(part.to(DEVICE, DTYPE) for part in (means, down, up)))


@pytest.mark.parametrize("rank", [0, 2, 16, 20])
@pytest.mark.parametrize("num_tokens", [1, 7, 70])
def test_what_stands_in_is_added(num_tokens, rank):
    hidden, gate_up, down = tensors(num_tokens, 24, 16, 9, DTYPE)
    module, part = SimpleNamespace(gate_up_proj=gate_up, down_proj=down), stand_in(24, rank)
    index, weights = routed(num_tokens, 3, 9)  # some slots are kept, some empty
    is_dropped = (torch.arange(3, device=DEVICE) > 0) & (index >= 0) & (index < 9)
    is_dropped[-1] &= num_tokens == 1  # of the last of several tokens nothing is dropped
    plain = experts_forward(module, hidden, index.masked_fill(is_dropped, 9), weights)
    index = torch.where(is_dropped, index + 10, index)
    got = experts_forward(module, hidden, index, weights, part)
    wide = LayerCompensation(*(tensor.float() for tensor in part))
    missing = wide.missing(hidden.float(), index, weights.float())
    assert relative_error(got, plain.float() + missing) < TOLERANCE
    assert relative_error(got.float() - plain.float(), missing) < 10 * TOLERANCE
    assert num_tokens == 1 or torch.equal(got[-1], plain[-1])


def test_means_of_many_experts():
    """Of more than are multiplied in one step."""
    hidden, gate_up, down = tensors(40, 24, 16, 70, DTYPE)
    part = stand_in(24, 2, 70)
    index, weights = routed(40, 3, 70)
    index = torch.where((index >= 0) & (index < 70), index + 71, index)
    module = SimpleNamespace(gate_up_proj=gate_up, down_proj=down)
    got = experts_forward(module, hidden, index, weights, part)
    wide = LayerCompensation(*(tensor.float() for tensor in part))
    assert relative_error(got, wide.missing(hidden.float(), index, weights.float())) < TOLERANCE


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="OLMoE's size takes hours in the interpreter: needs a CUDA device")
@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("num_tokens", [1, 8, 200, 2500])
def test_full_size(num_tokens, load):
    """OLMoE's shapes, in which every plan is used as it is meant; twice, for the same bits."""
    hidden, gate_up, down = tensors(num_tokens, 2048, 1024, 64, DTYPE)
    index, weights = routed(num_tokens, 8, 64, load)
    forward = vector_forward if num_tokens == 1 else grouped_forward
    got = forward(hidden, gate_up, down, index, weights)
    assert relative_error(got, by_expert(hidden, gate_up, down, index, weights)) < TOLERANCE
    assert torch.equal(got, forward(hidden, gate_up, down, index, weights))
