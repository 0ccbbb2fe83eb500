"""The families of rules that are compared: how each makes a rule that gives a wanted mean number of experts."""

from collections.abc import Callable
from functools import partial

from torch import Tensor

from bhlib.levels import entropy_thresholds, level_for_mean_experts
from bhlib.loading import load_settings
from bhlib.pvalues import NULLS, PValueMaker
from bhlib.rules import BH, FAMILIES, EntropyK, Rule, RuleFamily, StaticPerLayer

#: Makes a rule from calibration logits [layers, tokens, experts] and the mean number of experts that it is to give.
AtMean = Callable[[Tensor, float], Rule]


def by_level(family: Callable[[float], Rule]) -> AtMean:
    """A family of one level in (0, 1), found by bisection."""
    return lambda logits, mean_k: family(level_for_mean_experts(family, logits, mean_k))


def bh(pvalues: PValueMaker | str = "dirichlet", method: str = "bh", weighted: bool = False) -> AtMean:
    """`BH`, on request with the weights of the layers that were chosen for the embedded model."""
    weights = load_settings()["layer_weights"][method] if weighted else None
    return by_level(lambda alpha: BH(alpha, pvalues, method, weights))


def _entropy(logits: Tensor, mean_k: float, slope: float = 1.0) -> Rule:
    return EntropyK(entropy_thresholds(logits, mean_k, slope=slope), tuple(range(1, 9)))


def _static_per_layer(logits: Tensor, mean_k: float) -> Rule:
    return StaticPerLayer(tuple(load_settings()["static_per_layer"][f"{mean_k:g}"]))


#: How a family gives a wanted mean, where no level in (0, 1) does it.
FITTED: dict[str, AtMean] = {"entropy": _entropy, "static per layer": _static_per_layer}


def rivals() -> dict[str, AtMean]:
    """What people use, each under the name that figures give it: all rivals in `bhlib.rules.FAMILIES`."""
    return {name: _way_of(family) for name, family in FAMILIES.items() if family.is_rival}


def _way_of(family: RuleFamily) -> AtMean:
    if family.name in FITTED:
        return FITTED[family.name]
    if family.make is None:
        raise ValueError(
            f"nothing says how {family.name!r} gives a wanted number of experts: register it with make=, enter it in "
            f"bhlib.figures.families.FITTED, or leave it out of comparisons with is_rival=False."
        )
    return by_level(family.make)


def fitted_families(fitted: PValueMaker) -> dict[str, AtMean]:
    """With a null fitted to each layer: BH, and a fixed cut on the same p-values, which BH has to be better than.

    What both gain over the threshold on the probability is the null's doing; the step-up's is what lies between them.
    """
    return {"BH, fitted null": bh(fitted), "fixed cut, fitted null": bh(fitted, method="fixed")}


def weighted_families() -> dict[str, AtMean]:
    """With a weight per layer, chosen on calibration text: BH, and for fairness the threshold too."""
    return {"BH, layer weights": bh(weighted=True), "threshold, layer weights": bh(method="fixed", weighted=True)}


def tried_families(fitted: dict[str, PValueMaker]) -> dict[str, AtMean]:
    """Everything that was tried on the validation split.

    Parameters
    ----------
    fitted : dict of PValueMaker
        Nulls fitted on calibration text, by name.
    """
    uncalibrated = [entry for entry in NULLS.values() if not entry.needs_calibration]
    nulls = {label: entry.make(**options) for entry in uncalibrated for label, options in entry.tried.items()}
    tried = {f"BH, {label}": bh(maker) for label, maker in (nulls | fitted).items()}
    tried |= {f"{method}, Dirichlet 4": bh(method=method) for method in ("by", "storey", "tsbky", "hochberg", "hc")}
    tried |= weighted_families() | rivals()
    return tried | {f"entropy, slope {slope:g}": partial(_entropy, slope=slope) for slope in (0.5, 2.0, 4.0)}
