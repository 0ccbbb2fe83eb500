"""What was aimed at, and what a table of `bench_speed` shows of it."""

from collections.abc import Iterator

import numpy as np
import pandas as pd


def check_goals(table: pd.DataFrame, cpu: pd.DataFrame | None = None) -> pd.DataFrame:
    """Each goal, whether it was reached, and how much the hardware allows at most.

    Parameters
    ----------
    table : pandas.DataFrame
        Rows of ``speed.csv`` (`bhlib.speed.results.COLUMNS`).
    cpu : pandas.DataFrame, optional
        What `bhlib.benchmarks.bench_call` measured on the CPU.

    Returns
    -------
    pandas.DataFrame
        ``goal``; ``wanted`` and ``reached``, a ratio of times unless the goal says otherwise, NaN if it was not
        measured; ``at_most``, what running at the floor would reach, and ``without_experts``, what would
        be reached if no expert were computed, NaN where that says nothing; ``met``.
    """
    rows = [*_call_goals(table)]
    if cpu is not None:
        rows += _cpu_goals(cpu)
    rows += [*_router_goals(table), *_block_goals(table), *_model_goals(table), *_memory_goals(table)]
    columns = ["goal", "wanted", "reached", "at_most", "without_experts", "met"]
    return pd.DataFrame(rows).reindex(columns=columns)


def fastest(table: pd.DataFrame, by: str, k: float | None = None, **cells: object) -> pd.Series | None:
    """The row with the least median time among those `by` someone, at `k` experts, with these cells; None if none."""
    chosen = (table["by"] == by) & table["median_us"].notna()
    for column, value in cells.items():
        chosen &= table[column] == value
    if k is not None:
        chosen &= table["k"] == k
    return table.loc[table.loc[chosen, "median_us"].idxmin()] if chosen.any() else None


def _speedup(goal: str, wanted: float, own: pd.Series | None, ours: pd.Series | None, idle: pd.Series | None) -> dict:
    """A goal for the time of `own` over that of `ours`; `idle` is the pass without experts."""
    if own is None or ours is None:
        return {"goal": goal, "wanted": wanted, "reached": np.nan, "met": False}
    reached = own["median_us"] / ours["median_us"]
    return {
        "goal": goal,
        "wanted": wanted,
        "reached": reached,
        "at_most": own["median_us"] / ours["floor_us"],
        "without_experts": np.nan if idle is None else own["median_us"] / idle["median_us"],
        "met": bool(reached >= wanted),
    }


def _at_most(goal: str, wanted: float, reached: float) -> dict:
    """A goal for what should be small."""
    return {"goal": goal, "wanted": wanted, "reached": reached, "met": bool(reached <= wanted)}


def _ratio(ours: pd.Series | None, other: pd.Series | None) -> float:
    """The time of the one over that of the other, NaN if either was not measured."""
    return np.nan if ours is None or other is None else ours["median_us"] / other["median_us"]


def _tokens(count: int) -> str:
    return f"{count:,} token{'s' * (count > 1)}"


def _call_goals(table: pd.DataFrame) -> Iterator[dict]:
    """For the call of the README, with statistics."""
    wanted = {
        ("eager", 1): 1.0, ("eager", 8): 1.1, ("eager", 32): 1.1, ("prefill", 4096): 1.5,
        ("compiled", 1): 1.55, ("compiled", 8): 2.9, ("compiled", 32): 7.0,
    }  # fmt: skip
    for (mode, tokens), factor in wanted.items():
        cells = {"stage": "call", "mode": mode, "tokens": tokens}
        own, idle = fastest(table, "transformers", **cells), fastest(table, "neither", **cells)
        ours = fastest(table, "bhlib", name="patched", **cells)
        place = f"prefill of {tokens:,} tokens" if mode == "prefill" else f"{mode} generate(), batch {tokens}"
        yield _speedup(f"the call, {place}, k = 4: speedup", factor, own, ours, idle)
    for batch in (1, 8, 32):
        cells = {"stage": "call", "mode": "compiled", "tokens": batch}
        ours, without = (fastest(table, "bhlib", name=name, **cells) for name in ("patched", "no statistics"))
        yield _at_most(f"the call, compiled, batch {batch}: time over no statistics", 1.03, _ratio(ours, without))
    compiled = table[(table["stage"] == "call") & (table["mode"] == "compiled")].groupby("name")
    for name, goal in {"patched": "at two prompt lengths", "level moved": "when the level is moved"}.items():
        most = compiled[["graphs", "recompiled"]].max().reindex([name]).loc[name]
        yield _at_most(f"the call, compiled {goal}: graphs", 1.0, most["graphs"])
        yield _at_most(f"the call, compiled {goal}: graphs compiled anew", 0.0, most["recompiled"])


def _cpu_goals(cpu: pd.DataFrame) -> Iterator[dict]:
    """For the same on a CPU."""
    ratios = cpu[cpu["name"] == "patched"].set_index("call")["ratio"]
    yield _at_most("the call, generate() by the demo on a CPU: time over unpatched", 1.05, ratios["generate()"])
    reached = 1 / ratios["prefill"]
    goal = "the call, prefill by the demo on a CPU: speedup"
    yield {"goal": goal, "wanted": 1.5, "reached": reached, "met": bool(reached >= 1.5)}


def _router_goals(table: pd.DataFrame) -> Iterator[dict]:
    for mode, place in {"graph": "in a CUDA graph", "eager": "launched one by one"}.items():
        for tokens in (1, 512, 16_384):
            cells = {"stage": "router", "mode": mode, "tokens": tokens}
            own = fastest(table, "transformers", **cells)
            ours = fastest(table, "bhlib", name="BH, kernel", **cells)
            yield _at_most(f"router, {_tokens(tokens)}, {place}: time over softmax + topk", 0.4, _ratio(ours, own))


def _block_goals(table: pd.DataFrame) -> Iterator[dict]:
    for k, wanted in {4: {16_384: 3.0, 512: 3.0, 1: 2.5}, 8: {16_384: 1.3, 512: 1.3, 1: 1.3}}.items():
        for tokens, factor in wanted.items():
            cells = {"stage": "block", "tokens": tokens}
            own, ours = fastest(table, "transformers", **cells), fastest(table, "bhlib", k, **cells, name="kernels")
            yield _speedup(f"experts of a layer, {_tokens(tokens)}, k = {k}: speedup", factor, own, ours, None)
    for k, wanted in {8: 1.25, 4: 1.35}.items():
        for tokens in (4096, 16_384):
            ours = fastest(table, "bhlib", k, stage="block", tokens=tokens, name="kernels")
            reached = np.nan if ours is None else ours["over_floor"]
            yield _at_most(f"experts of a layer, {_tokens(tokens)}, k = {k}: time over the floor", wanted, reached)
    for name in ("means", "means and map"):
        for mode, tokens in (("graph", 1), ("graph", 512), ("eager", 4096), ("eager", 16_384)):
            cells = {"stage": "block", "mode": mode, "tokens": tokens}
            plain, ours = (fastest(table, "bhlib", 4, **cells, name=f"kernels{more}") for more in ("", f", {name}"))
            goal = f"experts of a layer, {_tokens(tokens)}, k = 4: with {name} over without"
            yield _at_most(goal, 1.03, _ratio(ours, plain))


def _model_goals(table: pd.DataFrame) -> Iterator[dict]:
    cells = {"stage": "prefill", "tokens": 16_384}
    own, idle = fastest(table, "transformers", **cells), fastest(table, "neither", **cells)
    yield _speedup("prefill of 16,384 tokens, k = 4: speedup", 1.9, own, fastest(table, "bhlib", 4, **cells), idle)
    for batch, wanted in ((1, 2.0), (8, 3.0)):
        cells = {"stage": "generate", "tokens": batch}
        ours, idle = fastest(table, "bhlib", 4, **cells), fastest(table, "neither", **cells)
        best = fastest(table, "transformers", **cells)
        yield _speedup(f"generate(), batch {batch}, k = 4: over the best of all", wanted, best, ours, idle)


def _memory_goals(table: pd.DataFrame) -> Iterator[dict]:
    for stage in ("prefill", "decode", "generate"):
        part = table[(table["stage"] == stage) & table["peak_gib"].notna()]
        own = part[part["by"] == "transformers"].groupby("tokens")["peak_gib"].min()
        ours = part[part["by"] == "bhlib"].groupby("tokens")["peak_gib"].max()
        yield _at_most(f"{stage}: peak memory over the least of transformers", 1.01, (ours / own).max())
