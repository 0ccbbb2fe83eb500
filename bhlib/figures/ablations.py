"""The figure of what each ingredient of a calibrated rule adds, by itself and to the others."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from bhlib import comparisons
from bhlib.comparisons import with_documents
from bhlib.evaluation import sweep
from bhlib.figures.about import DEMO, about_of
from bhlib.figures.drawing import Picture, heat_map, joint_bars, sample_caption, signed, signed_ticks
from bhlib.figures.ingredients import DEFAULT, INGREDIENTS, MEAN_NORMS, PLAIN, Entry, named, rules_of_ingredients
from bhlib.figures.registry import figure
from bhlib.figures.study import Study
from bhlib.looks import BLACK, BLUE, GREEN, ORANGE, PINK, RED

__all__ = ["compute_ablations", "draw_ablations"]

STATIC = "static top-k"

#: Up to this share above the loss of the model's own top-k a rule counts as good as that.
AS_GOOD = 0.005


def compute_ablations(
    study: Study, split: str = "test", max_sequences: int | None = None, layer_weights: bool = False
) -> pd.DataFrame:
    """What each ingredient adds, on every sequence of the test split.

    Everything was fitted and chosen on the calibration split (`bhlib.figures.ingredients`); to look at another one
    before the test split is opened, name it.

    Parameters
    ----------
    study : Study
    split : str
    max_sequences : int, optional
        Of each domain; all by default.
    layer_weights : bool
        Whether weights of the layers are among the ingredients. To choose them at each number of experts takes 20
        searches over calibration text, longer than all the rest.

    Returns
    -------
    pandas.DataFrame
        A row per family of rules, wanted mean number of experts and rival: ``family``; its ingredients ``null``,
        ``statistic``, ``layer_weights`` ("no help" where they were left out since they did not help on calibration
        text) and ``step_up``; ``wanted_k``, ``level``, ``mean_k``, ``loss`` (nats per token); ``as_good_k``, the mean
        number of experts at which the family's loss is 0.5 % above that of the model's own top-k, interpolated; and
        ``against`` whom the ``difference`` of losses is, at the same mean number of experts, with its 95 % intervals
        over documents: "static top-k" (`matched_compute`), "threshold" or "without" one of the ingredients, the same
        rule otherwise (`matched_difference`). ``joint_low`` and ``joint_high`` hold for all rows that are
        compared with the same rival at once, and ``equal`` is as `matched_difference` says it. ``sequences``, ``units``
        (documents), ``tokens``, ``split``.
    """
    text = study.text.sequences(split, study.length, max_sequences)
    documents = study.text.documents(split, study.length, max_sequences)
    if split == "test" and max_sequences is None:
        text, documents = study.whole_test, study.whole_test_documents
    entries = rules_of_ingredients(study, layer_weights)
    options = {"cache": study.cache, "batch_size": 2 * study.batch_size(study.length)}
    parts = []
    for norms in dict.fromkeys(entry.norms for entry in entries):
        rules = {entry.name: entry.rule for entry in entries if entry.norms is norms}
        if norms is None:
            parts.append(sweep(study.model, study.static_rules | rules, text, **options))
        else:
            parts.append(sweep(study.model, rules, text, norms=norms, **options))
    frame = with_documents(pd.concat(parts, ignore_index=True), documents)
    facts = pd.DataFrame([_described(entry) for entry in entries], index=[entry.name for entry in entries])
    return summarize_ablations(frame, facts, study.own).assign(split=split)


def _described(entry: Entry) -> dict[str, object]:
    """What the table says of a rule; and its ingredients, for differences."""
    one = "one for all layers, Dirichlet" if entry.family == DEFAULT else "one for all layers"
    norms = {True: "mean norm", False: "norm guessed"}[entry.family in MEAN_NORMS.values()]
    return {
        "family": entry.family,
        "null": "per layer" if "null per layer" in entry.parts else one,
        "statistic": f"weight × {norms}" if "norms" in entry.parts else "weight",
        "layer_weights": {None: "no", True: "yes", False: "no help"}[entry.helped],
        "step_up": "yes" if "step-up" in entry.parts else "no",
        "wanted_k": entry.wanted_k,
        "level": entry.rule.level,
        "parts": entry.parts,
    }


def summarize_ablations(frame: pd.DataFrame, facts: pd.DataFrame, own: str = DEMO.own) -> pd.DataFrame:
    """The table of `compute_ablations`, from that of a sweep and the facts of each rule in it, by name."""
    rules = facts.groupby("family", sort=False).groups  # the names of each family's rules
    static = comparisons.matched_compute(frame).set_index("rule")
    differences = [static.loc[facts.index].assign(against=STATIC)]
    measured = static.loc[facts.index, ["mean_k", "loss", "sequences", "units"]]

    def against(rival: str, rows: dict[str, str]) -> None:
        """Differences of rules from a family; `rows` has what the table calls these."""
        some = frame[frame["rule"].isin([*rows, *rules[rival]])]
        found = comparisons.matched_difference(some, list(rows), list(rules[rival])).set_index("rule")
        differences.append(found.join(measured).assign(against=[rows[name] for name in found.index]))

    against(PLAIN, dict.fromkeys(facts.index, PLAIN))
    for rival in [family for family, names in rules.items() if len(names) > 1]:  # of one rule there is no curve
        added = {
            name: f"without {ingredient}"
            for name, fact in facts.iterrows()
            for ingredient in INGREDIENTS
            if rival == _without(ingredient, fact)
        }
        if added:
            against(rival, added)
    table = facts.drop(columns="parts").join(pd.concat(differences), how="right")
    loss_of_own = frame.loc[frame["rule"] == own, "loss"].mean()
    good = {family: _as_good(measured.loc[rows], loss_of_own, own) for family, rows in rules.items()}
    table.insert(table.columns.get_loc("loss") + 1, "as_good_k", table["family"].map(good))
    table["tokens"] = int(frame.loc[frame["rule"] == own, "tokens"].sum())
    front = [*facts.columns.drop("parts"), "mean_k", "loss", "as_good_k", "against"]
    kept = ["difference", "low", "high", "joint_low", "joint_high", "equal", "sequences", "units", "tokens"]
    return table[front + kept].reset_index(drop=True)


def _without(ingredient: str, fact: pd.Series) -> str | None:
    """The family of the same rule without an ingredient, if it has that."""
    if ingredient not in fact["parts"] or (fact["family"] in MEAN_NORMS.values() and ingredient != "norms"):
        return None  # of those with mean norms there are no others
    return named(tuple(part for part in fact["parts"] if part != ingredient))


def _as_good(rules: pd.DataFrame, loss_of_own: float, own: str) -> float:
    """Mean number of experts at which a family is as good as the model's own top-k, on straight lines between rules.

    NaN beyond what was measured, and where two neighbours are further apart than 1.5 experts.
    """
    curve = pd.concat([rules, pd.DataFrame({"mean_k": [float(own.removeprefix("top-"))], "loss": [loss_of_own]})])
    curve, at = curve.sort_values("loss"), (1 + AS_GOOD) * loss_of_own
    found = float(np.interp(at, curve["loss"], curve["mean_k"], right=np.nan))
    number = int(np.searchsorted(curve["loss"], at).clip(1, len(curve) - 1))
    apart = abs(curve["mean_k"].iloc[number] - curve["mean_k"].iloc[number - 1])
    return found if apart <= 1.5 else np.nan


@figure("ablations", compute_ablations, slow=True)
def draw_ablations(table: pd.DataFrame) -> Figure:
    """Above, every combination against static top-k and the threshold; below, what each ingredient adds to a rule."""
    families = list(table["family"].unique())
    fig = Picture(figsize=(12.6, 4.2 + 0.26 * len(families)), layout="constrained")
    above, below = fig.subfigures(2, 1, height_ratios=(1.0 + 0.26 * len(families), 3.4))
    static, threshold = above.subplots(1, 2, width_ratios=(1, 1.2))
    for axes, rival, labels in ((static, STATIC, True), (threshold, PLAIN, False)):
        _draw_table(axes, table[table["against"] == rival], families, labels)
        axes.set_title(
            f"loss minus {'that of ' if rival == STATIC else 'that of the '}{rival}, nats / 1000", fontsize=8
        )
    added = {one: table[table["against"] == f"without {one}"] for one in INGREDIENTS}
    added = {ingredient: part for ingredient, part in added.items() if len(part)}
    panels = below.subplots(1, len(added), sharey=True, squeeze=False)[0]
    for axes, (ingredient, part) in zip(panels, added.items(), strict=True):
        _draw_added(axes, part, ingredient)
    bars = table[table["against"].str.startswith("without")]
    panels[0].set_ylim(1100 * min(bars["joint_low"].min(), -1e-3), 1100 * max(bars["joint_high"].max(), 1e-3))
    panels[0].set_ylabel("loss minus that of the same rule\nwithout it (nats / 1000)")
    below.legend(handles=_legend(table), fontsize=8, loc="outside lower center", ncols=4)
    units = f"{table['units'].iloc[0]} documents"
    without = "in brackets: weights of the layers did not help on calibration text and were left out; "
    without = without if (table["layer_weights"] == "no help").any() else ""
    fig.suptitle(
        f"{sample_caption(table, table['split'].iloc[0])}; at the same mean number of experts; everything fitted and "
        "chosen on calibration text\n"
        f"± half of the 95 % bootstrap interval over {units} that holds for all of a table at once; bars: for all "
        "that are compared with the same rule\n"
        f"{without}last column: mean number of experts at which the loss is {100 * AS_GOOD:g} % above "
        f"{about_of(table).own}",
        fontsize=8,
    )
    return fig


def _draw_table(axes: Axes, part: pd.DataFrame, families: list[str], labels: bool) -> None:
    """A family per row and a number of experts per column; behind them, how many are as good as the model's own."""
    half = (part["joint_high"] - part["joint_low"]) / 2
    words = [f"{signed(1000 * d, '.1f')} ± {1000 * h:.1f}" for d, h in zip(part["difference"], half, strict=True)]
    fell_back = part["layer_weights"] == "no help"
    words = [f"({word})" if back else word for word, back in zip(words, fell_back, strict=True)]
    shown, text = (
        part.assign(shown=cells).pivot(index="family", columns="wanted_k", values="shown").loc[families]
        for cells in (np.arcsinh(200 * part["difference"]), words)
    )
    shown.columns = text.columns = [f"k = {k:g}" for k in shown.columns]
    if not labels:
        good = part.groupby("family")["as_good_k"].first().loc[families]
        shown["as good at"], text["as good at"] = 0.0, [f"{k:.2f}" if k == k else "–" for k in good]
    else:
        shown.index = families
    heat_map(axes, shown, text, cmap="PuOr_r", vmin=-4, vmax=4, alpha=0.6, cbar=False)
    if not labels:
        axes.set_yticks([])


#: What a rule has besides the ingredient that is looked at: null per layer and norms by colour.
COLORS = {(False, False): BLACK, (True, False): BLUE, (False, True): ORANGE, (True, True): GREEN}


def _draw_added(axes: Axes, part: pd.DataFrame, ingredient: str) -> None:
    """What one ingredient adds to each rule that can have it."""
    families = list(part["family"].unique())
    step = 0.5 * np.diff(np.unique(part["wanted_k"])).min(initial=1) / max(1, len(families))
    for number, family in enumerate(families):
        rows = part[part["family"] == family].sort_values("wanted_k")
        first = rows.iloc[0]
        color, line, marker = _style(first, ingredient)
        x = rows["wanted_k"] + step * (number - len(families) / 2)
        axes.errorbar(x, *joint_bars(rows), color=color, linestyle=line, marker=marker, markersize=4, capsize=1.5,
                      linewidth=1)  # fmt: skip
    axes.axhline(0, color=BLACK, linewidth=1)
    axes.set_yscale("symlog", linthresh=5, linscale=1.5)
    signed_ticks(axes, [-40, -20, -10, -5, -2, 0, 2, 5, 10, 20, 40])
    axes.set_xticks(sorted(part["wanted_k"].unique()))
    axes.set_xlabel("experts per token and layer (mean)", fontsize=8)
    axes.set_title(f"what it adds: {ingredient}", fontsize=8)


def _style(row: pd.Series, ingredient: str) -> tuple[str, str, str]:
    """Colour, line and marker of what a rule has besides an ingredient."""
    if row["family"] == DEFAULT:
        return RED, "-", "D"
    if row["statistic"] == "weight × mean norm":
        return PINK, "-", "v" if row["null"] == "per layer" else "o"
    null = row["null"] == "per layer" and ingredient != "null per layer"
    norms = row["statistic"] != "weight" and ingredient != "norms"
    weights = row["layer_weights"] != "no" and ingredient != "layer weights"
    step_up = row["step_up"] == "yes" and ingredient != "step-up"
    return COLORS[null, norms], "--" if weights else "-", "s" if step_up else "o"


def _legend(table: pd.DataFrame) -> list[Line2D]:
    names = {"added to: threshold": BLACK, "null per layer": BLUE, "norms": ORANGE, "both": GREEN, DEFAULT: RED}
    if (table["statistic"] == "weight × mean norm").any():
        names["mean norms (triangles: to null per layer)"] = PINK
    handles = [Line2D([], [], color=color, label=name) for name, color in names.items()]
    if (table["layer_weights"] != "no").any():
        handles.append(Line2D([], [], color=BLACK, linestyle="--", label="and layer weights"))
    handles.append(Line2D([], [], color=BLACK, linestyle="", marker="s", markersize=4, label="and the step-up"))
    return handles
