"""How fast a patched OLMoE is on a GPU, beside the unpatched one and beside what the hardware allows.

    python -m bhlib bench speed --folder results            # everything, about 20 minutes on an H100
    python -m bhlib bench speed --only call --quick

What is compared runs in one process, in turns, round after round, so that a clock that drifts or a busy host hits all
alike; a row gives the median of the rounds and their quartiles. (A compiled model takes no turns: a patch that comes or
goes makes compiled code forget itself. The stage "call" compiles everything twice, one after the other.) Beside each
time stands the floor: the bytes that must be read and written over the bandwidth of a large copy, or the operations
over the rate of a large bfloat16 product, whichever takes longer, both measured in the same process. What fails, say
for want of memory, is a row that says why.

`bhlib.speed.goals` reads the table and needs no GPU.
"""

from pathlib import Path

import pandas as pd
import torch

from bhlib.speed.call import bench_call
from bhlib.speed.generation import bench_generate
from bhlib.speed.layer import bench_block, bench_router
from bhlib.speed.results import Results
from bhlib.speed.timing import ceilings, describe_machine
from bhlib.speed.whole_model import bench_decode, bench_prefill

#: What can be measured, in this order: functions of (results, limits, quick, name).
STAGES = {
    "call": bench_call,
    "router": bench_router,
    "block": bench_block,
    "decode": bench_decode,
    "prefill": bench_prefill,
    "generate": bench_generate,
}


def bench_speed(
    folder: str | Path, only: list[str] | None = None, quick: bool = False, name: str | None = None
) -> pd.DataFrame:
    """Measure, and write ``speed.csv`` after every row: a run that is cut short keeps what it has.

    Parameters
    ----------
    folder : str or Path
        Where the file goes. If it is there, the stages that are measured now take the place of their old rows, and the
        other rows stay.
    only : list of str, optional
        Some of `STAGES`.
    quick : bool
        Fewer rounds, no eager baseline, nothing compiled but `generate()`, for fewer rules.
    name : str, optional
        Checkpoint for the stages that run a whole model; OLMoE's shapes with random weights by default.

    Returns
    -------
    pandas.DataFrame
        See `bhlib.speed.results.COLUMNS`.
    """
    stages = list(STAGES if only is None else only)
    unknown = [stage for stage in stages if stage not in STAGES]
    if unknown:
        raise ValueError(f"no stage is called {', '.join(map(repr, unknown))}; there are: {', '.join(STAGES)}.")
    if not torch.cuda.is_available():
        raise RuntimeError("bench speed needs a CUDA device, and torch finds none: on the CPU, use bench call.")
    with torch.no_grad():
        limits = ceilings()
        results = Results(Path(folder) / "speed.csv", stages, describe_machine(), limits)
        for stage in stages:
            STAGES[stage](results, limits, quick, name)
    return results.table()
