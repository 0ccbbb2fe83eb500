"""Figures of the router after the OLMoE paper: which experts go together, and how specialized they are under a rule."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import seaborn
from matplotlib.figure import Figure
from scipy.cluster.hierarchy import leaves_list, linkage

from bhlib.figures.drawing import Picture, layer_ticks
from bhlib.figures.registry import figure
from bhlib.looks import BLACK, COLORS
from bhlib.specialization import Selection, coactivation, domain_specialization

__all__ = ["draw_router_maps", "draw_specialization"]


def draw_router_maps(seen: Mapping[str, Selection], layer: int) -> Figure:
    """Co-activation and domain specialization of a layer's experts, a column for each rule.

    Experts stand in the same order everywhere: that of a hierarchical clustering (average linkage) of how far those
    that the first rule selects go together.

    Parameters
    ----------
    seen : mapping of str to Selection
        By the name of the rule, all of one model and text (`bhlib.specialization.observe_selection`).
    layer : int
    """
    first = coactivation(next(iter(seen.values())))[layer]
    order = leaves_list(linkage((first + first.T) / 2, method="average", optimal_ordering=True))
    fig = Picture(figsize=(3.6 * len(seen) + 0.6, 5.6), layout="constrained")
    above, below = fig.subplots(2, len(seen), squeeze=False, height_ratios=(2, 1))
    for column, (name, one) in enumerate(seen.items()):
        load = one.load.mean(axis=0)[layer]
        lift = np.log2(np.maximum(coactivation(one)[layer], 1e-4) / np.maximum(load, 1e-4))
        np.fill_diagonal(lift, np.nan)
        last = column == len(seen) - 1
        options = {"cbar": last, "xticklabels": False}
        bar = {"cbar_kws": {"label": "co-activation over chance (log2)"}} if last else {}
        seaborn.heatmap(lift[order][:, order], ax=above[column], cmap="PuOr_r", vmin=-3, vmax=3, square=True,
                        yticklabels=False, **options, **bar)  # fmt: skip
        above[column].set_title(f"{name}: {one.mean_k[layer]:.1f} experts", fontsize=8)
        share = pd.DataFrame(100 * domain_specialization(one)[layer][order].T, index=one.domains)
        bar = {"cbar_kws": {"label": "% of a domain's tokens"}} if last else {}
        seaborn.heatmap(share, ax=below[column], cmap="viridis", vmin=0, vmax=60,
                        yticklabels=column == 0, **options, **bar)  # fmt: skip
        for axes in (above[column], below[column]):
            axes.grid(False)
            axes.set_ylabel("")
        below[column].tick_params(labelsize=7)
    fig.supxlabel(f"experts of layer {layer}, in one order for all", fontsize=8)
    return fig


@figure("specialization", None, of_model=False)
def draw_specialization(table: pd.DataFrame) -> Figure:
    """A panel per measure: each rule, layer by layer, the mean of the models and each of them."""
    measures = list(dict.fromkeys(table["measure"]))
    rules = sorted(table["rule"].unique(), key=lambda rule: (not rule.startswith("top-"), rule))
    fig = Picture(figsize=(11.5, 3.6), layout="constrained")
    for axes, measure in zip(fig.subplots(1, len(measures)), measures, strict=True):
        for rule, color in zip(rules, (BLACK, *COLORS), strict=False):
            part = table[(table["measure"] == measure) & (table["rule"] == rule)]
            for _, one in part.groupby("model", sort=False):
                axes.plot(one["layer"], one["value"], color=color, linewidth=0.5, alpha=0.6)
            mean = part.groupby("layer")[["value", "low", "high"]].mean()
            axes.plot(mean.index, mean["value"], color=color, marker="o", markersize=3.5, label=rule)
            if mean["low"].notna().any():
                axes.fill_between(mean.index, mean["low"], mean["high"], color=color, alpha=0.12)
        axes.set_xticks(layer_ticks(table["layer"]))
        axes.set_xlabel("layer", fontsize=8)
        axes.set_ylabel(measure, fontsize=8)
    axes.legend(fontsize=7)
    sizes = table.groupby("model", sort=False)["sequences"].first()
    models = ", ".join(f"{model}: {sequences:,} sequences" for model, sequences in sizes.items())
    fig.suptitle(
        f"{models} of the test split; thin: each model; bands: 95 % bootstrap over documents, mean of the models",
        fontsize=8,
    )
    return fig
