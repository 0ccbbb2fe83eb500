"""The figure of what is written with fewer experts, and with something in the place of the dropped ones."""

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from bhlib.agreement import text_agreement
from bhlib.comparisons import resample
from bhlib.figures.about import about_of
from bhlib.figures.drawing import Picture, error_bars
from bhlib.figures.families import bh
from bhlib.figures.registry import figure
from bhlib.figures.stand_ins import STAND_INS, costs_of, fitted, mean_for
from bhlib.figures.study import Study
from bhlib.looks import COLORS

__all__ = ["compute_written", "draw_written"]

#: Tokens of a prompt, and tokens to write.
PROMPT, LENGTH = 24, 40

#: What is measured, and what pictures call it.
MEASURES = {
    "same": "tokens equal to the model's own\nin the same place",
    "until": "tokens before the first\nthat differs",
    "top1_agreement": "same best guess along\nthe model's own text",
    "kl": "KL along the model's own text\n(nats per token)",
}


def compute_written(study: Study) -> pd.DataFrame:
    """How far the text that default BH writes agrees with the model's own, by what stands in, at counted cost.

    Greedily, from the beginning of one sequence of each document of the test split (`bhlib.agreement.text_agreement`).

    Returns
    -------
    pandas.DataFrame
        A row per ``stands_in``, ``wanted_cost`` and ``measure`` (`MEASURES`): ``value`` (mean over prompts) with its
        95 % interval ``low``, ``high`` over documents; ``cost`` and ``mean_k`` (experts per token and layer);
        ``units`` (documents, a prompt of each), ``length`` (tokens written).
    """
    prompts, domains = _prompts(study)
    drawn = resample(domains, np.arange(len(domains)))
    rows = []
    for name, one in STAND_INS.items():
        compensation, norms = fitted(study, one)
        logits = study.thin_logits if norms is None else norms.shown(study.thin_logits)
        more = {key: value for key, value in (("compensation", compensation), ("norms", norms)) if value is not None}
        for cost in costs_of(study):
            rule = bh(study)(logits, mean_for(compensation, norms, cost, study))
            table = text_agreement(study.model, prompts, rule, LENGTH, **more)
            spent = {"cost": table["cost"].mean(), "mean_k": table["mean_k"].mean()}
            for measure in MEASURES:
                means = drawn.means(table[measure])
                low, high = drawn.interval(means)
                rows.append({"stands_in": name, "wanted_cost": cost, "measure": measure, "value": means[0], "low": low,
                             "high": high} | spent)  # fmt: skip
    return pd.DataFrame(rows).assign(units=len(prompts), length=LENGTH)


def _prompts(study: Study) -> tuple[Tensor, np.ndarray]:
    """The beginning of a sequence of each document [documents, tokens], and its domain."""
    found, domains = [], []
    for domain, sequences in study.whole_test.items():
        documents = np.asarray(study.whole_test_documents[domain])
        first = [int(np.flatnonzero(documents == one)[0]) for one in dict.fromkeys(documents.tolist())]
        found.append(sequences[first, :PROMPT])
        domains += [domain] * len(first)
    return torch.cat(found), np.array(domains)


@figure("written", compute_written, slow=True)
def draw_written(table: pd.DataFrame) -> Figure:
    """Agreement with the model's own text against counted cost: a panel per measure, a line for what stands in."""
    fig = Picture(figsize=(9.6, 3.1), layout="constrained")
    panels = fig.subplots(1, len(MEASURES), sharex=True)
    for axes, (measure, label) in zip(panels, MEASURES.items(), strict=True):
        _draw_measure(axes, table[table["measure"] == measure], label)
    first = table.iloc[0]
    fig.suptitle(
        f"{about_of(table).name}, test split: {first['units']} documents, a text of {first['length']} tokens for each; "
        "default BH against the model's own routing\nbars: 95 % bootstrap over documents, for each point by itself",
        fontsize=8,
    )
    handles, labels = panels[0].get_legend_handles_labels()
    fig.legend(
        handles, labels, title="in the place of dropped experts:", title_fontsize=8, fontsize=8,
        loc="outside lower center", ncols=4,
    )  # fmt: skip
    return fig


def _draw_measure(axes: Axes, rows: pd.DataFrame, label: str) -> None:
    for number, (name, color) in enumerate(zip(STAND_INS, COLORS, strict=False)):
        part = rows[rows["stands_in"] == name].sort_values("cost")
        axes.errorbar(part["cost"] + 0.03 * (number - 1.5), *error_bars(part), color=color, marker="o", markersize=3.5,
                      capsize=1.5, linewidth=1, label=name.rstrip(","))  # fmt: skip
    axes.set_title(label, fontsize=8)
    axes.set_xlabel("counted cost (experts)", fontsize=8)
    axes.set_ylim(bottom=0)
