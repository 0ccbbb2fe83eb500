"""Models that are trained or served by several processes: patched, or refused by name.

Two processes on the CPU show that they route as one does. Elsewhere one process stands for all: a group of its own, or
torch's fake group, which spreads weights and communicates nothing.
"""

import inspect
import os

import pytest
import torch
import torch.distributed as dist
from models import tiny_olmoe, tokens
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import OlmoeForCausalLM
from transformers.distributed import DistributedConfig

from bhlib import BHRoutingIntegration, RoutingPatch
from bhlib.rules import BH, PrefixRule, TopK

KNOWN = inspect.signature(DistributedConfig).parameters

#: Ways to spread a model over two processes: every matrix over both, or half of the experts to each and the rest so.
WAYS = {
    "tensor parallel": {"tp_size": 2},
    "expert parallel": {"tp_size": 2, "ep_size": 2, "ep_implementation": "all_reduce"},
}


@pytest.fixture
def alone(tmp_path):
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def first_of_two(monkeypatch):
    """This process as the first of two, of which the second is not there."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


class Nothing(PrefixRule):
    """No expert for any token."""

    def count(self, top, scores, layer):
        return top.new_zeros(len(top), dtype=torch.int64)


@pytest.mark.parametrize("implementation", ("eager", "grouped_mm", "batched_mm"))
def test_where_nothing_is_selected_gradients_are_zero_and_not_missing(implementation, alone):
    """DistributedDataParallel waits for a gradient of every parameter, and refuses the pass after one without."""
    model = tiny_olmoe()
    model.set_experts_implementation(implementation)
    ids = tokens(1, 9)
    with RoutingPatch(model, Nothing(min_k=0)) as patch:
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        for _ in range(2):
            parallel(input_ids=ids, labels=ids).loss.backward()
    for layer in patch.layers:
        for module in (layer.router, layer.experts):
            assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in module.parameters())


def shard(model):
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def test_fully_shard_comes_after_patching(alone):
    ids = tokens(2, 9)
    model = tiny_olmoe()
    own = model(input_ids=ids).logits
    with BHRoutingIntegration(model, alpha=0.2) as bh:
        expected, counts = model(input_ids=ids).logits, bh.records.counts()
        bh.reset_stats()
        shard(model)
        got = model(input_ids=ids).logits
        got.sum().backward()
        assert (bh.records.counts() == counts).all()
        assert all(parameter.grad is not None for parameter in model.parameters())
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(model(input_ids=ids).logits, own)
    with pytest.raises(ValueError, match=r"'model.layers.0.mlp.gate' .*\(a DTensor, .*patch it first, then call fully"):
        BHRoutingIntegration(model)


def test_other_expert_parallelism_is_refused_by_name(first_of_two, tmp_path):
    """By default transformers may look up which process has the expert of each slot, and an empty slot has none."""
    tiny_olmoe().save_pretrained(tmp_path)
    wanted = {"ep_size": 2} if "ep_size" in KNOWN else {"enable_expert_parallel": True}
    model = OlmoeForCausalLM.from_pretrained(tmp_path, distributed_config=DistributedConfig(tp_size=2, **wanted))
    refusal = (
        r"expert parallelism \(EP\): 'model.layers.0.mlp.experts' holds the 32 experts of one process, the gate beside "
        r"it .* ep_implementation=('auto'|None) may look up whose .* ep_implementation='all_reduce'\)"
    )
    with pytest.raises(ValueError, match=refusal):
        BHRoutingIntegration(model)


def run(model, rule, ids):
    """Logits and experts per token under a rule, and the gradients of the loss, whole."""
    model.zero_grad()
    with RoutingPatch(model, rule) as patch:
        output = model(input_ids=ids, labels=ids)
        output.loss.backward()
        counts = patch.records.counts()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    whole = {name: getattr(grad, "full_tensor", lambda grad=grad: grad)() for name, grad in gradients.items()}
    return output.logits.detach(), counts, whole


def assert_alike(got, expected, what):
    (logits, counts, gradients), (expected_logits, expected_counts, expected_gradients) = got, expected
    assert (counts == expected_counts).all(), what
    close = {"rtol": 1e-4, "atol": 1e-5, "msg": lambda text: f"{what}: {text}"}
    torch.testing.assert_close(logits, expected_logits, **close)
    torch.testing.assert_close(gradients, expected_gradients, **close)


def route_as_one_process(folder, way):
    """In one of two processes: what `way` spreads is routed and trained as the whole model is."""
    rules = {"BH": BH(0.2), "none for some": BH(0.001, min_k=0), "one": TopK(1), "own": TopK(8)}
    ids = tokens(2, 9)
    for implementation in ("eager", "grouped_mm", "batched_mm"):
        whole = tiny_olmoe()
        whole.set_experts_implementation(implementation)
        model = OlmoeForCausalLM.from_pretrained(
            folder, distributed_config=DistributedConfig(**WAYS[way]), experts_implementation=implementation
        )
        with torch.no_grad():
            before = model(input_ids=ids).logits
        for name, rule in rules.items():
            assert_alike(run(model, rule, ids), run(whole, rule, ids), f"{way}, {implementation}, {name}")
        with torch.no_grad():
            assert torch.equal(model(input_ids=ids).logits, before), (way, implementation)
        with BHRoutingIntegration(model, alpha=0.2), BHRoutingIntegration(whole, alpha=0.2):
            options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
            assert torch.equal(*(one.generate(ids[:1, :4], **options) for one in (model, whole)))


def train_as_one_process(rank):
    """In one of two processes, with text of its own: `fully_shard` after patching gives the mean of the gradients."""
    model, whole, rule = tiny_olmoe(), tiny_olmoe(), BH(0.2)
    texts = [tokens(2, 9, seed=seed) for seed in range(2)]
    logits, counts, gradients = run(whole, rule, texts[rank])
    other = run(whole, rule, texts[1 - rank])[2]
    mean = {name: (gradients[name] + other[name]) / 2 for name in gradients}
    with RoutingPatch(model, rule) as patch:
        shard(model)
        output = model(input_ids=texts[rank], labels=texts[rank])
        output.loss.backward()
        got = {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}
        assert_alike((output.logits.detach(), patch.records.counts(), got), (logits, counts, mean), "fully_shard")


def work(rank, folder):
    """What one of the two processes does."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    for way in WAYS:
        route_as_one_process(folder, way)
    train_as_one_process(rank)
    dist.destroy_process_group()


@pytest.mark.skipif("ep_implementation" not in KNOWN, reason="this transformers cannot choose how tokens reach experts")
def test_two_processes_work_as_one(tmp_path, monkeypatch):
    """All in one test, since it takes most of its time to start the processes."""
    for name, value in {"WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}.items():
        monkeypatch.setenv(name, value)
    tiny_olmoe().save_pretrained(tmp_path)
    torch.multiprocessing.spawn(work, (tmp_path,), nprocs=2)
