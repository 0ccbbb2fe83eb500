"""What each layer gets, chosen on calibration text: whole numbers of experts, or weights for `BH`.

    weights = choose_layer_weights(model, load_heldout("calibration"), BH(0.01))
    BH(0.01, layer_weights=weights)

Nothing here looks at the test split.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from torch import Tensor, nn

from bhlib.discovery import find_moe_layers
from bhlib.evaluation import sweep
from bhlib.levels import level_for_mean_experts
from bhlib.rules import BH, Rule, StaticPerLayer


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
    by finite differences. A division can be too fine for the text that it was chosen on, so check it on other text.
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
        means = _means(model, rules, data, batch_size=batch_size, cache=cache)
        more, less = (means.loc[[f"{name} in layer {i}" for i in range(len(log_weights))]] for name in ("more", "less"))
        lost = less["loss"].to_numpy() - more["loss"].to_numpy()
        saved = more["mean_k"].to_numpy() - less["mean_k"].to_numpy()
        gains = np.maximum(lost / np.maximum(saved, 1e-4), 1e-6)
        surplus = np.log(gains) - np.log(gains).mean()
        log_weights += 2 * np.log(factor) * surplus.clip(-1, 1)
        log_weights -= log_weights.mean()
    return tuple(float(weight) for weight in np.exp(log_weights))
