"""What an earlier study measured on the real OLMoE: a check that a user of the checkpoint can make."""

import numpy as np
import pandas as pd

from bhlib.evaluation import sweep
from bhlib.figures.study import Study
from bhlib.rules import TopK

__all__ = ["compare_with_predecessor"]

#: Perplexity by text and experts per token. Tokenization and window are not fully known.
EARLIER = {
    "WikiText": {8: 16.76, 16: 17.59, 32: 22.04, 64: 52.48},
    "LAMBADA": {8: 23.74, 16: 24.89, 32: 31.60, 64: 87.71},
}

#: Settings that tell OLMoE-1B-7B.
OLMOE = {
    "model_type": "olmoe",
    "num_hidden_layers": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "hidden_size": 2048,
}


def compare_with_predecessor(study: Study) -> pd.DataFrame | None:
    """The earlier perplexities, beside those of a study's model on the test split, if its text has the same name.

    Returns
    -------
    pandas.DataFrame or None
        None for a model of another shape than OLMoE-1B-7B. Otherwise a row per text and k: ``text``, ``k``,
        ``earlier``, and ``ours``, NaN for a text that the study is not of.
    """
    if not has_shape_of_olmoe(study.model.config):
        return None
    return beside(perplexities(study) if _name_in(study.text.name) else {}, study.text.name)


def has_shape_of_olmoe(config) -> bool:
    """Whether a configuration is of OLMoE-1B-7B, whatever its weights are."""
    return all(getattr(config, name, None) == value for name, value in OLMOE.items())


def perplexities(study: Study) -> dict[int, float]:
    """Perplexity of `Study.test` with k experts for every token, weighted as the model weights its own."""
    rules = {f"top-{k}": TopK(k) for k in EARLIER["WikiText"]}
    batch_size = study.batch_size(study.length)
    frame = sweep(study.model, rules, study.test, cache=study.cache, batch_size=batch_size)
    losses = frame.groupby("rule")["loss"].mean()
    return {k: float(np.exp(losses[f"top-{k}"])) for k in EARLIER["WikiText"]}


def beside(ours: dict[int, float], name: str) -> pd.DataFrame:
    """The earlier numbers, and beside those of the text that a name tells, ours."""
    rows = [
        (text, k, earlier, ours.get(k, np.nan) if text == _name_in(name) else np.nan)
        for text, numbers in EARLIER.items()
        for k, earlier in numbers.items()
    ]
    return pd.DataFrame(rows, columns=["text", "k", "earlier", "ours"])


def _name_in(name: str) -> str | None:
    """The earlier study's text that a name tells, if it does."""
    return next((text for text in EARLIER if text.lower() in name.lower()), None)
