"""The measurements that are repeated on every model; each gives a tidy table."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from scipy import stats
from torch import Tensor
from tqdm.auto import tqdm

from bhlib.comparisons import matched_compute, matched_difference, with_documents
from bhlib.evaluation import sweep
from bhlib.figures.families import by_level
from bhlib.figures.tables import to_csv, write_whole
from bhlib.measures import measure
from bhlib.pvalues import STATISTICS, DirichletNull
from bhlib.replication.models import REPLICATES
from bhlib.replication.routers import saturation_of, who_of
from bhlib.replication.subject import SHARED, Case, Subject
from bhlib.rules import BH, Rule, Threshold, TopK
from bhlib.specialization import observe_selection, summarize_specialization
from bhlib.tuning import tune_layer_weights

#: Sequences of a forward pass.
BATCH = 64 if torch.cuda.is_available() else 16

#: Concentrations of the Dirichlet null that the default was chosen among.
CONCENTRATIONS = (1, 2, 4, 8)

#: Measured beyond the loss.
MEASURED = ("threshold", "BH", "BH, fitted null", "threshold, norms", "threshold, norms, compensated")


#: The tables of a model.
TABLES = ("rules", "defaults", "measures", "saturation", "specialization", "who", "tuner")


def evaluate_model(
    name: str,
    folder: Path,
    target: Path,
    sequences: int | None = None,
    length: int = 512,
    tables: Sequence[str] = TABLES,
) -> list[str]:
    """Make every table of a model that is not there yet; returns the names of those that were made.

    Parameters
    ----------
    name : str
        In `REPLICATES`.
    folder : path
        Of the trained model.
    target : path
        ``target/name`` gets the tables.
    sequences, length : int
        As for `Subject`.
    tables : sequence of str
        Those to make, of `TABLES`.

    Raises
    ------
    ValueError
        If there is no replicate or no table of the name.
    """
    if name not in REPLICATES:
        raise ValueError(f"no replicate is called {name!r}; there are: {', '.join(REPLICATES)}.")
    if unknown := set(tables) - set(TABLES):
        raise ValueError(f"no table is called {min(unknown)!r}; there are: {', '.join(TABLES)}.")
    subject, made = Subject(folder, sequences, length), []
    compute: dict[str, Callable[[], pd.DataFrame]] = {
        "rules": lambda: rules_table(subject),
        "tuner": lambda: tuner_table(subject),
        "defaults": lambda: defaults_table(subject),
        "measures": lambda: measures_table(subject),
        "saturation": lambda: saturation_of(Path(folder) / "snapshots", subject, router_rules(subject)),
        "specialization": lambda: selection_table(subject),
        "who": lambda: who_of(subject, router_rules(subject)),
    }
    for what in tables:
        path = target / name / f"{what}.csv"
        if path.exists():
            continue
        table = compute[what]()
        if len(table):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, to_csv(table))
            made.append(what)
    return made


def _swept(subject: Subject, cases: Sequence[Case], text: Mapping[str, Tensor]) -> pd.DataFrame:
    """The table of a sweep over static top-k and these rules."""
    parts = [sweep(subject.model, subject.study.static_rules, text, batch_size=BATCH)]
    for options in {tuple(case.options): case.options for case in cases}.values():
        rules = {case.name: case.rule for case in cases if case.options.keys() == options.keys()}
        parts.append(sweep(subject.model, rules, text, batch_size=BATCH, **options))
    return pd.concat(parts, ignore_index=True)


def rules_table(subject: Subject, step: int = 2) -> pd.DataFrame:
    """Every family of `Subject.families` at every cost, on every step-th sequence of the test split.

    Returns
    -------
    pandas.DataFrame
        A row per family, cost and rival: ``family``, the ``wanted`` cost, its ``share`` of the model's own experts,
        ``level``, ``mean_k``, ``cost``, ``loss``; ``against``, "static top-k" at the same cost (`matched_compute`) or
        "threshold" (`matched_difference`), ``difference`` with ``low``, ``high`` and its standard error ``se`` over
        documents; ``sequences``, ``units``. Static top-k itself, ``against`` nothing, at each whole k.
    """
    cases = subject.cases(subject.families, subject.costs())
    text, documents = subject.text("test", step)
    frame = with_documents(_swept(subject, cases, text), documents)
    static = matched_compute(frame).set_index("rule")
    plain = [case.name for case in cases if case.family == "threshold"]
    rivals = {"static top-k": static}
    if len(plain) > 1:
        rivals["threshold"] = matched_difference(frame, [case.name for case in cases], plain).set_index("rule")
    units = int(static["units"].iloc[0])
    reach = stats.t.ppf(0.975, units - len(text))
    rows = []
    for case in cases:
        one = static.loc[case.name]
        facts = {"family": case.family, "wanted": case.wanted, "share": case.wanted / subject.top_k}
        facts |= {"level": case.rule.level, "mean_k": one["mean_k"], "cost": one.get("cost", one["mean_k"])}
        for rival, found in rivals.items():
            if case.family != rival:
                row = found.loc[case.name, ["difference", "low", "high"]].to_dict()
                row["se"] = (row["high"] - row["low"]) / 2 / reach
                rows.append(facts | {"loss": one["loss"], "against": rival} | row)
    for name, part in frame[frame["rule"].isin(subject.study.static_rules)].groupby("rule", sort=False):
        k = int(str(name).removeprefix("top-"))
        facts = {"family": "static top-k", "wanted": k, "share": k / subject.top_k, "mean_k": k, "cost": k}
        rows.append(facts | {"loss": part["loss"].mean(), "against": ""})
    return pd.DataFrame(rows).assign(sequences=sum(map(len, text.values())), units=units)


def tuner_table(subject: Subject) -> pd.DataFrame:
    """Weights of the layers for BH and the threshold at half of the experts: were they taken, and what they do on test.

    Returns
    -------
    pandas.DataFrame
        A row per ``method`` of `BH`: ``wanted``, ``share``; ``chosen``, whether `tune_layer_weights` took the weights
        on calibration text, with its ``calibration`` difference, ``calibration_low``, ``calibration_high``; and the
        difference on every second sequence of the test split of the rule with these weights, taken or not, from the
        rule without: ``test``, ``low``, ``high``; ``layer_weights``.
    """
    calibration, numbers = subject.text("calibration", 4)
    text, documents = subject.text("test", 2)
    (cost,) = subject.costs((0.5 if subject.top_k > 3 else 0.625,))
    thin, rows = subject.study.thin_logits, []
    for method in ("bh", "fixed"):
        plain = BH(method=method, max_k=subject.top_k)
        tuned = tune_layer_weights(subject.model, calibration, plain, cost, documents=numbers, batch_size=BATCH)
        weighted = replace(plain, layer_weights=tuned.layer_weights)
        rules: dict[str, Rule] = {"weighted": by_level(weighted.at, subject.study)(thin, cost)}
        around = [cost + more for more in (-0.3, 0.0, 0.3) if 1.02 < cost + more < subject.top_k]
        rules |= {f"plain {k:g}": by_level(plain.at, subject.study)(thin, k) for k in around}
        frame = with_documents(sweep(subject.model, rules, text, batch_size=BATCH), documents)
        row = matched_difference(frame, ["weighted"], [name for name in rules if name != "weighted"]).iloc[0]
        rows.append(
            {"method": method, "wanted": cost, "share": cost / subject.top_k, "chosen": tuned.high < 0}
            | {"calibration": tuned.difference, "calibration_low": tuned.low, "calibration_high": tuned.high}
            | {"test": row["difference"], "low": row["low"], "high": row["high"]}
            | {"layer_weights": " ".join(f"{weight:.4g}" for weight in tuned.layer_weights)}
        )
    return pd.DataFrame(rows)


def defaults_table(subject: Subject) -> pd.DataFrame:
    """The default's choices on every second sequence of the validation split: concentrations, statistics, and weights.

    The last where a model divides weights by their sum (`bhlib.weighting`): by that of the model's own top, the default
    of a patch, instead of that of what is kept.

    Returns
    -------
    pandas.DataFrame
        Rows of `matched_compute`, with ``family``, ``wanted`` and ``share`` for ``rule``.
    """
    text, documents = subject.text("validation", 2)
    rules: dict[str, Rule] = {
        f"BH, Dirichlet {c}": BH(pvalues=DirichletNull(c), max_k=subject.top_k) for c in CONCENTRATIONS
    }
    for statistic in STATISTICS:
        fitted = subject.study.fit_null(statistic=statistic)
        rules[f"BH, KDE of {statistic}"] = BH(pvalues=fitted, max_k=subject.top_k)
    rules["threshold"] = Threshold(max_k=subject.top_k)
    costs, cases = subject.costs((3 / 8, 4 / 8, 6 / 8)), []
    for name, rule in rules.items():
        for cost in costs:
            try:
                level = by_level(rule.at, subject.study)(subject.study.thin_logits, cost)
                cases.append(Case(name, cost, level, subject.weights_of(name)))
            except ValueError as reason:
                tqdm.write(f"{name}, {cost:g} is left out: {reason}")
    if subject.normalizes:
        cases += subject.cases(SHARED, costs)
    table = matched_compute(with_documents(_swept(subject, cases, text), documents))
    facts = {case.name: (case.family, case.wanted, case.wanted / subject.top_k) for case in cases}
    described = pd.DataFrame([facts[name] for name in table["rule"]], columns=["family", "wanted", "share"])
    return described.join(table.drop(columns=["rule", "joint_low", "joint_high"]))


def measures_table(subject: Subject) -> pd.DataFrame:
    """`bhlib.measures` of `MEASURED` against static top-k at half and three quarters of the model's own experts."""
    whole = [share for share in (0.5, 0.75) if share * subject.top_k >= 1.05]
    cases = subject.cases(MEASURED, subject.costs(whole))
    static = sorted({int(cost) for cost in subject.costs(whole)} | {subject.top_k})
    rules: dict[str, tuple[Rule, Mapping]] = {f"top-{k}": (TopK(k), {}) for k in static}
    rules |= {case.name: (case.rule, case.options) for case in cases}
    against = {case.name: f"top-{case.wanted:g}" for case in cases if float(case.wanted).is_integer()}
    text, documents = subject.text("test", 2)
    table = measure(subject.model, rules, text, documents, against=against, batch_size=BATCH)
    facts = {f"top-{k}": ("static top-k", float(k)) for k in static}
    facts |= {case.name: (case.family, case.wanted) for case in cases}
    described = pd.DataFrame([facts[name] for name in table["rule"]], columns=["family", "wanted"])
    return described.join(table.drop(columns="rule"))


def router_rules(subject: Subject) -> dict[str, Rule]:
    """Rules under which the router is looked at: the model's own top-k, and BH at three levels."""
    cases = subject.cases(["BH"], subject.costs((3 / 8, 4 / 8, 6 / 8)))
    own: dict[str, Rule] = {f"top-{subject.top_k}": TopK(subject.top_k)}
    return own | {f"{case.name} experts": case.rule for case in cases}


def selection_table(subject: Subject) -> pd.DataFrame:
    """`summarize_specialization` under each of `router_rules`, on ``sequences``, every fourth of the test split."""
    text, documents = subject.text("test", 4)
    parts = []
    for name, rule in router_rules(subject).items():
        seen = observe_selection(subject.model, text, documents, rule, batch_size=BATCH)
        parts.append(summarize_specialization(seen).assign(rule=name))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return pd.concat(parts, ignore_index=True).assign(sequences=sum(map(len, text.values())))
