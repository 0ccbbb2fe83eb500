"""The memory of the process over long runs: what is recorded is bounded, and what is dropped is freed.

`SOAK_TOKENS=20000 python -m pytest tests/test_soak.py -s` runs it at full length and prints all that was measured.
"""

import ctypes
import gc
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import psutil
import pytest
import torch
from models import tiny_olmoe, tokens

from bhlib import BHRoutingIntegration, load_demo

pytestmark = pytest.mark.timing

TOKENS = int(os.environ.get("SOAK_TOKENS", 6000))
BATCH, NEW_TOKENS = 20, 50
LIBC = ctypes.CDLL(None) if os.name == "posix" else None


def memory() -> int:
    """Resident bytes of this process, without what is free but was not given back to the system yet."""
    gc.collect()
    if hasattr(LIBC, "malloc_trim"):  # glibc's
        LIBC.malloc_trim(0)
    return psutil.Process().memory_info().rss


def alone(function, *arguments):
    """Call in a process of its own: memory that other tests have freed would hide what this one takes."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def generate_in_rounds(num_rounds: int) -> tuple[list[int], int, int]:
    """Memory after each round of 1,000 tokens under the default patch, tokens counted, bytes of rows."""
    model, _ = load_demo()
    prompts = torch.randint(2, 4000, (BATCH, 2), generator=torch.Generator().manual_seed(0))
    measured = []
    with BHRoutingIntegration(model) as bh:
        for _ in range(num_rounds):
            model.generate(
                prompts, attention_mask=torch.ones_like(prompts), do_sample=True,
                min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS,
            )  # fmt: skip
            measured.append(memory())
    return measured, bh.get_routing_stats()["total_tokens"], bh.records.nbytes


def test_memory_is_flat_while_generating():
    num_rounds = TOKENS // (BATCH * NEW_TOKENS)
    measured, counted, rows = alone(generate_in_rounds, num_rounds)
    print(f"\nMB after each 1,000 tokens: {[round(one / 1e6, 1) for one in measured]}; {rows / 1e6:.1f} MB of rows")
    assert counted == num_rounds * BATCH * (NEW_TOKENS + 1) and rows < 409 * 10_100
    # Each round is the same work, but the allocator's own moves are some megabytes, without a patch too.
    assert max(measured[2:]) - measured[1] < 8e6


def generate_one_by_one(num_tokens: int) -> tuple[float, int]:
    """Bytes that the process grows by for each token when all rows are kept, on 16 layers; bytes stated."""
    model = tiny_olmoe(num_hidden_layers=16, hidden_size=32, intermediate_size=16)
    for bound in (0, 0, None):  # twice to warm up
        with BHRoutingIntegration(model, max_recorded_tokens=bound) as bh:
            before = memory()
            model.generate(tokens(1, 3), max_new_tokens=num_tokens, do_sample=False)
            grown = memory() - before
    return grown / len(bh.records.counts()), bh.records.bytes_per_token(8)


def test_a_token_at_a_time_costs_what_is_stated():
    grown, stated = alone(generate_one_by_one, TOKENS // 40)
    print(f"\nthe process grew by {grown:.0f} bytes a token, {stated} stated")
    assert grown < stated + 6000  # the allocator again; three tensors per layer would cost 65,000


def drop_patched_models() -> tuple[list[int], int]:
    """Memory after each of 20 models was patched, run and dropped; bytes of a model."""
    measured = []
    for _ in range(20):
        model = tiny_olmoe(intermediate_size=128)
        BHRoutingIntegration(model).patch_model()
        with torch.no_grad():
            model(input_ids=tokens(2, 9))
        size = sum(parameter.nbytes for parameter in model.parameters())
        del model
        measured.append(memory())
    return measured, size


def test_models_dropped_while_patched_are_freed():
    measured, size = alone(drop_patched_models)
    print(f"\nmodels of {size / 1e6:.0f} MB; MB after each: {[round(one / 1e6) for one in measured]}")
    assert max(measured) - measured[1] < size
