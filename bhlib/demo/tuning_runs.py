"""Train the demo for fewer experts in many ways, and measure it, on GPUs: what the figure `training` shows.

    python bhlib/demo/tuning_runs.py --corpus .corpus --out RUNS --part 0 --of 4 &     # for each GPU, 0 to 3
    python bhlib/demo/tuning_table.py RUNS figures/training.csv

The corpus is that of `corpus.py`. First settings are chosen on the validation split (part E); the criterion is the
lowest validation loss of each method by itself, over grids of equal size. Then, with these, trainings are measured on
the test split: equally long ones of every weight (A), routers alone (B), elastic models and others for one number of
experts each (C), A and B three times as long, too; and on the validation split, shorter and longer ones (D). A training
is one cell; what is finished is read from `--out`, so that a run that was stopped goes on, in other parts if need be.
Routers for four experts are kept there; `router_18000000_st-all.safetensors` is what the demo has as its tuned router.

Forward and backward run in bfloat16 with float32 copies of the weights. The trained weights are measured in float32.
"""

import argparse
import json
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from train import Corpus
from tuning_gates import gated

from bhlib import RoutingPatch, load_demo, load_heldout
from bhlib.comparisons import with_documents
from bhlib.evaluation import evaluate
from bhlib.loading import heldout_sequence_documents
from bhlib.rules import BH, Rule, Threshold, TopK
from bhlib.training import LevelController, Tuned, settle, tune
from bhlib.training.loop import Training

LENGTH, ROWS = 512, 64
#: Domains are drawn as when the demo was trained, in a stream of random numbers of its own.
EXPONENT, DRAW = 0.7, 77
COLUMNS = ["rule", "domain", "sequence", "document", "tokens", "loss", "mean_k", "load_entropy"]
#: Used where nothing was chosen: peak of the learning rate and weight of the distillation.
SETTINGS = {
    "all BH": (3e-4, 1.0), "router BH": (1e-3, 1.0), "all top-4": (3e-4, 1.0), "all top-8": (1e-4, 0.0),
}  # fmt: skip
ELASTIC = (2, 7.5)  # no level of BH gives eight


def rule_of(method: str) -> Rule:
    """``"BH"``, ``"threshold"``, or ``"top-4"``."""
    return {"BH": BH, "threshold": Threshold}[method]() if method[:3] != "top" else TopK(int(method[4:]))


@contextmanager
def drawn(how: str) -> Iterator[None]:
    """Within the block an elastic training draws its means ``"low"``, as `bhlib.training` does, or ``"even"``."""

    def evenly(self, step, rows):
        generator = np.random.default_rng([self.plan.seed, step, self.state.process_index, 1])
        return generator.integers(len(self.plan.mean_ks), size=rows)

    own = Training.targets
    Training.targets = evenly if how == "even" else own
    try:
        yield
    finally:
        Training.targets = own


class Runs:
    """Models and texts, and what is done with them for a cell."""

    def __init__(self, corpus: Path):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        half = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.model, self.wide = load_demo(half)[0].to(self.device), load_demo()[0].to(self.device)
        self.corpus = Corpus(corpus, self.device, EXPONENT)
        self.calibration = load_heldout("calibration", LENGTH, 8)

    def train(self, cell: dict) -> Tuned:
        """Train the model as a cell says; notes time, memory, and the end of the training."""
        began, rows = time.time(), -(-cell["tokens"] // LENGTH)
        text = self.corpus.batch(cell["seed"], DRAW, rows, LENGTH - 1).cpu()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with gated(self.model, cell["gate"]), drawn(cell.get("draw", "even")):
            tuned = tune(
                self.model, text, rule_of(cell["method"]), mean_k=cell["k"], train=cell["train"], seed=cell["seed"],
                tokens=cell["tokens"], batch_size=ROWS, learning_rate=cell["lr"], distillation=cell["w"],
                progress=False,
            )  # fmt: skip
        cell["seconds"] = round(time.time() - began, 2)
        if self.device.type == "cuda":
            cell["peak_GB"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        end = tuned.history.tail(max(len(tuned.history) // 5, 1))
        cell |= {
            "train_k": end["mean_k"].mean(),
            "train_loss": end["cross_entropy"].mean(),
            "steps": len(tuned.history),
        }
        return tuned

    def rules(self, method: str, means: list, text: dict) -> dict[float, Rule]:
        """The rules of a method that give these means on a text, under the weights that are in the wide model now."""
        rule = rule_of(method)
        if rule.level_name is None:
            return {rule.max_k: rule}
        some = {domain: sequences[:: max(len(sequences) // 2, 1)] for domain, sequences in text.items()}
        controller = LevelController.on(self.wide, rule, means, some)
        with RoutingPatch(self.wide, rule, collect_stats=False, kernels=False) as patch:
            settle(patch, controller, text, batch_size=64, passes=3)
        return {mean: rule.at(level) for mean, level in zip(means, controller.levels, strict=True)}

    def on_validation(self, cell: dict, tuned: Tuned | None) -> None:
        """Loss on the validation split, at levels found on that split; of an elastic model a list of losses."""
        text = load_heldout("validation", LENGTH)
        wanted = [mean for mean in cell["at"] if mean < 8] if cell["k"] == ELASTIC else [cell["k"]]
        with tuned.in_place(self.wide) if tuned else nullcontext():
            rules = self.rules(cell["method"], wanted, text)
            frames = [evaluate(self.wide, text, rule, batch_size=64, kernels=False) for rule in rules.values()]
        losses = [float(np.average(frame["loss"], weights=frame["tokens"])) for frame in frames]
        if cell["k"] == ELASTIC:
            cell["valid_losses"] = losses
        else:
            (cell["valid_loss"],), (frame,) = losses, frames
            cell |= {"valid_k": frame["mean_k"].mean(), "entropy": frame["load_entropy"].mean()}

    def on_test(self, cell: dict, tuned: Tuned | None) -> pd.DataFrame:
        """Loss of every sequence of the test split, at levels that were found on the calibration split."""
        means = cell.get("at") or [round(cell["k"] * factor, 3) for factor in (0.94, 1.0, 1.06)]
        with tuned.in_place(self.wide) if tuned else nullcontext():
            rules = self.rules(cell["method"], [mean for mean in means if mean < 8], self.calibration)
            if 8 in means:
                rules[8] = TopK(8)
            text = load_heldout("test", LENGTH)
            frames = [
                evaluate(self.wide, text, rule, batch_size=64, kernels=False).assign(rule=f"{cell['name']}|{mean:g}")
                for mean, rule in rules.items()
            ]
        frame = pd.concat(frames, ignore_index=True)
        return with_documents(frame, heldout_sequence_documents("test", LENGTH))[COLUMNS]

    def save_router(self, tuned: Tuned, path: Path) -> None:
        """In bfloat16, with levels that were found on the calibration split under the float32 model."""
        tuned.weights = {name: value.to(torch.bfloat16) for name, value in tuned.weights.items()}
        with tuned.in_place(self.wide):
            rules = self.rules("BH", [3.5, 4.0, 4.5, 5.0], self.calibration)
        tuned.levels, tuned.rule = {mean: rule.level for mean, rule in rules.items()}, rules[4.0]
        tuned.save(path)


# -- which cells ---------------------------------------------------------------------------------------------------


def choice_cells(tokens: int) -> list[dict]:
    """Part E: learning rates and distillation for each method; how the decision gets a gradient; nothing."""
    every, least, routers = (3e-4, 1e-3, 1e-4), (1e-4, 3e-4, 3e-5), (1e-3, 3e-3, 3e-4)
    grid = [
        (train, method, lr, w, "kept")
        for train, method, rates, shares in (
            ("all", "BH", every, (1.0, 0.5)),
            ("router", "BH", routers, (1.0, 0.5)),
            ("all", "top-4", every, (1.0, 0.5)),
            ("all", "top-8", least, (0.0, 0.5)),  # with 1 it would be told to stay as it is
        )
        for lr in rates
        for w in shares
    ]
    gates = ("st-kept", "st-all", "penalty-0.01", "penalty-0.1")
    grid += [(train, "BH", lr, 1.0, gate) for train, lr in (("router", 1e-3), ("all", 3e-4)) for gate in gates]
    grid += [("none", method, None, None, "kept") for method in ("BH", "top-8", "top-4")]
    return [
        {"part": "E", "train": train, "method": method, "k": 8 if method == "top-8" else 4, "lr": lr, "w": w,
         "gate": gate, "seed": 1, "tokens": tokens, "name": f"E {train} {method} {lr} {w} {gate}"}
        for train, method, lr, w, gate in grid
    ]  # fmt: skip


def settings_from(cells: pd.DataFrame) -> dict[str, tuple[float, float]]:
    """For each method the learning rate and the distillation with the lowest validation loss."""
    done = cells[(cells["part"] == "E") & cells["valid_loss"].notna() & (cells["gate"] == "kept")]
    best = done[done["train"] != "none"].sort_values("valid_loss").groupby(["train", "method"]).first()
    return {" ".join(key): (float(row["lr"]), float(row["w"])) for key, row in best.iterrows()}


def final_cells(tokens: int, settings: dict[str, tuple[float, float]]) -> list[dict]:
    """Parts A to D, and the model without training (0), the most important first."""

    def cell(part, method, train, k, seed, tokens=tokens, gate="kept", **more):
        lr, w = settings.get(f"{train} {method.replace('threshold', 'BH')}", (None, None))
        name = f"{part} {train} {method} {'elastic' if k == ELASTIC else k} {tokens} s{seed}"
        name += "".join(f" {word}" for word in (gate, more.get("draw", "even")) if word not in ("kept", "even"))
        return {"part": part, "train": train, "method": method, "k": k, "lr": lr, "w": w, "gate": gate, "seed": seed,
                "tokens": tokens, "name": name} | more  # fmt: skip

    whole = {"at": [2, 3, 4, 5, 6, 7, 8]}
    cells = [cell("0", "BH", "none", 4, 0, 0, at=[2, 3, 4, 5, 6, 7]), cell("0", "threshold", "none", 4, 0, 0)]
    cells += [cell("0", f"top-{k}", "none", k, 0, 0) for k in range(2, 9)]
    others = []
    for seed in (1, 2, 3):
        cells += [cell("A", m, "all", 8 if m == "top-8" else 4, seed) for m in ("BH", "top-8", "top-4", "threshold")]
        cells += [cell("B", "BH", "router", k, seed) for k in (4, 5)]
        one = [cell("C", "BH", "all", ELASTIC, seed, **whole), *(cell("C", "BH", "all", k, seed) for k in (3, 5, 6, 7))]
        (cells if seed == 1 else others).extend([*one, cell("B", "threshold", "router", 4, seed)])
    long = tokens * 3
    for other in (tokens // 24, tokens // 12, tokens // 6, tokens // 3, long):
        for method, train, k in (("BH", "all", 4), ("top-8", "all", 8), ("BH", "router", 4), ("top-4", "all", 4)):
            cells += [cell("D", method, train, k, 1, other)]
    cells += [cell("C", "BH", "router", ELASTIC, 1, **whole), *others]
    cells += [cell("C", "BH", "all", ELASTIC, seed, draw="low", **whole) for seed in (2, 1, 3)]
    cells += [
        cell("D", "BH", train, 4, 1, other, "st-all") for other in (tokens // 3, tokens) for train in ("router", "all")
    ]
    for seed in (1, 2, 3):
        cells += [
            cell("A", m, "all", 8 if m == "top-8" else 4, seed, long) for m in ("BH", "top-8", "top-4", "threshold")
        ]
        cells += [cell("B", "BH", "router", k, seed, long, "st-all") for k in (4, 5)]
        cells += [cell("A", "BH", "all", 4, seed, long, "st-all"), cell("B", "BH", "router", 4, seed, long)]
        cells += [cell("B", "threshold", "router", 4, seed, long, "st-all")]
    return cells


# -- running -------------------------------------------------------------------------------------------------------


def run(runs: Runs, cells: list[dict], args: argparse.Namespace) -> None:
    """Train and measure the cells of this process, and write down each as it is finished."""
    told, losses = args.out / f"cells_{args.part}.csv", args.out / f"sequences_{args.part}.csv.xz"
    rows = pd.read_csv(told).to_dict("records") if told.exists() else []
    frames = [pd.read_csv(losses)] if losses.exists() else []
    others = [pd.read_csv(path).to_dict("records") for path in sorted(args.out.glob("cells_*.csv"))]
    finished = {row["name"] for row in [*rows, *chain(*others)] if not isinstance(row.get("error"), str)}
    for cell in cells[args.part :: args.of]:
        if cell["name"] in finished:
            continue
        try:
            tuned = None if cell["train"] == "none" else runs.train(cell)
            if cell["part"] in "ED" or (cell["part"] in "ABC" and cell["seed"] == (2 if cell["part"] == "C" else 1)):
                runs.on_validation(cell, tuned)
            if cell["part"] in "0ABC":
                frames.append(runs.on_test(cell, tuned))
                pd.concat(frames).to_csv(losses, index=False, float_format="%.6g")
            if cell["name"].startswith("B router BH 4 ") and cell["seed"] == 1:
                runs.save_router(tuned, args.out / f"router_{cell['tokens']}_{cell['gate']}.safetensors")
        except Exception as error:
            traceback.print_exc()
            cell["error"] = f"{type(error).__name__}: {error}"[:300]
        rows.append(
            {name: json.dumps(value) if isinstance(value, (tuple, list)) else value for name, value in cell.items()}
        )
        pd.DataFrame(rows).to_csv(told, index=False)
        print({name: value for name, value in cell.items() if name != "at"}, flush=True)


def wait_for_all(args: argparse.Namespace) -> pd.DataFrame:
    """The finished cells of all processes, once each has said that its choice is through."""
    (args.out / f"chosen_{args.part}.done").touch()
    while not all((args.out / f"chosen_{part}.done").exists() for part in range(args.of)):
        time.sleep(0.5)
    return pd.concat([pd.read_csv(path) for path in sorted(args.out.glob("cells_*.csv"))], ignore_index=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=Path(".corpus"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--part", type=int, default=0, help="number of this process")
    parser.add_argument("--of", type=int, default=1, help="how many there are")
    parser.add_argument(
        "--tokens", type=int, default=6_000_000, help="of a training that is measured on the test split"
    )
    parser.add_argument("--choice-tokens", type=int, default=2_000_000, help="of one that settings are chosen by")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    runs = Runs(args.corpus)
    run(runs, choice_cells(args.choice_tokens), args)
    settings = SETTINGS | settings_from(wait_for_all(args))
    print("chosen:", settings, flush=True)
    run(runs, final_cells(args.tokens, settings), args)


if __name__ == "__main__":
    main()
