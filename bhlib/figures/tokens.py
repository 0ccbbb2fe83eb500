"""Figures of single tokens: who is given more experts, with which weights, and what text comes of it."""

import re

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from bhlib.calibration import alpha_for_mean_experts
from bhlib.comparisons import paired_difference, with_documents
from bhlib.evaluation import sweep
from bhlib.figures.drawing import Picture
from bhlib.figures.registry import FREE, Demo, figure
from bhlib.figures.runs import interval, rank_correlation
from bhlib.looks import BLACK, BLUE, GREEN, ORANGE, RED, SKY
from bhlib.patching import RoutingPatch
from bhlib.pvalues import DirichletNull
from bhlib.rules import BH, KeepMass, TopK

# -- are hard tokens given more? ---------------------------------------------------------------------------------------


def compute_token_loss(demo: Demo, num_bins: int = 10) -> pd.DataFrame:
    """Experts that BH gives to the token that predicts another, against how hard that other is.

    The difficulty is the loss under the model's own top-8, the experts are a mean over the layers.

    Returns
    -------
    pandas.DataFrame
        Rows of three kinds, with ``value`` and its 95 % interval over documents, by itself: ``bin``: mean experts, for
        equal numbers of tokens by loss (``loss``: mean of the bin), of all domains and of each; ``domain``: rank
        correlation of loss and experts, of all domains and within each; ``layer``: that with the experts of one layer.
    """
    loss, run = demo.runs["top-8"].loss, demo.runs["BH 0.05"]
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
            {"kind": "layer", "domain": "all", "layer": layer, "sequences": len(loss), "documents": run.drawn.units,
             "tokens": loss.size} | rank_correlation(loss, by_layer[:, :, layer], run.drawn)
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
        everything["loss"], everything["value"], _error(everything), color=BLUE, marker="o", markersize=4, capsize=2,
        label="all domains, 95 % interval",
    )  # fmt: skip
    left.set(xscale="log", xlabel="loss of a token under top-8 (nats; tenths of tokens)")
    left.set(ylabel="experts of the token that predicts it\n(mean over layers)")
    left.legend(fontsize=7.5)
    domains = table[table["kind"] == "domain"].sort_values("value", ignore_index=True)
    for color, part in ((BLUE, domains[domains["domain"] == "all"]), (BLACK, domains[domains["domain"] != "all"])):
        middle.errorbar(
            part["value"], part.index, xerr=_error(part), color=color, linestyle="", marker="o", markersize=4, capsize=2
        )
    middle.set_yticks(domains.index, domains["domain"])
    middle.set(xlabel="rank correlation of loss and experts")
    layers = table[table["kind"] == "layer"]
    right.errorbar(layers["layer"], layers["value"], _error(layers), color=BLUE, marker="o", markersize=4, capsize=2)
    right.set(xlabel="layer", ylabel="rank correlation with that layer's experts", xticks=layers["layer"])
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


def _error(part: pd.DataFrame, of: str = "value") -> np.ndarray:
    """Lengths of error bars, [2, rows]."""
    return np.abs(np.stack([part[of] - part["low"], part["high"] - part[of]]))


# -- renormalization and temperature -----------------------------------------------------------------------------------


#: What is done to the weights of the kept experts, and the options of `RoutingPatch` that do it.
WEIGHTS = {
    "as they are": {},
    "sum 1": {"weights": "normalized"},
    "sum of top-8": {},
    "temperature 0.9": {"temperature": 0.9},
    "temperature 1.1": {"temperature": 1.1},
}


def compute_renormalization(demo: Demo, mean_experts: tuple[int, ...] = (3, 4, 5, 6)) -> pd.DataFrame:
    """Loss of static top-k and of BH at about the same number of experts, with different weights of the kept ones.

    Differences are paired, from the same rule with its weights as they are. Every sixth test sequence.
    """
    text = {domain: sequences[::6] for domain, sequences in demo.test.items()}
    documents = {domain: demo.test_documents[domain][::6] for domain in text}
    rules = {f"top-{k}": TopK(k) for k in mean_experts}
    for k in mean_experts:
        rules[f"BH-{k}"] = BH(alpha_for_mean_experts(DirichletNull(), demo.calibration_logits, k))
    parts = []
    for weights, options in WEIGHTS.items():
        changed = {name: KeepMass(rule) for name, rule in rules.items()} if weights == "sum of top-8" else rules
        frame = sweep(demo.model, changed, text, **options)
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
                part["mean_k"] + shift, part["difference"], _error(part, "difference"), color=color, marker=marker,
                markersize=4, capsize=2, label=weights,
            )  # fmt: skip
        axes.axhline(0, color=BLACK, linewidth=1)
        axes.set_yscale("symlog", linthresh=0.02, linscale=0.8)
        axes.set(xlabel="experts per token and layer (mean)", xticks=sorted(table["k"].unique()))
        axes.set_title(title, fontsize=8.5)
    ticks = [-0.01, 0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1]
    fig.axes[0].set_yticks(ticks, [f"{tick:+g}".replace("-", "−") if tick else "0" for tick in ticks])
    fig.axes[0].set_yticks([], minor=True)
    fig.axes[0].set_ylabel("loss above that with the weights\nas they are (nats per token)")
    handles, labels = fig.axes[0].get_legend_handles_labels()
    fig.legend(handles, labels, fontsize=8, loc="outside right center", title="weights of the\nkept experts")
    fig.suptitle(
        f"test split: {table['sequences'].iloc[0]} sequences, {table['tokens'].iloc[0]:,} tokens; bars: 95 % paired "
        f"bootstrap over documents, each by itself", fontsize=8,
    )  # fmt: skip
    return fig


# -- generation --------------------------------------------------------------------------------------------------------

#: Rules whose texts stand side by side.
WRITERS = {"top-8": TopK(8), "BH 0.05": BH(0.05), "BH 0.01": BH(0.01)}


@torch.no_grad()
def compute_generation(
    demo: Demo,
    domains: tuple[str, ...] = ("novels", "scripture", "manuals", "python"),
    prompt_length: int = 24,
    length: int = 30,
) -> pd.DataFrame:
    """Beginnings of test sequences, continued greedily (repetition penalty 1.2) by top-8 and by BH.

    Returns
    -------
    pandas.DataFrame
        Row per token: ``domain``, ``rule`` ("prompt" for what was given), ``position``, ``token`` (its text),
        ``experts`` (mean over layers, of the token before, from which this one was predicted; none for the prompt).
    """
    prompts = torch.cat([demo.test[domain][:1, :prompt_length] for domain in domains]).to(demo.model.device)
    names, rows = np.array(domains), []

    def add(rule: str, ids: np.ndarray, experts: np.ndarray) -> None:
        for (i, position), token in np.ndenumerate(ids):
            text = demo.tokenizer.decode([token])
            rows.append((names[i], rule, position, text, experts[i, position]))

    add("prompt", prompts.cpu().numpy(), np.full(prompts.shape, np.nan))
    for rule_name, rule in WRITERS.items():
        with RoutingPatch(demo.model, rule, max_recorded_tokens=None) as patch:
            output = demo.model.generate(
                input_ids=prompts, attention_mask=torch.ones_like(prompts),
                do_sample=False, repetition_penalty=1.2, min_new_tokens=length, max_new_tokens=length,
            )  # fmt: skip
        counts = patch.records.counts().mean(axis=1)
        reading = counts[: prompts.numel()].reshape(prompts.shape)
        writing = counts[prompts.numel() :].reshape(length - 1, len(prompts)).T
        add(rule_name, output[:, prompt_length:].cpu().numpy(), np.hstack([reading[:, -1:], writing]))
    return pd.DataFrame(rows, columns=["domain", "rule", "position", "token", "experts"])


#: Characters per line of a column of text, and between columns; size of the font in points.
_COLUMNS, _GAP, _FONT = 44, 3, 7.2


@figure("generation", compute_generation, tolerance={"token": FREE, "experts": FREE})
def draw_generation(table: pd.DataFrame) -> Figure:
    """Texts side by side, a column per rule; the darker a token's background, the more experts predicted it."""
    pieces, headings, top = [], [], 2
    rules = [name for name in table["rule"].unique() if name != "prompt"]
    for domain, part in table.groupby("domain", sort=False):
        texts = {rule: rows for rule, rows in part.groupby("rule")}
        prompt = "".join(_visible(text) for text in texts["prompt"]["token"])
        headings.append((0, top, f"{domain}: {prompt} …", "bold"))
        bottom = top
        for column, rule in enumerate(rules):
            left = column * (_COLUMNS + _GAP)
            mean = texts[rule]["experts"].mean()
            headings.append((left, top + 1.2, f"{rule}: {mean:.2f} experts per token and layer", "normal"))
            boxes = _wrap(texts[rule])
            pieces += [(left + x, top + 2.3 + y, text, experts) for x, y, text, experts in boxes]
            bottom = max(bottom, top + 2.3 + boxes[-1][1])
        top = bottom + 2
    width = len(rules) * (_COLUMNS + _GAP)
    # The letters of DejaVu Sans Mono are 0.602 of its size wide: a character of the grid is one of the font.
    fig = Picture(figsize=(0.602 * _FONT / 72 * width, 1.5 * _FONT / 72 * top))
    axes = fig.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(top, 0))
    axes.axis("off")
    legend = "mean experts per layer of the token that predicts it:"
    headings.append((0, 0.2, legend, "normal"))
    pieces += [(len(legend) + 2 + 4 * k, 0.2, f" {k} ", k) for k in range(1, 9)]
    length = table.loc[table["rule"] == rules[0], "position"].max() + 1
    settings = f"greedy, repetition penalty 1.2; one text of {length} tokens each"
    headings.append((len(legend) + 40, 0.2, settings, "normal"))
    _put(axes, pieces, headings)
    return fig


def _visible(text: object) -> str:
    """Line breaks and other invisible characters shown."""
    text = str(text).replace("\n", "⏎").replace("\t", "→")
    return "".join(character if character.isprintable() else "·" for character in text)


def _wrap(rows: pd.DataFrame) -> list[tuple[int, int, str, float]]:
    """Tokens as (column, line, text, experts), in lines of `_COLUMNS` characters that begin anew after a line break."""
    boxes, column, line = [], 0, 0
    for token, experts in zip(rows["token"], rows["experts"], strict=True):
        for text in re.findall("[^⏎]*⏎|[^⏎]+", _visible(token)):
            if column + len(text) > _COLUMNS:
                column, line = 0, line + 1
            boxes.append((column, line, text, experts))
            column += len(text)
            if text.endswith("⏎"):
                column, line = 0, line + 1
    return boxes


def _put(axes: Axes, pieces: list[tuple], headings: list[tuple]) -> None:
    """Text in a grid of characters: `pieces` (x, y, text, experts) on colour, `headings` (x, y, text, weight)."""
    shade = LinearSegmentedColormap.from_list("experts", ["#ffffff", SKY])
    boxes = [Rectangle((x, y), len(text), 0.94, facecolor=shade((k - 1) / 7)) for x, y, text, k in pieces]
    axes.add_collection(PatchCollection(boxes, match_original=True, edgecolor="#dddddd", linewidth=0.4))
    font = {"family": "DejaVu Sans Mono", "fontsize": _FONT, "va": "center", "parse_math": False}
    for x, y, text, _ in pieces:
        axes.text(x, y + 0.5, text, **font)
    for x, y, text, weight in headings:
        axes.text(x, y + 0.5, text, weight=weight, **font)
