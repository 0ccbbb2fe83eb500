"""Figures of what fewer experts cost: loss at matched compute, of BH and of what people use."""

from functools import lru_cache

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bhlib import comparisons, evaluation, evidence
from bhlib.calibration import fit_null, name_of
from bhlib.figures.drawing import Picture
from bhlib.figures.families import Family, bh, fitted_families, rivals, tried_families, weighted_families
from bhlib.figures.registry import ALPHAS, FREE, Demo, figure
from bhlib.loading import heldout_sequence_documents, load_heldout
from bhlib.looks import BLACK, BLUE, GREEN, ORANGE, PINK, RED, SKY
from bhlib.pvalues import NULLS, STATISTICS, DirichletNull
from bhlib.rules import BH, FAMILIES, Rule, RuleFamily, TopK, families_of
from bhlib.sampling import VALUES_PER_LAYER

#: Where families are compared.
MEAN_K = (3, 4, 5, 6, 7)

#: Of every so many tokens one is enough to find the level that gives a mean number of experts.
THIN = 8

STATIC = {f"top-{k}": TopK(k) for k in range(1, 9)}


@lru_cache(maxsize=1)
def comparison(demo: Demo) -> pd.DataFrame:
    """All rules on 72 sequences of the test split: a row per rule and sequence.

    Levels were found on the calibration split, so that nothing is tuned on the text that results are reported on.

    Returns
    -------
    pandas.DataFrame
        As `sweep` returns it, with the ``document`` of each row's sequence, and ``family``, ``wanted_k`` (the mean that
        a level was found for) and ``level`` (`RuleFamily.level_of`) of its rule.
    """
    default = [("BH", np.nan, f"BH {alpha:g}", BH(alpha)) for alpha in ALPHAS]
    text, documents = (
        {domain: sequences[::2] for domain, sequences in data.items()} for data in (demo.test, demo.test_documents)
    )
    return _sweep(demo, default + _at_mean_k(demo, _calibrated_families(demo)), text, documents)


def whole_comparison(demo: Demo) -> pd.DataFrame:
    """As `comparison` on every test sequence, with the default BH at the mean numbers of experts of the others.

    Takes minutes on a GPU, and two hours on two cores without; `Demo.cache` keeps what is finished.
    """
    families = {"BH": bh()} | _calibrated_families(demo)
    return _sweep(demo, _at_mean_k(demo, families), demo.whole_test, demo.whole_test_documents, batch_size=16)


def _calibrated_families(demo: Demo) -> dict[str, Family]:
    """All families but BH with its default p-values, in the order of tables."""
    fitted = fit_null(demo.calibration_logits, statistic="log_prob", **_fit_options(demo))
    return fitted_families(fitted) | weighted_families() | rivals()


def _at_mean_k(demo: Demo, families: dict[str, Family]) -> list[tuple[str, float, str, Rule]]:
    """Family, wanted mean, name and rule, of each family at each of `MEAN_K`."""
    logits = demo.calibration_logits[:, ::THIN]
    return [(name, k, f"{name}, k = {k}", make(logits, k)) for k in MEAN_K for name, make in families.items()]


def _sweep(
    demo: Demo, entries: list[tuple[str, float, str, Rule]], text: dict, documents: dict, **options
) -> pd.DataFrame:
    """A sweep of static top-k and of what `_at_mean_k` lists, on sequences by domain, of documents by domain."""
    entries = [("static top-k", np.nan, name, rule) for name, rule in STATIC.items()] + entries
    rules = {name: rule for _, _, name, rule in entries}
    facts = {
        name: {"family": family, "wanted_k": k, "level": FAMILIES[family].level_of(rule)}
        for family, k, name, rule in entries
    }
    frame = evaluation.sweep(demo.model, rules, text, cache=demo.cache, **options)
    return comparisons.with_documents(frame.join(pd.DataFrame.from_dict(facts, orient="index"), on="rule"), documents)


def _series(family: RuleFamily) -> dict:
    """How `errorbar` draws a family: BH bolder, and over the others."""
    first = family.name == "BH"
    size = {"markersize": 4.5, "linewidth": 2 if first else 1.2, "capsize": 2, "zorder": 3 if first else 2}
    return family.look._asdict() | size


def compute_loss_vs_experts(demo: Demo) -> pd.DataFrame:
    """Loss of every rule on the test split, and its difference from the model's own top-8."""
    frame = comparison(demo)
    summary = comparisons.summarize(frame, ["family", "rule"])
    summary.insert(2, "level", summary["rule"].map(frame.groupby("rule")["level"].first()))
    against = pd.DataFrame([comparisons.paired_difference(frame, rule, "top-8") for rule in summary["rule"]])
    return pd.concat([summary, against[["difference", "low", "high"]]], axis=1)


@figure("loss_vs_experts", compute_loss_vs_experts, tolerance={"seconds": FREE, "rows": 300})
def draw_loss_vs_experts(table: pd.DataFrame) -> Figure:
    """Loss minus the loss of the model's own top-8, against experts per token: every rule."""
    fig = Picture(figsize=(7.0, 4.0), layout="constrained")
    axes = fig.subplots()
    for family in families_of(table["family"]):
        part = table[(table["family"] == family.name) & table["mean_k"].between(2.4, 8)].sort_values("mean_k")
        if part.empty:
            continue
        error = np.stack([part["difference"] - part["low"], part["high"] - part["difference"]])
        axes.errorbar(part["mean_k"], part["difference"], error, label=family.name, **_series(family))
    axes.axhline(0, color=BLACK, linewidth=0.8)
    half_percent = 0.005 * table.loc[table["rule"] == "top-8", "loss"].iloc[0]
    axes.axhline(half_percent, color=BLACK, linewidth=0.8, linestyle=":")
    axes.annotate("0.5 % of the loss of top-8", (2.75, half_percent), fontsize=7, va="bottom")
    axes.set_yscale("symlog", linthresh=0.02, linscale=0.8)
    ticks = [0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_yticks([], minor=True)
    axes.set(
        xlabel="experts per token and layer (mean)", ylabel="loss above top-8 (nats per token)", ylim=(-0.002, 0.4)
    )
    axes.set_title(f"{_sample(table, 'test')}\n{_bootstrap(table, ONE)}", fontsize=8)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return fig


def _sample(table: pd.DataFrame, split: str) -> str:
    first = table.iloc[0]
    return f"demo model, {split} split: {first['sequences']:,.0f} sequences, {first['tokens']:,.0f} tokens"


def _bootstrap(table: pd.DataFrame, scope: str) -> str:
    """What the bars are: units fewer than sequences are documents."""
    first = table.iloc[0]
    units = f"{first['units']:,.0f} documents" if first["units"] < first["sequences"] else "sequences"
    return f"bars: 95 % bootstrap over {units}, for {scope}"


#: Scopes of intervals.
ONE, ALL = "each point by itself", "all points of a panel at once"


def _joint(part: pd.DataFrame, prefix: str = "", scale: float = 1000) -> tuple[pd.Series, np.ndarray]:
    """Differences and the lengths of their bars, scaled: of the intervals that hold for all rows of a table at once."""
    value, low, high = (part[f"{prefix}{name}"] for name in ("difference", "joint_low", "joint_high"))
    return scale * value, scale * np.stack([value - low, high - value])


#: Ticks for differences in thousandths of a nat.
DIFFERENCES = [-40, -20, -10, -5, 0, 5, 10, 20, 50, 100]


def _signed_ticks(axes: Axes, ticks: list[float]) -> None:
    axes.set_yticks(ticks, [f"{tick:+g}".replace("-", "−") if tick else "0" for tick in ticks])
    axes.set_yticks([], minor=True)


def compute_matched_compute(demo: Demo) -> pd.DataFrame:
    """Each rule's loss minus that of static top-k at the same mean number of experts, test split."""
    frame = comparison(demo)
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
    table = table[(table["mean_k"] - table["mean_k"].round()).abs() < 0.15]
    fig = Picture(figsize=(7.0, 4.0), layout="constrained")
    axes = fig.subplots()
    for i, family in enumerate(families_of({"static top-k", *table["family"]})):
        part = table[(table["family"] == family.name) & table["mean_k"].between(2.6, 7.5)].sort_values("mean_k")
        if part.empty:
            continue
        axes.errorbar(part["mean_k"] + 0.02 * (i - 5), *_joint(part), label=family.name, **_series(family))
    axes.axhline(0, color=BLACK, linewidth=1.2)
    axes.annotate("static top-k", (7.15, 0.3), fontsize=8)
    axes.set_yscale("symlog", linthresh=10, linscale=1.5)
    _signed_ticks(axes, DIFFERENCES)
    axes.set(
        xlabel="experts per token and layer (mean)", ylabel="loss minus static top-k (nats / 1000 per token)",
        xlim=(2.6, 7.95),
    )  # fmt: skip
    axes.set_title(f"{_sample(table, 'test')}\n{_bootstrap(table, ALL)}", fontsize=8)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return fig


def _fit_options(demo: Demo) -> dict:
    """What `fit_null` is told of a demo."""
    return {"model_name": name_of(demo.model), "max_values": min(VALUES_PER_LAYER, demo.calibration_logits.shape[1])}


# -- the whole test split ------------------------------------------------------------------------------------------


#: BH families, and the fixed cut on the same p-values, with the same layer weights: what is between is the step-up's.
FIXED_CUTS = {
    "BH": "threshold",
    "BH, fitted null": "fixed cut, fitted null",
    "BH, layer weights": "threshold, layer weights",
}


def compute_whole_test_split(demo: Demo) -> pd.DataFrame:
    """All families on every test sequence, against static top-k, the threshold, the model's own top-8 and fixed cuts.

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
        ``top8_…``: from the model's own top-8, each row by itself; and ``tokens``.
    """
    return summarize_whole_test_split(whole_comparison(demo))


def summarize_whole_test_split(frame: pd.DataFrame) -> pd.DataFrame:
    """The table of `compute_whole_test_split` from that of `whole_comparison`."""
    facts = frame.groupby("rule", sort=False)[["family", "wanted_k", "level"]].first()
    rules = facts.dropna(subset="wanted_k").groupby("family", sort=False).groups  # the names of each family's rules
    table = facts.join(comparisons.matched_compute(frame).set_index("rule"), how="inner")
    table["wanted_k"] = table["wanted_k"].astype(int)
    threshold = comparisons.matched_difference(frame, table.index, rules["threshold"])
    stepup = [comparisons.matched_difference(frame, rules[bh], rules[cut]) for bh, cut in FIXED_CUTS.items()]
    top8 = [{"rule": rule} | comparisons.paired_difference(frame, rule, "top-8") for rule in table.index]
    parts = {"threshold": threshold, "stepup": pd.concat(stepup), "top8": pd.DataFrame(top8).drop(columns="sequences")}
    for name, part in parts.items():
        table = table.join(part.set_index("rule").add_prefix(f"{name}_"))
    table["tokens"] = int(frame.loc[frame["rule"] == "top-8", "tokens"].sum())
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
            x = part["wanted_k"] + 0.04 * (i - len(shown) / 2)
            axes.errorbar(x, *_joint(part, prefix), label=label, **_series(family))
        axes.axhline(0, color=BLACK, linewidth=1.2)
        axes.set_xticks(MEAN_K)
        axes.set_xlabel("experts per token and layer (mean)")
    margin = 1000 * comparisons.EQUAL
    threshold.axhspan(-margin, margin, color=BLACK, alpha=0.12, linewidth=0, label=f"equal: within ± {margin:g}")
    static.set_yscale("symlog", linthresh=10, linscale=1.5)
    _signed_ticks(static, DIFFERENCES)
    static.set_ylabel("loss minus static top-k (nats / 1000 per token)")
    threshold.set_ylabel("loss minus the probability threshold (nats / 1000)")
    fig.suptitle(f"{_sample(table, 'test')}\n{_bootstrap(table, ALL)}", fontsize=8)
    fig.legend(fontsize=8, loc="outside lower center", ncols=4)
    return fig


# -- which statistic, which null: on the validation split ----------------------------------------------------------


def compute_statistic_matters(demo: Demo, mean_experts: tuple[float, ...] = (4.0, 5.0, 6.0)) -> pd.DataFrame:
    """Loss of BH with one kind of null and different statistics, against static top-k with as many experts."""
    logits = demo.calibration_logits
    fit = _fit_options(demo)
    makers = {"KDE of all, logit": fit_null(logits, statistic="logit", exclude_top=0, **fit)}
    makers |= {f"KDE, {name}": fit_null(logits, statistic=name, **fit) for name in STATISTICS}
    makers |= {"Dirichlet": DirichletNull()}
    return evidence.compare_at_equal_cost(
        demo.model, makers, logits, demo.validation, mean_experts=mean_experts, documents=demo.validation_documents
    )


@figure("statistic_matters", compute_statistic_matters)
def draw_statistic_matters(table: pd.DataFrame) -> Figure:
    """Loss above that of static top-k with the same mean number of experts, a line per statistic."""
    fig = Picture(figsize=(7.0, 3.6), layout="constrained")
    axes = fig.subplots()
    looks = dict(zip(table["pvalues"].unique(), (RED, ORANGE, BLUE, GREEN, SKY, PINK), strict=False))
    for (name, color), marker in zip(looks.items(), "osD^vP", strict=False):
        part = table[table["pvalues"] == name].sort_values("mean_k")
        axes.errorbar(
            part["mean_k"], *_joint(part, scale=1), color=color, marker=marker, markersize=5, capsize=2, label=name
        )
    axes.axhline(0, color=BLACK, linewidth=1)
    axes.annotate("static top-k", (table["mean_k"].min(), 0.0007), fontsize=8)
    axes.set_yscale("symlog", linthresh=0.02, linscale=1.2)
    _signed_ticks(axes, [-0.02, -0.01, 0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4])
    axes.set(xlabel="experts per token and layer (mean)", ylabel="loss above static top-k (nats per token)")
    axes.set_title(
        f"{_sample(table, 'validation')}\n{_bootstrap(table, ALL)}\n"
        "KDE nulls leave out the top 8 of each token, except “of all”", fontsize=8,
    )  # fmt: skip
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), title="null and statistic", title_fontsize=8)
    return fig


def compute_families_tried(
    demo: Demo, mean_k: tuple[int, ...] = (3, 5, 7), length: int = 512, per_domain: int = 8
) -> pd.DataFrame:
    """Every family that was tried, on the validation split: loss minus static top-k. Takes half an hour."""
    logits = demo.calibration_logits
    fit = _fit_options(demo)
    fitted = {
        label: fit_null(logits, null=name, **options, **fit)
        for name, entry in NULLS.items()
        if entry.needs_calibration
        for label, options in entry.tried.items()
    }
    rules, wanted = dict(STATIC), {}
    for name, family in tried_families(fitted).items():
        for k in mean_k:
            try:
                rules[f"{name}, k = {k}"] = family(logits[:, ::THIN], k)
            except ValueError:
                continue  # no level of this family gives so many
            wanted[f"{name}, k = {k}"] = name, k
    frame = evaluation.sweep(demo.model, rules, load_heldout("validation", length, per_domain))
    frame = comparisons.with_documents(frame, heldout_sequence_documents("validation", length, per_domain))
    matched = comparisons.matched_compute(frame)
    matched.insert(0, "family", [wanted[rule][0] for rule in matched["rule"]])
    matched.insert(1, "wanted_k", [wanted[rule][1] for rule in matched["rule"]])
    return matched.drop(columns="rule").assign(tokens=int(frame.loc[frame["rule"] == "top-8", "tokens"].sum()))


@figure("families_tried", compute_families_tried, slow=True)
def draw_families_tried(table: pd.DataFrame) -> Figure:
    """A heat map: families by rows, wanted mean number of experts by columns, with numbers and intervals."""
    order = table[table["wanted_k"] == table["wanted_k"].median()].set_index("family")["difference"].sort_values().index
    order = [*order, *table.loc[~table["family"].isin(order), "family"].unique()]
    ks = sorted(table["wanted_k"].unique())
    fig = Picture(figsize=(7.2, 0.9 + 0.24 * len(order)), layout="constrained")
    axes = fig.subplots()
    rows = table.set_index(["family", "wanted_k"])
    shown = np.full((len(order), len(ks)), np.nan)
    for (family, k), row in rows.iterrows():
        place = order.index(family), ks.index(k)
        shown[place] = 1000 * row["difference"]
        half = 1000 * (row["joint_high"] - row["joint_low"]) / 2
        text = f"{shown[place]:+.1f} ± {half:.1f}".replace("-", "−")
        axes.text(place[1], place[0], text, ha="center", va="center", fontsize=7.5)
    axes.imshow(np.arcsinh(shown / 5), aspect="auto", cmap="PuOr_r", vmin=-3.5, vmax=3.5, alpha=0.6)
    axes.set_xticks(range(len(ks)), [f"k = {k:g}" for k in ks])
    axes.set_yticks(range(len(order)), order, fontsize=8)
    axes.grid(False)
    axes.set_xlabel("mean experts per token and layer that the level was chosen for (on calibration text)")
    axes.set_title(
        f"loss minus static top-k at the same mean, nats / 1000; {_sample(table, 'validation')}\n"
        f"± half of the 95 % bootstrap interval over {table['units'].iloc[0]} documents that holds for all at once",
        fontsize=8,
    )
    return fig
