"""From the tables of each model to those that figures are drawn from.

python -m bhlib.replication gather OUT figures       # OUT/NAME/*.csv, as `evaluate` writes them
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from bhlib.figures.tables import to_csv, write_whole
from bhlib.loading import DEMO
from bhlib.replication.mixed import who_gets_many
from bhlib.replication.models import REPLICATES

#: Facts of a model that differences are set against.
SIZES = ("parameters", "layers", "tokens", "experts", "top_k")


def gather(source: Path, target: Path) -> list[str]:
    """Write every table that there is something for; returns their names.

    Parameters
    ----------
    source : path
        A folder for each model, named as in `REPLICATES`.
    target : path
        Folder of the figures' tables.
    """
    facts = models_table(source)
    tables = {
        "replicates": facts,
        "generalization": _labelled(source, "rules").merge(facts[["model", *SIZES]], on="model"),
        "defaults_again": defaults_table(source),
        "beyond_loss": _labelled(source, "measures"),
        "router_saturation": saturation_table(source),
        "specialization": specialization_table(source),
        "who_gets_many": who_gets_many(_labelled(source, "who")),
    }
    written = []
    for name, table in tables.items():
        if len(table):
            write_whole(target / f"{name}.csv", to_csv(table))
            written.append(name)
    return written


def _read(source: Path, what: str) -> Iterator[tuple[str, pd.DataFrame]]:
    """The tables of one kind, model by model in the order of `REPLICATES`."""
    for name in REPLICATES:
        for ending in (".csv", ".csv.gz"):
            path = source / name / f"{what}{ending}"
            if path.exists():
                yield name, pd.read_csv(path)


def _labelled(source: Path, what: str) -> pd.DataFrame:
    """All of them in one table, with the labels of the models in its first column."""
    parts = [table.drop(columns="model", errors="ignore").assign(model=REPLICATES[name].label)
             for name, table in _read(source, what)]  # fmt: skip
    if not parts:
        return pd.DataFrame(columns=["model"])
    table = pd.concat(parts, ignore_index=True)
    return table[["model", *table.columns.drop("model")]]


def models_table(source: Path) -> pd.DataFrame:
    """What the models are: sizes, training, loss on the test split at their own top-k, and the command.

    Returns
    -------
    pandas.DataFrame
        A row per model with tables in `source`: ``model``; ``parameters``, ``layers``, ``hidden``, ``width``,
        ``experts``, ``top_k``, ``norm_topk_prob``, ``load_balance``, ``seed``; ``steps``, ``tokens``, ``seconds`` on
        ``device``; ``loss``, the mean of the domains' in nats per token; ``command``.
    """
    rows = []
    for name, replicate in REPLICATES.items():
        path = (DEMO if name == "demo" else source / name) / "metrics.json"
        if not (source / name).exists() or not path.exists():
            continue
        metrics = json.loads(path.read_text(encoding="utf-8"))
        given, trained = metrics["arguments"], metrics["training"]
        top_k = given.get("top_k", 8)
        rows.append(
            {"model": replicate.label, "parameters": metrics["parameters"], "layers": given["layers"]}
            | {"hidden": given["hidden"], "width": given["width"], "experts": given.get("experts", 64)}
            | {"top_k": top_k, "norm_topk_prob": given.get("norm_topk_prob", False)}
            | {"load_balance": given.get("load_balance", 0.01), "seed": given["seed"]}
            | {key: trained[key] for key in ("steps", "tokens", "seconds")}
            | {"device": metrics["device"], "loss": metrics["test"]["loss"][str(top_k)]["mean"]}
            | {"command": replicate.command(name)}
        )
    return pd.DataFrame(rows)


def defaults_table(source: Path) -> pd.DataFrame:
    """The default chosen again: what each choice does on each model.

    Returns
    -------
    pandas.DataFrame
        ``model``; ``choice``: "concentration", "statistic" or "weights", on the validation split against static top-k,
        or "layer weights", on the test split against the same rule without; ``variant``; ``share`` of the model's own
        experts; ``difference`` with ``low`` and ``high``; ``sequences`` and their documents, ``units``, where the
        model's table has them; ``chosen``, whether the tuner took its weights on calibration text.
    """
    tried = _labelled(source, "defaults")
    parts = []
    if len(tried):
        fixed = tried["family"].str.contains("Dirichlet")
        tried["choice"] = np.where(fixed, "concentration", "statistic")
        tried.loc[tried["family"] == "threshold", "choice"] = "threshold"
        tried.loc[tried["family"].str.contains("shares"), "choice"] = "weights"
        parts.append(tried.rename(columns={"family": "variant"}).assign(split="validation"))
    tuned = _labelled(source, "tuner")
    if len(tuned):
        names = tuned["method"].map({"bh": "BH", "fixed": "threshold"})
        tuned = tuned.assign(choice="layer weights", variant=names, split="test", difference=tuned["test"])
        parts.append(tuned)
    columns = ["model", "choice", "variant", "split", "wanted", "share", "difference", "low", "high"]
    columns += ["sequences", "units", "chosen"]
    return pd.concat(parts, ignore_index=True).reindex(columns=columns) if parts else pd.DataFrame(columns=columns)


def saturation_table(source: Path) -> pd.DataFrame:
    """Router saturation by rule, layer and step, means over ``domains`` with Student's intervals over these."""
    table = _labelled(source, "saturation")
    if not len(table):
        return table
    by = ["model", "rule", "step", "layer"]
    grouped = table.groupby(by, sort=False)["saturation"]
    reach = stats.t.ppf(0.975, grouped.size() - 1) * grouped.sem()
    found = pd.DataFrame({"saturation": grouped.mean(), "low": grouped.mean() - reach, "high": grouped.mean() + reach})
    others = table.groupby(by, sort=False)[["chance", "mean_k"]].mean()
    return found.join(others).assign(domains=grouped.size()).reset_index()


def specialization_table(source: Path) -> pd.DataFrame:
    """How specialized experts are under each rule, layer by layer (`bhlib.specialization.summarize_specialization`)."""
    return _labelled(source, "specialization")
