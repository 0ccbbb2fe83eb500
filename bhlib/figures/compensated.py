"""The figure of what stands in for dropped experts: published rules with and without compensation, at counted cost."""

from collections.abc import Iterator
from typing import NamedTuple

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from bhlib.comparisons import percent_at_cost, with_documents
from bhlib.compensation import Compensation
from bhlib.evaluation import sweep
from bhlib.figures.about import about_of
from bhlib.figures.counted import mean_for
from bhlib.figures.drawing import ONE, Picture, error_bars, interval_caption, sample_caption
from bhlib.figures.families import AtMean, bh, fitted_families, rivals, weighted_families
from bhlib.figures.ingredients import fit_each, norms_of
from bhlib.figures.recent import recent, thin_text
from bhlib.figures.registry import figure
from bhlib.figures.study import Study
from bhlib.looks import BLACK
from bhlib.norms import OutputNorms
from bhlib.rival_fits import fit_alignment, fit_folding
from bhlib.rules import ExFold, Halving, Rule, TopK, families_of

__all__ = ["compute_compensated", "draw_compensated"]

#: Counted costs that rules are given levels for, where the model's own top-k is 8; others in proportion.
COSTS = (3.0, 4.0, 5.0, 6.0)

#: Rank of the map.
RANK = 16


class StandIn(NamedTuple):
    """What stands in for dropped experts: the rank of its map, None for nothing; and whether norms choose these."""

    rank: int | None
    by_norms: bool = False


STAND_INS = {
    "nothing": StandIn(None),
    "means": StandIn(0),
    f"means and a map of rank {RANK}": StandIn(RANK),
    "the same, chosen by norms,": StandIn(RANK, by_norms=True),
}

#: What is measured with experts that are chosen by weight times norm (`bhlib.norms`): rules that look at weights.
BY_NORMS = ("BH", "BH, fitted null", "fixed cut, fitted null", "threshold")

#: Over how many of the best experts halving normalizes: twice the model's own, as published.
REFERENCE = 2

#: Per cent of the model's own loss that count as little.
WITHIN = 0.5


def costs_of(study: Study) -> tuple[float, ...]:
    """`COSTS`, in the model's own experts."""
    return tuple(cost * study.top_k / 8 for cost in COSTS)


def _families(study: Study) -> dict[str, AtMean]:
    """Rules that can have any mean number of experts, in the order of tables."""
    fitted = fitted_families(study, study.fit_null(statistic="log_prob"))
    some = {"BH": bh(study), "BH, fitted null": fitted["BH, fitted null"]}
    return some | weighted_families(study) | rivals(study) | recent(study)


def _rules(
    study: Study, compensation: Compensation | None, norms: OutputNorms | None = None
) -> Iterator[tuple[str, str, Rule]]:
    """Family, name and rule of everything that is measured with a compensation, or with none."""
    for k in range(min(2, study.top_k - 1), study.top_k):
        yield "static top-k", f"static top-k, {k}", TopK(k)
    families = _families(study)
    if norms is not None:
        families = {name: (families | _fitted_to(study, norms))[name] for name in BY_NORMS}
    logits = study.thin_logits if norms is None else norms.shown(study.thin_logits)
    for name, make in families.items():
        wanted = [mean_for(compensation, norms, cost, study) for cost in costs_of(study)]
        for mean in study.mean_ks if name == "static per layer" else wanted:
            try:
                yield name, f"{name}, {mean:.3f} experts", make(logits, mean)
            except ValueError as reason:
                tqdm.write(f"{name}, {mean:.2f} experts, is left out: {reason}")


def _fitted_to(study: Study, norms: OutputNorms) -> dict[str, AtMean]:
    """Rules with a null that is fitted to what they are shown."""
    return fitted_families(study, fit_each(study, norms.shown(study.calibration_logits)))


def _corrected(study: Study) -> Iterator[tuple[str, str, Rule, Compensation | None]]:
    """Rivals that make up for what static top-k drops, each in its own way."""
    folding = fit_folding(study.model, study.fitting_text, batch_size=study.batch_size(study.window))
    static = {f"{k}": TopK(k) for k in range(min(2, study.top_k - 1), study.top_k)}
    alignments = fit_alignment(study.model, thin_text(study), static, batch_size=study.batch_size(study.window))
    for k, rule in static.items():
        reference = min(REFERENCE * study.top_k, study.num_experts)
        yield "halving", f"halving, {k}", Halving(rule, study.top_k, reference), None
        yield "ExFold", f"ExFold, {k}", ExFold(rule, study.top_k, **folding), None
        yield "LDA", f"LDA, {k}", rule, alignments[k]


def _measured(study: Study) -> tuple[pd.DataFrame, dict[tuple[str, str], list[str]]]:
    """All rules on `Study.test`, and the names of each family's by what stands in."""
    parts, names = [], {}
    options = {"cache": study.cache, "batch_size": 2 * study.batch_size(study.length)}

    def measure(stands_in: str, found: list[tuple[str, str, Rule]], **more: Compensation | OutputNorms | None) -> None:
        rules = {f"{name}; {stands_in}": rule for _, name, rule in found}
        given = {name: value for name, value in more.items() if value is not None}
        parts.append(sweep(study.model, rules, study.test, **options, **given))
        for (family, *_), rule in zip(found, rules, strict=True):
            names.setdefault((family, stands_in), []).append(rule)

    parts.append(sweep(study.model, {study.own: TopK(study.top_k)}, study.test, **options))
    for stands_in, (rank, by_norms) in STAND_INS.items():
        compensation = None if rank is None else study.compensation(rank)
        norms = norms_of(study) if by_norms else None
        found = list(_rules(study, compensation, norms))
        measure(stands_in, found, compensation=compensation, norms=norms)
    for family, name, rule, compensation in _corrected(study):
        measure("its own", [(family, name, rule)], compensation=compensation)
    return with_documents(pd.concat(parts, ignore_index=True), study.test_documents), names


def compute_compensated(study: Study) -> pd.DataFrame:
    """Loss above the model's own top-k at counted cost, of every rule with each thing that stands in; `Study.test`.

    Returns
    -------
    pandas.DataFrame
        The rows of `bhlib.comparisons.percent_at_cost`, with ``stands_in`` after ``family`` and ``mean_k`` after
        ``cost`` (of a rule's own row). ``stands_in`` is a name in `STAND_INS`, or "its own"
        for rivals that make up for what they drop in their own way. Levels, compensations, and what rivals are fitted
        with are of the calibration split.
    """
    frame, names = _measured(study)
    labels = {f"{family}; {stands_in}": (family, stands_in) for family, stands_in in names}
    families = {label: names[key] for label, key in labels.items() if len(names[key]) > 1}
    table = percent_at_cost(frame, families, study.own, costs_of(study), within=WITHIN)
    table.insert(1, "stands_in", [labels[label][1] for label in table["family"]])
    table["family"] = [labels[label][0] for label in table["family"]]
    means = frame.groupby("rule")["mean_k"].mean()
    table.insert(4, "mean_k", table["kind"].map(means))
    table["kind"] = table["kind"].where(table["kind"].isin(["at cost", "within"]), "measured")
    table["tokens"] = int(frame.loc[frame["rule"] == study.own, "tokens"].sum())
    return table


#: Texts of a level change with the mean that is asked for; where a curve is flat, so does the cost at which it falls.
_TOLERANCE = {"percent": 0.02, "low": 0.03, "high": 0.03, "cost": 0.02, "mean_k": 0.02}


@figure("compensated", compute_compensated, tolerance=_TOLERANCE, slow=True)
def draw_compensated(table: pd.DataFrame) -> Figure:
    """Loss above the model's own top-k against counted cost: a panel for what stands in, a line per family."""
    own = about_of(table).own
    measured = table[table["kind"] == "measured"]
    fig = Picture(figsize=(9.6, 5.6), layout="constrained")
    panels = fig.subplots(1, len(STAND_INS), sharex=True, sharey=True)
    limits = table.loc[table["kind"] == "at cost", "cost"]
    best = _best(table[(table["kind"] == "at cost") & (table["stands_in"] == "nothing")])
    for axes, stands_in in zip(panels, STAND_INS, strict=True):
        shown = measured[measured["stands_in"] == stands_in]
        if stands_in == "nothing":
            shown = pd.concat([shown, measured[measured["stands_in"] == "its own"]])
        else:
            axes.plot(best.index, best, color=BLACK, linewidth=6, alpha=0.15, label="least of all without")
        _draw_families(axes, shown)
        axes.axhline(WITHIN, color=BLACK, linewidth=0.8, linestyle=":")
        axes.set(xlabel="counted cost (experts per token and layer)", xlim=(limits.min() - 0.3, limits.max() + 0.3))
        axes.set_title(f"{stands_in} stands in" if stands_in == "nothing" else f"{stands_in} stand in", fontsize=8)
    shown = measured[measured["cost"].between(limits.min() - 0.3, limits.max() + 0.3)]
    panels[0].set(yscale="log", ylabel=f"loss above that of {own} (%)")
    panels[0].set_ylim(0.8 * max(shown["percent"].min(), 0.02), 1.25 * shown["percent"].max())
    low, high = panels[0].get_ylim()
    ticks = [tick for tick in (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20) if low < tick < high]
    panels[0].set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    panels[0].set_yticks([], minor=True)
    fig.suptitle(f"{sample_caption(table, 'test')}\n{interval_caption(table, ONE)}", fontsize=8)
    handles = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    fig.legend(handles.values(), handles.keys(), fontsize=7.5, loc="outside lower center", ncols=5)
    return fig


def _best(rows: pd.DataFrame) -> pd.Series:
    """The least percentage of all families, by cost."""
    return rows.groupby("cost")["percent"].min()


def _draw_families(axes: Axes, rows: pd.DataFrame) -> None:
    for family in families_of(rows["family"]):
        part = rows[(rows["family"] == family.name)].sort_values("cost")
        axes.errorbar(
            part["cost"], *error_bars(part, "percent"), label=family.name, **family.look._asdict(), markersize=3.5,
            linewidth=2 if family.name == "BH" else 1, capsize=1.5, zorder=3 if family.name == "BH" else 2,
        )  # fmt: skip
