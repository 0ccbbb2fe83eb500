"""Time on a GPU: several functions in turns, from CUDA graphs or not, and what the device can do at best."""

import gc
import subprocess
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
import transformers


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
    calls: dict[Hashable, Callable],
    rounds: int = 15,
    least: float = 2e-3,
    contexts: dict[Hashable, Callable[[], AbstractContextManager]] | None = None,
) -> dict[Hashable, np.ndarray]:
    """Seconds per call, [rounds], of each of several functions, in turns.

    Parameters
    ----------
    calls : dict of functions without arguments
    rounds : int
    least : float
        Seconds that one measurement should last: short calls are repeated within it.
    contexts : dict of functions that make a context, optional
        By the keys of `calls`: what a call runs in. To enter it is not measured, nor is the first call after that.
    """
    contexts = contexts or {}
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def seconds(name, repeats):
        with contexts.get(name, nullcontext)():
            if name in contexts:
                calls[name]()
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
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name in calls:
                times[name].append(seconds(name, repeats[name]))
    finally:
        gc.enable()
    return {name: np.array(values) for name, values in times.items()}


def in_turn(calls: list[Callable]) -> Callable:
    """A function that makes all calls, one after the other."""

    def run():
        for call in calls:
            call()

    return run


def ceilings() -> dict[str, float]:
    """Bytes per second of a large copy (read and written), operations per second of a large bfloat16 product."""
    source = torch.empty(2**30, dtype=torch.bfloat16, device="cuda").normal_()
    target = torch.empty_like(source)
    left, right = _large_matrices()
    product = torch.empty_like(left)
    times = measure({"copy": lambda: target.copy_(source), "product": lambda: torch.mm(left, right, out=product)})
    return {
        "bytes_per_second": 2 * source.nbytes / float(np.median(times["copy"])),
        "operations_per_second": 2 * left.shape[0] ** 3 / float(np.median(times["product"])),
    }


def _large_matrices() -> list[torch.Tensor]:
    return [torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2)]


def describe_machine() -> dict[str, str]:
    """The GPU, its clocks while it multiplies matrices, and versions."""
    import triton

    versions = {"torch": torch.__version__, "triton": triton.__version__, "transformers": transformers.__version__}
    fields = "name,clocks.sm,clocks.max.sm,clocks.mem,power.limit,driver_version"
    left, right = _large_matrices()
    for _ in range(500):  # some 0.8 s on an H100, while the question is asked and answered
        torch.mm(left, right)
    try:
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
        name, clock, most, memory, power, driver = map(str.strip, answer.split(","))
        clocks = f"{clock} under load (at most {most}), memory {memory}, limit {power}"
        versions["driver"] = driver
    except (OSError, subprocess.CalledProcessError):
        name, clocks = torch.cuda.get_device_name(), "not known"
    torch.cuda.synchronize()
    return {"gpu": name, "clocks": clocks, "versions": ", ".join(f"{key} {value}" for key, value in versions.items())}
