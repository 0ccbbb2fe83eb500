"""Who gets many experts: a mixed model of a rule's counts, documents as random effects."""

import warnings

import numpy as np
import pandas as pd
from scipy import stats
from statsmodels.regression.mixed_linear_model import MixedLM
from statsmodels.tools.sm_exceptions import ConvergenceWarning

#: What the counts are explained by.
FACTORS = ("kind", "domain", "position")


def who_gets_many(table: pd.DataFrame, level: float = 0.95) -> pd.DataFrame:
    """Experts of a token against the class of its text, its domain and its place, with intervals.

    Parameters
    ----------
    table : pandas.DataFrame
        A row per model, rule, domain, ``document``, ``kind`` of token and ``position`` (0 to 7, eighths of a sequence):
        the sum ``experts`` of the tokens' mean numbers of experts over layers, and ``tokens``.
    level : float
        Of the intervals.

    Returns
    -------
    pandas.DataFrame
        A row per model, rule, factor and value: ``tokens``, the raw mean ``experts``, and ``effect``: by how much the
        mean lies above that of all tokens if the other two factors are spread as they are in all tokens, with ``low``,
        ``high``. Rules that give every token the same number are left out.

    Notes
    -----
    Cells of a document, a kind and an eighth are weighted by the square root of their tokens. Fixed effects are the
    three factors, without interactions; a document's random effect says that its tokens are alike. It is a description:
    the kinds differ in how often they are where.
    """
    rows = []
    for (model, rule), part in table.groupby(["model", "rule"], sort=False) if len(table) else ():
        part = part.assign(mean=part["experts"] / part["tokens"])
        if part["mean"].std() < 1e-6:
            continue
        rows += [{"model": model, "rule": rule} | row for row in _effects(part, level)]
    return pd.DataFrame(rows)


def _effects(part: pd.DataFrame, level: float) -> list[dict]:
    """Effects of each value of each factor, about the mean of all tokens."""
    weight = np.sqrt(part["tokens"].to_numpy(float) / part["tokens"].mean())
    columns, names = [np.ones(len(part))], [("", "")]
    share = {factor: part.groupby(factor)["tokens"].sum() / part["tokens"].sum() for factor in FACTORS}
    for factor in FACTORS:
        values = sorted(part[factor].unique())
        last = (part[factor] == values[-1]).to_numpy(float)
        for value in values[:-1]:  # effects whose mean over tokens is 0: the last follows from the others
            ratio = share[factor][value] / share[factor][values[-1]]
            columns.append((part[factor] == value).to_numpy(float) - ratio * last)
            names.append((factor, value))
    design = np.stack(columns, axis=1)
    groups = part["domain"].astype(str) + " " + part["document"].astype(str)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a variance of 0 between documents is an answer
        model = MixedLM(part["mean"] * weight, design * weight[:, None], groups=groups, exog_re=weight[:, None])
        fitted = model.fit(reml=True, method="powell")
    size = design.shape[1]
    covariance = np.asarray(fitted.cov_params())[:size, :size]
    rows = []
    quantile = stats.norm.ppf((1 + level) / 2)
    for factor in FACTORS:
        values = sorted(part[factor].unique())
        for value in values:
            contrast = np.zeros(size)
            if value != values[-1]:
                contrast[names.index((factor, value))] = 1
            else:
                for other in values[:-1]:
                    ratio = share[factor][other] / share[factor][value]
                    contrast[names.index((factor, other))] = -ratio
            effect = contrast @ np.asarray(fitted.fe_params)
            reach = quantile * np.sqrt(contrast @ covariance @ contrast)
            inside = part[part[factor] == value]
            rows.append(
                {"factor": factor, "value": value, "tokens": int(inside["tokens"].sum())}
                | {"experts": inside["experts"].sum() / inside["tokens"].sum()}
                | {"effect": effect, "low": effect - reach, "high": effect + reach}
            )
    return rows
