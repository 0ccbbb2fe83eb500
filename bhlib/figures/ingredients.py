"""What a calibrated rule is made of: four ingredients, and a rule for each combination of them.

All of it comes from the calibration split: nulls, norms, weights of the layers, and the levels.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import compress, product
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from bhlib.calibration import calibrate, fit_null
from bhlib.figures.families import by_level
from bhlib.figures.study import Study
from bhlib.levels import alpha_for_mean_experts
from bhlib.pvalues import FittedNull
from bhlib.rules import BH, Rule, Threshold
from bhlib.sampling import VALUES_PER_LAYER
from bhlib.tuning import tune_layer_weights

#: In the order of tables: a null for each layer instead of one for all; weight times mean norm of the expert's output
#: as the statistic instead of the weight; a weight per layer on the odds of the level; BH's step-up instead of a cut.
INGREDIENTS = ("null per layer", "norms", "layer weights", "step-up")

#: The rule of no ingredient, and the one that comes without calibration, which is no combination of them.
PLAIN, DEFAULT = "threshold", "BH, default"


def named(parts: tuple[str, ...]) -> str:
    """What a combination of ingredients is called."""
    return " + ".join(parts) or PLAIN


def combinations() -> list[tuple[str, ...]]:
    """All of them, those with the step-up behind those without."""
    return [tuple(compress(INGREDIENTS, chosen)) for chosen in product((False, True), repeat=len(INGREDIENTS))]


class Entry(NamedTuple):
    """A rule of a family at a wanted mean number of experts; and whether weights of the layers were seen to help."""

    family: str
    parts: tuple[str, ...]
    wanted_k: float
    rule: Rule
    helped: bool | None


@lru_cache(maxsize=1)
def rules_of_ingredients(study: Study) -> tuple[Entry, ...]:
    """A rule for each combination and each of `Study.mean_ks`, and the default `BH`.

    Weights of the layers are chosen for the cut (`bhlib.tuning.tune_layer_weights`) at each number of experts. The
    step-up takes the same ones, at a level of its own: what it adds is then its own doing. Where weights did not help
    on calibration documents that were held out, there are none, and the rule is the one without.
    """
    return tuple(_each_rule(study))


def _each_rule(study: Study) -> Iterator[Entry]:
    nulls = _nulls(study)
    for k in study.mean_ks:
        default = BH(max_k=study.top_k)
        yield from _at(study, DEFAULT, ("step-up",), default, k)
        for parts in combinations():
            if "step-up" in parts:
                continue
            null = nulls["null per layer" in parts, "norms" in parts]
            cut: Any = BH(pvalues=null, method="fixed", max_k=study.top_k)
            helped = None
            if "layer weights" in parts:
                try:
                    helped, cut = _weighted(study, cut, k)
                except ValueError as reason:
                    tqdm.write(f"{named(parts)}, k = {k:g} is left out: {reason}")
                    continue
            step_up = replace(cut, method="bh")
            if parts in ((), ("layer weights",)) and cut.layer_weights is None:
                cut = Threshold(max_k=study.top_k)  # what a cut on one null decides, by the rule that people know
            yield from _at(study, named(parts), parts, cut, k, helped)
            yield from _at(study, named((*parts, "step-up")), (*parts, "step-up"), step_up, k, helped)


def _at(
    study: Study, family: str, parts: tuple[str, ...], rule: Rule, k: float, helped: bool | None = None
) -> Iterator[Entry]:
    """The rule at the level that gives k experts on calibration text, if there is one."""
    try:
        at_level = _at_level(study, rule, k)
    except ValueError as reason:
        tqdm.write(f"{family}, k = {k:g} is left out: {reason}")
    else:
        yield Entry(family, parts, k, at_level, helped)


def _at_level(study: Study, rule: Rule, k: float) -> Rule:
    if isinstance(rule, BH) and rule.layer_weights is None:  # then no search is needed
        options = {"method": rule.method, "max_k": study.top_k}
        return rule.at(alpha_for_mean_experts(rule.pvalues, study.thin_logits, k, **options))
    return by_level(rule.at, study)(study.thin_logits, k)


def _weighted(study: Study, cut: BH, k: float) -> tuple[bool, BH]:
    """Whether weights of the layers helped, and the cut with them if so."""
    tuned = tune_layer_weights(
        study.model, study.calibration, cut, k, documents=study.calibration_documents,
        batch_size=study.batch_size(study.window), cache=study.cache,
    )  # fmt: skip
    return tuned.high < 0, replace(cut, layer_weights=tuned.rule.layer_weights)


def _nulls(study: Study) -> dict[tuple[bool, bool], FittedNull]:
    """By whether each layer has its own, and whether p-values count the norms of outputs."""
    batch_size = study.batch_size(study.window)
    norms = calibrate(study.model, study.calibration, norms=True, max_values=1_000, batch_size=batch_size).log_norms
    assert norms is not None
    plain = {True: study.fit_null(statistic="log_prob"), False: one_null(study)}
    return {
        (own, counted): null.with_norms(norms) if counted else null
        for own, null in plain.items()
        for counted in (False, True)
    }


def one_null(study: Study) -> FittedNull:
    """A null fitted to the log-probabilities of all layers together, the same for each of them.

    A cut on it is a threshold on the probability.
    """
    pooled = study.calibration_logits[:, :: study.num_layers].flatten(0, 1)
    fitted = fit_null(
        pooled[None], model_name=study.name, exclude_top=study.top_k, max_values=min(VALUES_PER_LAYER, len(pooled))
    )
    layers = range(study.num_layers)
    tensors = {f"{part}.{layer}": fitted.tensors[f"{part}.0"] for part in fitted.parts for layer in layers}
    sizes = {"num_layers": study.num_layers, "sample_sizes": fitted.header["sample_sizes"] * len(layers)}
    header = {key: value for key, value in fitted.header.items() if key != "levels"} | sizes
    return type(fitted)(tensors, header)
