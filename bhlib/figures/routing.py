"""Figures of what is routed where: experts per alpha, token, layer."""

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from bhlib.calibration import collect_router_logits
from bhlib.comparisons import resample
from bhlib.figures.drawing import Picture
from bhlib.figures.quality import comparison
from bhlib.figures.registry import Demo, figure
from bhlib.figures.runs import Run, interval
from bhlib.looks import BLACK, BLUE, RED
from bhlib.patching import BHRoutingIntegration
from bhlib.rules import BH


def compute_experts_vs_alpha(demo: Demo) -> pd.DataFrame:
    """Mean experts per token by alpha and domain, with 95 % intervals over documents, each by itself."""
    sweep = comparison(demo).query("family == 'BH'")
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
    axes.axhline(8, color=BLACK, linestyle=":", label="the model's own top-8")
    axes.set(xscale="log", xlabel="α", ylabel="experts per token and layer", ylim=(0, 8.4))
    axes.set_title(
        f"default p-values, max_k = 8; per domain {table['sequences'].iloc[0]} sequences of "
        f"{table['tokens_per_sequence'].iloc[0]} tokens\nfrom {table['documents'].min()} to "
        f"{table['documents'].max()} documents; 95 % bands over documents, each point by itself", fontsize=8
    )  # fmt: skip
    axes.legend(fontsize=7.5, loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=3.5)
    return fig


def compute_count_distribution(demo: Demo) -> pd.DataFrame:
    """Share of (token, layer) pairs that get k experts, per alpha: a fifth of the test text, the model's own logits."""
    text = {domain: sequences[::5] for domain, sequences in demo.test.items()}
    logits = collect_router_logits(demo.model, text, progress=False)
    layers, tokens, _ = logits.shape
    rows = []
    for alpha in (0.01, 0.05, 0.2, 0.5):
        counts = torch.cat([BH(alpha)(part, layer).counts for layer, part in enumerate(logits)])
        shares = counts.bincount(minlength=9) / len(counts)
        rows += [
            {"alpha": alpha, "experts": k, "fraction": share, "tokens": tokens, "layers": layers}
            for k, share in enumerate(shares.tolist())
        ]
    return pd.DataFrame(rows)


@figure("count_distribution", compute_count_distribution)
def draw_count_distribution(table: pd.DataFrame) -> Figure:
    """Distribution of the number of experts per token and layer, one panel per alpha."""
    alphas = sorted(table["alpha"].unique())
    fig = Picture(figsize=(7.2, 2.4), layout="constrained")
    for axes, alpha in zip(fig.subplots(1, len(alphas), sharey=True), alphas, strict=True):
        part = table[table["alpha"] == alpha]
        axes.bar(part["experts"], 100 * part["fraction"], color=BLUE)
        mean = (part["experts"] * part["fraction"]).sum()
        axes.axvline(mean, color=RED, linestyle="--")
        axes.set_title(f"α = {alpha:g}, mean {mean:.2f}", fontsize=8.5)
        axes.set(xlabel="experts", xticks=range(0, 9, 2))
    fig.axes[0].set_ylabel("% of (token, layer) pairs")
    fig.suptitle(f"{table['tokens'].iloc[0]:,} tokens × {table['layers'].iloc[0]} layers; bounds 1 and 8", fontsize=8)
    return fig


def compute_token_layer_map(demo: Demo, alpha: float = 0.05, length: int = 40) -> pd.DataFrame:
    """Experts per token and layer of a passage from each of two test domains."""
    parts = []
    domains = sorted(demo.test)
    for domain in (domains[0], domains[-1]):
        ids = demo.test[domain][:1, : 3 * length]
        parts.append(passage_counts(demo.model, demo.tokenizer, ids, alpha=alpha).tail(
            length * len(demo.model.model.layers)).assign(domain=domain, alpha=alpha))  # fmt: skip
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
        model(input_ids=input_ids.to(model.device), use_cache=False)
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
    fig = Picture(figsize=(9.0, 2.5 * len(passages)), layout="constrained")
    for axes, (name, part) in zip(np.atleast_1d(fig.subplots(len(passages), 1)), passages, strict=True):
        grid = part.pivot(index="layer", columns="position", values="count")
        texts = part.drop_duplicates("position")["token"]
        image = axes.imshow(grid, aspect="auto", cmap="viridis", vmin=1, vmax=8, origin="lower")
        axes.set_xticks(range(len(texts)), [repr(str(text))[1:-1] for text in texts], rotation=90, fontsize=6.5)
        axes.set(ylabel="layer", title=f"{name}: mean {part['count'].mean():.2f} experts")
        axes.grid(False)
        fig.colorbar(image, ax=axes, label="experts", ticks=[1, 4, 8])
    return fig


def compute_experts_per_layer(demo: Demo) -> pd.DataFrame:
    """Mean experts per layer and domain under the default rule, with 95 % intervals over documents, each by itself."""
    run = demo.runs["BH 0.05"]
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
    wide = table.pivot(index="domain", columns="layer", values="value")
    order = wide.drop(index="all").mean(axis=1).sort_values(ascending=False).index
    fig = Picture(figsize=(8.6, 3.6), layout="constrained")
    left, right = fig.subplots(1, 2, width_ratios=(1.5, 1))
    left.imshow(wide.loc[order], aspect="auto", cmap="cividis")
    middle = (wide.min(axis=None) + wide.max(axis=None)) / 2
    for (row, layer), value in np.ndenumerate(wide.loc[order].to_numpy()):
        left.text(
            layer, row, f"{value:.1f}", ha="center", va="center", fontsize=8, color=BLACK if value > middle else "white"
        )
    left.set_yticks(range(len(order)), order)
    left.set_xticks(range(wide.shape[1]), wide.columns)
    left.grid(False)
    left.tick_params(length=0)
    left.spines[:].set_visible(False)
    each = table[table["domain"] != "all"]
    half = ((each["high"] - each["low"]) / 2).median()
    left.set(xlabel="layer")
    left.set_title(f"experts per token (mean); 95 % intervals, each by itself: ± {half:.2f} in the median", fontsize=8)
    for domain, part in each.groupby("domain"):
        right.plot(part["layer"], part["value"], color="#999999", linewidth=0.8, label="_" + domain)
    right.plot([], [], color="#999999", linewidth=0.8, label="one domain")
    everything = table[table["domain"] == "all"]
    value, error = _with_error(everything, 1)
    right.errorbar(
        everything["layer"], value, error, color=BLUE, marker="o", markersize=4, capsize=2,
        label="all domains, 95 % interval",
    )  # fmt: skip
    right.axhline(everything["value"].mean(), color=RED, linestyle="--", linewidth=1, label="mean over layers")
    right.set(xlabel="layer", ylabel="experts per token (mean)", ylim=(0, 8.4), xticks=everything["layer"])
    right.legend(fontsize=7.5, loc="lower right")
    fig.suptitle(
        f"default BH, α = 0.05, max_k = 8; test split, {each['sequences'].iloc[0]} sequences of "
        f"{table['tokens_per_sequence'].iloc[0]} tokens per domain; bootstrap over {everything['documents'].iloc[0]} "
        f"documents", fontsize=8,
    )  # fmt: skip
    return fig


def compute_expert_load(demo: Demo, layer: int = 4, num_pairs: int = 10) -> pd.DataFrame:
    """How evenly experts are used, and which go together, under the model's own top-8 and under BH.

    Returns
    -------
    pandas.DataFrame
        Rows of four kinds, each for both rules, with ``value`` and its 95 % interval over documents, by itself (none
        for loads):

        ``load``: share of a layer's (token, expert) pairs that falls to the expert of a ``rank``;
        ``busiest``: load of a layer's busiest expert over the mean load (1 if even);
        ``pair``: of the tokens that use expert ``i``, the share that also uses ``j`` (co-activation as defined in
        section 5.2 of the OLMoE paper), for the strongest pairs of one `layer` under top-8, one direction of each;
        ``partner``: mean over a layer's experts of the co-activation with the strongest partner, and ``pairs``: with
        any other, the mean over all pairs. Partners are those of the whole sample.
    """
    rows = []
    for rule, run in demo.runs.items():
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
    for i, j in _strongest_pairs(demo.runs["top-8"], layer, num_pairs):
        for rule, run in demo.runs.items():
            both, one = (run.drawn.means(run.coactivation[:, layer, i, other]) for other in (j, i))
            share = interval(both / one, run.drawn)
            rows.append({"rule": rule, "layer": layer, "kind": "pair", "i": i, "j": j} | share)
    sequences, tokens, _ = run.counts.shape
    whole = dict.fromkeys(["rank", "i", "j"], "Int64")
    return pd.DataFrame(rows).astype(whole).assign(
        sequences=sequences, documents=run.drawn.units, tokens=sequences * tokens
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


RULE_LOOKS = {"top-8": (BLACK, "s", "the model's own top-8"), "BH 0.05": (BLUE, "o", "BH, α = 0.05")}


@figure("expert_load", compute_expert_load)
def draw_expert_load(table: pd.DataFrame) -> Figure:
    """Sorted loads, the busiest expert per layer, the strongest pairs of one layer, strongest partners per layer."""
    fig = Picture(figsize=(9.0, 6.4), layout="constrained")
    (loads, busiest), (pairs, partners) = fig.subplots(2, 2)
    kinds = dict(list(table.groupby("kind")))
    layers = sorted(table["layer"].unique())
    kinds["pair"] = kinds["pair"].sort_values("value", ascending=False)
    own = kinds["pair"][kinds["pair"]["rule"] == "top-8"]
    names = [f"{i:.0f} → {j:.0f}" for i, j in zip(own["i"], own["j"], strict=True)]
    for shift, (rule, (color, marker, label)) in zip((-0.15, 0.15), RULE_LOOKS.items(), strict=True):
        part = {kind: rows[rows["rule"] == rule] for kind, rows in kinds.items()}
        wide = 100 * part["load"].pivot(index="rank", columns="layer", values="value")
        loads.plot(wide.index, wide, color=color, linewidth=0.6, alpha=0.5)
        loads.plot(wide.index, wide.mean(axis=1), color=color, linewidth=2, label=label)
        style = {"color": color, "marker": marker, "markersize": 4, "capsize": 2}
        for axes, kind, scale in ((busiest, "busiest", 1), (partners, "partner", 100)):
            value, error = _with_error(part[kind], scale)
            axes.errorbar(part[kind]["layer"] + shift / 2, value, error, label=label, **style)
        partners.plot(part["pairs"]["layer"], 100 * part["pairs"]["value"], color=color, linestyle=":")
        value, error = _with_error(own[["i", "j"]].merge(part["pair"], on=["i", "j"]), 100)
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
    pairs.set_title(f"co-activation in layer {shown}: the strongest pairs under top-8", fontsize=8)
    partners.set(xlabel="layer", ylabel="co-activation (%), mean over experts", xticks=layers, ylim=(0, None))
    partners.set_title("co-activation with the strongest partner; dotted: with any other", fontsize=8)
    handles, labels = loads.get_legend_handles_labels()
    fig.legend(handles, labels, fontsize=8, loc="outside lower center", ncols=3)
    fig.suptitle(
        f"test split: {table['sequences'].iloc[0]} sequences, {table['tokens'].iloc[0]:,} tokens; bars: 95 % bootstrap "
        f"over {table['documents'].iloc[0]} documents, each by itself", fontsize=8,
    )  # fmt: skip
    return fig


def _with_error(part: pd.DataFrame, scale: float) -> tuple[pd.Series, np.ndarray]:
    """Values and the lengths of their error bars, both scaled."""
    value = part["value"]
    return scale * value, scale * np.abs(np.stack([value - part["low"], part["high"] - value]))
