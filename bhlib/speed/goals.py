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
        What `bhlib.benchmarks.bench_experts` measured on the CPU.

    Returns
    -------
    pandas.DataFrame
        ``goal``; ``wanted`` and ``reached``, a ratio of times unless the goal says otherwise, NaN if it was not
        measured; ``at_most``, what running at the floor would reach, and ``without_experts``, what would
        be reached if no expert were computed, NaN where that says nothing; ``met``.
    """
    rows = [*_router_goals(table), *_block_goals(table), *_model_goals(table), *_memory_goals(table)]
    if cpu is not None:
        bh = cpu[cpu["rule"].str.startswith("BH")]
        nearest = bh.loc[(bh["mean_k"] - 4).abs().idxmin()]
        where = f"prefill of {nearest['tokens']:,} tokens by the demo on {nearest['threads']} CPU threads"
        goal = f"{where}, BH with mean k = {nearest['mean_k']:.1f}: speedup"
        reached = 1 / nearest["model_ratio"]
        rows.append({"goal": goal, "wanted": 1.3, "reached": reached, "met": bool(reached >= 1.3)})
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


def _tokens(count: int) -> str:
    return f"{count:,} token{'s' * (count > 1)}"


def _router_goals(table: pd.DataFrame) -> Iterator[dict]:
    for mode, place in {"graph": "in a CUDA graph", "eager": "launched one by one"}.items():
        for tokens in (1, 512, 16_384):
            cells = {"stage": "router", "mode": mode, "tokens": tokens}
            own = fastest(table, "transformers", **cells)
            ours = fastest(table, "bhlib", name="BH, kernel", **cells)
            reached = np.nan if own is None or ours is None else ours["median_us"] / own["median_us"]
            goal = f"router, {_tokens(tokens)}, {place}: time over softmax + topk"
            yield {"goal": goal, "wanted": 0.4, "reached": reached, "met": bool(reached <= 0.4)}


def _block_goals(table: pd.DataFrame) -> Iterator[dict]:
    for k, wanted in {4: {16_384: 3.0, 512: 3.0, 1: 2.5}, 8: {16_384: 1.3, 512: 1.3, 1: 1.3}}.items():
        for tokens, factor in wanted.items():
            cells = {"stage": "block", "tokens": tokens}
            own, ours = fastest(table, "transformers", **cells), fastest(table, "bhlib", k, **cells)
            yield _speedup(f"experts of a layer, {_tokens(tokens)}, k = {k}: speedup", factor, own, ours, None)


def _model_goals(table: pd.DataFrame) -> Iterator[dict]:
    cells = {"stage": "prefill", "tokens": 16_384}
    own, idle = fastest(table, "transformers", **cells), fastest(table, "neither", **cells)
    yield _speedup("prefill of 16,384 tokens, k = 4: speedup", 1.9, own, fastest(table, "bhlib", 4, **cells), idle)
    for batch, wanted in ((1, 2.0), (8, 3.0)):
        cells = {"stage": "generate", "tokens": batch}
        ours, idle = fastest(table, "bhlib", 4, **cells), fastest(table, "neither", **cells)
        as_it_comes = fastest(table, "transformers", name="batched_mm", **cells)
        yield _speedup(f"generate(), batch {batch}, k = 4: speedup", wanted, as_it_comes, ours, idle)
        best = fastest(table, "transformers", **cells)
        yield _speedup(f"generate(), batch {batch}, k = 4: over the best of all", wanted, best, ours, idle)
    recompiled = table.loc[(table["stage"] == "generate") & (table["by"] == "bhlib"), "recompiled"].max()
    goal = "generate(): graphs compiled anew when counts change"
    yield {"goal": goal, "wanted": 0.0, "reached": recompiled, "met": bool(recompiled == 0)}


def _memory_goals(table: pd.DataFrame) -> Iterator[dict]:
    for stage in ("prefill", "decode", "generate"):
        part = table[(table["stage"] == stage) & table["peak_gib"].notna()]
        own = part[part["by"] == "transformers"].groupby("tokens")["peak_gib"].min()
        ours = part[part["by"] == "bhlib"].groupby("tokens")["peak_gib"].max()
        reached = (ours / own).max()
        goal = f"{stage}: peak memory over the least of transformers"
        yield {"goal": goal, "wanted": 1.01, "reached": reached, "met": bool(reached <= 1.01)}
