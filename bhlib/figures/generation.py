"""The figure of generated text: what top-k and BH write, and how many experts each token took."""

import re

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from bhlib.figures.about import about_of
from bhlib.figures.drawing import Picture
from bhlib.figures.registry import figure
from bhlib.figures.study import Study
from bhlib.figures.tables import FREE
from bhlib.looks import SKY
from bhlib.patching import RoutingPatch
from bhlib.rules import BH, TopK

__all__ = ["compute_generation", "draw_generation"]

#: Domains of the repository's text that show best how texts differ.
DOMAINS = ("novels", "scripture", "manuals", "python")


@torch.no_grad()
def compute_generation(study: Study, prompt_length: int = 24, length: int = 30) -> pd.DataFrame:
    """Beginnings of test sequences, continued greedily (repetition penalty 1.2) by top-k and by BH.

    Of `DOMAINS` if the text has them, otherwise of its first four.

    Returns
    -------
    pandas.DataFrame
        Row per token: ``domain``, ``rule`` ("prompt" for what was given), ``position``, ``token`` (its text),
        ``experts`` (mean over layers, of the token before, from which this one was predicted; none for the prompt).
    """
    domains = DOMAINS if study.test.keys() >= {*DOMAINS} else sorted(study.test)[: len(DOMAINS)]
    writers = {study.own: TopK(study.top_k)}
    writers |= {f"BH {alpha}": BH(alpha, max_k=study.top_k) for alpha in (0.05, 0.01)}
    prompts = torch.cat([study.test[domain][:1, :prompt_length] for domain in domains]).to(study.device)
    names, rows = np.array(domains), []

    def add(rule: str, ids: np.ndarray, experts: np.ndarray) -> None:
        for (i, position), token in np.ndenumerate(ids):
            text = study.tokenizer.decode([token])
            rows.append((names[i], rule, position, text, experts[i, position]))

    add("prompt", prompts.cpu().numpy(), np.full(prompts.shape, np.nan))
    for rule_name, rule in writers.items():
        with RoutingPatch(study.model, rule, max_recorded_tokens=None) as patch:
            output = study.model.generate(
                input_ids=prompts, attention_mask=torch.ones_like(prompts),
                do_sample=False, repetition_penalty=1.2, min_new_tokens=length, max_new_tokens=length,
            )  # fmt: skip
        counts = patch.records.counts().mean(axis=1)
        reading = counts[: prompts.numel()].reshape(prompts.shape)
        writing = counts[prompts.numel() :].reshape(length - 1, len(prompts)).T
        add(rule_name, output[:, prompts.shape[1] :].cpu().numpy(), np.hstack([reading[:, -1:], writing]))
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
    top_k = about_of(table).top_k
    pieces += [(len(legend) + 2 + 4 * k, 0.2, f" {k} ", k) for k in range(1, top_k + 1)]
    length = table.loc[table["rule"] == rules[0], "position"].max() + 1
    settings = f"greedy, repetition penalty 1.2; one text of {length} tokens each"
    headings.append((len(legend) + 8 + 4 * top_k, 0.2, settings, "normal"))
    _put(axes, pieces, headings, top_k)
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


def _put(axes: Axes, pieces: list[tuple], headings: list[tuple], top_k: int) -> None:
    """Text in a grid of characters: `pieces` (x, y, text, experts) on colour, `headings` (x, y, text, weight)."""
    shade = LinearSegmentedColormap.from_list("experts", ["#ffffff", SKY])
    boxes = [Rectangle((x, y), len(text), 0.94, facecolor=shade((k - 1) / (top_k - 1))) for x, y, text, k in pieces]
    axes.add_collection(PatchCollection(boxes, match_original=True, edgecolor="#dddddd", linewidth=0.4))
    font = {"family": "DejaVu Sans Mono", "fontsize": _FONT, "va": "center", "parse_math": False}
    for x, y, text, _ in pieces:
        axes.text(x, y + 0.5, text, **font)
    for x, y, text, weight in headings:
        axes.text(x, y + 0.5, text, weight=weight, **font)
