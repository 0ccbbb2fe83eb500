"""The experts see the selected pairs and nothing else."""

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
from models import tiny_olmoe, tokens
from rows import count_rows
from torch.autograd import gradcheck
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func

from bhlib import sorted_pairs
from bhlib.expert_loop import is_plain, loop_forward, token_forward
from bhlib.experts import TwinName, kernel_forward, pairwise_forward, twin, twin_by_kernels
from bhlib.kernels import on_device
from bhlib.patching import BHRoutingIntegration, RoutingPatch
from bhlib.rules import BH, TopK
from bhlib.sorted_pairs import Combine, Dispatch, sorted_forward

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")


def dense_by_loop(module, hidden_states, top_k_index, top_k_weights):
    """What the forward pass means: every token's experts one after the other, in float64."""
    hidden, gate_up, down = (x.double() for x in (hidden_states, module.gate_up_proj, module.down_proj))
    out = torch.zeros_like(hidden)
    for token, (experts, weights) in enumerate(zip(top_k_index.tolist(), top_k_weights.double(), strict=True)):
        for expert, weight in zip(experts, weights, strict=True):
            if expert < module.num_experts:
                gate, up = (gate_up[expert] @ hidden[token]).chunk(2)
                out[token] += weight * (down[expert] @ (torch.nn.functional.silu(gate) * up))
    return out


def routing(num_tokens, slots, empty, num_experts=64):
    generator = torch.Generator().manual_seed(1)
    index = torch.stack([torch.randperm(num_experts, generator=generator)[:slots] for _ in range(num_tokens)])
    weights = torch.rand(num_tokens, slots, generator=generator)
    drop = torch.rand(num_tokens, slots, generator=generator) < empty
    return index.masked_fill(drop, num_experts), weights.masked_fill(drop, 0.0)


def forward_by(way, *inputs):
    """By an implementation of transformers on gathered pairs, by the loop, by sorted pairs, or token by token."""
    if way == "tokens":
        module, *inputs = inputs
        tokens = zip(*(tensor.split(1) for tensor in inputs), strict=True)
        return torch.cat([kernel_forward("grouped_mm", module, *token) for token in tokens])
    if way == "sorted":
        return sorted_forward(*inputs)
    return loop_forward(*inputs) if way == "loop" else pairwise_forward(way, *inputs)


@pytest.mark.parametrize("way", (*IMPLEMENTATIONS, "loop", "sorted", "tokens"))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize(("num_tokens", "slots", "empty"), [(40, 8, 0.5), (40, 64, 0.7), (1, 8, 0.5), (5, 8, 1.0)])
def test_agrees_with_a_loop_over_tokens(way, dtype, tolerance, num_tokens, slots, empty):
    module = tiny_olmoe().model.layers[0].mlp.experts.to(dtype)
    torch.nn.init.normal_(module.gate_up_proj, std=0.2)
    torch.nn.init.normal_(module.down_proj, std=0.2)
    hidden = torch.randn(num_tokens, 64).to(dtype)
    index, weights = routing(num_tokens, slots, empty)
    weights = weights.to(dtype)
    got = forward_by(way, module, hidden, index, weights)
    expected = dense_by_loop(module, hidden, index, weights)
    assert got.dtype == dtype
    scale = expected.abs().max().clamp(min=1e-9)
    assert ((got.double() - expected).abs().max() / scale) < tolerance


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_without_empty_slots_the_bits_are_the_models_own(implementation, dtype):
    model = tiny_olmoe().to(dtype)
    model.set_experts_implementation(implementation)
    module = model.model.layers[0].mlp.experts
    hidden = torch.randn(100, 64).to(dtype)
    index, weights = routing(100, 8, 0.0)
    own = module(hidden, index, weights.to(dtype))
    assert torch.equal(pairwise_forward(implementation, module, hidden, index, weights.to(dtype)), own)


@pytest.mark.parametrize("empty", [(), (7,), (0,), (0, 3, 6), (5, 6, 7)])
def test_one_token_whichever_slots_are_empty(empty):
    module = tiny_olmoe().model.layers[0].mlp.experts
    hidden, (index, weights) = torch.randn(1, 64), routing(1, 8, 0.0)
    index[:, empty] = 64  # whose weight is not 0 here: an empty slot that is counted would show
    got = kernel_forward("batched_mm", module, hidden, index, weights)
    torch.testing.assert_close(got.double(), dense_by_loop(module, hidden, index, weights))


@pytest.mark.parametrize("rows", [0, 7, 40])
def test_the_loop_by_parts(rows, monkeypatch):
    """An expert in two parts, or in none, would show."""
    module = tiny_olmoe().model.layers[0].mlp.experts
    hidden, (index, weights) = torch.randn(50, 64), routing(50, 8, 0.5)
    assert (index < 64).sum() > 2 * rows
    monkeypatch.setattr("bhlib.expert_loop.PART_BYTES", rows * 64 * 4)
    torch.testing.assert_close(
        loop_forward(module, hidden, index, weights).double(), dense_by_loop(module, hidden, index, weights)
    )


@pytest.mark.parametrize("way", ("grouped_mm", "loop", "sorted", "tokens"))
def test_gradients_flow_as_without_the_patch(way):
    module = tiny_olmoe().model.layers[0].mlp.experts
    index, weights = routing(20, 8, 0.0)
    grads = []
    for forward in (module, lambda *inputs: forward_by(way, module, *inputs)):
        hidden = torch.randn(20, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        leaf = weights.clone().requires_grad_()
        module.zero_grad()
        forward(hidden, index, leaf).square().sum().backward()
        grads.append((hidden.grad, leaf.grad, module.down_proj.grad.clone()))
    for own, ours in zip(*grads, strict=True):
        torch.testing.assert_close(ours, own)


@pytest.mark.parametrize(
    ("way", "empty"),
    [
        ("loop", 0.6),
        *((way, empty) for way in ("grouped_mm", "batched_mm", "sorted", "tokens") for empty in (0.6, 1.0)),
    ],
)
def test_gradients_are_those_of_a_loop_over_tokens(way, empty):
    """Zero where a slot is empty, and nowhere missing."""
    module = tiny_olmoe().model.layers[0].mlp.experts
    index, weights = routing(20, 8, empty)
    index[-1] = 64  # a token without experts, the last one
    hidden, weights, grads = torch.randn(20, 64).requires_grad_(), weights.requires_grad_(), []
    for forward in (dense_by_loop, lambda *inputs: forward_by(way, *inputs)):
        total = forward(module, hidden, index, weights).square().sum()
        if forward is dense_by_loop:  # which may have computed nothing
            total = total + 0 * sum(one.sum() for one in (hidden, weights, *module.parameters()))
        grads.append(torch.autograd.grad(total, (hidden, weights, *module.parameters())))
    for expected, got in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected)


def test_pairs_are_gathered_and_added_up():
    """Token 2 has no pair, token 1 two, in one order by expert and in another by slot."""
    order = torch.tensor([3, 1, 6, 2])  # of the slots of all tokens, two each
    token, place = order // 2, torch.tensor([[4, 1], [3, 0], [4, 4], [2, 4]])
    hidden, rows = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.equal(Dispatch.apply(hidden, token, place), hidden[token])
    zeros, (a, b, c, d) = torch.zeros(3), rows * weights.flatten()[order, None]
    torch.testing.assert_close(Combine.apply(rows, weights, order, place), torch.stack([b, d + a, zeros, c]))
    assert gradcheck(lambda hidden: Dispatch.apply(hidden, token, place), hidden)
    assert gradcheck(lambda rows, weights: Combine.apply(rows, weights, order, place), (rows, weights))


@pytest.mark.parametrize("way", ("grouped_mm", "loop", "sorted", "tokens"))
def test_the_result_of_a_token_adds_up_in_float32(way):
    """64 experts in bfloat16: one rounding at the end, as in the model, and not one per addition."""
    module = tiny_olmoe().model.layers[0].mlp.experts.to(torch.bfloat16)
    index, weights = routing(50, 64, 0.01)
    hidden = torch.randn(50, 64).to(torch.bfloat16)
    expected = dense_by_loop(module, hidden, index, weights.to(torch.bfloat16))
    got = forward_by(way, module, hidden, index, weights.to(torch.bfloat16))
    error = (got.double() - expected).norm() / expected.norm()
    assert error < 5e-3


def test_the_auxiliary_loss_balances_the_models_own_top_k():
    """transformers computes it from the router's logits, which the patch leaves alone: as `RoutingPatch` says."""
    model = tiny_olmoe()
    ids = torch.randint(2, 100, (2, 9))
    with RoutingPatch(model, TopK(1)):
        out = model(input_ids=ids, output_router_logits=True)
    own_k, selected = (load_balancing_loss_func(out.router_logits, 64, k) for k in (8, 1))
    assert torch.equal(out.aux_loss, own_k) and own_k > 4 * selected


def test_a_kernel_starts_where_its_tensors_are(monkeypatch):
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    assert on_device(torch.device("cuda", 1)).idx == 1
    for device in ("cuda:0", "cpu"):
        assert isinstance(on_device(torch.device(device)), nullcontext), device


@pytest.mark.parametrize(("version", "kind"), [("2.11.0", str), ("2.12.1+cpu", str), ("2.13.0+cpu", TwinName)])
def test_twin_names(version, kind, monkeypatch):
    monkeypatch.setattr("torch.__version__", version)
    assert twin("grouped_mm") == "bh_grouped_mm" and twin(None) == "bh_eager"
    assert type(twin("grouped_mm")) is type(twin(None)) is kind, "what torch.compile of this version can trace"
    for name in (None, "grouped_mm"):
        assert twin_by_kernels(twin(name)) == twin(name, by_kernels=True)
    with pytest.raises(ValueError, match="'bh_eager' is a twin already"):
        twin("bh_eager")


@pytest.mark.parametrize("original", [None, "grouped_mm"])
def test_who_copies_a_twins_name_gets_the_original(original):
    name = TwinName(original)
    copies = copy.copy(name), copy.deepcopy(name), pickle.loads(pickle.dumps(name))
    assert copies == (original,) * 3 and not any(isinstance(one, TwinName) for one in copies)


@pytest.mark.parametrize("num_tokens", [1, 50])
@pytest.mark.parametrize("by_kernels", [False, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_multiplied_are_the_pairs(implementation, by_kernels, num_tokens):
    """Counted at the matrix products themselves, not in our own bookkeeping."""
    index, weights = routing(num_tokens, 8, 0.6)
    pairs = int((index < 64).sum())
    module = tiny_olmoe().model.layers[0].mlp.experts
    module.config._experts_implementation = twin(implementation, by_kernels)
    with count_rows(module) as counter:
        module(torch.randn(num_tokens, 64), index, weights)
    assert 0 < pairs < index.numel() and counter.rows == {"gate_up_proj": pairs, "down_proj": pairs}


# -- who computes ------------------------------------------------------------------------------------------------------


def test_sorted_pairs_compute_what_is_trained_on_a_cuda_device(monkeypatch):
    """And nothing else: no implementation but grouped_mm, no pass of a model that is not trained."""
    calls = []
    monkeypatch.setattr(
        "bhlib.sorted_pairs.sorted_forward", lambda *inputs: calls.append(len(inputs[1])) or sorted_forward(*inputs)
    )

    def run(rule=None, implementation="grouped_mm", dtype=torch.float32, frozen=False, training=False, **options):
        calls.clear()
        model = tiny_olmoe(num_hidden_layers=1).to(dtype).requires_grad_(not frozen).train(training)
        model.set_experts_implementation(implementation)
        with RoutingPatch(model, rule or BH(0.01), **options):
            model(input_ids=tokens(2, 9))
        return [*calls]

    assert run() == []  # on a CPU
    monkeypatch.setattr("bhlib.sorted_pairs.DEVICES", ("cpu",))
    assert run() == run(dtype=torch.bfloat16) == run(dtype=torch.float16) == run(TopK(4)) == [18]
    assert run(implementation="eager") == run(implementation="batched_mm") == run(frozen=True) == []
    assert run(kernels=False) == run(TopK(8)) == run(mode="analyze") == []
    with torch.no_grad():
        assert run() == [] and run(training=True) == [18]  # a pass that is repeated with gradients


def test_sorted_pairs_heed_autocast_as_grouped_mm_does(monkeypatch):
    monkeypatch.setattr("bhlib.sorted_pairs.DEVICES", ("cpu",))
    module = tiny_olmoe().model.layers[0].mlp.experts
    hidden, (index, weights) = torch.randn(40, 64), routing(40, 8, 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        got = kernel_forward("grouped_mm", module, hidden, index, weights)
        own = pairwise_forward("grouped_mm", module, hidden, index, weights)
    assert torch.equal(got, sorted_forward(module, hidden, index, weights)) and got.dtype == own.dtype
    torch.testing.assert_close(got, own)


def test_a_module_of_mixed_precision_is_left_to_the_model(monkeypatch):
    monkeypatch.setattr("bhlib.sorted_pairs.DEVICES", ("cpu",))
    module, weights = tiny_olmoe().model.layers[0].mlp.experts, torch.rand(3, 8)
    for dtype, fits in ((torch.float32, True), (torch.bfloat16, False)):
        assert sorted_pairs.inputs_fit("grouped_mm", module, torch.randn(3, 64, dtype=dtype), weights) == fits
    assert not sorted_pairs.inputs_fit("grouped_mm", module.double(), torch.randn(3, 64).double(), weights)


def test_the_loops_compute_plain_experts_with_an_empty_slot(monkeypatch):
    calls = []
    for forward in (loop_forward, token_forward):
        name = forward.__name__
        spy = lambda *inputs, own=forward, name=name: calls.append(name) or own(*inputs)  # noqa: E731
        monkeypatch.setattr(f"bhlib.experts.{name}", spy)
    model = tiny_olmoe(num_hidden_layers=1)
    for length, way in ((9, "loop_forward"), (1, "token_forward")):
        for rule, options, expected in (
            (BH(0.01), {}, [way]),
            (BH(0.01), {"kernels": False}, []),
            (BH(0.01, min_k=8), {}, []),
            (TopK(4), {}, []),  # no slot is empty: the bits are the model's own
        ):
            calls.clear()
            with RoutingPatch(model, rule, **options):
                model(input_ids=torch.randint(2, 100, (1, length)))
            assert calls == expected, (length, rule)
    model.config._experts_implementation = "one of the user's own"
    assert not RoutingPatch(model, BH(0.01)).kernels


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_autocast_means_the_same_for_one_token_and_for_many(implementation):
    """transformers' grouped_mm ignores autocast and its two others obey it; the loop would obey it always."""
    module = tiny_olmoe().model.layers[0].mlp.experts
    hidden, (index, weights) = torch.randn(40, 64), routing(40, 8, 0.5)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        tokens = zip(hidden.split(1), index.split(1), weights.split(1), strict=True)
        few = torch.cat([kernel_forward(implementation, module, *token) for token in tokens])
        many = kernel_forward(implementation, module, hidden, index, weights)
        own = module(hidden, index.clamp(max=63), weights)  # by the default implementation, for its dtype
    assert few.dtype == many.dtype == own.dtype == torch.float32
    torch.testing.assert_close(many, few, rtol=1e-5, atol=1e-7)
    expected = dense_by_loop(module, hidden, index, weights).detach()
    error = float((few.double() - expected).norm() / expected.norm())
    assert (error < 1e-6) == (implementation == "grouped_mm"), error


def test_what_is_not_plain_is_left_to_the_model():
    class Shard(torch.nn.Parameter):
        pass

    module = tiny_olmoe().model.layers[0].mlp.experts
    assert is_plain(module)
    module.has_bias = True
    assert not is_plain(module)
    module.has_bias, module.gate_up_proj = False, Shard(module.gate_up_proj.detach())
    assert not is_plain(module)


def test_sonicmoe_gets_the_routing_as_it_is():
    """It leaves out empty slots by itself: nothing is gathered, and nothing waits for the device to count them."""
    model, seen = tiny_olmoe(), []

    def sonicmoe(module, hidden_states, top_k_index, top_k_weights):
        seen.append((hidden_states.shape[0], top_k_index, top_k_weights, module.num_experts))
        return loop_forward(module, hidden_states, top_k_index, top_k_weights)

    ids = tokens(2, 9)
    with BHRoutingIntegration(model, alpha=0.05, kernels=False):
        expected = model(input_ids=ids).logits
    if "sonicmoe" not in ALL_EXPERTS_FUNCTIONS:
        pytest.skip("this transformers has no sonicmoe")
    own = ALL_EXPERTS_FUNCTIONS["sonicmoe"]
    ALL_EXPERTS_FUNCTIONS["sonicmoe"] = sonicmoe
    try:
        model.set_experts_implementation("sonicmoe")
        with BHRoutingIntegration(model, alpha=0.05):
            got = model(input_ids=ids).logits
    finally:
        ALL_EXPERTS_FUNCTIONS["sonicmoe"] = own
    torch.testing.assert_close(got, expected)
    for num_tokens, index, weights, num_experts in seen:
        assert num_tokens == len(index) == 18 and index.shape[1] > 1
        assert (index == num_experts).any() and not weights[index == num_experts].any()
