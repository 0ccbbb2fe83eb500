"""What each layer gets, chosen on calibration text: whole numbers of experts, or weights for `BH`.

    tuned = tune_layer_weights(model, load_heldout("calibration"), BH(), mean_k=4)
    tuned.rule          # at the level that gives four experts, with a weight per layer if that was seen to help

Nothing here looks at the test split.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor, nn

from bhlib.calibration import collect_router_logits
from bhlib.comparisons import matched_difference, with_documents
from bhlib.discovery import find_moe_layers
from bhlib.evaluation import sweep
from bhlib.levels import level_for_mean_experts
from bhlib.norms import OutputNorms
from bhlib.rules import BH, Rule, StaticPerLayer

#: Tokens of a text, at most, on whose logits a level is found.
TOKENS_FOR_LEVELS = 4_000


def choose_settings(
    model: nn.Module,
    data: Mapping[str, Tensor],
    router_logits: Tensor,
    mean_ks: Iterable[float],
    weighted_at: float,
    *,
    batch_size: int = 8,
    cache: str | Path | None = None,
) -> dict:
    """Settings of the rules that differ by layer, for a model and its calibration text.

    Parameters
    ----------
    model : nn.Module
        Unpatched model.
    data : mapping of str to Tensor [sequences, length]
        Calibration text by domain.
    router_logits : Tensor [layers, tokens, experts]
        Of calibration text (`bhlib.calibration.collect_router_logits`), to find levels on; some thousand tokens do.
    mean_ks : iterable of float
        For which whole numbers per layer are chosen.
    weighted_at : float
        Mean number of experts at which the weights are chosen.
    batch_size : int
        Sequences per forward pass.
    cache : path, optional
        Folder of finished cells, as for `sweep`.

    Returns
    -------
    dict
        ``layer_weights``: by method of `BH` ("bh", "fixed"), a weight per layer. ``static_per_layer``: by mean number
        of experts, as text, the experts of each layer. It can be written as JSON.
    """
    top_k = find_moe_layers(model)[0].top_k
    weights = {}
    for method in ("bh", "fixed"):
        plain = BH(method=method, max_k=top_k)
        rule = plain.at(level_for_mean_experts(plain.at, router_logits, weighted_at))
        weights[method] = choose_layer_weights(model, data, rule, batch_size=batch_size, cache=cache)
    static = choose_static_per_layer(model, data, mean_ks, batch_size=batch_size, cache=cache)
    return {
        "layer_weights": {method: [float(f"{w:.6g}") for w in chosen] for method, chosen in weights.items()},
        "static_per_layer": {f"{k:g}": list(rule.ks) for k, rule in static.items()},
    }


def _means(model: nn.Module, rules: Mapping[str, Rule], data: Mapping[str, Tensor], **options) -> pd.DataFrame:
    """Mean loss and mean number of experts of rules, by name; an error of one of them is raised."""
    frame = sweep(model, rules, data, **options)
    failed = frame[frame["error"] != ""]
    if len(failed):
        raise RuntimeError(f"{failed['rule'].iloc[0]} could not be measured: {failed['error'].iloc[0]}")
    return frame.groupby("rule", sort=False)[["loss", "mean_k"]].mean()


def _patched_with(norms: OutputNorms | None) -> dict[str, Any]:
    """Options of a sweep; none without norms, so that its cells are those of any other sweep."""
    return {} if norms is None else {"norms": norms}


def choose_static_per_layer(
    model: nn.Module,
    data: Mapping[str, Tensor],
    mean_ks: Iterable[float],
    *,
    max_k: int | None = None,
    batch_size: int = 8,
    cache: str | Path | None = None,
) -> dict[float, StaticPerLayer]:
    """Distribute a budget of experts over the layers, by what each layer alone loses with fewer.

    The loss of the model is measured with k experts in one layer and `max_k` in all others, for every layer and k.
    As if the layers' losses added up, the best numbers that sum to the budget are then found exactly, by dynamic
    programming. (LExI, arXiv:2509.02753, searches in the same way, with the change of the layer's output for the loss.)

    Parameters
    ----------
    model : nn.Module
        Unpatched model.
    data : mapping of str to Tensor [sequences, length]
        Calibration text by domain.
    mean_ks : iterable of float
        Mean experts per token and layer; for each the nearest that whole numbers allow.
    max_k : int, optional
        Most experts of a layer; by default the model's own top-k.
    batch_size : int
        Sequences per forward pass.
    cache : path, optional
        Folder of finished cells, as for `sweep`: a search that was stopped goes on where it was.

    Returns
    -------
    dict of float to StaticPerLayer
        One for each of `mean_ks`; all from the same measurements.

    Raises
    ------
    ValueError
        If a mean is not between 1 and `max_k`.
    """
    layers = find_moe_layers(model)
    most = layers[0].top_k if max_k is None else max_k
    mean_ks = list(mean_ks)
    for mean_k in mean_ks:
        if not 1 <= mean_k <= most:
            raise ValueError(f"mean_ks must lie between 1 and max_k={most}, got {mean_k}.")
    full = (most,) * len(layers)
    rules = {
        f"{k} in layer {layer}": StaticPerLayer((*full[:layer], k, *full[layer + 1 :]))
        for layer in range(len(layers))
        for k in range(1, most)
    }
    rules = {f"{most} everywhere": StaticPerLayer(full)} | rules
    losses = _means(model, rules, data, batch_size=batch_size, cache=cache)["loss"]
    whole = losses[f"{most} everywhere"]
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}  # experts spent so far -> least loss, and how
    for layer in range(len(layers)):
        added = {most: 0.0} | {k: losses[f"{k} in layer {layer}"] - whole for k in range(1, most)}
        extended: dict[int, tuple[float, tuple[int, ...]]] = {}
        for spent, (loss, ks) in best.items():
            for k, more in added.items():
                extended[spent + k] = min(extended.get(spent + k, (np.inf, ())), (loss + more, (*ks, k)))
        best = extended
    return {mean_k: StaticPerLayer(best[round(mean_k * len(layers))][1]) for mean_k in mean_ks}


def choose_layer_weights(
    model: nn.Module,
    data: Mapping[str, Tensor],
    rule: BH,
    *,
    factor: float = 7.0,
    rounds: int = 4,
    batch_size: int = 8,
    cache: str | Path | None = None,
    norms: OutputNorms | None = None,
) -> tuple[float, ...]:
    """Weights of the layers for `BH`, so that one more expert is worth as much in one layer as in another.

    Each round multiplies and divides the weight of one layer after the other by `factor`, and sees what the loss of the
    model gains per additional expert of the layer. Layers that gain more than the (geometric) mean of all get a larger
    weight, the others a smaller one.

    Parameters
    ----------
    model : nn.Module
        Unpatched model.
    data : mapping of str to Tensor [sequences, length]
        Calibration text by domain: none that a result is reported on. The loss must tell the weights of one layer from
        each other, which takes some ten thousand tokens.
    rule : BH
        At the level where the weights are to be good; they change slowly with it.
    factor : float
        Above 1. For p-values that spread over fewer powers of ten, a smaller one.
    rounds : int
        Each takes two evaluations per layer.
    batch_size : int
        Sequences per forward pass.
    cache : path, optional
        Folder of finished cells, as for `sweep`: a search that was stopped goes on where it was.
    norms : OutputNorms, optional
        With which the model will be patched (`bhlib.norms`).

    Returns
    -------
    tuple of float
        One weight per MoE layer; their geometric mean is 1. (The arithmetic mean is then above 1, and `rule.alpha` is
        the level of no layer in particular: find it anew for a wanted number of experts, `bhlib.levels`.)

    Notes
    -----
    The weights set the level of a separate BH procedure in each layer. They divide experts, not an error rate: no false
    discovery rate over the layers is controlled by them.

    At the best division of a budget, its marginal value is the same everywhere: this is gradient descent toward that,
    by finite differences. A division can be too fine for the text that it was chosen on, so check it on other text:
    `tune_layer_weights` does.
    """
    if factor <= 1:
        raise ValueError(f"factor must be above 1, got {factor}; 7.0 suits the default p-values.")
    log_weights = np.zeros(len(find_moe_layers(model)))
    for _ in range(rounds):
        rules: dict[str, Rule] = {}
        for layer in range(len(log_weights)):
            step = np.zeros(len(log_weights))
            step[layer] = np.log(factor)
            for name, moved in (("more", log_weights + step), ("less", log_weights - step)):
                rules[f"{name} in layer {layer}"] = replace(rule, layer_weights=tuple(np.exp(moved)))
        means = _means(model, rules, data, batch_size=batch_size, cache=cache, **_patched_with(norms))
        more, less = (means.loc[[f"{name} in layer {i}" for i in range(len(log_weights))]] for name in ("more", "less"))
        lost = less["loss"].to_numpy() - more["loss"].to_numpy()
        saved = more["mean_k"].to_numpy() - less["mean_k"].to_numpy()
        gains = np.maximum(lost / np.maximum(saved, 1e-4), 1e-6)
        surplus = np.log(gains) - np.log(gains).mean()
        log_weights += 2 * np.log(factor) * surplus.clip(-1, 1)
        log_weights -= log_weights.mean()
    return tuple(float(weight) for weight in np.exp(log_weights))


@dataclass(frozen=True)
class TunedWeights:
    """What `tune_layer_weights` found.

    Attributes
    ----------
    rule : BH
        At the level that gives the wanted number of experts on the whole text: with the weights if they helped, else
        without.
    layer_weights : tuple of float
        The weights that were judged.
    difference, low, high : float
        Loss with these weights minus loss without, at the same mean number of experts, on the documents that were held
        out: nats per token, with a 95 % interval over documents. The weights helped if `high` is below 0.
    """

    rule: BH
    layer_weights: tuple[float, ...]
    difference: float
    low: float
    high: float


def tune_layer_weights(
    model: nn.Module,
    data: Mapping[str, Tensor],
    rule: BH,
    mean_k: float,
    *,
    documents: Mapping[str, Sequence | np.ndarray] | None = None,
    factor: float = 7.0,
    rounds: int = 4,
    batch_size: int = 8,
    cache: str | Path | None = None,
    norms: OutputNorms | None = None,
) -> TunedWeights:
    """Weights of the layers where they are wanted, and only if they help on text that they were not chosen on.

    `choose_layer_weights` on every second document of each domain, at the level that gives `mean_k` experts; then the
    weights are compared with none on the other documents, at the same number of experts.

    Parameters
    ----------
    model, factor, rounds, batch_size, cache, norms
        As for `choose_layer_weights`.
    data : mapping of str to Tensor [sequences, length]
        Calibration text by domain.
    rule : BH
        P-values, procedure and bounds; its level and its weights do not matter.
    mean_k : float
        Wanted mean number of experts over tokens and layers.
    documents : mapping of str to array_like [sequences], optional
        The document of each sequence (`bhlib.loading.heldout_sequence_documents`). By default each sequence is one.

    Raises
    ------
    ValueError
        If no domain has two documents; no level gives `mean_k`; `factor` is not above 1.

    Notes
    -----
    None is the answer unless the interval excludes it: where they do nothing, weights are taken once in 40 times. That
    is said of the text that was held out; on text of another kind the weights may still do harm.
    """
    if documents is None:
        documents = {name: np.arange(len(sequences)) for name, sequences in data.items()}
    chosen_on, judged_on = _halves(data, documents)
    logits = _some_logits(model, data, batch_size)
    logits = logits if norms is None else norms.shown(logits)
    plain = replace(rule, layer_weights=None)
    at_level = plain.at(level_for_mean_experts(plain.at, logits, mean_k))
    text = {name: data[name][rows] for name, rows in chosen_on.items()}
    options: dict[str, Any] = {"batch_size": batch_size, "cache": cache} | _patched_with(norms)
    weights = choose_layer_weights(model, text, at_level, factor=factor, rounds=rounds, **options)
    weighted = replace(plain, layer_weights=weights)
    weighted = weighted.at(level_for_mean_experts(weighted.at, logits, mean_k))
    # The text gives each rule its own mean: without weights three levels make a curve to read the loss from.
    near = [plain.at(level_for_mean_experts(plain.at, logits, k)) for k in _around(mean_k, rule)]
    rules = {"weighted": weighted} | {f"plain {number}": one for number, one in enumerate(near)}
    frame = sweep(model, rules, {name: data[name][rows] for name, rows in judged_on.items()}, **options)
    frame = with_documents(frame, {name: np.asarray(documents[name])[rows] for name, rows in judged_on.items()})
    row = matched_difference(frame, ["weighted"], [name for name in rules if name != "weighted"]).iloc[0]
    helped = row["high"] < 0
    return TunedWeights(
        weighted if helped else at_level, weights, *(float(row[c]) for c in ("difference", "low", "high"))
    )


def _around(mean_k: float, rule: BH) -> tuple[float, float, float]:
    """Three numbers of experts about the wanted one, between the bounds of the rule."""
    reach = min(0.3, (mean_k - rule.min_k) / 2, (rule.max_k - mean_k) / 2)
    return mean_k - reach, mean_k, mean_k + reach


def _halves(
    data: Mapping[str, Tensor], documents: Mapping[str, Sequence | np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The sequences of the 1st, 3rd, ... document of each domain, and of the 2nd, 4th, ...; no empty domains."""
    halves: tuple[dict[str, np.ndarray], dict[str, np.ndarray]] = ({}, {})
    for name in data:
        order = np.unique(np.asarray(documents[name]), return_inverse=True)[1]
        for number, half in enumerate(halves):
            rows = np.flatnonzero(order % 2 == number)
            if len(rows):
                half[name] = rows
    if not halves[1]:
        raise ValueError(
            "no domain has two documents, so none can be held out to judge layer weights on: give more text"
        )
    return halves


def _some_logits(model: nn.Module, data: Mapping[str, Tensor], batch_size: int) -> Tensor:
    """Router logits [layers, tokens, experts] of sequences that are spread over a text."""
    total = sum(sequences.numel() for sequences in data.values())
    step = max(1, round(total / TOKENS_FOR_LEVELS))
    text = {name: sequences[::step] for name, sequences in data.items()}
    return collect_router_logits(model, text, batch_size=batch_size, progress=False)
