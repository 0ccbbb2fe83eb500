"""The figure of what alpha promises: useless experts among those that a rule keeps, against the level it was given."""

from contextlib import suppress
from functools import lru_cache, partial

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from bhlib.contributions import Contributions, measure_contributions, one_changed
from bhlib.evidence import realised, realised_by_effect
from bhlib.figures.about import about_of
from bhlib.figures.drawing import Picture, error_bars
from bhlib.figures.registry import figure
from bhlib.figures.study import Study
from bhlib.guarantees import promise_discoveries, promise_effects
from bhlib.looks import BLACK, BLUE, GREEN, ORANGE, PINK, RED, SKY, Look
from bhlib.pvalues import ContributionNull
from bhlib.rules import BH, Rule

__all__ = ["compute_realised_alpha", "draw_realised_alpha"]

#: Levels at which rules are measured.
LEVELS = (0.05, 0.1, 0.15, 0.2, 0.3)

#: Up to which contribution an expert counts as useless: a tenth of the norm of the layer's output.
LARGEST = 0.1

#: Sequences of a document that are measured, of half a `Study.window` each: documents are what counts.
PER_DOCUMENT = {"calibration": 2, "test": 1}

#: The divergence that an expert makes if it is left out alone, from which on it is useful: nats.
SMALLEST = 1e-3
BY_EFFECT = "all, by effect"

#: What is tried for `promise_discoveries`: log-odds evenly spaced.
TRIED = tuple(float(level) for level in 1 / (1 + np.exp(-np.linspace(-9, 5, 36))))


LOOKS = {
    "BH, default": Look(BLUE, "o"),
    "BH, fitted null": Look(SKY, "D"),
    "fixed cut, fitted null": Look(PINK, "v", "--"),
    "BH, contribution null": Look(GREEN, "s"),
    "fixed cut, contribution null": Look(ORANGE, "^", "--"),
    "BH, contribution null, at α / H": Look(BLACK, "P", ":"),
    "risk control by contribution (proven)": Look(RED, "X", ":"),
    "risk control by effect (proven)": Look(RED, "*", "-"),
}


def some_of_each_document(study: Study, split: str) -> tuple[dict[str, Tensor], dict[str, np.ndarray]]:
    """Some sequences of each document of a split, spread evenly over it; and the document of each."""
    length, most = study.window // 2, PER_DOCUMENT[split]
    text, documents = study.text.sequences(split, length), study.text.documents(split, length)
    for domain, numbers in documents.items():
        rows = [np.flatnonzero(numbers == document) for document in np.unique(numbers)]
        chosen = [
            of_one[np.linspace(0, len(of_one) - 1, min(most, len(of_one))).round().astype(int)] for of_one in rows
        ]
        picked = np.concatenate(chosen)[: 8 * study.sequences_per_domain]
        text[domain], documents[domain] = text[domain][picked], numbers[picked]
    return text, documents


def measured(study: Study, split: str) -> Contributions:
    """Contributions of all experts for the tokens of these."""
    text, documents = some_of_each_document(study, split)
    return measure_contributions(study.model, text, documents=documents)


def effects(study: Study, split: str) -> pd.DataFrame:
    """What experts do to the prediction, each left out alone, at some places of these."""
    text, documents = some_of_each_document(study, split)
    return one_changed(study.model, text, num_tokens=5 * study.sequences_per_domain, documents=documents)


@lru_cache(maxsize=1)
def contribution_null(study: Study) -> tuple[ContributionNull, Contributions]:
    """A null fitted on contributions of the calibration split, and these."""
    seen = measured(study, "calibration")
    options = {"model_name": study.name, "largest": LARGEST, "max_k": study.top_k}
    return ContributionNull.from_contributions(seen.r, seen.logits, seen.units, **options), seen


def _rules(study: Study) -> dict[tuple[str, float], Rule]:
    """By method and alpha; all of them fitted and found on the calibration split."""
    null, seen = contribution_null(study)
    changed = effects(study, "calibration")
    fitted, rules, most = study.fit_null(statistic="log_prob"), {}, study.top_k
    default = BH(max_k=most)
    harmonic = float((1 / np.arange(1, most + 1)).sum())  # by which `ContributionNull` proves too little
    for alpha in LEVELS:
        made = (
            default.at(alpha),
            BH(alpha, fitted, max_k=most),
            BH(alpha, fitted, "fixed", max_k=most),
            BH(alpha, null, max_k=most),
            BH(alpha, null, "fixed", max_k=most),
            BH(alpha / harmonic, null, max_k=most),
        )
        rules |= {(method, alpha): rule for method, rule in zip(LOOKS, made, strict=False)}
        promises = (
            partial(promise_discoveries, seen, largest=LARGEST),
            partial(promise_effects, changed, seen, smallest=SMALLEST),
        )
        for method, promise in zip([*LOOKS][len(made) :], promises, strict=True):
            with suppress(ValueError):  # none can be made: too few documents, or too many of the best without effect
                rules[method, alpha] = promise(alpha=alpha, rule=default, levels=TRIED).rule
    return rules


def compute_realised_alpha(study: Study) -> pd.DataFrame:
    """Realised false discovery proportion, power and mean k on the test split: overall, by layer and by domain."""
    rules = _rules(study)
    names = {f"{method}, {alpha:g}": (method, alpha) for method, alpha in rules}
    named = {name: rules[key] for name, key in names.items()}
    seen = measured(study, "test")
    by_effect = realised_by_effect(effects(study, "test"), seen, named, SMALLEST)
    table = pd.concat([realised(seen, named, LARGEST), by_effect.assign(part=BY_EFFECT)], ignore_index=True)
    table.insert(0, "method", [names[name][0] for name in table["rule"]])
    table.insert(1, "alpha", [names[name][1] for name in table["rule"]])
    return table.drop(columns="rule")


#: Over the few documents of a domain or on one layer, one count that rounding decides shows more.
_TOLERANCE = {"fdp": 2e-3, "low": 4e-3, "high": 4e-3, "power": 2e-3, "mean_k": 1e-2}


@figure("realised_alpha", compute_realised_alpha, tolerance=_TOLERANCE)
def draw_realised_alpha(table: pd.DataFrame) -> Figure:
    """Realised against nominal, overall, in the worst domain and by effect; what is kept of the useful experts."""
    fig = Picture(figsize=(8.6, 7.4), layout="constrained")
    (overall, worst), (changed, power) = fig.subplots(2, 2)
    whole, by_effect = table[table["part"] == "all"], table[table["part"] == BY_EFFECT]
    domains = table[~table["part"].str.match(r"all|layer \d")]
    at_worst = domains.loc[domains.groupby(["method", "alpha"], sort=False)["fdp"].idxmax()]
    for axes, part in ((overall, whole), (worst, at_worst), (changed, by_effect)):
        _draw_realised(axes, part)
    for method, look in LOOKS.items():
        part = whole[whole["method"] == method].sort_values("mean_k")
        power.plot(part["mean_k"], part["power"], color=look.color, marker=look.marker, linestyle=look.linestyle)
    first, few = whole.iloc[0], by_effect.iloc[0]
    overall.set_title(
        f"useless: contributes at most {LARGEST:g} of the layer's output (norms)\n"
        f"{first['documents']} documents, {first['tokens']:,} tokens", fontsize=8,
    )  # fmt: skip
    worst.set_title(f"the same, worst of {domains['part'].nunique()} domains at each level", fontsize=8)
    changed.set_title(
        f"useless: without it the prediction moves by less than {SMALLEST:g} nats\n"
        f"{few['tokens']} pairs of a token and a layer, {few['documents']} documents", fontsize=8,
    )  # fmt: skip
    power.set_title("experts that contribute more than that: how many are kept", fontsize=8)
    power.set(xlabel="experts per token and layer (mean)", ylabel="useful experts kept, of all useful ones")
    fig.suptitle(
        f"{about_of(table).name}, test split; nulls and levels from the calibration split; alpha is kept on or below "
        "the line; H: 1 + 1/2 + ... + 1/top-k\n"
        "bars: 95 % bootstrap over documents, each by itself; proven: on average over documents (left)",
        fontsize=8,
    )
    fig.legend(*overall.get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=3)
    return fig


def _draw_realised(axes: Axes, part: pd.DataFrame) -> None:
    levels = np.unique(part["alpha"])
    axes.plot([0, levels.max()], [0, levels.max()], color=BLACK, linewidth=0.8)
    for method, look in LOOKS.items():
        rows = part[part["method"] == method]
        axes.errorbar(
            rows["alpha"], *error_bars(rows, "fdp"), color=look.color, marker=look.marker, linestyle=look.linestyle,
            markersize=4, capsize=2, label=method,
        )  # fmt: skip
    axes.set_xticks(levels, [f"{level:g}" for level in levels])
    axes.set(xlabel="alpha", ylabel="useless experts, of those kept", ylim=(0, None))
