"""What a calibrated rule is made of: four ingredients, and a rule for each combination of them.

All of it comes from the calibration split: nulls, norms, weights of the layers, and the levels.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import compress, product
from typing import Any, NamedTuple

from torch import Tensor
from tqdm.auto import tqdm

from bhlib.calibration import fit_null
from bhlib.figures.families import by_level
from bhlib.figures.study import Study
from bhlib.fitting_norms import fit_norms
from bhlib.levels import alpha_for_mean_experts
from bhlib.norms import OutputNorms
from bhlib.pvalues import FittedNull
from bhlib.rules import BH, Rule, Threshold
from bhlib.sampling import VALUES_PER_LAYER
from bhlib.tuning import tune_layer_weights

#: In the order of tables. A null for each layer instead of one for all; weight times the norm of the expert's output,
#: guessed from the token's logits (`bhlib.norms`), as the statistic instead of the weight; a weight per layer on the
#: odds of the level; BH's step-up instead of a cut at one p-value.
INGREDIENTS = ("null per layer", "norms", "layer weights", "step-up")

#: The rule of no ingredient, and the one that comes without calibration.
PLAIN, DEFAULT = "threshold", "BH, default"

#: Cuts with one mean norm for each expert in place of a guess for the token, by the parts that they stand beside.
MEAN_NORMS = {("norms",): "mean norms", ("null per layer", "norms"): "null per layer + mean norms"}

#: Of how many of a token's largest logits norms are guessed, at most.
NEAR = 16


def named(parts: tuple[str, ...]) -> str:
    """What a combination of ingredients is called."""
    return " + ".join(parts) or PLAIN


def combinations() -> list[tuple[str, ...]]:
    """All of them, each with the step-up behind the one without."""
    return [tuple(compress(INGREDIENTS, chosen)) for chosen in product((False, True), repeat=len(INGREDIENTS))]


class Entry(NamedTuple):
    """A rule of a family at a wanted mean number of experts.

    Attributes
    ----------
    family : str
    parts : tuple of str
        Its ingredients.
    wanted_k : float
    rule : Rule
    norms : OutputNorms or None
        What the model is patched with.
    helped : bool or None
        Whether weights of the layers were seen to help; None if the family has none.
    """

    family: str
    parts: tuple[str, ...]
    wanted_k: float
    rule: Rule
    norms: OutputNorms | None = None
    helped: bool | None = None

    @property
    def name(self) -> str:
        return f"{self.family}, k = {self.wanted_k:g}"


@lru_cache(maxsize=1)
def rules_of_ingredients(study: Study, layer_weights: bool = True) -> tuple[Entry, ...]:
    """A rule for each combination and each of `Study.mean_ks`, and those beside: the default `BH`, and `MEAN_NORMS`.

    Weights of the layers are chosen for the cut (`bhlib.tuning.tune_layer_weights`) at each number of experts. The
    step-up takes the same ones, at a level of its own: what it adds is then its own doing. Where weights did not help
    on calibration documents that were held out, there are none, and the rule is the one without. To choose them takes
    longer than all the rest: without `layer_weights` nothing has any.
    """
    found: list[Entry] = []
    mean, guess = norms_of(study, 0), norms_of(study)
    nulls = {(own, norms): _null(study, own, norms) for own in (False, True) for norms in (None, mean, guess)}
    for k in study.mean_ks:
        found += _at(study, Entry(DEFAULT, ("step-up",), k, BH(max_k=study.top_k)))
        for parts in combinations():
            if "step-up" in parts or ("layer weights" in parts and not layer_weights):
                continue
            norms, own = guess if "norms" in parts else None, "null per layer" in parts
            found += _cut_and_step_up(study, parts, k, nulls[own, norms], norms)
            if parts in MEAN_NORMS:
                found += _at(study, Entry(MEAN_NORMS[parts], parts, k, _cut(study, nulls[own, mean]), mean))
    return tuple(found)


def norms_of(study: Study, near: int | None = None) -> OutputNorms:
    """What is guessed of the norms of the outputs, from the `NEAR` largest logits if not told else."""
    total = sum(map(len, study.fitting_text.values()))
    batch_size = min(study.batch_size(study.window), max(1, total // 10))  # some batches are held out
    near = min(NEAR, study.num_experts // 2) if near is None else near
    return fit_norms(study.model, study.fitting_text, near=near, batch_size=batch_size)


def _cut(study: Study, null: FittedNull) -> BH:
    return BH(pvalues=null, method="fixed", max_k=study.top_k)


def _cut_and_step_up(
    study: Study, parts: tuple[str, ...], k: float, null: FittedNull, norms: OutputNorms | None
) -> Iterator[Entry]:
    """The rule of these ingredients, and the one that steps up besides."""
    cut: Any = _cut(study, null)
    helped = None
    if "layer weights" in parts:
        try:
            tuned = tune_layer_weights(
                study.model, study.calibration, cut, k, documents=study.calibration_documents,
                batch_size=study.batch_size(study.window), cache=study.cache, norms=norms,
            )  # fmt: skip
        except ValueError as reason:
            tqdm.write(f"{named(parts)}, k = {k:g} is left out: {reason}")
            return
        helped, cut = tuned.high < 0, replace(cut, layer_weights=tuned.rule.layer_weights)
    step_up = replace(cut, method="bh")
    if parts in ((), ("layer weights",)) and cut.layer_weights is None:
        cut = Threshold(max_k=study.top_k)  # what a cut on one null decides, by the rule that people know
    for more, rule in (((), cut), (("step-up",), step_up)):
        yield from _at(study, Entry(named(parts + more), parts + more, k, rule, norms, helped))


def _at(study: Study, entry: Entry) -> Iterator[Entry]:
    """The entry with its rule at the level that gives k experts on calibration text, if there is one."""
    logits = _shown(study.thin_logits, entry.norms)
    try:
        yield entry._replace(rule=_at_level(study, entry.rule, logits, entry.wanted_k))
    except ValueError as reason:
        tqdm.write(f"{entry.name} is left out: {reason}")


def _at_level(study: Study, rule: Rule, logits: Tensor, k: float) -> Rule:
    if isinstance(rule, BH) and rule.layer_weights is None:  # then no search is needed
        return rule.at(alpha_for_mean_experts(rule.pvalues, logits, k, method=rule.method, max_k=study.top_k))
    return by_level(rule.at, study)(logits, k)


def _shown(logits: Tensor, norms: OutputNorms | None) -> Tensor:
    """What a rule looks at."""
    return logits if norms is None else norms.shown(logits)


def _null(study: Study, own: bool, norms: OutputNorms | None) -> FittedNull:
    """A null of the log-probabilities that a rule is shown, one for each layer or the same for all."""
    logits = _shown(study.calibration_logits, norms)
    return fit_each(study, logits) if own else fit_one(study, logits)


def fit_each(study: Study, logits: Tensor) -> FittedNull:
    """A null fitted to each layer's logits [layers, tokens, experts], as `Study.fit_null` does it."""
    size = min(VALUES_PER_LAYER, logits.shape[1])
    return fit_null(logits, model_name=study.name, exclude_top=study.top_k, max_values=size)


def fit_one(study: Study, logits: Tensor) -> FittedNull:
    """A null fitted to those of all layers together, the same for each of them: a cut on it is a threshold on p."""
    fitted = fit_each(study, logits[:, :: len(logits)].flatten(0, 1)[None])
    layers = range(len(logits))
    tensors = {f"{part}.{layer}": fitted.tensors[f"{part}.0"] for part in fitted.parts for layer in layers}
    sizes = {"num_layers": len(layers), "sample_sizes": fitted.header["sample_sizes"] * len(layers)}
    return type(fitted)(tensors, {key: value for key, value in fitted.header.items() if key != "levels"} | sizes)
