"""The table of `bench_speed`: one row per thing measured, written as it grows."""

import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

#: What the columns hold.
COLUMNS = {
    "stage": "call, router, block, prefill, decode or generate",
    "mode": "eager, graph (replayed from a CUDA graph) or compiled (by torch.compile, then replayed); in call, prefill",
    "tokens": "tokens of a pass; sequences, in decode, generate and the other modes of call",
    "name": "what ran: an experts implementation of transformers, our kernels, our patch, nothing",
    "by": "transformers, bhlib, others (a library beside the two) or neither",
    "k": "experts per token that were aimed at, if any",
    "mean_k": "experts per token and layer that were used",
    "median_us": "median of the rounds: microseconds per pass, per step where sequences are decoded",
    "q1_us": "their first quartile",
    "q3_us": "their third quartile",
    "rounds": "how many there were",
    "floor_us": "what the hardware needs at least",
    "peak_gib": "most memory allocated, GiB",
    "graphs": "graphs that generate() compiled",
    "graph_breaks": "places at which the compiler had to give up and go on behind",
    "recompiled": "graphs that generate() compiled anew in the measured runs",
    "error": "why there is no time",
    "speedup": "over the fastest of transformers in the same mode",
    "best_speedup": "over the fastest of transformers in any mode",
    "over_floor": "median_us / floor_us",
    "run": "when the run began (UTC): ratios are of one run",
    "gpu": "its name",
    "clocks": "its clocks",
    "versions": "of the software",
    "bytes_per_second": "of a large copy in this run",
    "operations_per_second": "of a large bfloat16 product in this run",
}


class Candidate(NamedTuple):
    """One of several things that are compared: its name, whose it is, and the experts per token that it aims at."""

    name: str
    by: str
    k: int | None


class Results:
    """Rows so far, with those of other stages that the file held before.

    Parameters
    ----------
    path : Path
        CSV file, written after every row.
    stages : sequence of str
        Stages that are measured now: their rows in the file are dropped.
    machine : dict of str
        See `bhlib.speed.timing.describe_machine`.
    limits : dict of float
        See `bhlib.speed.timing.ceilings`.
    """

    def __init__(self, path: Path, stages: Sequence[str], machine: dict[str, str], limits: dict[str, float]):
        self.path, self.rows = path, []
        self.kept = pd.DataFrame(columns=list(COLUMNS))
        if path.exists():
            before = pd.read_csv(path)
            self.kept = before[~before["stage"].isin(stages)]
        self._facts = {"run": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())} | machine | limits
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(
        self,
        stage: str,
        mode: str,
        tokens: int,
        candidate: Candidate,
        mean_k: float,
        times: np.ndarray,
        floor: float,
        **more: float,
    ) -> None:
        """Add a row from the seconds of every round, and the floor in seconds."""
        low, middle, high = 1e6 * np.quantile(times, [0.25, 0.5, 0.75])
        self._append(
            stage, mode, tokens, candidate, mean_k=mean_k, median_us=middle, q1_us=low, q3_us=high, rounds=len(times),
            floor_us=1e6 * floor, **more,
        )  # fmt: skip

    @contextmanager
    def attempt(self, stage: str, mode: str, tokens: int, candidate: Candidate) -> Iterator[None]:
        """A context in which something may fail: then a row says why, and the run goes on."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 (whatever CUDA, Triton or the compiler raise)
            first_line = str(error).strip().partition("\n")[0]
            self._append(stage, mode, tokens, candidate, error=f"{type(error).__name__}: {first_line}"[:200])
        else:
            return
        gc.collect()
        torch.cuda.empty_cache()

    def _append(self, stage: str, mode: str, tokens: int, candidate: Candidate, **cells: object) -> None:
        row = {"stage": stage, "mode": mode, "tokens": tokens} | candidate._asdict() | cells
        self.rows.append(row | self._facts)
        self.table().to_csv(self.path, index=False, float_format="%.6g", lineterminator="\n")
        said = cells.get("error") or f"{cells['median_us']:,.1f} us at {cells['mean_k']:.2f} experts"
        print(f"{stage:9}{mode:9}{tokens:7,} {candidate.name:16}{said}", flush=True)

    def table(self) -> pd.DataFrame:
        """All rows, stages in the order in which they were measured, with `COLUMNS`."""
        frames = [frame for frame in (self.kept, pd.DataFrame(self.rows)) if len(frame)]
        return add_ratios(pd.concat(frames, ignore_index=True) if frames else self.kept)


def add_ratios(table: pd.DataFrame) -> pd.DataFrame:
    """Add ``speedup``, ``best_speedup`` and ``over_floor``, and put the columns in order."""
    table = table.drop(columns=["speedup", "best_speedup"], errors="ignore").reindex(columns=list(COLUMNS))
    own = table[table["by"] == "transformers"]
    for column, key in {"speedup": ["stage", "mode", "tokens"], "best_speedup": ["stage", "tokens"]}.items():
        best = own.groupby(key)["median_us"].min().rename("best_us")
        table[column] = table[key].join(best, on=key)["best_us"] / table["median_us"]
    table["over_floor"] = table["median_us"] / table["floor_us"]
    return table


def rows_of(
    table: pd.DataFrame, stage: str, columns: Sequence[str] = ("median_us", "speedup", "best_speedup", "over_floor")
) -> pd.DataFrame:
    """What was measured of a stage, for people: some columns, by tokens, mode, name and experts per token."""
    rows = table[(table["stage"] == stage) & table["median_us"].notna()]
    rows = rows.round({"mean_k": 2}).set_index(["tokens", "mode", "name", "mean_k"])[list(columns)]
    return rows.sort_index(level=["tokens", "mode"], sort_remaining=False, kind="stable").round(2)
