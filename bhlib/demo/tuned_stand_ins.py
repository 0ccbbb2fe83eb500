"""What the demo's tuned routers give together with what stands in for a dropped expert, on the test split, on a CPU.

    python bhlib/demo/tuned_stand_ins.py RUNS     # twenty minutes; then tuning_table.py, as after the runs

Only the routers were trained, and without stand-ins. Norms, means and maps are fitted under them on the calibration
split, as for the model itself (`bhlib.replication.subject`). The cost is counted, stand-ins included, and chosen a
little below the whole number that it is compared at, so that it is not above. With ``--split validation`` losses are
printed and nothing is written.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
from tuning_runs import COLUMNS

from bhlib import load_demo
from bhlib.comparisons import with_documents
from bhlib.evaluation import evaluate
from bhlib.replication.subject import Subject

#: How a family is called in the table of the trainings.
METHODS = {"threshold, norms, compensated": "threshold", "BH, fitted null, norms, compensated": "BH"}

#: Counted costs that are wanted, by the number of experts that a row is for.
COSTS = {4: 3.95, 5: 4.95}

#: Length of the training of the routers.
TOKENS = 18_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--split", choices=["validation", "test"], default="test")
    args = parser.parse_args()
    with TemporaryDirectory() as folder:
        load_demo(tuned_router=True)[0].save_pretrained(folder)
        subject = Subject(folder)
    text, documents = subject.text(args.split)
    cells, frames = [], []
    for family, method in METHODS.items():
        for k, cost in COSTS.items():
            (case,) = subject.cases([family], [cost])
            frame = evaluate(subject.model, text, case.rule, batch_size=16, **case.options)
            name = f"S router {method} {k} {TOKENS} s1 stand-ins"
            cells.append(
                {"part": "S", "train": "router", "method": method, "k": k, "seed": 1, "tokens": TOKENS, "name": name}
                | {"gate": "stand-ins"}
            )
            frames.append(frame.assign(rule=f"{name}|{k}", mean_k=frame["cost"]))
            loss = np.average(frame["loss"], weights=frame["tokens"])
            print(f"{name}: {loss:.4f} at a cost of {frame['cost'].mean():.3f}", flush=True)
    if args.split != "test":
        return
    table = with_documents(pd.concat(frames, ignore_index=True), documents)[COLUMNS]
    pd.DataFrame(cells).to_csv(args.runs / "cells_stand_ins.csv", index=False)
    table.to_csv(args.runs / "sequences_stand_ins.csv.xz", index=False, float_format="%.6g")


if __name__ == "__main__":
    main()
