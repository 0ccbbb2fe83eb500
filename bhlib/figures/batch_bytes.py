"""The figure of a batch's bytes: loss against the different experts that a batch of decoded tokens loads in a layer."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from bhlib import comparisons
from bhlib.evaluation import score_tokens
from bhlib.figures.about import NotForThisModel, about_of
from bhlib.figures.drawing import Picture, error_bars
from bhlib.figures.registry import figure
from bhlib.figures.study import Study
from bhlib.looks import BLACK
from bhlib.patching import RoutingPatch
from bhlib.records import Records
from bhlib.rules import BH, OEA, BatchBH, BatchRule, BatchThreshold, Rule, TopK, families_of

__all__ = ["compute_batch_bytes", "draw_batch_bytes", "mixed_sequences", "unique_experts"]

#: Sequences that are decoded side by side.
BATCHES = (8, 16, 32, 512)

#: Batches of each size that are measured, at most: more take more time than they tell.
PASSES = 16

#: Levels of each family, from few experts to many.
ALPHAS = (1e-9, 1e-7, 1e-5, 1e-4, 1e-3, 3e-3)
#: Of a token: what a batch misses grows with its tokens, and its threshold with the root of their number.
THRESHOLDS = (0.037, 0.031, 0.026, 0.022, 0.019, 0.016)

#: Rules of OEA whose batches load so nearly the same number of experts are one point of its curve.
APART = 0.1


def rules_of(top_k: int, batch: int) -> dict[str, list[Rule]]:
    """What is compared, by family, for a model of this top-k and a batch of this size."""
    bounds = {"max_k": top_k}
    return {
        "static top-k": [TopK(k) for k in range(1, top_k + 1)],
        "OEA": [OEA(k0=k, **bounds) for k in range(1, top_k)],
        "BH": [BH(alpha, **bounds) for alpha in (1e-3, 1e-2, 0.05, 0.2)],
        "BH, free experts": [BatchBH(alpha, boost=0, **bounds) for alpha in ALPHAS],
        "BH, batch weights": [BatchBH(alpha, **bounds) for alpha in ALPHAS],
        "batch threshold": [BatchThreshold(one * batch**0.5, **bounds) for one in THRESHOLDS],
    }


def mixed_sequences(
    text: Mapping[str, Tensor], documents: Mapping[str, np.ndarray], most: int | None = None
) -> tuple[Tensor, pd.DataFrame]:
    """Sequences in the order in which a server may get them: domain after domain, and document after document.

    Parameters
    ----------
    text : mapping of str to Tensor [sequences, length]
        By domain.
    documents : mapping of str to ndarray [sequences]
        The document of each.
    most : int, optional
        How many to take, spread evenly over those that there are.

    Returns
    -------
    ids : Tensor [sequences, length]
        Neighbours are of different domains; those of one domain are of different documents as far as there are enough.
    facts : DataFrame
        ``domain``, ``sequence`` (number in its domain) and ``document`` of each.
    """
    rows = []
    for number, (domain, found) in enumerate(documents.items()):
        turn = pd.Series(found).groupby(found).cumcount()  # how many of its document came before
        order = np.lexsort([found, turn])
        rows += [(place, number, domain, int(i), int(found[i])) for place, i in enumerate(order)]
    rows.sort()
    if most is not None and most < len(rows):
        rows = [rows[i] for i in np.linspace(0, len(rows) - 1, most).round().astype(int)]
    facts = pd.DataFrame(rows, columns=["place", "number", "domain", "sequence", "document"])
    ids = torch.stack([text[domain][i] for domain, i in zip(facts["domain"], facts["sequence"], strict=True)])
    return ids, facts[["domain", "sequence", "document"]]


def unique_experts(records: Records, batch: int) -> float:
    """Different experts of a layer that a batch loads, mean over layers and places.

    Parameters
    ----------
    records : Records
        Of one pass over this many sequences, whose tokens at the same place are a batch.
    batch : int
    """
    (only,) = records.passes
    means = []
    for routing in only.routings.values():
        slots = routing.experts.long().view(batch, -1, routing.experts.shape[-1]).transpose(0, 1).flatten(1)
        slots = slots.masked_fill(slots < 0, records.num_experts)
        used = torch.zeros(len(slots), records.num_experts + 1, dtype=torch.bool, device=slots.device)
        used.scatter_(1, slots, True)
        means.append(used[:, :-1].sum(dim=1).double().mean().item())
    return float(np.mean(means))


@torch.no_grad()
def measure(model: nn.Module, ids: Tensor, rule: Rule, batch: int, device: torch.device) -> pd.DataFrame:
    """Loss of each sequence under a rule, where `batch` of them are decoded side by side, and the experts loaded.

    A forward pass over whole sequences in which the tokens at the same place are routed together: what steps on a cache
    would give (tested), at the price of one pass. Sequences that fill no batch are left out.

    Returns
    -------
    pandas.DataFrame
        A row per sequence: ``loss`` (nats per token), ``tokens``, ``mean_k`` (experts per token and layer) and
        ``unique`` (different experts of a layer), both of its batch.
    """
    if isinstance(rule, BatchRule):
        rule = replace(rule, batch=batch, most=max(batch, rule.most))
    rows = []
    with RoutingPatch(model, rule, max_recorded_tokens=None) as patch:
        for start in range(0, len(ids) - batch + 1, batch):
            patch.reset_stats()
            loss = score_tokens(model, ids[start : start + batch].to(device))[0].double().mean(dim=1).cpu()
            mean_k = float(patch.records.counts().mean())
            common = {"tokens": ids.shape[1] - 1, "mean_k": mean_k, "unique": unique_experts(patch.records, batch)}
            rows += [{"loss": one} | common for one in loss.tolist()]
    return pd.DataFrame(rows)


def compute_batch_bytes(study: Study) -> pd.DataFrame:
    """Loss and loaded experts of every rule at every size of a batch, on sequences spread over the test split."""
    return measure_batches(study, "test")


def measure_batches(study: Study, split: str, most: int | None = None) -> pd.DataFrame:
    """`compute_batch_bytes` on a split: on `PASSES` batches of each size, or on this many sequences.

    Sequences are `Study.window` tokens long, or shorter where a pass over a batch would have more than 8 times
    `Study.tokens_per_pass` tokens. Sizes for which there are too few sequences are left out.

    Returns
    -------
    pandas.DataFrame
        A row per batch, family and rule: ``batch``, ``family``, ``rule``, ``level``, ``unique`` (different experts of a
        layer that a batch loads), ``saved`` (the share of those of the model's own top-k that it does not), ``mean_k``,
        ``loss``; ``above``, the loss minus that of the model's own top-k, with ``low`` and ``high``; ``oea``, the loss
        minus that of OEA at the same number of loaded experts (a curve through its rules, as in `matched_difference`),
        with ``oea_low`` and ``oea_high``; ``sequences``, ``length``, ``tokens`` and ``units`` (documents). Intervals
        are 95 % over documents, each row's by itself.

    Raises
    ------
    NotForThisModel
        If there are fewer sequences than the smallest batch has.
    """
    parts = []
    for batch in BATCHES:
        length = min(study.window, max(2, 8 * study.tokens_per_pass // batch))
        text, documents = study.text.sequences(split, length), study.text.documents(split, length)
        ids, facts = mixed_sequences(text, documents, most or PASSES * batch)
        if len(ids) >= batch:
            parts.append(_one_size(study, ids[: len(ids) // batch * batch], facts, batch))
    if not parts:
        raise NotForThisModel(
            f"the {split} split of {study.text.name} has fewer sequences than the smallest batch, {BATCHES[0]}: give "
            f"more text."
        )
    return pd.concat(parts, ignore_index=True).assign(split=split)


def _one_size(study: Study, ids: Tensor, facts: pd.DataFrame, batch: int) -> pd.DataFrame:
    """The rows of one size of a batch."""
    frames, rows = [], []
    for family, rules in rules_of(study.top_k, batch).items():
        for rule in rules:
            level = rule.k if isinstance(rule, TopK) else rule.level
            name = f"top-{level}" if family == "static top-k" else f"{family} {level:.3g}"
            part = measure(study.model, ids, rule, batch, study.device).join(facts).assign(rule=name)
            rows.append(
                {"batch": batch, "family": family, "rule": name, "level": level, "unique": part["unique"].mean()}
                | {"mean_k": part["mean_k"].mean(), "loss": part["loss"].mean()}
            )
            frames.append(part)
    table = pd.DataFrame(rows)
    frame = pd.concat(frames, ignore_index=True)
    own = table.loc[table["rule"] == study.own].iloc[0]
    table.insert(5, "saved", 1 - table["unique"] / own["unique"])
    drawn = comparisons.resample(facts["domain"][: len(ids)], facts["document"][: len(ids)])
    losses = frame.pivot(index=["domain", "sequence"], columns="rule", values="loss")
    losses = losses.loc[pd.MultiIndex.from_frame(facts.loc[: len(ids) - 1, ["domain", "sequence"]])]
    above = [drawn.means(losses[name] - losses[study.own]) for name in table["rule"]]
    table["above"] = [one[0] for one in above]
    table[["low", "high"]] = [drawn.interval(one) for one in above]
    # Matched by the experts that a batch loads, not by those that a token takes.
    matched = comparisons.matched_difference(
        frame.assign(mean_k=frame["unique"]), list(table["rule"]), _curve(table[table["family"] == "OEA"])
    )
    table[["oea", "oea_low", "oea_high"]] = matched[["difference", "low", "high"]].to_numpy()
    sizes = {"sequences": len(ids), "length": ids.shape[1], "tokens": losses.size // len(table) * (ids.shape[1] - 1)}
    return table.assign(**sizes, units=drawn.units)


def _curve(oea: pd.DataFrame) -> list[str]:
    """The rules of OEA that a curve goes through: those that load different numbers of experts."""
    names: list[str] = []
    last = -np.inf
    for name, unique in oea.sort_values("unique")[["rule", "unique"]].itertuples(index=False):
        if unique > last + APART:
            names.append(name)
            last = unique
    return names


@figure("batch_bytes", compute_batch_bytes, tolerance={"unique": 0.05, "mean_k": 0.02}, slow=True)
def draw_batch_bytes(table: pd.DataFrame) -> Figure:
    """Above, loss minus that of the model's own top-k; below, minus that of OEA; a column per size of a batch."""
    about, sizes = about_of(table), sorted(table["batch"].unique())
    fig = Picture(figsize=(2.6 * len(sizes) + 0.6, 5.6), layout="constrained")
    panels = fig.subplots(2, len(sizes), squeeze=False, sharex="col", sharey="row")
    families = families_of(table["family"])
    for (above, against), size in zip(panels.T, sizes, strict=True):
        part = table[table["batch"] == size]
        own = part[part["rule"] == about.own].iloc[0]
        for family in families:
            one = part[part["family"] == family.name].sort_values("unique")
            look = family.look._asdict() | {"markersize": 4, "linewidth": 1.1, "capsize": 2}
            label = family.name if size == sizes[0] else None
            above.errorbar(one["unique"], *error_bars(one, "above", "low", "high"), label=label, **look)
            if family.name != "OEA":
                near = one[one["oea"].abs() < 0.06]
                against.errorbar(near["unique"], *error_bars(near, "oea", "oea_low", "oea_high", 1000), **look)
        above.set_yscale("symlog", linthresh=0.02, linscale=0.8)
        ticks = [0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8]
        above.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        above.set_yticks([], minor=True)
        above.set_ylim(-0.004, 1.2)
        for axes in (above, against):
            axes.axhline(0, color=BLACK, linewidth=0.8)
            axes.axvline(0.6 * own["unique"], color=BLACK, linewidth=0.8, linestyle=":")
        sample = f"{own['sequences']} sequences of {own['length']} tokens\nof {own['units']} documents"
        above.set_title(f"batch of {size}\n{sample}", fontsize=8)
        against.set_xlabel("experts loaded per layer (mean)")
    panels[0, 0].set_ylabel(f"loss above {about.own} (nats per token)")
    panels[1, 0].set_ylabel("loss minus OEA with as many\nloaded experts (nats / 1000)")
    what = f"{about.name}, {table['split'].iloc[0]} split; a batch mixes domains and documents"
    text = f"{what}; dotted: 40 % fewer experts than {about.own}"
    fig.suptitle(f"{text}\nbars: 95 % bootstrap interval over documents, for each point by itself", fontsize=8)
    fig.legend(fontsize=8, loc="outside lower center", ncols=6)
    return fig
