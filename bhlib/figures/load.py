"""The figure of how evenly experts are used, and which are used together."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from bhlib.figures.about import about_of
from bhlib.figures.drawing import Picture, error_bars, layer_ticks
from bhlib.figures.registry import figure
from bhlib.figures.runs import Run, interval
from bhlib.figures.study import Study
from bhlib.looks import BLACK, BLUE, RED

__all__ = ["compute_expert_load", "draw_expert_load"]


def compute_expert_load(study: Study, num_pairs: int = 10) -> pd.DataFrame:
    """How evenly experts are used, and which go together, under the model's own top-k and under BH.

    Returns
    -------
    pandas.DataFrame
        Rows of four kinds, each for both rules, with ``value`` and its 95 % interval over documents, by itself (none
        for loads):

        ``load``: share of a layer's (token, expert) pairs that falls to the expert of a ``rank``;
        ``busiest``: load of a layer's busiest expert over the mean load (1 if even);
        ``pair``: of the tokens that use expert ``i``, the share that also uses ``j`` (co-activation as defined in
        section 5.2 of the OLMoE paper), for the strongest pairs of the middle layer under top-k, one direction of each;
        ``partner``: mean over a layer's experts of the co-activation with the strongest partner, and ``pairs``: with
        any other, the mean over all pairs. Partners are those of the whole sample.
    """
    layer, rows = study.num_layers // 2, []
    for rule, run in study.runs.items():
        load = np.diagonal(run.coactivation, axis1=2, axis2=3)
        share = load.sum(axis=0) / load.sum(axis=(0, 2))[:, None]
        for number, shares in enumerate(share):
            common = {"rule": rule, "layer": number}
            ranked = enumerate(sorted(shares, reverse=True), start=1)
            rows += [common | {"kind": "load", "rank": rank, "value": value} for rank, value in ranked]
            busiest, mean = load[:, number, shares.argmax()], load[:, number].mean(axis=1)
            excess = run.drawn.means(busiest) / run.drawn.means(mean)
            rows.append(common | {"kind": "busiest"} | interval(excess, run.drawn))
            partner, anyone = _partners(run, number)
            rows.append(common | {"kind": "partner"} | interval(partner, run.drawn))
            rows.append(common | {"kind": "pairs"} | interval(anyone, run.drawn))
    for i, j in _strongest_pairs(study.runs[study.own], layer, num_pairs):
        for rule, run in study.runs.items():
            both, one = (run.drawn.means(run.coactivation[:, layer, i, other]) for other in (j, i))
            one[one == 0] = np.nan  # an expert that no token of a resample used
            share = interval(both / one, run.drawn)
            rows.append({"rule": rule, "layer": layer, "kind": "pair", "i": i, "j": j} | share)
    sequences, tokens, _ = run.counts.shape
    whole = dict.fromkeys(["rank", "i", "j"], "Int64")
    return (
        pd.DataFrame(rows)
        .astype(whole)
        .assign(sequences=sequences, documents=run.drawn.units, tokens=sequences * tokens)
    )


def _coactivation(run: Run, layer: int) -> np.ndarray:
    """Share of expert i's tokens that j got too, [experts, experts]; 0 on the diagonal and for experts without any."""
    counts = run.coactivation[:, layer].sum(axis=0)
    share = counts / np.maximum(counts.diagonal(), 1)[:, None]
    np.fill_diagonal(share, 0)
    return share


def _strongest_pairs(run: Run, layer: int, number: int) -> list[tuple[int, int]]:
    """The experts (i, j) with the largest co-activation, the stronger direction of each pair; in order of i and j."""
    share = _coactivation(run, layer)
    share = np.where(share >= share.T, share, 0)
    best = np.argsort(share, axis=None)[::-1][:number]
    # By their numbers, since rounding decides the order of two that are alike.
    return sorted((int(i), int(j)) for i, j in zip(*np.unravel_index(best, share.shape), strict=True))


def _partners(run: Run, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """Resampled means over a layer's experts of the co-activation with the strongest partner, and with all others."""
    experts = np.arange(run.coactivation.shape[-1])
    partner = _coactivation(run, layer).argmax(axis=1)
    counts = run.coactivation[:, layer]
    own = run.drawn.means(counts[:, experts, experts])
    own[own == 0] = np.nan  # an expert that no token of a resample used
    shared = run.drawn.means(counts[:, experts, partner])
    others = run.drawn.means(counts.sum(axis=2)) - own
    return np.nanmean(shared / own, axis=1), np.nanmean(others / own, axis=1) / (len(experts) - 1)


@figure("expert_load", compute_expert_load)
def draw_expert_load(table: pd.DataFrame) -> Figure:
    """Sorted loads, the busiest expert per layer, the strongest pairs of one layer, strongest partners per layer."""
    fig = Picture(figsize=(9.0, 6.4), layout="constrained")
    (loads, busiest), (pairs, partners) = fig.subplots(2, 2)
    top = about_of(table).own
    looks = {top: (BLACK, "s", f"the model's own {top}"), "BH 0.05": (BLUE, "o", "BH, α = 0.05")}
    kinds = dict(list(table.groupby("kind")))
    layers = layer_ticks(table["layer"])
    kinds["pair"] = kinds["pair"].sort_values("value", ascending=False)
    own = kinds["pair"][kinds["pair"]["rule"] == top]
    names = [f"{i:.0f} → {j:.0f}" for i, j in zip(own["i"], own["j"], strict=True)]
    for shift, (rule, (color, marker, label)) in zip((-0.15, 0.15), looks.items(), strict=True):
        part = {kind: rows[rows["rule"] == rule] for kind, rows in kinds.items()}
        wide = 100 * part["load"].pivot(index="rank", columns="layer", values="value")
        loads.plot(wide.index, wide, color=color, linewidth=0.6, alpha=0.5)
        loads.plot(wide.index, wide.mean(axis=1), color=color, linewidth=2, label=label)
        style = {"color": color, "marker": marker, "markersize": 4, "capsize": 2}
        for axes, kind, scale in ((busiest, "busiest", 1), (partners, "partner", 100)):
            axes.errorbar(part[kind]["layer"] + shift / 2, *error_bars(part[kind], scale=scale), label=label, **style)
        partners.plot(part["pairs"]["layer"], 100 * part["pairs"]["value"], color=color, linestyle=":")
        value, error = error_bars(own[["i", "j"]].merge(part["pair"], on=["i", "j"]), scale=100)
        pairs.errorbar(value, np.arange(len(names)) + shift, xerr=error, linestyle="", **style)
    experts = int(table["rank"].max())
    loads.axhline(100 / experts, color=RED, linestyle="--", linewidth=1, label="all alike")
    busiest.axhline(1, color=RED, linestyle="--", linewidth=1)
    loads.set(xlabel="experts of a layer, busiest first", ylabel="share of the layer's load (%)", ylim=(0, None))
    loads.set_title("load of each expert: layers (thin) and their mean", fontsize=8)
    busiest.set(xlabel="layer", ylabel="busiest expert, load over mean load", xticks=layers, ylim=(0, None))
    busiest.set_title("the busiest expert (1: all alike)", fontsize=8)
    pairs.set_yticks(range(len(names)), names)
    pairs.invert_yaxis()
    pairs.set(xlabel="tokens of expert i that use expert j too (%)", ylabel="experts i → j", xlim=(0, None))
    shown = kinds["pair"]["layer"].iloc[0]
    pairs.set_title(f"co-activation in layer {shown}: the strongest pairs under {top}", fontsize=8)
    partners.set(xlabel="layer", ylabel="co-activation (%), mean over experts", xticks=layers, ylim=(0, None))
    partners.set_title("co-activation with the strongest partner; dotted: with any other", fontsize=8)
    handles, labels = loads.get_legend_handles_labels()
    fig.legend(handles, labels, fontsize=8, loc="outside lower center", ncols=3)
    fig.suptitle(
        f"test split: {table['sequences'].iloc[0]} sequences, {table['tokens'].iloc[0]:,} tokens; bars: 95 % bootstrap "
        f"over {table['documents'].iloc[0]} documents, each by itself", fontsize=8,
    )  # fmt: skip
    return fig
