"""The table of the figure `training`, from what the runs of `tuning_runs.py` have left in a folder.

    python bhlib/demo/tuning_table.py RUNS figures/training.csv

Losses are means over seeds, and intervals are over documents. Two trainings are compared at the same mean number of
experts: where one was measured at several levels, its loss is read off a curve through them, a cubic spline in the
logarithm of the mean, as `bhlib.comparisons.matched_difference` does.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.interpolate import CubicSpline

from bhlib.comparisons import Resamples, resample

#: What is trained, in words; and how the decision got a gradient, where not through the kept weights alone, or what
#: was added (`tuned_stand_ins.py`).
WORDS = {"none": "untuned", "router": "routers", "all": "all weights"}
GATES = {"kept": "", "st-all": ", gates", "stand-ins": ", stand-ins"}

#: What a measurement on the validation split is for, by the part of the cell; of the others, loss against tokens.
KINDS = {"E": "choice", "C": "elastic"}

#: Rows of the comparison: what, rule, experts, against what, rule; elastic models are compared in a loop.
PAIRS = (
    ("all weights", "BH", 4, "all weights", "top-8"),
    ("all weights", "BH", 4, "all weights", "top-4"),
    ("all weights", "BH", 4, "all weights", "threshold"),
    ("all weights", "BH", 4, "untuned", "BH"),
    ("all weights", "BH", 4, "untuned", "top-8"),
    ("all weights", "threshold", 4, "all weights", "top-8"),
    ("all weights", "top-4", 4, "all weights", "top-8"),
    ("all weights", "top-8", 8, "untuned", "top-8"),
    ("routers", "BH", 4, "untuned", "BH"),
    ("routers", "BH", 4, "untuned", "top-8"),
    ("routers", "BH", 4, "routers", "threshold"),
    ("routers", "BH", 5, "untuned", "BH"),
    ("routers", "BH", 5, "untuned", "top-8"),
    ("routers", "threshold", 4, "untuned", "top-8"),
    ("all weights, gates", "BH", 4, "all weights", "top-8"),
    ("all weights, gates", "BH", 4, "all weights", "BH"),
    ("routers, gates", "BH", 4, "untuned", "BH"),
    ("routers, gates", "BH", 4, "routers", "BH"),
    ("routers, gates", "BH", 4, "routers, gates", "threshold"),
    ("routers, gates", "BH", 5, "untuned", "BH"),
    ("routers, gates", "BH", 5, "untuned", "top-8"),
    ("routers, stand-ins", "threshold", 4, "untuned", "BH"),
    ("routers, stand-ins", "threshold", 5, "untuned", "top-8"),
    ("routers, stand-ins", "BH", 4, "untuned", "BH"),
    ("routers, stand-ins", "BH", 5, "untuned", "top-8"),
)


class Measured:
    """Losses of all trainings on the same sequences: means over seeds, and resamples of documents.

    Parameters
    ----------
    sequences : pandas.DataFrame
        A row per rule and sequence; ``rule`` is the name of a run, its seed and the level, as `tuning_runs.py` has it.
    cells : pandas.DataFrame
        A row per run.
    """

    def __init__(self, sequences: pd.DataFrame, cells: pd.DataFrame) -> None:
        told = cells.set_index("name")
        runs = sequences["rule"].str.rpartition("|")
        elastic = runs[0].str.contains(" elastic ")
        draws = np.where(told.loc[runs[0], "draw"] == "low", "elastic", "elastic, even")
        self.frame = sequences.assign(
            what=[WORDS[row.train] + GATES[row.gate] for row in told.loc[runs[0], ["train", "gate"]].itertuples()],
            method=told.loc[runs[0], "method"].to_numpy(),
            k=np.where(elastic, draws, told.loc[runs[0], "k"].astype(str)),
            seed=told.loc[runs[0], "seed"].to_numpy(),
            level=runs[2].astype(float),
        )
        self.series = list(self.frame[["what", "method", "k"]].drop_duplicates().itertuples(index=False, name=None))
        first = self.frame[self.frame["rule"] == self.frame["rule"].iloc[0]].sort_values(["domain", "sequence"])
        self.order = pd.MultiIndex.from_frame(first[["domain", "sequence"]])
        self.drawn: Resamples = resample(first["domain"], first["document"], size=first["tokens"])

    def seeds(self, series: tuple) -> list[int]:
        """The seeds of a series."""
        return sorted(self._part(series)["seed"].unique())

    def _part(self, series: tuple) -> pd.DataFrame:
        return self.frame[(self.frame[["what", "method", "k"]] == list(series)).all(axis=1)]

    def points(self, series: tuple, seed: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Mean number of experts and loss [1 + resamples, levels] of a series, of one seed or the mean of all."""
        part = self._part(series)
        if seed is not None:
            part = part[part["seed"] == seed]
        wide = part.groupby(["level", "domain", "sequence"])[["mean_k", "loss"]].mean()
        columns = [self.drawn.means(wide[name].unstack(0).loc[self.order]) for name in ("mean_k", "loss")]
        return columns[0], columns[1]

    def at(self, series: tuple, mean_k: float, seed: int | None = None) -> np.ndarray:
        """Loss [1 + resamples] at a mean number of experts."""
        experts, loss = self.points(series, seed)
        if experts.shape[1] > 1:  # the model's own rule, on elastic weights, is no point of a curve of levels
            inside = experts[0] < 7.99 if mean_k < 7.99 else experts[0] > 7.99
            experts, loss = experts[:, inside], loss[:, inside]
        if experts.shape[1] == 1:
            return loss[:, 0]
        pairs = zip(np.log(experts), loss, strict=True)
        return np.array([CubicSpline(nodes, curve)(np.log(mean_k)) for nodes, curve in pairs])

    def compare(self, one: tuple, other: tuple, mean_k: float) -> dict[str, object]:
        """A row: the difference of two series at a mean number of experts."""
        first, second = self.at(one, mean_k), self.at(other, mean_k)
        difference, percent = first - second, 100 * (first / second - 1)
        low, high = self.drawn.interval(difference)
        percent_low, percent_high = self.drawn.interval(percent)
        seeds = [seed for seed in self.seeds(one) if seed in self.seeds(other) or other[0] == "untuned"]
        if one[0] == "untuned":
            seeds = [0]
        untuned = 0 if other[0] == "untuned" else None
        each = [
            self.at(one, mean_k, seed)[0] - self.at(other, mean_k, seed if untuned is None else untuned)[0]
            for seed in seeds
        ]
        return {
            "kind": "difference", "what": one[0], "method": one[1], "k": one[2], "mean_k": mean_k, "loss": first[0],
            "versus": " ".join(other[:2]), "difference": difference[0], "low": low, "high": high,
            "percent": percent[0], "percent_low": percent_low, "percent_high": percent_high, "seeds": len(seeds),
            "seed_sd": np.std(each, ddof=1) if len(each) > 1 else np.nan,
        }  # fmt: skip

    def curve(self, series: tuple) -> Iterator[dict[str, object]]:
        """A row for each level of a series that was measured at all its levels for their own sake, else for its own."""
        experts, loss = self.points(series)
        wanted = range(len(experts[0]))
        if series[0] != "untuned" and not series[2].startswith("elastic"):
            wanted = [int(np.abs(experts[0] - float(series[2])).argmin())]  # type: ignore[assignment]
        for index in wanted:
            low, high = self.drawn.interval(loss[:, index])
            yield {
                "kind": "curve", "what": series[0], "method": series[1], "k": series[2], "mean_k": experts[0, index],
                "loss": loss[0, index], "low": low, "high": high, "seeds": len(self.seeds(series)),
            }  # fmt: skip


def make_table(cells: pd.DataFrame, sequences: pd.DataFrame | None = None) -> pd.DataFrame:
    """Curves and differences on the test split, loss against tokens and the choice of settings on the validation split.

    Without `sequences`, of runs of which no part that is measured on the test split is through, the latter alone.

    Returns
    -------
    pandas.DataFrame
        ``kind`` ("curve", "difference", "tokens", "choice"), ``what`` is trained, ``method`` (the rule), ``k`` (what it
        was trained for), ``mean_k``, ``loss`` (nats per token), ``low``, ``high`` (95 %, over documents; of a
        difference its own), ``versus``, ``difference``, ``percent`` with its interval, ``seeds``, ``seed_sd`` (standard
        deviation of the difference over seeds), ``split``, ``tokens`` (trained on), ``learning_rate``,
        ``distillation``, ``gate``, ``units``, ``sequences``, ``measured_tokens``.
    """
    cells = cells[cells["error"].isna()] if "error" in cells else cells
    if sequences is None:
        return pd.DataFrame(validation_rows(cells))
    told, parts = cells.set_index("name")["tokens"], []
    runs = told.loc[sequences["rule"].str.rpartition("|")[0]].to_numpy()
    for trained in sorted(cells.loc[cells["part"] == "A", "tokens"].unique()):
        measured = Measured(sequences[(runs == trained) | (runs == 0)], cells)
        one = measured.frame[measured.frame["rule"] == measured.frame["rule"].iloc[0]]
        size = {"units": measured.drawn.units, "sequences": len(one), "measured_tokens": int(one["tokens"].sum())}
        series = [s for s in measured.series if s[0] != "untuned" or not parts]  # that it is untuned is told once
        rows = [row for one in series for row in measured.curve(one)] + list(_differences(measured))
        parts.append(pd.DataFrame(rows).assign(split="test", tokens=trained, **size))
    return pd.concat([*parts, pd.DataFrame(validation_rows(cells))], ignore_index=True)


def _differences(measured: Measured) -> Iterator[dict[str, object]]:
    """Rows of `PAIRS` that were measured; elastic models against those for one number of experts, and none."""

    def find(what: str, method: str, k: object) -> tuple | None:
        near = [s for s in measured.series if s[:2] == (what, method) and s[2] in (str(k), f"{k}.0")]
        return near[0] if near else None

    for what, method, k, versus, rival in PAIRS:
        whole = rival[4:] if rival.startswith("top-") else 4 if versus == "untuned" else k
        one, other = find(what, method, k), find(versus, rival, whole)
        if one and other:
            yield measured.compare(one, other, float(k))
    for what, draw in (("all weights", "elastic"), ("all weights", "elastic, even"), ("routers", "elastic, even")):
        elastic = find(what, "BH", draw)
        for k in (3, 4, 5, 6, 7, 8) if elastic else ():
            single = find("all weights", "top-8" if k == 8 else "BH", k) if what == "all weights" else None
            untuned = find("untuned", "top-8" if k == 8 else "BH", 8 if k == 8 else 4)
            yield from (measured.compare(elastic, other, float(k)) for other in (single, untuned) if other)


def validation_rows(cells: pd.DataFrame) -> list[dict[str, object]]:
    """A row for each training that was measured on the validation split, which keeps no interval.

    An elastic one has a row for each number of experts.
    """
    done = cells[cells["valid_loss"].notna()]
    if "valid_losses" in cells:
        elastic = cells[cells["valid_losses"].notna()]
        read = elastic.assign(
            valid_loss=elastic["valid_losses"].map(json.loads),
            valid_k=elastic["at"].map(lambda text: [k for k in json.loads(text) if k < 8]),
            k=np.where(elastic["draw"] == "low", "elastic", "elastic, even"),
        )
        done = pd.concat([done, read.explode(["valid_loss", "valid_k"])])
    return [
        {
            "kind": KINDS.get(row.part, "tokens"), "split": "validation", "what": WORDS[row.train],
            "method": row.method, "k": row.k, "mean_k": row.valid_k, "loss": row.valid_loss, "seeds": 1,
            "tokens": 0 if row.train == "none" else row.tokens, "learning_rate": row.lr, "distillation": row.w,
            "gate": row.gate,
        }
        for row in done.itertuples()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder with cells*.csv and sequences*.csv.xz")
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    cells = pd.concat([pd.read_csv(path) for path in sorted(args.runs.glob("cells*.csv"))], ignore_index=True)
    found = [pd.read_csv(path) for path in sorted(args.runs.glob("sequences*.csv.xz"))]
    table = make_table(cells, pd.concat(found) if found else None)
    table.to_csv(args.out, index=False, float_format="%.6g", lineterminator="\n")
    shown = ["kind", "what", "method", "mean_k", "loss", "learning_rate", "distillation", "gate"]
    print(table[[name for name in shown if name in table]].to_string(index=False, float_format="{:.4g}".format))


if __name__ == "__main__":
    main()
