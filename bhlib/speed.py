"""How fast a patched OLMoE is on a GPU, beside the unpatched one and beside what the hardware allows.

    python -m bhlib.speed --folder results            # everything
    python -m bhlib.speed --only block --quick

Everything that is compared runs in one process, in turns, round after round, so that a clock that drifts or a busy
host hits all alike; a row gives the median of the rounds and their quartiles. (The stage ``generate`` takes no turns:
a patch that comes or goes makes compiled code forget itself.) Beside each time stands the floor: the
bytes that must be read and written over the bandwidth of a large copy, or the operations over the rate of a large
bfloat16 product, whichever takes longer, both measured in the same process.
"""

import argparse
import json
import subprocess
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

from bhlib.kernels.forward import experts_forward
from bhlib.kernels.routing import bh_route, cut_table
from bhlib.patching import RoutingPatch, find_moe_layers
from bhlib.rules import BH

STAGES = ("router", "block", "prefill", "decode", "generate")
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
MEAN_K = (8, 6, 4, 3, 2)
ROUTER_STD = 1.8  # of a token's logits, as in a trained router: OLMoE's hidden size times a weight of 0.04


# ------------------------------------------------------------------------------------------------------ measuring


def captured(*calls: Callable) -> Callable:
    """A function that replays all calls from one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]

    def replay():
        graph.replay()
        return kept

    return replay


def measure(
    calls: dict[object, Callable],
    rounds: int = 15,
    least: float = 2e-3,
    contexts: dict[object, Callable[[], AbstractContextManager]] | None = None,
) -> dict[object, np.ndarray]:
    """Seconds per call, [rounds], of each of several functions, in turns.

    Parameters
    ----------
    calls : dict of functions without arguments
    rounds : int
    least : float
        Seconds that one measurement should last: short calls are repeated within it.
    contexts : dict of functions that make a context, optional
        By the keys of `calls`: what a call runs in. To enter it is not measured.
    """
    contexts = contexts or {}
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def seconds(name, repeats):
        with contexts.get(name, nullcontext)():
            start.record()
            for _ in range(repeats):
                calls[name]()
            end.record()
            end.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats

    repeats = {}
    for name in calls:
        seconds(name, 2)
        repeats[name] = max(1, min(500, round(least / max(seconds(name, 1), 1e-6))))
        repeats[name] = max(1, min(500, round(least / max(seconds(name, repeats[name]), 1e-6))))
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name in calls:
            times[name].append(seconds(name, repeats[name]))
    return {name: np.array(values) for name, values in times.items()}


def ceilings() -> dict[str, float]:
    """Bytes per second of a large copy (read and written), operations per second of a large bfloat16 product."""
    source = torch.empty(2**30, dtype=torch.bfloat16, device="cuda").normal_()
    target = torch.empty_like(source)
    left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = torch.empty_like(left)
    times = measure({"copy": lambda: target.copy_(source), "product": lambda: torch.mm(left, right, out=product)})
    return {
        "bytes_per_second": 2 * source.nbytes / float(np.median(times["copy"])),
        "operations_per_second": 2 * 8192**3 / float(np.median(times["product"])),
    }


def describe_machine() -> dict[str, str]:
    """The GPU, its driver and clocks, and versions."""
    fields = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit"
    try:
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
        found = dict(zip(fields.split(","), map(str.strip, answer.split(",")), strict=True))
    except (OSError, subprocess.CalledProcessError):
        found = {"name": torch.cuda.get_device_name()}
    import triton

    return found | {"torch": torch.__version__, "triton": triton.__version__, "transformers": transformers.__version__}


def row(
    stage: str, mode: str, tokens: int, name: str, mean_k: float, times: np.ndarray, floor: float, **more: float
) -> dict:
    """One line of the table; times in microseconds."""
    low, middle, high = 1e6 * np.quantile(times, [0.25, 0.5, 0.75])
    return {
        "stage": stage,
        "mode": mode,
        "tokens": tokens,
        "name": name,
        "mean_k": mean_k,
        "median_us": middle,
        "q1_us": low,
        "q3_us": high,
        "floor_us": 1e6 * floor,
    } | more


# ------------------------------------------------------------------------------------------------------- the stages


def exact_counts(num_tokens: int, mean_k: float, max_k: int, seed: int = 0) -> Tensor:
    """Random numbers of experts [tokens], 1 to max_k, with a sum of exactly ``round(mean_k * num_tokens)``."""
    generator = np.random.default_rng(seed)
    counts = np.clip(np.rint(generator.normal(mean_k, 1.5, num_tokens)), 1, max_k).astype(np.int64)
    excess = int(counts.sum()) - round(mean_k * num_tokens)
    while excess:
        movable = np.flatnonzero(counts > 1) if excess > 0 else np.flatnonzero(counts < max_k)
        if not len(movable):
            raise ValueError(f"mean_k must lie between 1 and max_k={max_k}, got {mean_k}.")
        moved = generator.permutation(movable)[: abs(excess)]
        counts[moved] -= np.sign(excess)
        excess = int(counts.sum()) - round(mean_k * num_tokens)
    return torch.from_numpy(counts)


def random_routing(num_tokens: int, mean_k: float, slots: int = 8, num_experts: int = 64, seed: int = 0):
    """Indices [tokens, slots] (`num_experts` if empty) and bfloat16 weights, from logits spread as a router's."""
    generator = torch.Generator().manual_seed(seed)
    probabilities = torch.softmax(ROUTER_STD * torch.randn(num_tokens, num_experts, generator=generator), dim=-1)
    weights, index = probabilities.topk(slots, dim=-1)
    empty = torch.arange(slots) >= exact_counts(num_tokens, mean_k, slots, seed)[:, None]
    return index.masked_fill(empty, num_experts).cuda(), weights.masked_fill(empty, 0.0).to("cuda", torch.bfloat16)


def full_size_experts(seed: int = 0) -> OlmoeExperts:
    """The experts of one layer of OLMoE-1B-7B, bfloat16, random."""
    config = OlmoeConfig(hidden_size=2048, intermediate_size=1024, num_experts=64, num_experts_per_tok=8)
    torch.manual_seed(seed)
    with torch.device("cuda"):
        module = OlmoeExperts(config).to(torch.bfloat16).requires_grad_(False)
    for matrices in module.parameters():
        nn.init.normal_(matrices, std=0.02)
    return module.eval()


def block_floor(index: Tensor, num_experts: int, hidden: int, intermediate: int, limits: dict[str, float]) -> float:
    """Seconds below which the experts of one layer cannot go: weights of the experts in use, hidden in and out."""
    filled = index[index < num_experts]
    moved = 2 * (3 * hidden * intermediate * len(filled.unique()) + 2 * hidden * len(index))
    operations = 6 * hidden * intermediate * len(filled)
    return max(moved / limits["bytes_per_second"], operations / limits["operations_per_second"])


def bench_router(
    limits: dict[str, float], quick: bool = False, name: str | None = None, num_experts: int = 64, max_k: int = 8
) -> list[dict]:
    """Softmax and top-k of torch, the rule in plain torch, and the kernel."""
    rows = []
    rule = BH(alpha=0.05, max_k=max_k)
    thresholds, _ = rule._critical_statistics(num_experts, None, torch.device("cuda"))
    statistic, exclude_top, cuts = cut_table(rule.pvalues, thresholds, num_experts)
    for tokens in (1, 512, 16_384):
        logits = (ROUTER_STD * torch.randn(tokens, num_experts, device="cuda")).to(torch.bfloat16)

        def own(logits=logits):
            weights, index = torch.topk(torch.softmax(logits, dim=-1, dtype=torch.float32), max_k, dim=-1)
            return weights.to(logits.dtype), index

        def plain(logits=logits):
            return rule(logits)

        def kernel(logits=logits):
            return bh_route(logits, cuts, statistic=statistic, exclude_top=exclude_top, max_k=max_k,
                            weights_dtype=logits.dtype)  # fmt: skip

        mean_k = float(kernel()[2].float().mean())
        calls = {"softmax + topk": (own, max_k), "BH, torch": (plain, mean_k), "BH, kernel": (kernel, mean_k)}
        floor = tokens * (2 * num_experts + 10 * max_k + 8) / limits["bytes_per_second"]
        for mode in ("eager", "graph"):
            ready = {name: call if mode == "eager" else captured(*[call] * 20) for name, (call, _) in calls.items()}
            times = measure(ready, rounds=7 if quick else 25)
            for call, (_, k) in calls.items():
                rows.append(row("router", mode, tokens, call, k, times[call] / (1 if mode == "eager" else 20), floor))
    return rows


def bench_block(limits: dict[str, float], quick: bool = False, name: str | None = None) -> list[dict]:
    """The experts of one layer: transformers' own implementations at top-8, and the kernels at every mean k."""
    module, rows = full_size_experts(), []
    sizes = module.num_experts, module.hidden_dim, module.intermediate_dim
    for tokens in (1, 8, 32, 512, 4096, 16_384):
        hidden = torch.randn(tokens, sizes[1], device="cuda", dtype=torch.bfloat16)
        # Few tokens use few experts, which the cache would hold from one call to the next: take turns.
        draws = 16 if tokens == 1 else 4 if tokens <= 32 else 1
        routings = {k: [random_routing(tokens, k, seed=seed) for seed in range(draws)] for k in MEAN_K}

        def own(implementation, routing, hidden=hidden):
            module.config._experts_implementation = implementation
            return module(hidden, *routing)

        def kernel(routing, hidden=hidden):
            return experts_forward(module, hidden, *routing)

        for mode in ("eager", "graph") if tokens <= 512 else ("eager",):
            candidates = {}
            for own_name in IMPLEMENTATIONS:
                if own_name == "batched_mm" and tokens > 32 or own_name == "eager" and (mode == "graph" or quick):
                    continue  # the first copies each slot's weights, the second waits for the device
                candidates[own_name, 8] = [lambda n=own_name, r=r, own=own: own(n, r) for r in routings[8]]
            for k in MEAN_K:
                candidates["kernels", k] = [lambda r=r, kernel=kernel: kernel(r) for r in routings[k]]
            ready = {key: captured(*calls) if mode == "graph" else _in_turn(calls) for key, calls in candidates.items()}
            times = measure(ready, rounds=5 if quick else 15)
            for (called, k), values in times.items():
                floor = np.mean([block_floor(index, *sizes, limits) for index, _ in routings[k]])
                rows.append(row("block", mode, tokens, called, k, values / draws, floor))
            del ready
            torch.cuda.empty_cache()
    return rows


def _in_turn(calls: list[Callable]) -> Callable:
    def run():
        for call in calls:
            call()

    return run


# ------------------------------------------------------------------------------------------------- the whole model


@lru_cache(maxsize=1)
def load_model(name: str | None = None) -> nn.Module:
    """A model on the GPU in bfloat16: a checkpoint by name, else OLMoE-1B-7B's shapes with random weights.

    The random routers are drawn so that the logits of a token spread like those of a trained model.
    """
    if name is not None:
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16).cuda().eval()
    config = OlmoeConfig(intermediate_size=1024, bos_token_id=None, eos_token_id=None, pad_token_id=1)
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = OlmoeForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    for layer in find_moe_layers(model):
        nn.init.normal_(layer.router.weight, std=ROUTER_STD / config.hidden_size**0.5)
    return model


def random_ids(model: nn.Module, batch: int, length: int) -> Tensor:
    """Token ids [batch, length], none of them special."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(2, model.config.vocab_size - 300, (batch, length), generator=generator).cuda()


@contextmanager
def implementation_set(model: nn.Module, name: str):
    """transformers' experts implementation of a model, for a while."""
    before = model.config._experts_implementation
    model.set_experts_implementation(name)
    try:
        yield
    finally:
        model.set_experts_implementation(before)


def watch(model: nn.Module, call: Callable, index: int) -> list[Tensor]:
    """Output number `index` (0 logits, 1 weights, 2 experts) of every router during a call, other hooks applied."""
    seen = []
    handles = [
        layer.router.register_forward_hook(lambda module, args, output: seen.append(output[index]))
        for layer in find_moe_layers(model)
    ]
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def mean_filled(model: nn.Module, selected: list[Tensor]) -> float:
    """Experts per token and layer, from the indices [tokens, slots] that each layer's router returned."""
    return float(torch.cat(selected).lt(model.config.num_experts).sum(-1).float().mean())


def rules_by_mean_k(model: nn.Module, ids: Tensor) -> dict[int, BH]:
    """BH rules at the levels that give `MEAN_K` experts per token and layer, on the unpatched model's logits."""
    logits = torch.cat(watch(model, lambda: model(input_ids=ids, use_cache=False, logits_to_keep=1), 0)).float()
    max_k = find_moe_layers(model)[0].top_k

    def mean_k(score):
        return float(BH(alpha=float(torch.sigmoid(torch.tensor(score))), max_k=max_k)(logits).counts.float().mean())

    rules = {}
    for k in MEAN_K:
        if k == max_k:  # every slot filled: what the kernels gain by themselves
            rules[k] = BH(alpha=0.5, min_k=k, max_k=k)
            continue
        low, high = -30.0, 12.0  # log-odds of alpha
        for _ in range(16):
            middle = (low + high) / 2
            low, high = (middle, high) if mean_k(middle) < k else (low, middle)
        rules[k] = BH(alpha=float(torch.sigmoid(torch.tensor(low))), max_k=max_k)
    return rules


def variants(model: nn.Module, rules: dict[int, BH], implementations: tuple[str, ...]) -> dict[tuple, Callable]:
    """What is compared, by (name, mean k): functions that make the context in which the model is run."""
    top_k = find_moe_layers(model)[0].top_k
    own = {(name, top_k): lambda name=name: implementation_set(model, name) for name in implementations}
    patches = {k: RoutingPatch(model, rule, collect_stats=False, kernels=True) for k, rule in rules.items()}
    return own | {("patched", k): lambda patch=patch: patch for k, patch in patches.items()}


def model_floor(
    model: nn.Module, selected: list[Tensor], batch: int, length: int, past: int, limits: dict[str, float]
) -> float:
    """Seconds below which a pass cannot go: weights in use and cache read once, or all operations done.

    Parameters
    ----------
    model : nn.Module
    selected : list of Tensor [tokens, slots]
        Experts that each layer's router returned.
    batch, length, past : int
        Sequences, new tokens of each, and tokens in the cache.
    limits : dict
        See `ceilings`.
    """
    config = model.config
    expert = 3 * config.hidden_size * config.intermediate_size
    head = config.vocab_size * config.hidden_size
    embedding = 0 if config.tie_word_embeddings else head
    dense = model.num_parameters() - embedding - head - config.num_hidden_layers * config.num_experts * expert
    filled = [index[(index >= 0) & (index < config.num_experts)] for index in selected]
    cache = 2 * config.num_hidden_layers * batch * past * config.num_key_value_heads
    cache *= config.hidden_size // config.num_attention_heads
    moved = 2 * (dense + head + cache + sum(expert * len(index.unique()) for index in filled))
    attended = batch * length * (past + (length + 1) / 2)  # (query, key) pairs
    operations = 2 * batch * length * dense + 2 * batch * head + 2 * expert * sum(len(index) for index in filled)
    operations += 4 * config.num_hidden_layers * config.hidden_size * attended
    return max(moved / limits["bytes_per_second"], operations / limits["operations_per_second"])


def compare_passes(
    stage: str,
    model: nn.Module,
    candidates: dict,
    forward: Callable,
    tokens: int,
    shape: tuple[int, int, int],
    limits: dict[str, float],
    rounds: int,
) -> list[dict]:
    """Rows for one forward pass under every candidate, eagerly and from CUDA graphs, with the peak of memory (GiB)."""
    rows, graphs, facts = [], {}, {}
    for key, context in candidates.items():
        with context():
            selected = watch(model, forward, 2)
            mean_k = mean_filled(model, selected)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            forward()
            peak = torch.cuda.max_memory_allocated() / 2**30
            facts[key] = mean_k, model_floor(model, selected, *shape, limits), peak
    times = {"eager": measure(dict.fromkeys(candidates, forward), rounds, contexts=candidates)}
    for key, context in candidates.items():
        if key[0] == "eager":
            continue  # waits for the device
        with context():
            try:
                graphs[key] = captured(forward)
            except RuntimeError as error:
                print(f"{stage}, {tokens}, {key}: no CUDA graph: {error}".splitlines()[0], flush=True)
                torch.cuda.synchronize()
    times["graph"] = measure(graphs, rounds) if graphs else {}
    for mode, measured in times.items():
        for key, values in measured.items():
            mean_k, floor, peak = facts[key]
            rows.append(row(stage, mode, tokens, key[0], mean_k, values, floor, peak_gib=peak))
    return rows


def bench_prefill(limits: dict[str, float], quick: bool = False, name: str | None = None) -> list[dict]:
    """One forward pass over prompts of 512 and 4,096 tokens, and over four of 4,096."""
    model, rows = load_model(name), []
    rules = rules_by_mean_k(model, random_ids(model, 1, 4096))
    for batch, length in ((1, 512), (1, 4096), (4, 4096)):
        ids = random_ids(model, batch, length)

        def forward(ids=ids):
            return model(input_ids=ids, use_cache=False, logits_to_keep=1).logits

        candidates = variants(model, rules, ("grouped_mm",) if quick else ("eager", "grouped_mm"))
        rows += compare_passes(
            "prefill", model, candidates, forward, batch * length, (batch, length, 0), limits, 5 if quick else 15
        )
        torch.cuda.empty_cache()
        if not quick:
            for key in (("grouped_mm", 8), ("patched", 4)):
                with candidates[key]():
                    compiled = torch.compile(model, dynamic=False)
                    call = partial(compiled, input_ids=ids, use_cache=False, logits_to_keep=1)
                    values = measure({key: call})[key]
                like = next(r for r in rows[::-1] if r["tokens"] == batch * length and r["name"] == key[0]
                            and round(r["mean_k"]) == key[1])  # fmt: skip
                rows.append(row("prefill", "compiled", batch * length, key[0], like["mean_k"], values,
                                like["floor_us"] / 1e6))  # fmt: skip
    return rows


def bench_decode(
    limits: dict[str, float], quick: bool = False, name: str | None = None, prompt: int = 128
) -> list[dict]:
    """One decoding step on a static cache, for 1, 8 and 32 sequences."""
    model, rows = load_model(name), []
    rules = rules_by_mean_k(model, random_ids(model, 1, 4096))
    for batch in (1, 8, 32):
        ids = random_ids(model, batch, prompt)
        # Every call goes on by a token where the cache counts on the host, and wherever it is, room costs little.
        cache = StaticCache(config=model.config, max_cache_len=prompt + 128)
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token = ids[:, -1:].contiguous()
        position = torch.full((batch, 1), prompt, device="cuda")

        def forward(cache=cache, token=token, position=position, ids=ids):
            logits = model(input_ids=token, past_key_values=cache, position_ids=position, use_cache=True).logits
            _rewind(cache, ids.shape[1])
            return logits

        candidates = variants(model, rules, ("grouped_mm", "batched_mm"))
        rows += compare_passes(
            "decode", model, candidates, forward, batch, (batch, 1, prompt), limits, 5 if quick else 15
        )
        torch.cuda.empty_cache()
    return rows


def _rewind(cache: StaticCache, length: int) -> None:
    """Let a cache go on after `length` tokens again, where it counts them."""
    for layer in cache.layers:
        count = getattr(layer, "cumulative_length", None)
        if isinstance(count, Tensor):
            count.fill_(length)
        elif count is not None:
            layer.cumulative_length = length


class StepClock(StoppingCriteria):
    """Notes the time of every step of `generate()`, which waits for the device once a step, and stops nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def generate_steps(model: nn.Module, ids: Tensor, new_tokens: int) -> np.ndarray:
    """Seconds of each decoding step of transformers' compiled `generate()` with a static cache, but for the first 8."""
    clock = StepClock()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        cache_implementation="static",
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    return np.diff(clock.times)[8:]


def bench_generate(
    limits: dict[str, float], quick: bool = False, name: str | None = None, prompt: int = 128
) -> list[dict]:
    """`generate()` with a static cache, compiled by transformers; times are of one step."""
    model, rows = load_model(name), []
    rules = rules_by_mean_k(model, random_ids(model, 1, 4096))
    if quick:
        rules = {4: rules[4]}
    for batch in (1, 8) if quick else (1, 8, 32):
        ids = random_ids(model, batch, prompt)
        # generate() itself puts batched_mm in the place of grouped_mm for its decoding steps.
        for key, context in variants(model, rules, ("batched_mm",)).items():
            torch.compiler.reset()
            with context():
                selected = watch(model, lambda: model(input_ids=ids[:, -1:], use_cache=False), 2)  # noqa: B023
                floor = model_floor(model, selected, batch, 1, prompt, limits)
                mean_k = mean_filled(model, selected)
                generate_steps(model, ids, 48 if quick else 128)  # compiles: the same length, hence the same cache
                torch.cuda.reset_peak_memory_stats()
                times = generate_steps(model, ids, 48 if quick else 128)
            peak = torch.cuda.max_memory_allocated() / 2**30
            rows.append(row("generate", "compiled", batch, key[0], mean_k, times, floor, peak_gib=peak))
            print(f"generate, batch {batch}, {key}: {1e3 * np.median(times):.2f} ms a step", flush=True)
    return rows


# -------------------------------------------------------------------------------------------------------- the table


def add_ratios(table: pd.DataFrame) -> pd.DataFrame:
    """Add ``speedup`` over the best row of transformers of the same stage, mode and tokens, and ``over_floor``."""
    own = table[table["name"].isin([*IMPLEMENTATIONS, "softmax + topk"])]
    key = ["stage", "mode", "tokens"]
    best = own.groupby(key)["median_us"].min().rename("best_us")
    table = table.join(best, on=key)
    table["speedup"] = table.pop("best_us") / table["median_us"]
    table["over_floor"] = table["median_us"] / table["floor_us"]
    return table


def draw_speed(table: pd.DataFrame, mode: str = "graph"):
    """Time against the mean number of experts: measured, the floor, and k / 8 of the best of transformers.

    Parameters
    ----------
    table : pandas.DataFrame
        As `bench_speed` gives it.
    mode : str
        ``"eager"``, ``"graph"`` or ``"compiled"``; a stage without it is drawn from its first mode.

    Returns
    -------
    matplotlib.figure.Figure
        A row of panels for each of block, prefill, decode and generate that the table has.
    """
    from matplotlib.figure import Figure

    stages = [stage for stage in STAGES[1:] if (table["stage"] == stage).any()]
    panels = []
    for stage in stages:
        part = table[table["stage"] == stage]
        for tokens in sorted(part["tokens"].unique()):
            here = part[part["tokens"] == tokens]
            shown = mode if (here["mode"] == mode).any() else here["mode"].iloc[0]
            panels.append((stage, tokens, here[here["mode"] == shown]))
    columns = max(sum(stage == other for other, *_ in panels) for stage in stages)
    figure = Figure(figsize=(2.6 * columns, 2.6 * len(stages)), layout="constrained")
    grid = figure.subplots(len(stages), columns, squeeze=False)
    for axes in grid.flat:
        axes.set_visible(False)
    for place, stage in enumerate(stages):
        for axes, (_, tokens, part) in zip(grid[place], (p for p in panels if p[0] == stage), strict=False):
            axes.set_visible(True)
            ours = part[part["name"].isin(["kernels", "patched"])].sort_values("mean_k")
            best = part.loc[part["name"].isin(IMPLEMENTATIONS), "median_us"].min()
            ks = np.linspace(0, 8, 2)
            axes.plot(ks, best * ks / 8, ":", color="0.6", label="k / 8 of the best of transformers")
            axes.plot(8, best, "s", color="0.3", label="best of transformers, top-8")
            axes.plot(ours["mean_k"], ours["floor_us"], "--", color="#d55e00", label="floor of the hardware")
            spread = ours["median_us"] - ours["q1_us"], ours["q3_us"] - ours["median_us"]
            axes.errorbar(ours["mean_k"], ours["median_us"], spread, fmt="o-", ms=4, color="#0072b2", label="skipping")
            unit = "sequences" if stage in ("decode", "generate") else "tokens"
            axes.set(title=f"{stage}, {tokens:,} {unit} ({part['mode'].iloc[0]})", xlabel="mean experts per token",
                     ylabel="µs", xlim=(0, 8.5), ylim=(0, None))  # fmt: skip
            axes.title.set_fontsize(8)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8)
    return figure


def bench_speed(
    folder: str | Path, only: list[str] | None = None, quick: bool = False, name: str | None = None
) -> pd.DataFrame:
    """Measure, and write ``speed.csv`` and ``speed_machine.json``.

    Parameters
    ----------
    folder : str or Path
    only : list of str, optional
        Some of `STAGES`.
    quick : bool
        Fewer rounds, no eager baseline, fewer things compiled.
    name : str, optional
        Checkpoint for the stages that run a whole model; random weights by default.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("bench speed needs a CUDA device, and torch finds none: use bench routing on the CPU.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    with torch.no_grad():
        limits = ceilings()
        stages = (bench_router, bench_block, bench_prefill, bench_decode, bench_generate)
        for stage in only or STAGES:
            rows += stages[STAGES.index(stage)](limits, quick, name)
            table = add_ratios(pd.DataFrame(rows))
            table.to_csv(folder / "speed.csv", index=False)
    (folder / "speed_machine.json").write_text(json.dumps(describe_machine() | limits, indent=2) + "\n")
    return table


def main(argv: list[str] | None = None) -> None:
    """Parse a command line and run it."""
    parser = argparse.ArgumentParser(prog="python -m bhlib.speed", description=bench_speed.__doc__.splitlines()[0])
    parser.add_argument("--folder", default="figures", help="where speed.csv goes (default: figures)")
    parser.add_argument("--only", action="append", choices=STAGES, help="this stage only; may be repeated")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--model", metavar="NAME", help="a checkpoint instead of random weights")
    arguments = parser.parse_args(argv)
    table = bench_speed(arguments.folder, arguments.only, arguments.quick, arguments.model)
    print(json.dumps(describe_machine()))
    print(table.round(2).to_string(index=False))


if __name__ == "__main__":
    main()
