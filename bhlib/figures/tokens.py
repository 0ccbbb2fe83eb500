"""Figures of single tokens: who is given more experts, and with which weights."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from bhlib.comparisons import paired_difference, with_documents
from bhlib.evaluation import sweep
from bhlib.figures.about import NotForThisModel, about_of
from bhlib.figures.drawing import Picture, error_bars, layer_ticks, signed_ticks
from bhlib.figures.registry import figure
from bhlib.figures.runs import interval, rank_correlation
from bhlib.figures.study import Study
from bhlib.levels import alpha_for_mean_experts
from bhlib.looks import BLACK, BLUE, GREEN, ORANGE, RED, SKY
from bhlib.pvalues import DirichletNull
from bhlib.rules import BH, KeepMass, TopK

__all__ = [
    "compute_renormalization",
    "compute_token_loss",
    "draw_renormalization",
    "draw_token_loss",
]

# -- are hard tokens given more? ---------------------------------------------------------------------------------------


def compute_token_loss(study: Study, num_bins: int = 10) -> pd.DataFrame:
    """Experts that BH gives to the token that predicts another, against how hard the other is to predict.

    The difficulty is the loss under the model's own top-k, the experts are a mean over the layers.

    Returns
    -------
    pandas.DataFrame
        Rows of three kinds, with ``value`` and its 95 % interval over documents, by itself: ``bin``: mean experts, for
        equal numbers of tokens by loss (``loss``: mean of the bin), of all domains and of each; ``domain``: rank
        correlation of loss and experts, of all domains and within each; ``layer``: that with the experts of one layer.
    """
    loss, run = study.runs[study.own].loss, study.runs["BH 0.05"]
    by_layer = run.counts[:, :-1]  # the last token predicts nothing that is known
    experts = by_layer.mean(axis=2)
    groups = {name: (run.domain == name, run.drawn_within(name)) for name in np.unique(run.domain)}
    rows = []
    for domain, (chosen, drawn) in ({"all": (np.full(len(loss), True), run.drawn)} | groups).items():
        common = {"domain": domain, "sequences": int(chosen.sum()), "documents": drawn.units}
        common["tokens"] = loss[chosen].size
        rows.append({"kind": "domain"} | common | rank_correlation(loss[chosen], experts[chosen], drawn))
        edges = np.quantile(loss[chosen], np.linspace(0, 1, num_bins + 1)[1:-1])
        bins = np.searchsorted(edges, loss[chosen])
        for number in range(num_bins):
            inside = bins == number
            given = drawn.means((inside * experts[chosen]).mean(axis=1)) / drawn.means(inside.mean(axis=1))
            center = {"bin": number, "loss": loss[chosen][inside].mean()}
            rows.append({"kind": "bin"} | common | center | interval(given, drawn))
    for layer in range(by_layer.shape[2]):
        rows.append(
            {
                "kind": "layer",
                "domain": "all",
                "layer": layer,
                "sequences": len(loss),
                "documents": run.drawn.units,
                "tokens": loss.size,
            }
            | rank_correlation(loss, by_layer[:, :, layer], run.drawn)
        )
    return pd.DataFrame(rows).astype({"bin": "Int64", "layer": "Int64"})


@figure("token_loss", compute_token_loss, tolerance=dict.fromkeys(["value", "low", "high", "loss"], 5e-3))
def draw_token_loss(table: pd.DataFrame) -> Figure:
    """Experts against difficulty; rank correlations by domain and by layer."""
    fig = Picture(figsize=(9.4, 3.4), layout="constrained")
    left, middle, right = fig.subplots(1, 3, width_ratios=(1.3, 1, 1))
    bins = table[table["kind"] == "bin"]
    for domain, part in bins[bins["domain"] != "all"].groupby("domain"):
        left.plot(part["loss"], part["value"], color="#999999", linewidth=0.8, label="_" + domain)
    left.plot([], [], color="#999999", linewidth=0.8, label="one domain")
    everything = bins[bins["domain"] == "all"]
    left.errorbar(
        everything["loss"], *error_bars(everything), color=BLUE, marker="o", markersize=4, capsize=2,
        label="all domains, 95 % interval",
    )  # fmt: skip
    left.set(xscale="log", xlabel=f"loss of a token under {about_of(table).own} (nats; tenths of tokens)")
    left.set(ylabel="experts of the token that predicts it\n(mean over layers)")
    left.legend(fontsize=7.5)
    domains = table[table["kind"] == "domain"].sort_values("value", ignore_index=True)
    for color, part in ((BLUE, domains[domains["domain"] == "all"]), (BLACK, domains[domains["domain"] != "all"])):
        middle.errorbar(
            part["value"],
            part.index,
            xerr=error_bars(part)[1],
            color=color,
            linestyle="",
            marker="o",
            markersize=4,
            capsize=2,
        )
    middle.set_yticks(domains.index, domains["domain"])
    middle.set(xlabel="rank correlation of loss and experts")
    layers = table[table["kind"] == "layer"]
    right.errorbar(layers["layer"], *error_bars(layers), color=BLUE, marker="o", markersize=4, capsize=2)
    right.set(xlabel="layer", ylabel="rank correlation with that layer's experts", xticks=layer_ticks(layers["layer"]))
    reach = 1.1 * domains[["low", "high"]].abs().max(axis=None)
    middle.set_xlim(-reach, reach)
    middle.axvline(0, color=RED, linestyle="--", linewidth=1)
    right.axhline(0, color=RED, linestyle="--", linewidth=1)
    first = table.iloc[0]
    fig.suptitle(
        f"default BH, α = 0.05; test split, {first['sequences']} sequences, {first['tokens']:,} tokens; bars: 95 % "
        f"bootstrap over {first['documents']} documents, each by itself; dashed: no relation", fontsize=8,
    )  # fmt: skip
    return fig


# -- renormalization and temperature -----------------------------------------------------------------------------------


#: What keeps the sum of the weights that the model's own experts would have; tables call it so whatever its top-k.
SUM = "sum of top-8"

#: What is done to the weights of the kept experts, and the options of `RoutingPatch` that do it.
WEIGHTS = {
    "as they are": {},
    "sum 1": {"weights": "normalized"},
    SUM: {},
    "temperature 0.9": {"temperature": 0.9},
    "temperature 1.1": {"temperature": 1.1},
}


def compute_renormalization(study: Study) -> pd.DataFrame:
    """Loss of static top-k and of BH at about the same number of experts, with different weights of the kept ones.

    At the whole numbers of experts of other figures, but for the largest. Differences are paired, from the same rule
    with its weights as they are. Every sixth test sequence.
    """
    mean_experts = [int(k) for k in study.mean_ks[:-1] if k == int(k)]
    if not mean_experts:
        raise NotForThisModel(
            f"static {study.own} and BH are compared at whole numbers of experts between 1 and the model's own, and "
            f"between 1 and {study.top_k} there is none"
        )
    text, documents = study.every(6)
    rules = {f"top-{k}": TopK(k) for k in mean_experts}
    for k in mean_experts:
        alpha = alpha_for_mean_experts(DirichletNull(), study.calibration_logits, k, max_k=study.top_k)
        rules[f"BH-{k}"] = BH(alpha, max_k=study.top_k)
    parts = []
    for weights, options in WEIGHTS.items():
        changed = {name: KeepMass(rule, study.top_k) for name, rule in rules.items()} if weights == SUM else rules
        batch_size = study.batch_size(study.length)
        frame = sweep(study.model, changed, text, cache=study.cache, batch_size=batch_size, **options)
        parts.append(frame.assign(weights=weights, plain=frame["rule"], rule=frame["rule"] + " " + weights))
    frame = with_documents(pd.concat(parts, ignore_index=True), documents)
    rows = []
    for (rule, plain, weights), part in frame.groupby(["rule", "plain", "weights"], sort=False):
        rows.append(
            {"rule": plain.partition("-")[0], "k": int(plain.partition("-")[2]), "weights": weights,
             "alpha": getattr(rules[plain], "alpha", np.nan), "mean_k": part["mean_k"].mean(),
             "loss": part["loss"].mean()}
            | paired_difference(frame, rule, f"{plain} as they are")
            | {"tokens": int(part["tokens"].sum())}
        )  # fmt: skip
    return pd.DataFrame(rows)


# Few sequences, and levels that are themselves searched for: between a CPU and a GPU 6e-4 was seen.
@figure(
    "renormalization", compute_renormalization, tolerance=dict.fromkeys(["loss", "difference", "low", "high"], 1e-3)
)
def draw_renormalization(table: pd.DataFrame) -> Figure:
    """Change of the loss by other weights, against experts per token, for static top-k and for BH."""
    fig = Picture(figsize=(7.6, 3.4), layout="constrained")
    looks = dict(zip(list(WEIGHTS)[1:], ((RED, "s"), (ORANGE, "D"), (SKY, "v"), (GREEN, "^")), strict=True))
    titles = {"top": "static top-k", "BH": "BH, default p-values, α for about k experts"}
    for axes, (rule, title) in zip(fig.subplots(1, 2, sharey=True), titles.items(), strict=True):
        for shift, (weights, (color, marker)) in zip((-0.06, -0.02, 0.02, 0.06), looks.items(), strict=True):
            part = table[(table["rule"] == rule) & (table["weights"] == weights)]
            axes.errorbar(
                part["mean_k"] + shift, *error_bars(part, "difference"), color=color, marker=marker,
                markersize=4, capsize=2, label=f"sum of {about_of(table).own}" if weights == SUM else weights,
            )  # fmt: skip
        axes.axhline(0, color=BLACK, linewidth=1)
        axes.set_yscale("symlog", linthresh=0.02, linscale=0.8)
        axes.set(xlabel="experts per token and layer (mean)", xticks=sorted(table["k"].unique()))
        axes.set_title(title, fontsize=8.5)
    ticks = [-0.01, 0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1]
    signed_ticks(fig.axes[0], ticks)
    fig.axes[0].set_ylabel("loss above that with the weights\nas they are (nats per token)")
    handles, labels = fig.axes[0].get_legend_handles_labels()
    fig.legend(handles, labels, fontsize=8, loc="outside right center", title="weights of the\nkept experts")
    fig.suptitle(
        f"test split: {table['sequences'].iloc[0]} sequences, {table['tokens'].iloc[0]:,} tokens; bars: 95 % paired "
        f"bootstrap over documents, each by itself", fontsize=8,
    )  # fmt: skip
    return fig
