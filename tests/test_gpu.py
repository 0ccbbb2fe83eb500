"""On a CUDA device, with OLMoE at its full size and random weights: loads, patches, skips, generates, restores.

    python -m pytest tests/test_gpu.py -m gpu -s      # prints rows, seconds and memory

The router's weights are spread so that its logits have a standard deviation of about 1.8, like a trained router's.
"""

import statistics
from functools import partial

import pytest
import torch
from rows import count_rows
from transformers import OlmoeConfig, OlmoeForCausalLM
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

from bhlib import BHRoutingIntegration, RoutingPatch, find_moe_layers
from bhlib.expert_loop import loop_forward
from bhlib.experts import kernel_forward
from bhlib.rules import BH, TopK
from bhlib.sorted_pairs import sorted_forward
from bhlib.speed.layer import random_routing

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device with 40 GB of memory"),
]

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")


def full_size():
    """OLMoE-1B-7B's shapes, bfloat16, random weights, made on the device."""
    config = OlmoeConfig(bos_token_id=None, eos_token_id=None, pad_token_id=1)
    assert (config.hidden_size, config.num_hidden_layers, config.num_experts) == (2048, 16, 64)
    config.intermediate_size = 1024
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = OlmoeForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.mlp.gate.weight, std=0.04)
    return model


@pytest.fixture(scope="module")
def model():
    model = full_size()
    yield model
    del model
    torch.cuda.empty_cache()


def random_ids(*shape):
    return torch.randint(2, 50_000, shape, generator=torch.Generator().manual_seed(1)).cuda()


@torch.no_grad()
def logits_of(model, ids):
    return model(input_ids=ids, use_cache=False).logits


def test_it_is_olmoe_in_size(model):
    assert 6.8e9 < model.num_parameters() < 7.0e9
    assert len(find_moe_layers(model)) == 16


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_parity_and_restore(model, implementation):
    model.set_experts_implementation(implementation)
    ids = random_ids(1, 64) if implementation == "batched_mm" else random_ids(2, 512)
    before = logits_of(model, ids)
    again = logits_of(model, ids)
    with RoutingPatch(model, TopK(8)):
        during = logits_of(model, ids)
    with BHRoutingIntegration(model, alpha=0.3) as bh:
        routed = logits_of(model, ids)
    after = logits_of(model, ids)
    print(f"\n{implementation}: run to run {(again - before).abs().max().item()}, "
          f"patched with top-8 {(during - before).abs().max().item()}, restored {(after - before).abs().max().item()}, "
          f"{bh.get_routing_stats()}")  # fmt: skip
    assert torch.equal(before, again), "the unpatched model itself is not deterministic"
    assert torch.equal(before, during) and torch.equal(before, after) and not torch.equal(before, routed)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_in_prefill_and_decoding(model, implementation):
    model.set_experts_implementation(implementation)
    experts = [layer.experts for layer in find_moe_layers(model)]
    with BHRoutingIntegration(model, alpha=0.3, kernels=False) as bh, count_rows(*experts) as counter:
        model.generate(random_ids(2, 32), max_new_tokens=8, do_sample=False)
    frame = bh.records.to_frame()
    selected, slots = int(frame["count"].sum()), 8 * len(frame)
    print(f"\n{implementation}: {counter.rows} rows, {selected} selected, {slots} slots, "
          f"{frame['generated'].sum() // 16} decoded tokens")  # fmt: skip
    assert counter.rows == {"gate_up_proj": selected, "down_proj": selected}
    assert selected < slots


def test_memory_and_time(model):
    """Reports; asserts only that memory is given back and that the patch needs no more than the model alone."""
    model.set_experts_implementation("grouped_mm")
    ids = random_ids(4, 1024)

    def run():
        torch.cuda.reset_peak_memory_stats()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        model.model(input_ids=ids, use_cache=False)
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end), torch.cuda.max_memory_allocated()

    with torch.no_grad():
        run()
        held = torch.cuda.memory_allocated()
        plain, patched = [], []
        for _ in range(7):
            plain.append(run())
            with BHRoutingIntegration(model, alpha=0.3, collect_stats=False):
                run()  # critical values are computed in the first pass
                patched.append(run())
        with BHRoutingIntegration(model, alpha=0.3) as bh:
            model.model(input_ids=ids, use_cache=False)
        mean_k = bh.get_routing_stats()["mean_experts_per_token"]
        del bh
    ratio = statistics.median(t for t, _ in patched) / statistics.median(t for t, _ in plain)
    peaks = max(m for _, m in patched) / max(m for _, m in plain)
    print(f"\nprefill 4 x 1,024 at mean k {mean_k:.2f}: time {ratio:.2f} of unpatched, peak memory {peaks:.3f}; "
          f"held before {held / 2**30:.2f} GiB, after {torch.cuda.memory_allocated() / 2**30:.2f} GiB")  # fmt: skip
    assert torch.cuda.memory_allocated() <= held + 2**20
    assert peaks < 1.05


two_devices = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@two_devices
@pytest.mark.parametrize("num_tokens", [1, 100])
def test_kernels_on_another_device_than_the_current_one(num_tokens):
    """Same bits as on the current one, in the stream of their tensors, and the current device stays what it was."""
    from bhlib.kernels.forward import experts_forward

    results = []
    for device in ("cuda:0", "cuda:1"):
        module = full_size_experts(device)
        hidden = torch.randn(num_tokens, 2048, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
        logits = 1.8 * torch.randn(num_tokens, 64, generator=torch.Generator().manual_seed(1)).to(device)
        rule = BH(0.3, max_k=4)
        assert rule.kernel_cuts(64, None, logits.device) is not None, "the routing kernel would not run"
        torch.cuda.synchronize(device)  # what was made in the default stream
        with torch.cuda.stream(torch.cuda.Stream(device)), torch.cuda.device(0), torch.no_grad():
            weights, experts, counts = rule.fused(logits)
            out = experts_forward(module, hidden, experts, weights.to(torch.bfloat16))
            assert torch.cuda.current_device() == 0 and out.device == torch.device(device)
        torch.cuda.synchronize(device)
        results.append([tensor.cpu() for tensor in (weights, experts, counts, out)])
    for here, there in zip(*results, strict=True):
        assert torch.equal(here, there)
    assert results[0][-1].float().abs().sum() > 0


def full_size_experts(device):
    """The experts of one layer of OLMoE-1B-7B, the same on every device."""
    config = OlmoeConfig(hidden_size=2048, intermediate_size=1024, num_experts=64)
    module = OlmoeExperts(config).requires_grad_(False)
    for seed, matrices in enumerate(module.parameters()):
        torch.nn.init.normal_(matrices, std=0.02, generator=torch.Generator().manual_seed(seed))
    return module.to(device, torch.bfloat16)


@pytest.mark.parametrize("num_tokens", [3, 512])
def test_experts_in_training(num_tokens):
    """By sorted pairs: the gradients of float32, up to the rounding of bfloat16, and the same bits again."""
    module, exact = (full_size_experts("cuda").to(dtype).requires_grad_() for dtype in (torch.bfloat16, torch.float32))
    index, weights = random_routing(num_tokens, 4.0)
    hidden, found = torch.randn(num_tokens, 2048, device="cuda", dtype=torch.bfloat16), []
    grouped = partial(kernel_forward, "grouped_mm")
    for run, forward in ((module, grouped), (module, sorted_forward), (exact, grouped), (exact, loop_forward)):
        wanted = [one.to(run.down_proj.dtype).requires_grad_() for one in (hidden, weights)]
        output = forward(run, wanted[0], index, wanted[1])
        found.append((output, *torch.autograd.grad(output.float().square().mean(), (*wanted, *run.parameters()))))
    unused = torch.ones(64, dtype=torch.bool, device="cuda").index_fill(0, index[index < 64], False)
    assert unused.any() == (num_tokens == 3)
    for got, again, wide, expected in zip(*found, strict=True):
        assert torch.equal(got, again)
        assert (got - expected).norm() < 0.02 * expected.norm()
        torch.testing.assert_close(wide, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
        assert len(got) != 64 or not got[unused].any()


@two_devices
def test_two_gpus(model):
    """Layers on two devices under accelerate's hooks: same result as on one, exact counts, restored."""
    from accelerate import dispatch_model, infer_auto_device_map

    ids = random_ids(2, 64)
    model.set_experts_implementation("grouped_mm")
    with BHRoutingIntegration(model, alpha=0.3) as bh:
        assert bh.kernels, "the kernels would not run"
        expected, counts = logits_of(model, ids), bh.records.counts()
        one_token = logits_of(model, ids[:1, :1])
    spread = full_size()
    spread.load_state_dict(model.state_dict())
    device_map = infer_auto_device_map(
        spread, max_memory={0: "8GiB", 1: "40GiB"}, no_split_module_classes=["OlmoeDecoderLayer"]
    )
    spread = dispatch_model(spread, device_map)
    assert {p.device.index for p in spread.parameters()} == {0, 1}
    plain = logits_of(spread, ids)
    with BHRoutingIntegration(spread, alpha=0.3) as bh:
        got = logits_of(spread, ids)
        assert bh.kernels and (bh.records.counts() == counts).all()
        assert torch.equal(logits_of(spread, ids[:1, :1]).cpu(), one_token.cpu())
        spread.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(got.cpu(), expected.cpu())
    assert torch.equal(logits_of(spread, ids), plain)
