"""Settings of rules, chosen on calibration text: levels that give so many experts, and what each layer gets.

    logits = collect_router_logits(model, load_heldout("calibration"))
    level = level_for_mean_experts(TopP, logits, 4.0)
    weights = choose_layer_weights(model, load_heldout("calibration"), BH(0.01))
    BH(0.01, layer_weights=weights)

Nothing here looks at the test split.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from bhlib.discovery import find_moe_layers
from bhlib.evaluation import evaluate
from bhlib.rules import BH, Rule, StaticPerLayer
from bhlib.weighting import probabilities


def mean_experts(rule: Rule, router_logits: Tensor) -> float:
    """Mean number of experts that a rule gives to tokens with these logits [layers, tokens, experts]."""
    counts = [rule(logits, layer).counts.double().mean() for layer, logits in enumerate(router_logits)]
    return float(sum(counts) / len(counts))


def level_for_mean_experts(family: Callable[[float], Rule], router_logits: Tensor, mean_k: float) -> float:
    """The level at which a family of rules gives so many experts on average: how to compare rules at equal cost.

    For any rule. For `BH` without layer weights `bhlib.calibration.alpha_for_mean_experts` finds it in one pass.

    Parameters
    ----------
    family : callable
        Makes a rule of a level in (0, 1), for instance ``TopP`` or ``lambda alpha: BH(alpha, method="by")``. Its number
        of experts has to rise with the level everywhere, or to fall.
    router_logits : Tensor [layers, tokens, experts]
        As `bhlib.calibration.collect_router_logits` returns them. A patched model sees somewhat other logits, so its
        mean will be close to `mean_k`, not equal.
    mean_k : float
        Wanted mean over tokens and layers.

    Returns
    -------
    float
        By bisection of its log-odds; of a step function the side with at least `mean_k`.

    Raises
    ------
    ValueError
        If no level gives so many.
    """

    def at(log_odds: float) -> tuple[float, float]:
        level = float(1 / (1 + np.exp(-log_odds)))
        return level, mean_experts(family(level), router_logits)

    low, high = -30.0, 30.0
    (_, few), (best, many) = at(low), at(high)
    if few > many:
        low, high, few, many, best = high, low, many, few, at(low)[0]
    if not few <= mean_k <= many:
        raise ValueError(f"no level gives {mean_k} experts on average: these rules give from {few:.2f} to {many:.2f}.")
    for _ in range(24):
        middle = (low + high) / 2
        level, mean = at(middle)
        if mean >= mean_k:
            best, high = level, middle
        else:
            low = middle
    return best


def entropy_thresholds(
    router_logits: Tensor, mean_k: float, *, slope: float = 1.0, max_k: int = 8
) -> tuple[float, ...]:
    """Thresholds for `EntropyK` with ks = 1, 2, ..., `max_k` that give `mean_k` experts on calibration logits.

    k is the offset plus `slope` times the entropy, rounded and cut to 1..`max_k`; the offset is found by bisection.

    Parameters
    ----------
    router_logits : Tensor [..., experts]
        Of any tokens and layers (`bhlib.calibration.collect_router_logits`).
    mean_k : float
        Wanted mean, strictly between 1 and `max_k`.
    slope : float
        Experts per nat of entropy, > 0.
    max_k : int
        Most experts of a token.

    Returns
    -------
    tuple of float
        ``max_k - 1`` entropies in nats, 1 / slope apart: ``EntropyK(thresholds, range(1, max_k + 1))``.

    Raises
    ------
    ValueError
        If `mean_k` or `slope` is out of range.
    """
    if not 1 < mean_k < max_k:
        raise ValueError(f"mean_k must lie strictly between 1 and max_k={max_k}, got {mean_k}.")
    if not 0 < slope < np.inf:
        raise ValueError(f"slope must be a finite number above 0, got {slope}.")
    entropy = np.sort(torch.special.entr(probabilities(router_logits)).sum(dim=-1).flatten().double().cpu().numpy())
    steps = (np.arange(1, max_k) - mean_k + 0.5) / slope

    def mean_at(shift: float) -> float:
        return 1 + (1 - np.searchsorted(entropy, steps + shift, side="right") / len(entropy)).sum()

    reach = max_k / slope + 1
    low, high = entropy[0] - reach, entropy[-1] + reach  # max_k experts for every token, and 1
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_at(middle) > mean_k else (low, middle)
    return tuple((steps + high).tolist())


# -- by layer ----------------------------------------------------------------------------------------------------


def choose_static_per_layer(
    model: nn.Module,
    data: Mapping[str, Tensor],
    mean_ks: Iterable[float],
    *,
    max_k: int | None = None,
    batch_size: int = 8,
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
    whole = evaluate(model, data, StaticPerLayer(full), batch_size=batch_size)["loss"].mean()
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}  # experts spent so far -> least loss, and how
    for layer in tqdm(range(len(layers)), unit="layer", desc="static k per layer"):
        added = {most: 0.0}
        for k in range(1, most):
            rule = StaticPerLayer((*full[:layer], k, *full[layer + 1 :]))
            added[k] = evaluate(model, data, rule, batch_size=batch_size)["loss"].mean() - whole
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
) -> tuple[float, ...]:
    """Weights of the layers for `BH`, so that an expert more is worth as much in one layer as in another.

    Each round multiplies and divides the weight of one layer after the other by `factor`, and sees what the loss of the
    model gains per expert that the layer gets more. Layers that gain more than the (geometric) mean of all get a larger
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

    Returns
    -------
    tuple of float
        One weight per MoE layer; their geometric mean is 1. (The arithmetic mean is then above 1, and `rule.alpha` is
        the level of no layer in particular: find it anew for a wanted number of experts, `level_for_mean_experts`.)

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

    def measure(log_weights: np.ndarray) -> tuple[float, float]:
        frame = evaluate(model, data, replace(rule, layer_weights=tuple(np.exp(log_weights))), batch_size=batch_size)
        return frame["loss"].mean(), frame["mean_k"].mean()

    with tqdm(total=2 * rounds * len(log_weights), unit="pass", desc="layer weights") as bar:
        for _ in range(rounds):
            gains = []
            for layer in range(len(log_weights)):
                step = np.zeros(len(log_weights))
                step[layer] = np.log(factor)
                (loss_with, more), (loss_without, fewer) = measure(log_weights + step), measure(log_weights - step)
                gains.append(max((loss_without - loss_with) / max(more - fewer, 1e-4), 1e-6))
                bar.update(2)
            surplus = np.log(gains) - np.log(gains).mean()
            log_weights += 2 * np.log(factor) * surplus.clip(-1, 1)
            log_weights -= log_weights.mean()
    return tuple(float(weight) for weight in np.exp(log_weights))
