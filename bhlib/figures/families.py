"""The families of rules that are compared: how each makes a rule that gives a wanted mean number of experts."""

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from bhlib.figures.study import Study
from bhlib.levels import entropy_thresholds, level_for_mean_experts
from bhlib.pvalues import NULLS, PValueMaker
from bhlib.rules import BH, FAMILIES, EntropyK, Rule, RuleFamily, StaticPerLayer

#: Makes a rule from calibration logits [layers, tokens, experts] and the mean number of experts that it is to give.
AtMean = Callable[[Tensor, float], Rule]


def by_level(family: Callable[[float], Rule], study: Study) -> AtMean:
    """A family of one level in (0, 1), found by bisection; of rules that give no more experts than the model does."""

    def make(level: float) -> Rule:
        rule = family(level)
        return rule if rule.max_k == study.top_k else replace(rule, max_k=study.top_k)

    return lambda logits, mean_k: make(level_for_mean_experts(make, logits, mean_k))


def bh(study: Study, pvalues: PValueMaker | str = "dirichlet", method: str = "bh", weighted: bool = False) -> AtMean:
    """`BH`, on request with the weights of the layers that were chosen for the model."""

    def make(level: float) -> BH:
        weights = study.settings["layer_weights"][method] if weighted else None
        return BH(level, pvalues, method, weights, max_k=study.top_k)

    return by_level(make, study)


def entropy(study: Study, slope: float = 1.0) -> AtMean:
    """`EntropyK` with one expert more for each step of the entropy."""
    ks = tuple(range(1, study.top_k + 1))

    def make(logits: Tensor, mean_k: float) -> EntropyK:
        return EntropyK(entropy_thresholds(logits, mean_k, slope=slope, max_k=study.top_k), ks)

    return make


def static_per_layer(study: Study) -> AtMean:
    """`StaticPerLayer` with the numbers that were chosen for the model."""
    return lambda logits, mean_k: StaticPerLayer(tuple(study.settings["static_per_layer"][f"{mean_k:g}"]))


#: How a family gives a wanted mean, where no level in (0, 1) does it.
FITTED: dict[str, Callable[[Study], AtMean]] = {"entropy": entropy, "static per layer": static_per_layer}


def rivals(study: Study | None = None) -> dict[str, AtMean]:
    """What people use, each under the name that figures give it: all rivals in `bhlib.rules.FAMILIES`.

    Parameters
    ----------
    study : Study, optional
        Whose model the rules are for; by default the embedded one.
    """
    study = study or Study()
    return {name: _way_of(family, study) for name, family in FAMILIES.items() if family.is_rival}


def _way_of(family: RuleFamily, study: Study) -> AtMean:
    if family.name in FITTED:
        return FITTED[family.name](study)
    if family.make is None:
        raise ValueError(
            f"nothing says how {family.name!r} gives a wanted number of experts: register it with make=, enter it in "
            f"bhlib.figures.families.FITTED, or leave it out of comparisons with is_rival=False."
        )
    return by_level(family.make, study)


def fitted_families(study: Study, fitted: PValueMaker) -> dict[str, AtMean]:
    """With a null fitted to each layer: BH, and a fixed cut on the same p-values, which BH has to be better than.

    What both gain over the threshold on the probability is the null's doing; the step-up's is what lies between them.
    """
    return {"BH, fitted null": bh(study, fitted), "fixed cut, fitted null": bh(study, fitted, method="fixed")}


def weighted_families(study: Study) -> dict[str, AtMean]:
    """With a weight per layer, chosen on calibration text: BH, and for fairness the threshold too."""
    return {
        "BH, layer weights": bh(study, weighted=True),
        "threshold, layer weights": bh(study, method="fixed", weighted=True),
    }


def tried_families(fitted: dict[str, PValueMaker], study: Study | None = None) -> dict[str, AtMean]:
    """Everything that was tried on the validation split.

    Parameters
    ----------
    fitted : dict of PValueMaker
        Nulls fitted on calibration text, by name.
    study : Study, optional
        As for `rivals`.
    """
    study = study or Study()
    nulls = {
        label: entry.make(exclude_top=study.top_k, **options)
        for entry in NULLS.values()
        if not entry.needs_calibration
        for label, options in entry.tried.items()
    }
    tried = {f"BH, {label}": bh(study, maker) for label, maker in (nulls | fitted).items()}
    methods = ("by", "storey", "tsbky", "hochberg", "hc")
    tried |= {f"{method}, Dirichlet 4": bh(study, method=method) for method in methods}
    tried |= weighted_families(study) | rivals(study)
    return tried | {f"entropy, slope {slope:g}": entropy(study, slope) for slope in (0.5, 2.0, 4.0)}
