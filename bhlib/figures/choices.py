"""Figures of what was tried and chosen on the validation split: which statistic, which null, which rule."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from bhlib.comparisons import matched_compute, with_documents
from bhlib.evaluation import sweep
from bhlib.evidence import compare_at_equal_cost
from bhlib.figures.about import about_of
from bhlib.figures.drawing import (
    ALL,
    Picture,
    heat_map,
    interval_caption,
    joint_bars,
    sample_caption,
    signed,
    signed_ticks,
)
from bhlib.figures.families import tried_families
from bhlib.figures.registry import figure
from bhlib.figures.study import Study
from bhlib.looks import BLACK, BLUE, GREEN, ORANGE, PINK, RED, SKY
from bhlib.pvalues import NULLS, STATISTICS, DirichletNull

__all__ = [
    "compute_families_tried",
    "compute_statistic_matters",
    "draw_families_tried",
    "draw_statistic_matters",
]


def compute_statistic_matters(study: Study) -> pd.DataFrame:
    """Loss of BH with one kind of null and different statistics, against static top-k with as many experts.

    At the mean numbers of experts of other figures, but for the smallest and the largest.
    """
    makers = {"KDE of all, logit": study.fit_null(statistic="logit", exclude_top=0)}
    makers |= {f"KDE, {name}": study.fit_null(statistic=name) for name in STATISTICS}
    makers |= {"Dirichlet": DirichletNull()}
    return compare_at_equal_cost(
        study.model, makers, study.calibration_logits, study.validation,
        mean_experts=study.mean_ks[1:-1], static_k=tuple(range(int(study.mean_ks[0]), study.top_k + 1)),
        max_k=study.top_k, documents=study.validation_documents,
        cache=study.cache, batch_size=study.batch_size(study.window),
    )  # fmt: skip


@figure("statistic_matters", compute_statistic_matters)
def draw_statistic_matters(table: pd.DataFrame) -> Figure:
    """Loss above that of static top-k with the same mean number of experts, a line per statistic."""
    fig = Picture(figsize=(7.0, 3.6), layout="constrained")
    axes = fig.subplots()
    looks = dict(zip(table["pvalues"].unique(), (RED, ORANGE, BLUE, GREEN, SKY, PINK), strict=False))
    for (name, color), marker in zip(looks.items(), "osD^vP", strict=False):
        part = table[table["pvalues"] == name].sort_values("mean_k")
        axes.errorbar(
            part["mean_k"], *joint_bars(part, scale=1), color=color, marker=marker, markersize=5, capsize=2, label=name
        )
    axes.axhline(0, color=BLACK, linewidth=1)
    axes.annotate("static top-k", (table["mean_k"].min(), 0.0007), fontsize=8)
    axes.set_yscale("symlog", linthresh=0.02, linscale=1.2)
    signed_ticks(axes, [-0.02, -0.01, 0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4])
    axes.set(xlabel="experts per token and layer (mean)", ylabel="loss above static top-k (nats per token)")
    axes.set_title(
        f"{sample_caption(table, 'validation')}\n{interval_caption(table, ALL)}\n"
        f"KDE nulls leave out the top {about_of(table).top_k} of each token, except “of all”", fontsize=8,
    )  # fmt: skip
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), title="null and statistic", title_fontsize=8)
    return fig


def compute_families_tried(
    study: Study, mean_k: tuple[float, ...] | None = None, length: int | None = None, per_domain: int | None = None
) -> pd.DataFrame:
    """Every family that was tried, on the validation split: loss minus static top-k. Takes half an hour.

    At every other mean number of experts of other figures, on half as many sequences of a domain, if not told else.
    """
    mean_k, length, per_domain = mean_k or study.mean_ks[::2], length or study.length, per_domain or study.few
    fitted = {
        label: study.fit_null(null=name, **options)
        for name, entry in NULLS.items()
        if entry.needs_calibration
        for label, options in entry.tried.items()
    }
    rules, wanted = study.static_rules, {}
    for name, family in tried_families(fitted, study).items():
        for k in mean_k:
            try:
                rules[f"{name}, k = {k:g}"] = family(study.thin_logits, k)
            except ValueError:
                continue  # no level of this family gives this many
            wanted[f"{name}, k = {k:g}"] = name, k
    text = study.text.sequences("validation", length, per_domain)
    frame = sweep(study.model, rules, text, cache=study.cache, batch_size=study.batch_size(length))
    frame = with_documents(frame, study.text.documents("validation", length, per_domain))
    matched = matched_compute(frame)
    matched.insert(0, "family", [wanted[rule][0] for rule in matched["rule"]])
    matched.insert(1, "wanted_k", [wanted[rule][1] for rule in matched["rule"]])
    return matched.drop(columns="rule").assign(tokens=int(frame.loc[frame["rule"] == study.own, "tokens"].sum()))


@figure("families_tried", compute_families_tried, slow=True)
def draw_families_tried(table: pd.DataFrame) -> Figure:
    """A heat map: families by rows, wanted mean number of experts by columns, with numbers and intervals."""
    order = table[table["wanted_k"] == table["wanted_k"].median()].set_index("family")["difference"].sort_values().index
    order = [*order, *table.loc[~table["family"].isin(order), "family"].unique()]
    fig = Picture(figsize=(7.2, 0.9 + 0.24 * len(order)), layout="constrained")
    axes = fig.subplots()
    half = (table["joint_high"] - table["joint_low"]) / 2
    words = [f"{signed(1000 * d, '.1f')} ± {1000 * h:.1f}" for d, h in zip(table["difference"], half, strict=True)]
    shown, text = (
        table.assign(shown=cells).pivot(index="family", columns="wanted_k", values="shown").loc[order]
        for cells in (np.arcsinh(200 * table["difference"]), words)
    )
    shown.columns = [f"k = {k:g}" for k in shown.columns]
    heat_map(axes, shown, text, cmap="PuOr_r", vmin=-3.5, vmax=3.5, alpha=0.6, cbar=False)
    axes.set_xlabel("mean experts per token and layer that the level was chosen for (on calibration text)")
    axes.set_title(
        f"loss minus static top-k at the same mean, nats / 1000; {sample_caption(table, 'validation')}\n"
        f"± half of the 95 % bootstrap interval over {table['units'].iloc[0]} documents that holds for all at once",
        fontsize=8,
    )
    return fig
