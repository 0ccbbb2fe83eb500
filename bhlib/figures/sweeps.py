"""The sweeps that several figures are made of: all families of rules on the test split, on some of it and on all."""

from functools import lru_cache

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from bhlib.comparisons import with_documents
from bhlib.evaluation import sweep
from bhlib.figures.families import AtMean, bh, fitted_families, rivals, weighted_families
from bhlib.figures.study import Study
from bhlib.rules import BH, FAMILIES, Rule

__all__ = ["ALPHAS"]

#: Levels at which the default rule is measured.
ALPHAS = (0.0003, 0.003, 0.01, 0.05, 0.07, 0.1, 0.3, 0.6, 0.9)


@lru_cache(maxsize=1)
def comparison(study: Study) -> pd.DataFrame:
    """All rules on every second sequence of `Study.test`: a row per rule and sequence.

    Levels were found on the calibration split, so that nothing is tuned on the text that results are reported on.

    Returns
    -------
    pandas.DataFrame
        As `sweep` returns it, with the ``document`` of each row's sequence, and ``family``, ``wanted_k`` (the mean that
        a level was found for) and ``level`` (`RuleFamily.level_of`) of its rule.
    """
    default = [("BH", np.nan, f"BH {alpha:g}", BH(alpha, max_k=study.top_k)) for alpha in ALPHAS]
    return _sweep(study, default + _at_mean_k(study, _calibrated_families(study)), *study.every(2))


def whole_comparison(study: Study) -> pd.DataFrame:
    """As `comparison` on every test sequence, with the default BH at the mean numbers of experts of the others.

    Takes minutes on a GPU, and two hours on two cores without; `Study.cache` keeps what is finished.
    """
    families = {"BH": bh(study)} | _calibrated_families(study)
    batch_size = 2 * study.batch_size(study.length)
    return _sweep(
        study, _at_mean_k(study, families), study.whole_test, study.whole_test_documents, batch_size=batch_size
    )


def _calibrated_families(study: Study) -> dict[str, AtMean]:
    """All families but BH with its default p-values, in the order of tables."""
    fitted = fitted_families(study, study.fit_null(statistic="log_prob"))
    return fitted | weighted_families(study) | rivals(study)


def _at_mean_k(study: Study, families: dict[str, AtMean]) -> list[tuple[str, float, str, Rule]]:
    """Family, wanted mean, name and rule, of each family at each of `Study.mean_ks` that it can give."""
    entries = []
    for k in study.mean_ks:
        for name, make in families.items():
            try:
                rule = make(study.thin_logits, k)
            except ValueError as reason:
                tqdm.write(f"{name}, k = {k:g} is left out: {reason}")
            else:
                entries.append((name, k, f"{name}, k = {k:g}", rule))
    return entries


def _sweep(
    study: Study, entries: list[tuple[str, float, str, Rule]], text: dict, documents: dict, **options
) -> pd.DataFrame:
    """A sweep of static top-k and of what `_at_mean_k` lists, on sequences by domain, of documents by domain."""
    entries = [("static top-k", np.nan, name, rule) for name, rule in study.static_rules.items()] + entries
    rules = {name: rule for _, _, name, rule in entries}
    facts = {
        name: {"family": family, "wanted_k": k, "level": FAMILIES[family].level_of(rule)}
        for family, k, name, rule in entries
    }
    options = {"batch_size": study.batch_size(study.length)} | options
    frame = sweep(study.model, rules, text, cache=study.cache, **options)
    return with_documents(frame.join(pd.DataFrame.from_dict(facts, orient="index"), on="rule"), documents)
