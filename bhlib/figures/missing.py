"""The figure of the missing part: how much of a layer's output dropped experts were, and how much of that is caught."""

import numpy as np
import pandas as pd
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bhlib.comparisons import resample
from bhlib.compensating import explain_missing
from bhlib.discovery import MoELayer, find_moe_layers
from bhlib.figures.about import about_of
from bhlib.figures.drawing import ONE, Picture, error_bars, interval_caption, layer_ticks, sample_caption
from bhlib.figures.families import by_level
from bhlib.figures.registry import figure
from bhlib.figures.study import RANKS, Study
from bhlib.layer_passes import LayerPass, watch_text
from bhlib.looks import BLUE, GREEN, ORANGE
from bhlib.rules import Threshold
from bhlib.text_pass import check_texts

__all__ = ["compute_missing_part", "draw_missing_part"]

#: The rank that the stacked bars show.
SHOWN = 16


@torch.no_grad()
def compute_missing_part(study: Study) -> pd.DataFrame:
    """Energies (squared norms) of what is missing under a probability threshold that keeps half, on validation text.

    The layers before the one that is looked at run as in the model itself.

    Returns
    -------
    pandas.DataFrame
        A row per layer and rank of the map, with 95 % intervals over documents, each by itself: ``layer``; ``rank``;
        ``missing`` (energy of what the dropped experts would have added, over that of the layer's output), with
        ``missing_low`` and ``missing_high``; ``caught`` (share of the energy of what is missing that the compensation
        takes away; of rank 0, the means alone), ``low``, ``high``; ``mean_k``, ``sequences``, ``units``, ``tokens``.
    """
    rule = by_level(Threshold, study)(study.thin_logits, study.half)
    layers, ranks = find_moe_layers(study.model), [rank for rank in RANKS if rank <= study.hidden_size]
    parts = {rank: study.compensation(rank) for rank in ranks}
    sums: dict[int, list[torch.Tensor]] = {layer.index: [] for layer in layers}
    kept: list[float] = []

    def take(layer: MoELayer, seen: LayerPass, _: int) -> None:
        features, missing = explain_missing(layer, seen, rule, True)
        dropped, hidden = features.split([layer.num_experts, missing.shape[1]], dim=1)
        rows = [seen.output.float(), missing.float()]
        for rank in ranks:
            part = parts[rank].layer(layer.index, features)
            rows.append(missing.float() - dropped @ part.means[1:] - hidden @ part.down.T @ part.up)
        energy = torch.stack([row.square().sum(dim=1) for row in rows], dim=1)
        sums[layer.index].append(energy.view(-1, study.window, len(rows)).sum(dim=1).double().cpu())
        kept.append(float(study.top_k - (dropped != 0).sum(dim=1).float().mean()))

    watch_text(study.model, layers, check_texts(study.validation, None), study.batch_size(study.window), take)
    documents = study.validation_documents
    domain = np.repeat(list(documents), [len(numbers) for numbers in documents.values()])
    drawn = resample(domain, np.concatenate([*documents.values()]))
    rows = []
    for layer, energies in sums.items():
        output, missing, *left = drawn.means(torch.cat(energies)).T
        share = missing / output
        of_layer = dict(zip(("missing_low", "missing_high"), drawn.interval(share), strict=True))
        for rank, rest in zip(ranks, left, strict=True):
            low, high = drawn.interval(1 - rest / missing)
            caught = {"caught": 1 - rest[0] / missing[0], "low": low, "high": high}
            rows.append({"layer": layer, "rank": rank, "missing": share[0]} | of_layer | caught)
    table = pd.DataFrame(rows).assign(mean_k=np.mean(kept), sequences=len(domain), units=drawn.units)
    return table.assign(tokens=len(domain) * study.window)


#: On a short text a token that is kept or not on the edge of the threshold shows.
_TOLERANCE = {name: 5e-3 for name in ("missing", "missing_low", "missing_high", "caught", "low", "high")} | {
    "mean_k": 1e-2
}


@figure("missing_part", compute_missing_part, tolerance=_TOLERANCE)
def draw_missing_part(table: pd.DataFrame) -> Figure:
    """Left, what is missing of each layer's output, and what catches it; right, the share caught against the rank."""
    fig = Picture(figsize=(8.2, 3.8), layout="constrained")
    bars, lines = fig.subplots(1, 2)
    _draw_bars(bars, table)
    layers = sorted(table["layer"].unique())
    for layer, color in zip(layers, colormaps["viridis"](np.linspace(0, 0.9, len(layers))), strict=True):
        part = table[table["layer"] == layer].sort_values("rank")
        lines.errorbar(
            part["rank"], *error_bars(part, "caught", scale=100), color=color, marker="o", markersize=3, capsize=2,
            label=f"layer {layer}" if layer in (layers[0], layers[-1]) else None,
        )  # fmt: skip
    lines.set_xticks(sorted(table["rank"].unique()))
    lines.set(
        xlabel="rank of the map (0: means alone)",
        ylabel="energy of the missing part that is caught (%)",
        ylim=(0, None),
    )
    lines.legend(fontsize=8, title="dark to light: layers in order", title_fontsize=7)
    fig.suptitle(
        f"{sample_caption(table, 'validation')}; a threshold keeps {table['mean_k'].iloc[0]:.1f} of the "
        f"{about_of(table).top_k} experts\n{interval_caption(table, ONE)}",
        fontsize=8,
    )
    return fig


def _draw_bars(axes: Axes, table: pd.DataFrame) -> None:
    """The energy that is missing of each layer, in three parts."""
    rank = SHOWN if (table["rank"] == SHOWN).any() else table["rank"].max()
    means, both = (table[table["rank"] == one].set_index("layer") for one in (0, rank))
    whole = 100 * means["missing"]
    by_means, by_map = whole * means["caught"], whole * (both["caught"] - means["caught"])
    axes.bar(whole.index, by_means, color=BLUE, label="the means catch")
    axes.bar(whole.index, by_map, bottom=by_means, color=GREEN, label=f"a map of rank {rank} besides")
    rest = whole - by_means - by_map
    axes.bar(whole.index, rest, bottom=by_means + by_map, color=ORANGE, alpha=0.6, label="stays missing")
    spread = np.abs(np.stack([means["missing"] - means["missing_low"], means["missing_high"] - means["missing"]])) * 100
    axes.errorbar(whole.index, whole, spread, color="black", linestyle="none", capsize=2, linewidth=1)
    axes.set_xticks(layer_ticks(whole.index))
    axes.set(xlabel="layer", ylabel="energy of the layer's output that is missing (%)")
    axes.legend(fontsize=8)
