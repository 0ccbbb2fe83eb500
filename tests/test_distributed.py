"""Models that are trained or served by several processes: patched, or refused by name.

One process stands for all: a group of its own, or torch's fake group, which spreads weights and communicates nothing.
"""

import inspect

import pytest
import torch
import torch.distributed as dist
from models import tiny_olmoe, tokens
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import OlmoeForCausalLM
from transformers.distributed import DistributedConfig

from bhlib import BHRoutingIntegration, RoutingPatch
from bhlib.rules import PrefixRule


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


def test_expert_parallelism_is_refused_by_name(first_of_two, tmp_path):
    tiny_olmoe().save_pretrained(tmp_path)
    known = inspect.signature(DistributedConfig).parameters
    wanted = {"ep_size": 2} if "ep_size" in known else {"enable_expert_parallel": True}
    model = OlmoeForCausalLM.from_pretrained(tmp_path, distributed_config=DistributedConfig(tp_size=2, **wanted))
    with pytest.raises(ValueError, match=r"expert parallelism \(EP\): .*the 32 experts of one process, and the gate"):
        BHRoutingIntegration(model)
