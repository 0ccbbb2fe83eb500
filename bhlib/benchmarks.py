"""How long routing takes: nanoseconds per token, on the processor and on the GPU if there is one.

    python -m bhlib bench routing

how much faster a model runs that skips experts:

    python -m bhlib bench experts

and what the call of the README costs on a CPU (on a GPU: `bhlib.speed.call`):

    python -m bhlib bench call
"""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from time import perf_counter, process_time

import numpy as np
import pandas as pd
import torch
from scipy.special import softmax
from scipy.stats import norm
from statsmodels.stats.multitest import multipletests
from torch import nn
from torch.utils.benchmark import Timer
from tqdm.auto import tqdm

from bhlib.calibration import fit_null
from bhlib.discovery import find_moe_layers, watch
from bhlib.patching import BHRoutingIntegration, RoutingPatch
from bhlib.procedures import PROCEDURES, reject
from bhlib.pvalues import NULLS, PValueMaker
from bhlib.rules import BH, Rule, TopK

BASELINE = "softmax + topk"


def bench_routing(
    num_tokens: int = 16_384,
    num_experts: int = 64,
    *,
    alpha: float = 0.05,
    max_k: int = 8,
    loop_tokens: int = 256,
    min_run_time: float = 0.5,
    devices: list[str] | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Time the routing of one layer.

    Parameters
    ----------
    num_tokens, num_experts : int
        Shape of the logits: float32, standard normal times two.
    alpha : float
        Level of every procedure.
    max_k : int
        Experts per token of the baseline, and the bound of the rules.
    loop_tokens : int
        Tokens for the loops, which are timed on no more than these: their time per token does not depend on it.
    min_run_time : float
        Seconds to spend on each row.
    devices : list of str, optional
        By default the CPU, and CUDA if there is any.
    seed : int
        Of the logits.

    Returns
    -------
    pandas.DataFrame
        One row per device and operation: ``device``, ``threads`` (of the CPU), ``group``, ``operation``, ``tokens``,
        ``experts``, ``ns_per_token`` (median), ``iqr_ns`` (interquartile range of the repetitions), ``repetitions``,
        and ``relative``, the median over that of `BASELINE` on the same device. Groups:

        "router" : what a model does itself, from logits to weights and indices.
        "rule" : the whole of `bhlib.rules.BH`, from logits to weights, indices and counts.
        "p-values" : from logits to p-values alone.
        "procedure" : from p-values to decisions alone.
        "loop" : the same by a loop over the tokens with scipy and statsmodels, on the CPU: ``rule, gaussian`` from
        logits to weights and experts (`loop_route`), the others from p-values to decisions (`loop_reject`).
    """
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(num_tokens, num_experts, generator=generator, device="cpu")
    makers = _makers(num_experts, max_k, generator)
    if devices is None:
        devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    rows = []
    with tqdm(desc="bench routing", unit="op") as bar:
        for device in devices:
            for group, operation, timer, tokens in _timers(logits.to(device), makers, alpha, max_k, loop_tokens):
                bar.set_postfix_str(f"{device}: {operation}")
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of the timer, about few repetitions: their number is reported
                    measured = timer.blocked_autorange(min_run_time=min_run_time)
                rows.append(
                    {
                        "device": device,
                        "threads": torch.get_num_threads(),
                        "group": group,
                        "operation": operation,
                        "tokens": tokens,
                        "experts": num_experts,
                        "ns_per_token": 1e9 * measured.median / tokens,
                        "iqr_ns": 1e9 * measured.iqr / tokens,
                        "repetitions": len(measured.times) * measured.number_per_run,
                    }
                )
                bar.update()
    frame = pd.DataFrame(rows)
    baseline = frame[frame["operation"] == BASELINE].set_index("device")["ns_per_token"]
    return frame.assign(relative=frame["ns_per_token"] / frame["device"].map(baseline))


def format_routing(frame: pd.DataFrame) -> str:
    """The table of `bench_routing` as text, a paragraph per device."""
    columns = ["group", "operation", "ns_per_token", "iqr_ns", "relative"]
    formats = {"ns_per_token": "{:,.0f}".format, "iqr_ns": "{:,.0f}".format, "relative": "{:.2f}".format}
    paragraphs = []
    for (device, threads), part in frame.groupby(["device", "threads"], sort=False):
        place = f"{device}, {threads} threads" if device == "cpu" else f"{device}, {torch.cuda.get_device_name()}"
        shape = f"{part['tokens'].max():,} tokens x {part['experts'].iloc[0]} experts"
        table = part[columns].to_string(index=False, formatters=formats)
        paragraphs.append(f"{place}: {shape}, relative to {BASELINE}\n\n{table}\n")
    return "\n".join(paragraphs)


def _makers(num_experts: int, exclude_top: int, generator: torch.Generator) -> dict[str, PValueMaker]:
    """Every null, but not what is none. Those that need calibration are fitted on noise, at the cost of real ones."""
    noise = 2 * torch.randn(1, 4096, num_experts, generator=generator, device="cpu")
    exclude_top = min(exclude_top, num_experts - 2)
    fit = {"model_name": "noise", "exclude_top": exclude_top}
    makers = {
        name: fit_null(noise, null=name, **fit) if entry.needs_calibration else entry.make(exclude_top=exclude_top)
        for name, entry in NULLS.items()
        if entry.compared
    }
    return makers | {"kde per expert": fit_null(noise, null="kde", per_expert=True, max_values=1000, **fit)}


def _timers(logits: torch.Tensor, makers: dict[str, PValueMaker], alpha: float, max_k: int, loop_tokens: int):
    """(group, operation, timer, tokens) of every row for one device."""
    tokens = len(logits)
    pvals = makers["gaussian"](logits)
    scope = {"torch": torch, "logits": logits, "pvals": pvals, "reject": reject, "alpha": alpha, "max_k": max_k}

    def timer(statement: str, **names) -> Timer:
        return Timer(statement, globals=scope | names, num_threads=torch.get_num_threads())

    yield "router", BASELINE, timer("torch.topk(torch.softmax(logits, -1, dtype=torch.float32), max_k)"), tokens
    for name, maker in makers.items():
        rule = BH(alpha, maker, max_k=max_k)
        yield "rule", f"BH, {name}", timer("rule(logits)", rule=rule), tokens
    for name, maker in makers.items():
        yield "p-values", name, timer("maker(logits)", maker=maker), tokens
    for method in PROCEDURES:
        yield "procedure", method, timer("reject(pvals, alpha, method, check=False)", method=method), tokens
    if logits.device.type == "cpu":
        few = logits[:loop_tokens].double().numpy()
        route = timer("loop(few, alpha, max_k)", loop=loop_route, few=few)
        yield "loop", "rule, gaussian", route, len(few)
        few_pvals = pvals[:loop_tokens].double().numpy()
        for method in ("fdr_bh", "fdr_tsbky"):
            decide = timer("loop(few_pvals, alpha, method)", loop=loop_reject, few_pvals=few_pvals, method=method)
            yield "loop", method, decide, len(few)


def loop_reject(pvals: np.ndarray, alpha: float, method: str) -> np.ndarray:
    """Decisions [tokens, experts] of ``statsmodels.stats.multitest.multipletests``, token by token."""
    return np.stack([multipletests(row, alpha, method)[0] for row in pvals])


def loop_route(logits: np.ndarray, alpha: float, max_k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`BH` with `TokenGaussian` as one would write it with scipy and statsmodels: weights, experts, counts."""
    rows = []
    for row in logits:
        background = np.sort(row)[:-max_k]
        pvals = norm.sf((row - background.mean()) / background.std(ddof=1))
        count = min(max(multipletests(pvals, alpha, "fdr_bh")[0].sum(), 1), max_k)
        empty = np.arange(max_k) >= count
        experts = np.argsort(-row)[:max_k]
        weights = softmax(row)[experts]
        rows.append((np.where(empty, 0.0, weights), np.where(empty, -1, experts), count))
    return tuple(np.stack(column) for column in zip(*rows, strict=True))


def bench_experts(
    model: nn.Module,
    input_ids: torch.Tensor,
    rules: dict[str, Rule] | None = None,
    *,
    repetitions: int = 15,
) -> pd.DataFrame:
    """Time a forward pass under rules that use fewer experts, against the unpatched model in the same run.

    Parameters
    ----------
    model : nn.Module
        A model that can be patched, on the CPU or on one GPU.
    input_ids : Tensor [batch, length]
        Tokens of one prefill, without a cache.
    rules : dict of str to Rule, optional
        By default static top-8, 4 and 2, and BH at three levels.
    repetitions : int
        Rounds, after one that is not counted. Each times every rule and the unpatched model once.

    Returns
    -------
    pandas.DataFrame
        One row per rule, the first ``unpatched``: ``rule``, ``mean_k`` (experts per token and layer), ``experts_ms``
        (median time in the experts modules, all layers together), ``experts_ratio``, ``experts_iqr`` (median and
        interquartile range over the rounds of the ratio to the unpatched model of the same round), ``model_ms``,
        ``model_ratio``, ``model_iqr`` (the whole forward pass), ``tokens``, ``threads``.
    """
    if rules is None:
        rules = {f"top-{k}": TopK(k) for k in (8, 4, 2)} | {f"BH, alpha={a}": BH(alpha=a) for a in (0.9, 0.05, 0.01)}
    patches = {"unpatched": None} | {
        name: RoutingPatch(model, rule, max_recorded_tokens=0) for name, rule in rules.items()
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in patches}
    for _ in tqdm(range(1 + repetitions), desc="bench experts", unit="round"):
        for name, patch in patches.items():
            with nullcontext() if patch is None else patch:
                times[name].append(_time_pass(model, input_ids))
    seconds = {name: np.array(rounds[1:]) for name, rounds in times.items()}
    top_k = find_moe_layers(model)[0].top_k
    rows = []
    for name, patch in patches.items():
        ratios = seconds[name] / seconds["unpatched"]
        low, median, high = np.quantile(ratios, (0.25, 0.5, 0.75), axis=0)
        experts_ms, model_ms = 1e3 * np.median(seconds[name], axis=0)
        mean_k = top_k if patch is None else patch.get_routing_stats()["mean_experts_per_token"]
        rows.append(
            {
                "rule": name,
                "mean_k": mean_k,
                "experts_ms": experts_ms,
                "experts_ratio": median[0],
                "experts_iqr": high[0] - low[0],
                "model_ms": model_ms,
                "model_ratio": median[1],
                "model_iqr": high[1] - low[1],
                "tokens": input_ids.numel(),
                "threads": torch.get_num_threads(),
            }
        )
    return pd.DataFrame(rows)


@torch.no_grad()
def _time_pass(model: nn.Module, input_ids: torch.Tensor) -> tuple[float, float]:
    """Seconds in the experts modules, and in the whole of one forward pass."""
    spent, started = 0.0, 0.0

    def now() -> float:
        if input_ids.is_cuda:
            torch.cuda.synchronize()
        return perf_counter()

    def enter(*_) -> None:
        nonlocal started
        started = now()

    def leave(*_) -> None:
        nonlocal spent
        spent += now() - started

    with watch(find_moe_layers(model), leave, module="experts", before=enter):
        begun = now()
        model(input_ids=input_ids, use_cache=False)
        return spent, now() - begun


def format_experts(frame: pd.DataFrame) -> str:
    """The table of `bench_experts` as text."""
    columns = ["rule", "mean_k", "experts_ms", "experts_ratio", "experts_iqr", "model_ms", "model_ratio", "model_iqr"]
    table = frame[columns].to_string(index=False, float_format="{:.2f}".format)
    return (
        f"{frame['tokens'].iloc[0]:,} tokens, {frame['threads'].iloc[0]} threads; ratios to the unpatched model of the "
        f"same round\n\n{table}\n"
    )


def bench_call(
    model: nn.Module,
    prompt: torch.Tensor,
    documents: torch.Tensor,
    *,
    alpha: float = 0.01,
    new_tokens: int = 32,
    repetitions: int = 9,
    threads: int = 1,
) -> pd.DataFrame:
    """Processor time of the call of the README: unpatched, patched as it stands, and patched without statistics.

    Parameters
    ----------
    model : nn.Module
        A model that can be patched, on the CPU.
    prompt : Tensor [1, length]
        Tokens that `generate()` goes on from, greedily.
    documents : Tensor [batch, length]
        Tokens of one prefill, without a cache.
    alpha : float
        By default the level that gives the embedded model four experts per token and layer.
    new_tokens : int
        Tokens that are generated.
    repetitions : int
        Rounds. In each, everything takes its turn: patched anew, called once, and called again for the clock.
    threads : int
        Of torch, meanwhile. With one, processor time is how long it takes on a quiet machine.

    Returns
    -------
    pandas.DataFrame
        One row per call (``generate()`` or ``prefill``) and ``name`` (``unpatched``, ``patched``, ``no statistics``):
        ``mean_k`` (experts per token and layer), ``cpu_ms`` (median over the rounds, of a whole `generate()` by
        the tokens that it made, or of a prefill), ``cpu_q1``, ``cpu_q3`` (its quartiles), ``ratio`` and ``ratio_iqr``
        (median and interquartile range of the ratio to the unpatched model of the same round), ``tokens`` (generated,
        or read), ``threads``.
    """
    contexts = {
        "unpatched": nullcontext,
        "patched": partial(BHRoutingIntegration, model, alpha=alpha),
        "no statistics": partial(BHRoutingIntegration, model, alpha=alpha, collect_stats=False),
    }
    length = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
    generate = partial(model.generate, prompt, attention_mask=torch.ones_like(prompt), **length)
    calls = {
        "generate()": (generate, new_tokens, new_tokens),
        "prefill": (partial(model, input_ids=documents, use_cache=False), documents.numel(), 1),
    }
    rows = []
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for name, (call, tokens, parts) in calls.items():
            times, used = _processor_times(call, contexts, repetitions, name)
            rows += _call_rows(name, {what: seconds / parts for what, seconds in times.items()}, used, tokens, model)
    finally:
        torch.set_num_threads(threads_before)
    return pd.DataFrame(rows).assign(threads=threads)


@torch.no_grad()
def _processor_times(
    call: Callable, contexts: dict[str, Callable], repetitions: int, name: str
) -> tuple[dict[str, np.ndarray], float]:
    """Seconds [repetitions] of a call in each context, in turns; and the experts that it used where that is counted."""
    times: dict[str, list[float]] = {what: [] for what in contexts}
    for _ in tqdm(range(repetitions), desc=f"bench call, {name}", unit="round"):
        for what, context in contexts.items():
            with context() as patch:
                call()
                if patch is not None:
                    patch.reset_stats()  # so that the second call is recorded as the first was
                began = process_time()
                call()
                times[what].append(process_time() - began)
            if what == "patched":
                used = patch.get_routing_stats()["mean_experts_per_token"]
    return {what: np.array(seconds) for what, seconds in times.items()}, used


def _call_rows(call: str, times: dict[str, np.ndarray], used: float, tokens: int, model: nn.Module) -> list[dict]:
    rows = []
    for name, seconds in times.items():
        low, middle, high = np.quantile(1e3 * seconds, (0.25, 0.5, 0.75))
        ratio_low, ratio, ratio_high = np.quantile(seconds / times["unpatched"], (0.25, 0.5, 0.75))
        mean_k = find_moe_layers(model)[0].top_k if name == "unpatched" else used
        rows.append(
            {"call": call, "name": name, "mean_k": mean_k, "cpu_ms": middle, "cpu_q1": low, "cpu_q3": high,
             "ratio": ratio, "ratio_iqr": ratio_high - ratio_low, "tokens": tokens}
        )  # fmt: skip
    return rows


def format_call(frame: pd.DataFrame) -> str:
    """The table of `bench_call` as text."""
    table = frame.drop(columns=["tokens", "threads"]).to_string(index=False, float_format="{:.2f}".format)
    tokens = frame.groupby("call", sort=False)["tokens"].first()
    return (
        f"processor time, torch in {frame['threads'].iloc[0]} thread: for each of {tokens['generate()']} tokens that "
        f"generate() makes, the prompt included; for a prefill of {tokens['prefill']:,} tokens\n\n{table}\n"
    )
