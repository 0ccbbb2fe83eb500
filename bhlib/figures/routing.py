"""Figures of what is routed where: experts per alpha, token, layer."""

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from bhlib.calibration import collect_router_logits
from bhlib.comparisons import resample
from bhlib.discovery import input_device
from bhlib.figures.about import about_of
from bhlib.figures.drawing import Picture, error_bars, heat_map, layer_ticks
from bhlib.figures.registry import figure
from bhlib.figures.runs import interval
from bhlib.figures.study import Study
from bhlib.figures.sweeps import comparison
from bhlib.looks import BLACK, BLUE, RED
from bhlib.patching import BHRoutingIntegration
from bhlib.rules import BH

__all__ = [
    "compute_count_distribution",
    "compute_experts_per_layer",
    "compute_experts_vs_alpha",
    "compute_token_layer_map",
    "draw_count_distribution",
    "draw_experts_per_layer",
    "draw_experts_vs_alpha",
    "draw_token_layer_map",
    "passage_counts",
]


def compute_experts_vs_alpha(study: Study) -> pd.DataFrame:
    """Mean experts per token by alpha and domain, with 95 % intervals over documents, each by itself."""
    sweep = comparison(study).query("family == 'BH'")
    rows = []
    for (domain, alpha), part in sweep.groupby(["domain", "level"]):
        drawn = resample(part["domain"], part["document"])
        low, high = drawn.interval(drawn.means(part["mean_k"]))
        rows.append(
            {"domain": domain, "alpha": alpha, "mean_k": part["mean_k"].mean(), "low": low, "high": high,
             "sequences": len(part), "documents": drawn.units, "tokens_per_sequence": int(part["tokens"].iloc[0]) + 1}
        )  # fmt: skip
    return pd.DataFrame(rows)


@figure("experts_vs_alpha", compute_experts_vs_alpha)
def draw_experts_vs_alpha(table: pd.DataFrame) -> Figure:
    """Experts per token against alpha, a line per domain."""
    top_k = about_of(table).top_k
    fig = Picture(figsize=(6.6, 3.6), layout="constrained")
    axes = fig.subplots()
    # More domains than colours: the line style tells the second round from the first.
    order = table.groupby("domain")["mean_k"].mean().sort_values(ascending=False).index
    for i, domain in enumerate(order):
        part = table[table["domain"] == domain]
        (line,) = axes.plot(
            part["alpha"], part["mean_k"], "-" if i < 6 else "--", color=f"C{i % 6}", marker="o", markersize=3,
            label=domain,
        )  # fmt: skip
        axes.fill_between(part["alpha"], part["low"], part["high"], alpha=0.2, linewidth=0, color=line.get_color())
    axes.axhline(top_k, color=BLACK, linestyle=":", label=f"the model's own top-{top_k}")
    axes.set(xscale="log", xlabel="α", ylabel="experts per token and layer", ylim=(0, 1.05 * top_k))
    axes.set_title(
        f"default p-values, max_k = {top_k}; per domain {table['sequences'].iloc[0]} sequences of "
        f"{table['tokens_per_sequence'].iloc[0]} tokens\nfrom {table['documents'].min()} to "
        f"{table['documents'].max()} documents; 95 % bands over documents, each point by itself", fontsize=8
    )  # fmt: skip
    axes.legend(fontsize=7.5, loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=3.5)
    return fig


def compute_count_distribution(study: Study) -> pd.DataFrame:
    """Share of (token, layer) pairs that get k experts, per alpha: a fifth of the test text, the model's own logits."""
    text, _ = study.every(5)
    logits = collect_router_logits(study.model, text, batch_size=study.batch_size(study.length), progress=False)
    layers, tokens, _ = logits.shape
    rows = []
    for alpha in (0.01, 0.05, 0.2, 0.5):
        counts = torch.cat([BH(alpha, max_k=study.top_k)(part, layer).counts for layer, part in enumerate(logits)])
        shares = counts.bincount(minlength=study.top_k + 1) / len(counts)
        rows += [
            {"alpha": alpha, "experts": k, "fraction": share, "tokens": tokens, "layers": layers}
            for k, share in enumerate(shares.tolist())
        ]
    return pd.DataFrame(rows)


@figure("count_distribution", compute_count_distribution)
def draw_count_distribution(table: pd.DataFrame) -> Figure:
    """Distribution of the number of experts per token and layer, one panel per alpha."""
    alphas, top_k = sorted(table["alpha"].unique()), about_of(table).top_k
    fig = Picture(figsize=(7.2, 2.4), layout="constrained")
    for axes, alpha in zip(fig.subplots(1, len(alphas), sharey=True), alphas, strict=True):
        part = table[table["alpha"] == alpha]
        axes.bar(part["experts"], 100 * part["fraction"], color=BLUE)
        mean = (part["experts"] * part["fraction"]).sum()
        axes.axvline(mean, color=RED, linestyle="--")
        axes.set_title(f"α = {alpha:g}, mean {mean:.2f}", fontsize=8.5)
        axes.set(xlabel="experts", xticks=range(0, top_k + 1, max(1, top_k // 4)))
    fig.axes[0].set_ylabel("% of (token, layer) pairs")
    sample = f"{table['tokens'].iloc[0]:,} tokens × {table['layers'].iloc[0]} layers"
    fig.suptitle(f"{sample}; bounds 1 and {top_k}", fontsize=8)
    return fig


def compute_token_layer_map(study: Study, alpha: float = 0.05, length: int = 40) -> pd.DataFrame:
    """Experts per token and layer of a passage from each of two test domains, or of the only one."""
    parts = []
    domains = sorted(study.test)
    for domain in dict.fromkeys((domains[0], domains[-1])):
        ids = study.test[domain][:1, : 3 * length]
        counts = passage_counts(study.model, study.tokenizer, ids, alpha=alpha, max_k=study.top_k)
        shown = counts[counts["position"] >= counts["position"].max() + 1 - length]
        parts.append(shown.assign(domain=domain, alpha=alpha))
    return pd.concat(parts, ignore_index=True)


def passage_counts(model, tokenizer, input_ids: torch.Tensor, **bh_options) -> pd.DataFrame:
    """Experts that BH gives to each token of one passage in each layer.

    Parameters
    ----------
    model, tokenizer
        As `load_demo` returns them.
    input_ids : Tensor [1, tokens], int64
    **bh_options
        For `BHRoutingIntegration`.

    Returns
    -------
    pandas.DataFrame
        Columns ``position``, ``token`` (its text), ``layer``, ``count``.
    """
    with BHRoutingIntegration(model, max_recorded_tokens=None, **bh_options) as bh, torch.no_grad():
        model(input_ids=input_ids.to(input_device(model)), use_cache=False)
    counts = bh.records.counts()
    texts = [tokenizer.decode([token]) for token in input_ids[0].tolist()]
    tokens, layers = counts.shape
    return pd.DataFrame(
        {
            "position": np.repeat(np.arange(tokens), layers),
            "token": np.repeat(texts, layers),
            "layer": np.tile(np.arange(layers), tokens),
            "count": counts.flatten(),
        }
    )


@figure("token_layer_map", compute_token_layer_map, tolerance={"count": 1})
def draw_token_layer_map(table: pd.DataFrame) -> Figure:
    """Experts per token and layer, a row of panels per passage (column ``domain``, if there is one)."""
    passages = list(table.groupby("domain")) if "domain" in table else [("passage", table)]
    top_k = about_of(table).top_k
    fig = Picture(figsize=(9.0, 2.5 * len(passages)), layout="constrained")
    for axes, (name, part) in zip(np.atleast_1d(fig.subplots(len(passages), 1)), passages, strict=True):
        grid = part.pivot(index="layer", columns="position", values="count")
        texts = part.drop_duplicates("position")["token"]
        bar = {"label": "experts", "ticks": sorted({1, max(1, top_k // 2), top_k}), "pad": 0.01}
        heat_map(axes, grid[::-1], cmap="viridis", vmin=1, vmax=top_k, cbar_kws=bar, xticklabels=False)
        axes.set_xticks(np.arange(len(texts)) + 0.5, [repr(str(text))[1:-1] for text in texts])
        axes.tick_params(axis="x", rotation=90, labelsize=6.5)
        axes.set(ylabel="layer", title=f"{name}: mean {part['count'].mean():.2f} experts")
    return fig


def compute_experts_per_layer(study: Study) -> pd.DataFrame:
    """Mean experts per layer and domain under the default rule, with 95 % intervals over documents, each by itself."""
    run = study.runs["BH 0.05"]
    per_sequence = run.counts.mean(axis=1)
    domains = {name: (per_sequence[run.domain == name], run.drawn_within(name)) for name in np.unique(run.domain)}
    rows = []
    for domain, (values, drawn) in (domains | {"all": (per_sequence, run.drawn)}).items():
        size = {"sequences": len(values), "documents": drawn.units}
        for layer, means in enumerate(drawn.means(values).T):
            rows.append({"domain": domain, "layer": layer} | interval(means, drawn) | size)
    return pd.DataFrame(rows).assign(tokens_per_sequence=run.counts.shape[1])


@figure("experts_per_layer", compute_experts_per_layer, tolerance=dict.fromkeys(["value", "low", "high"], 5e-3))
def draw_experts_per_layer(table: pd.DataFrame) -> Figure:
    """Heat map of the mean number of experts per domain and layer; beside it the layers' means with intervals."""
    top_k = about_of(table).top_k
    wide = table.pivot(index="domain", columns="layer", values="value")
    order = wide.drop(index="all").mean(axis=1).sort_values(ascending=False).index
    fig = Picture(figsize=(8.6, 3.6), layout="constrained")
    left, right = fig.subplots(1, 2, width_ratios=(1.5, 1))
    heat_map(left, wide.loc[order], wide.loc[order].map("{:.1f}".format), cmap="cividis", cbar=False)
    each = table[table["domain"] != "all"]
    half = ((each["high"] - each["low"]) / 2).median()
    left.set(xlabel="layer")
    left.set_title(f"experts per token (mean); 95 % intervals, each by itself: ± {half:.2f} in the median", fontsize=8)
    for domain, part in each.groupby("domain"):
        right.plot(part["layer"], part["value"], color="#999999", linewidth=0.8, label="_" + domain)
    right.plot([], [], color="#999999", linewidth=0.8, label="one domain")
    everything = table[table["domain"] == "all"]
    right.errorbar(
        everything["layer"], *error_bars(everything), color=BLUE, marker="o", markersize=4, capsize=2,
        label="all domains, 95 % interval",
    )  # fmt: skip
    right.axhline(everything["value"].mean(), color=RED, linestyle="--", linewidth=1, label="mean over layers")
    right.set(
        xlabel="layer",
        ylabel="experts per token (mean)",
        ylim=(0, 1.05 * top_k),
        xticks=layer_ticks(everything["layer"]),
    )
    right.legend(fontsize=7.5, loc="lower right")
    fig.suptitle(
        f"default BH, α = 0.05, max_k = {top_k}; test split, {each['sequences'].iloc[0]} sequences of "
        f"{table['tokens_per_sequence'].iloc[0]} tokens per domain; bootstrap over {everything['documents'].iloc[0]} "
        f"documents", fontsize=8,
    )  # fmt: skip
    return fig
