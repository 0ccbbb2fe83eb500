"""Figures of what fewer experts cost: loss at matched compute, of BH and of what people use."""

import pandas as pd
from matplotlib.figure import Figure

from bhlib import comparisons
from bhlib.figures.about import DEMO, about_of
from bhlib.figures.drawing import (
    ALL,
    ONE,
    Picture,
    error_bars,
    interval_caption,
    joint_bars,
    sample_caption,
    signed_ticks,
)
from bhlib.figures.registry import figure
from bhlib.figures.study import Study
from bhlib.figures.sweeps import comparison, whole_comparison
from bhlib.figures.tables import FREE
from bhlib.looks import BLACK
from bhlib.rules import RuleFamily, families_of

__all__ = [
    "compute_loss_vs_experts",
    "compute_matched_compute",
    "compute_whole_test_split",
    "draw_loss_vs_experts",
    "draw_matched_compute",
    "draw_whole_test_split",
]


def _series(family: RuleFamily) -> dict:
    """How `errorbar` draws a family: BH bolder, and over the others."""
    first = family.name == "BH"
    size = {"markersize": 4.5, "linewidth": 2 if first else 1.2, "capsize": 2, "zorder": 3 if first else 2}
    return family.look._asdict() | size


def compute_loss_vs_experts(study: Study) -> pd.DataFrame:
    """Loss of every rule on the test split, and its difference from the model's own top-k."""
    frame = comparison(study)
    summary = comparisons.summarize(frame, ["family", "rule"])
    summary.insert(2, "level", summary["rule"].map(frame.groupby("rule")["level"].first()))
    against = pd.DataFrame([comparisons.paired_difference(frame, rule, study.own) for rule in summary["rule"]])
    return pd.concat([summary, against[["difference", "low", "high"]]], axis=1)


@figure("loss_vs_experts", compute_loss_vs_experts, tolerance={"seconds": FREE, "rows": 300})
def draw_loss_vs_experts(table: pd.DataFrame) -> Figure:
    """Loss minus the loss of the model's own top-k, against experts per token: every rule."""
    own, top_k = about_of(table).own, about_of(table).top_k
    fig = Picture(figsize=(7.0, 4.0), layout="constrained")
    axes = fig.subplots()
    shown = table[table["mean_k"].between(0.3 * top_k, top_k)]
    for family in families_of(table["family"]):
        part = shown[shown["family"] == family.name].sort_values("mean_k")
        if part.empty:
            continue
        axes.errorbar(part["mean_k"], *error_bars(part, "difference"), label=family.name, **_series(family))
    axes.axhline(0, color=BLACK, linewidth=0.8)
    half_percent = 0.005 * table.loc[table["rule"] == own, "loss"].iloc[0]
    axes.axhline(half_percent, color=BLACK, linewidth=0.8, linestyle=":")
    axes.annotate(f"0.5 % of the loss of {own}", (0.34 * top_k, half_percent), fontsize=7, va="bottom")
    axes.set_yscale("symlog", linthresh=0.02, linscale=0.8)
    ticks = [0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_yticks([], minor=True)
    axes.set(
        xlabel="experts per token and layer (mean)",
        ylabel=f"loss above {own} (nats per token)",
        ylim=(min(-0.002, 1.1 * shown["low"].min()), max(0.4, 1.1 * shown["high"].max())),
    )
    axes.set_title(f"{sample_caption(table, 'test')}\n{interval_caption(table, ONE)}", fontsize=8)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return fig


#: Ticks for differences in thousandths of a nat.
DIFFERENCES = [-40, -20, -10, -5, 0, 5, 10, 20, 50, 100]


def compute_matched_compute(study: Study) -> pd.DataFrame:
    """Each rule's loss minus that of static top-k at the same mean number of experts, test split."""
    frame = comparison(study)
    facts = frame.groupby("rule", sort=False).agg(
        family=("family", "first"), level=("level", "first"), tokens=("tokens", "sum")
    )
    matched = comparisons.matched_compute(frame).join(facts, on="rule")
    return matched[["family", "level", *matched.columns.drop(["family", "level"])]]


@figure("matched_compute", compute_matched_compute)
def draw_matched_compute(table: pd.DataFrame) -> Figure:
    """Loss minus that of static top-k at the same mean number of experts, a line per family.

    Only near whole numbers: between them the straight line that static top-k is read from lies above its convex curve.
    """
    top_k = about_of(table).top_k
    if top_k >= 5:  # below, there are too few whole numbers
        table = table[(table["mean_k"] - table["mean_k"].round()).abs() < 0.15]
    left, right = 0.325 * top_k, top_k - 0.5 if top_k >= 5 else top_k
    fig = Picture(figsize=(7.0, 4.0), layout="constrained")
    axes = fig.subplots()
    for i, family in enumerate(families_of({"static top-k", *table["family"]})):
        part = table[(table["family"] == family.name) & table["mean_k"].between(left, right)].sort_values("mean_k")
        if part.empty:
            continue
        axes.errorbar(part["mean_k"] + top_k / 400 * (i - 5), *joint_bars(part), label=family.name, **_series(family))
    axes.axhline(0, color=BLACK, linewidth=1.2)
    axes.annotate("static top-k", (top_k - 0.1 * top_k, 0.3), fontsize=8)
    axes.set_yscale("symlog", linthresh=10, linscale=1.5)
    signed_ticks(axes, DIFFERENCES)
    axes.set(
        xlabel="experts per token and layer (mean)", ylabel="loss minus static top-k (nats / 1000 per token)",
        xlim=(left, top_k),
    )  # fmt: skip
    axes.set_title(f"{sample_caption(table, 'test')}\n{interval_caption(table, ALL)}", fontsize=8)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return fig


# -- the whole test split ------------------------------------------------------------------------------------------


#: BH families, and the fixed cut on the same p-values, with the same layer weights: what is between is the step-up's.
FIXED_CUTS = {
    "BH": "threshold",
    "BH, fitted null": "fixed cut, fitted null",
    "BH, layer weights": "threshold, layer weights",
}


def compute_whole_test_split(study: Study) -> pd.DataFrame:
    """All families on every test sequence, against static top-k, the threshold, the model's own top-k and fixed cuts.

    Returns
    -------
    pandas.DataFrame
        A row per family and wanted mean number of experts: ``family``, ``wanted_k``, ``level``
        (`RuleFamily.level_of`), the columns of `matched_compute` (losses in nats per token), and three differences of
        the same form:

        ``threshold_…``: from the probability threshold at the same mean (`matched_difference`), with ``…equal``: within
        ± 0.4 thousandths of a nat by an equivalence test, each row by itself;
        ``stepup_…``: of BH, from the fixed cut on the same p-values (`FIXED_CUTS`) at the same mean, ``…joint_low`` and
        ``…joint_high`` for the five means of a family at once;
        ``top8_…``: from the model's own top-k, whatever it is, each row by itself; and ``tokens``.
    """
    return summarize_whole_test_split(whole_comparison(study), study.own)


def summarize_whole_test_split(frame: pd.DataFrame, own: str = DEMO.own) -> pd.DataFrame:
    """The table of `compute_whole_test_split` from that of `whole_comparison`."""
    facts = frame.groupby("rule", sort=False)[["family", "wanted_k", "level"]].first()
    rules = facts.dropna(subset="wanted_k").groupby("family", sort=False).groups  # the names of each family's rules
    table = facts.join(comparisons.matched_compute(frame).set_index("rule"), how="inner")
    table["wanted_k"] = table["wanted_k"].convert_dtypes()  # whole numbers, if they are
    threshold = comparisons.matched_difference(frame, table.index, rules["threshold"])
    pairs = [pair for pair in FIXED_CUTS.items() if rules.keys() >= {*pair}]
    stepup = [comparisons.matched_difference(frame, rules[bh], rules[cut]) for bh, cut in pairs]
    top8 = [{"rule": rule} | comparisons.paired_difference(frame, rule, own) for rule in table.index]
    parts = {"threshold": threshold, "stepup": pd.concat(stepup), "top8": pd.DataFrame(top8).drop(columns="sequences")}
    for name, part in parts.items():
        table = table.join(part.set_index("rule").add_prefix(f"{name}_"))
    table["tokens"] = int(frame.loc[frame["rule"] == own, "tokens"].sum())
    return table.reset_index(drop=True)


@figure("whole_test_split", compute_whole_test_split, slow=True)
def draw_whole_test_split(table: pd.DataFrame) -> Figure:
    """Left, loss minus that of static top-k at the same mean; right, minus that of the probability threshold."""
    fig = Picture(figsize=(7.4, 4.8), layout="constrained")
    static, threshold = fig.subplots(1, 2, width_ratios=(1.35, 1))
    families = families_of(table["family"])
    nearest = [family for family in families if family.name in {*FIXED_CUTS, *FIXED_CUTS.values()} - {"threshold"}]
    for axes, shown, prefix in ((static, families, ""), (threshold, nearest, "threshold_")):
        for i, family in enumerate(shown):
            part = table[table["family"] == family.name].sort_values("mean_k")
            label = family.name if axes is static else None
            x = part["wanted_k"] + 0.005 * about_of(table).top_k * (i - len(shown) / 2)
            axes.errorbar(x, *joint_bars(part, prefix), label=label, **_series(family))
        axes.axhline(0, color=BLACK, linewidth=1.2)
        axes.set_xticks(sorted(table["wanted_k"].unique()))
        axes.set_xlabel("experts per token and layer (mean)")
    margin = 1000 * comparisons.EQUAL
    threshold.axhspan(-margin, margin, color=BLACK, alpha=0.12, linewidth=0, label=f"equal: within ± {margin:g}")
    static.set_yscale("symlog", linthresh=10, linscale=1.5)
    signed_ticks(static, DIFFERENCES)
    static.set_ylabel("loss minus static top-k (nats / 1000 per token)")
    threshold.set_ylabel("loss minus the probability threshold (nats / 1000)")
    fig.suptitle(f"{sample_caption(table, 'test')}\n{interval_caption(table, ALL)}", fontsize=8)
    fig.legend(fontsize=8, loc="outside lower center", ncols=4)
    return fig
