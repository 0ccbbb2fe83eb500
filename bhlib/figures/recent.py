"""The rivals of the last year: how each makes a rule that gives a wanted mean number of experts."""

import math
from functools import lru_cache

from torch import Tensor

from bhlib.figures.families import AtMean, by_level
from bhlib.figures.study import Study
from bhlib.rival_fits import allocate_layers, expert_gains, layer_importance
from bhlib.rules import ACE, AllocMoE, MoDES, SeqTopK

#: One in so many sequences of the calibration text is enough for what takes many passes over it.
THIN_TEXT = 4


def recent(study: Study) -> dict[str, AtMean]:
    """Each under the name that figures give it; fitted to calibration text when it is first asked for a rule."""
    return {"SeqTopK": _seq_top_k(study), "Alloc-MoE": _alloc(study), "MoDES": _modes(study), "ACE": _ace(study)}


def thin_text(study: Study) -> dict[str, Tensor]:
    """Some sequences of each domain of the calibration text."""
    return {domain: sequences[::THIN_TEXT] for domain, sequences in study.calibration.items()}


def _seq_top_k(study: Study) -> AtMean:
    """A token gets two experts more than the mean at most, as published."""
    return lambda logits, mean_k: SeqTopK(mean_k, max_k=min(study.top_k, math.ceil(mean_k) + 2))


@lru_cache(maxsize=1)
def _budgets(study: Study) -> dict[int, AllocMoE]:
    """Budgets of the layers by their sum."""
    layers, options = study.num_layers, {"batch_size": study.batch_size(study.window), "cache": study.cache}
    sums = range(layers, layers * study.top_k + 1)
    found = allocate_layers(study.model, thin_text(study), [total / layers for total in sums], **options)
    return dict(zip(sums, found.values(), strict=True))


def _alloc(study: Study) -> AtMean:
    def make(logits: Tensor, mean_k: float) -> AllocMoE:
        return _budgets(study)[round(mean_k * study.num_layers)]

    return make


def _modes(study: Study) -> AtMean:
    @lru_cache(maxsize=1)
    def importance() -> tuple[float, ...]:
        return layer_importance(study.model, thin_text(study), batch_size=study.batch_size(study.window))

    return lambda logits, mean_k: by_level(lambda level: MoDES(level, importance()), study)(logits, mean_k)


def _ace(study: Study) -> AtMean:
    @lru_cache(maxsize=1)
    def gains() -> dict[str, Tensor]:
        return expert_gains(study.model)

    return lambda logits, mean_k: by_level(lambda level: ACE(level, **gains()), study)(logits, mean_k)
