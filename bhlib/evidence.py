"""Do the p-values keep their promise, and does it matter? Measurements behind the figures, as tidy tables.

`uniformity` and `level_curve` ask the first question of a null on text that it was not fitted on,
`normal_scores_correlation` says how dependent the experts of a token are, and `compare_at_equal_cost` asks the second:
what a rule's loss is, against that of static top-k with the same number of experts. `realised` compares
a level with what the experts kept were measured to contribute.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.special import ndtri
from scipy.stats import binom, rankdata
from torch import Tensor, nn
from tqdm.auto import tqdm

from bhlib.calibration import fit_null
from bhlib.comparisons import matched_compute, resample, with_documents
from bhlib.contributions import Contributions
from bhlib.evaluation import sweep
from bhlib.guarantees import discoveries, discoveries_by_effect
from bhlib.levels import alpha_for_mean_experts
from bhlib.pvalues import NULLS, STATISTICS, PValueMaker
from bhlib.rules import BH, Rule, TopK
from bhlib.sampling import VALUES_PER_EXPERT, VALUES_PER_LAYER

#: Where distribution functions are compared: evenly, and by factors of 1.2 in the lower tail.
LEVELS = np.unique(np.concatenate([np.arange(1, 4097) / 4096, 10 ** np.linspace(-4, -2, 27)]))


# -- are the p-values uniform? -------------------------------------------------------------------------------


def candidate_nulls(router_logits: Tensor, model_name: str, exclude_top: int = 8) -> dict[str, PValueMaker]:
    """The nulls that are compared (`bhlib.pvalues.NULLS`), by label; those that need calibration are fitted.

    Parameters
    ----------
    router_logits : Tensor [layers, tokens, experts]
        To fit on (`bhlib.calibration.collect_router_logits`). Of the 50 or so values of a token at most two are used,
        or four where each expert has a null of its own, so that a sample is not mostly of a few tokens.
    """
    _, num_tokens, num_experts = router_logits.shape
    sizes = min(VALUES_PER_LAYER, 2 * num_tokens), min(VALUES_PER_EXPERT, 4 * num_tokens // num_experts)
    settings: dict[str, Any] = {"model_name": model_name, "exclude_top": exclude_top}
    makers: dict[str, PValueMaker] = {}
    for name, entry in NULLS.items():
        for label, options in entry.compared.items():
            if entry.needs_calibration:
                size = sizes[options.get("per_expert", False)]
                makers[label] = fit_null(router_logits, null=name, max_values=size, **settings, **options)
            else:
                makers[label] = entry.make(exclude_top=exclude_top, **options)
    return makers


def uniformity(
    pvalues: PValueMaker,
    router_logits: Tensor,
    *,
    sequence_length: int,
    exclude_top: int = 8,
    resamples: int = 200,
    seed: int = 0,
) -> pd.DataFrame:
    """How far the p-values of a token's null experts are from uniform, layer by layer.

    The null experts of a token are those outside its `exclude_top` largest logits: the ones that the model does not
    select, which is what nulls are fitted on. For a null hypothesis about the token as a whole
    (``pvalues.whole_token``) these are not a random part of its experts, and their p-values are compared with what
    they would then be if the experts of a token were independent (`lower_order_cdf`).

    Parameters
    ----------
    pvalues : PValueMaker
    router_logits : Tensor [layers, tokens, experts]
        Of text that `pvalues` was not fitted on, sequence by sequence.
    sequence_length : int
        Tokens per sequence. Sequences are the independent units: intervals are bootstrapped over them.
    exclude_top : int
    resamples : int
    seed : int

    Returns
    -------
    pandas.DataFrame
        One row per layer: ``ks``, the Kolmogorov-Smirnov distance (at `LEVELS`, so up to 1/4096 too small), with a 95 %
        percentile interval ``ks_low``, ``ks_high``; ``tail_01`` and ``tail_001``, P(p <= a)/a at a = 0.01 and 0.001;
        ``inflation``, the variance of a token's mean p-value over that of independent uniform ones; what each of the
        three is where the null is true (`true_null_reference`), ``tail_01_reference`` and so on; ``values``,
        ``tokens``, ``sequences``. A tail below its reference is cautious.
    """
    reference = true_null_reference(pvalues, router_logits.shape[-1], exclude_top)
    reference = {f"{name}_reference": value for name, value in reference.items()}
    weights = _bootstrap_weights(router_logits, sequence_length, resamples, seed)
    rows = []
    for layer, logits in enumerate(router_logits):
        pvals = _null_pvalues(pvalues, logits, layer, exclude_top)
        fractions = _fractions(pvals, sequence_length)
        pooled = fractions.mean(axis=0)
        low, high = np.quantile(np.abs(weights @ fractions - LEVELS).max(axis=1), [0.025, 0.975])
        rows.append(
            {"layer": layer, "ks": np.abs(pooled - LEVELS).max(), "ks_low": low, "ks_high": high}
            | _tails_and_inflation(pvals)
            | reference
            | {"values": pvals.size, "tokens": len(pvals), "sequences": len(fractions)}
        )
    return pd.DataFrame(rows)


def true_null_reference(
    pvalues: PValueMaker, num_experts: int, exclude_top: int = 8, *, tokens: int = 20_000, seed: int = 0
) -> dict[str, float]:
    """``tail_01``, ``tail_001`` and ``inflation`` of `uniformity` where the null is true, by simulation.

    For independent uniform p-values they are 1. The experts outside the top `exclude_top` do not have such p-values,
    even in a token where no expert stands out: all were selected for being low, which ties them together; a statistic
    that subtracts a mean of the token, or a division of one, makes them balance each other; and `lower_order_cdf` takes
    for independent what balances. The tokens simulated are

    - for a maker that says how a token comes about (`DirichletNull`, `TokenGaussian`), its ``null_logits``;
    - for any other, so for a fitted null, independent Gaussian logits under the very distribution that its
      statistic then has outside the top: the tails are 1 up to rounding, and only the inflation is simulated.

    Parameters
    ----------
    pvalues : PValueMaker
    num_experts : int
    exclude_top : int
    tokens : int
        With the default, 64 experts and `exclude_top` 8, the standard error is 0.01 for ``tail_01``, 0.02 for
        ``tail_001``, and 1.5 % of the ``inflation``, or less.
    seed : int

    Returns
    -------
    dict of float
    """
    generator = np.random.default_rng(seed)
    noise = pvalues.null_logits(tokens, num_experts, exclude_top, generator)
    if noise is not None:
        logits = torch.from_numpy(noise).float()
        return _tails_and_inflation(_null_pvalues(pvalues, logits, None, exclude_top))
    logits = torch.from_numpy(generator.standard_normal((tokens, num_experts))).float()
    statistics = pvalues.statistic_of(logits)[_outside_top(logits, exclude_top)].view(tokens, -1).numpy()
    return _tails_and_inflation(rankdata(-statistics).reshape(statistics.shape) / statistics.size)


def _tails_and_inflation(pvals: np.ndarray) -> dict[str, float]:
    """Of p-values [tokens, experts]: P(p <= a)/a, and the variance of a token's mean over that of independent ones."""
    tails = {f"tail_{str(a)[2:]}": float((pvals <= np.float32(a)).mean() / a) for a in (0.01, 0.001)}
    return tails | {"inflation": float(12 * pvals.shape[1] * pvals.mean(axis=1, dtype=np.float64).var())}


def level_curve(
    pvalues: PValueMaker,
    router_logits: Tensor,
    *,
    sequence_length: int,
    exclude_top: int = 8,
    resamples: int = 200,
    seed: int = 0,
) -> pd.DataFrame:
    """Fraction of null p-values up to a level, all layers together; parameters as for `uniformity`.

    Returns
    -------
    pandas.DataFrame
        One row per level, ``level``, ``fraction``, and its 95 % percentile interval ``low``, ``high``. Levels are
        multiples of 1/32, and from 1e-4 to 1e-2 steps of a factor of 1.2.
    """
    weights = _bootstrap_weights(router_logits, sequence_length, resamples, seed)
    layers = [
        _fractions(_null_pvalues(pvalues, logits, layer, exclude_top), sequence_length)
        for layer, logits in enumerate(router_logits)
    ]
    fractions = np.mean(layers, axis=0)  # a sequence is one unit: its layers are not independent
    low, high = np.quantile(weights @ fractions, [0.025, 0.975], axis=0)
    curve = pd.DataFrame({"level": LEVELS, "fraction": fractions.mean(axis=0), "low": low, "high": high})
    return curve[(LEVELS <= 0.0101) & (LEVELS * 4096 % 1 > 0) | (LEVELS * 32 % 1 == 0)].reset_index(drop=True)


def lower_order_cdf(levels: np.ndarray, num_tests: int, exclude_top: int) -> np.ndarray:
    """P(p <= level) for a p-value chosen at random among those above the `exclude_top` smallest of `num_tests`.

    If ``B`` of the ``N`` independent uniform p-values are at most the level, ``max(B - k, 0)`` of the ``N - k`` are:
    the expectation over the binomial ``B``.
    """
    surplus = np.arange(1, num_tests - exclude_top + 1)
    chances = binom.pmf(exclude_top + surplus, num_tests, np.asarray(levels)[..., None])
    return (chances * surplus).sum(axis=-1) / len(surplus)


def _null_pvalues(pvalues: PValueMaker, logits: Tensor, layer: int | None, exclude_top: int) -> np.ndarray:
    """P-values [tokens, experts - exclude_top] of the null experts, uniform if all is well."""
    pvals = pvalues(logits, layer)
    null = pvals[_outside_top(logits, exclude_top)].view(len(pvals), -1).numpy()
    if pvalues.whole_token:
        expected = lower_order_cdf(LEVELS, pvals.shape[-1], exclude_top)
        null = np.interp(null, np.append(0, LEVELS), np.append(0, expected)).astype(np.float32)
    return null


def _outside_top(logits: Tensor, exclude_top: int) -> Tensor:
    """[tokens, experts], bool: False for each token's `exclude_top` largest logits."""
    return torch.ones_like(logits, dtype=torch.bool).scatter_(-1, logits.topk(exclude_top).indices, False)


def _fractions(pvals: np.ndarray, sequence_length: int) -> np.ndarray:
    """[sequences, levels]: the fraction of a sequence's p-values up to each level."""
    ordered = np.sort(pvals.reshape(-1, sequence_length * pvals.shape[1]), axis=-1)
    levels = LEVELS.astype(ordered.dtype)
    return np.stack([row.searchsorted(levels, side="right") for row in ordered]) / ordered.shape[1]


def _bootstrap_weights(router_logits: Tensor, sequence_length: int, resamples: int, seed: int) -> np.ndarray:
    """[resamples, sequences]: how much each sequence counts in each resample.

    Not those of `bhlib.comparisons.resample`, which are made for means: the interval of a distance, which has no
    negative values, is read off the quantiles of the resamples themselves.
    """
    num_tokens = router_logits.shape[1]
    if num_tokens % sequence_length:
        raise ValueError(
            f"router_logits holds {num_tokens} tokens, which is no multiple of sequence_length={sequence_length}"
        )
    num_sequences = num_tokens // sequence_length
    draws = np.random.default_rng(seed).multinomial(num_sequences, np.full(num_sequences, 1 / num_sequences), resamples)
    return draws / num_sequences


# -- how dependent are the experts of a token? ---------------------------------------------------------------


def normal_scores_correlation(values: Tensor) -> np.ndarray:
    """Correlation between experts after each expert's values are mapped to normal quantiles by their ranks.

    The correlation matrix of a Gaussian copula fitted to the values: scores that are each exactly standard normal, and
    as dependent as the experts are. That is what `bhlib.simulations.simulate_fdr` takes.

    Parameters
    ----------
    values : Tensor [tokens, experts]
        Some statistic of the logits.

    Returns
    -------
    array [experts, experts], float64
        Symmetric, unit diagonal, no negative eigenvalue.
    """
    ranks = rankdata(values.numpy(), axis=0)
    return np.corrcoef(ndtri((ranks - 0.5) / len(ranks)), rowvar=False)


def strongest_dependence(router_logits: Tensor, statistic: str, exclude_top: int = 8) -> tuple[int, np.ndarray]:
    """The layer whose experts depend most on each other (largest mean squared correlation), and their correlation.

    Parameters
    ----------
    router_logits : Tensor [layers, tokens, experts]
    statistic : str
        A name in `bhlib.pvalues.STATISTICS`.
    """
    matrices = [normal_scores_correlation(STATISTICS[statistic](logits, exclude_top)) for logits in router_logits]
    layer = int(np.argmax([np.square(matrix).mean() for matrix in matrices]))
    return layer, matrices[layer]


# -- how many of the experts that a rule keeps are useless? ----------------------------------------------------


def realised(contributions: Contributions, rules: Mapping[str, Rule], largest: float = 0.1) -> pd.DataFrame:
    """What rules keep, against what experts contribute: the share of useless ones, and how many useful ones they miss.

    Parameters
    ----------
    contributions : Contributions
        Of text that nothing was fitted or chosen on (`bhlib.contributions.measure_contributions`).
    rules : mapping of str to Rule
        By the name that they get in the table. They see the logits of the unpatched model.
    largest : float
        Up to which contribution an expert is useless.

    Returns
    -------
    pandas.DataFrame
        One row per rule and part: ``rule``, ``part`` (``"all"``, ``"layer 0"``, ..., and the domains), ``fdp`` (useless
        experts over experts kept, taken for each token and layer) with a 95 % interval ``low``, ``high``
        (`bhlib.comparisons.resample`), ``power`` (useful experts kept over useful experts, those summed), ``mean_k``,
        ``documents`` and ``tokens``. Documents are the units, and count alike however many of their tokens were
        measured.
    """
    units, first, unit = np.unique(contributions.units, return_index=True, return_inverse=True)
    domains = contributions.domains[first]
    useless, rows = contributions.r <= largest, []
    for name, rule in rules.items():
        found = discoveries(rule, contributions.logits, useless)
        counts = torch.stack([found.proportion, found.kept - found.useless, found.useful, found.kept])
        means = np.stack([counts[:, :, unit == number].mean(dim=2).numpy() for number in units])
        parts: dict[str, tuple[Any, Any]] = {"all": (slice(None), slice(None))}  # which documents, which layers
        parts |= {f"layer {layer}": (slice(None), [layer]) for layer in range(means.shape[2])}
        parts |= {str(domain): (domains == domain, slice(None)) for domain in np.unique(domains)}
        for part, (documents, layers) in parts.items():
            of_part = means[documents][:, :, layers].mean(axis=2)
            drawn = resample(domains[documents], units[documents])
            fdp, kept, useful, mean_k = drawn.means(of_part).T
            low, high = drawn.interval(fdp)
            numbers = {
                "fdp": fdp[0],
                "low": low,
                "high": high,
                "power": _share(kept[0], useful[0]),
                "mean_k": mean_k[0],
            }
            tokens = int(np.isin(unit, units[documents]).sum())
            rows.append({"rule": name, "part": part} | numbers | {"documents": len(of_part), "tokens": tokens})
    return pd.DataFrame(rows)


def _share(part: float, whole: float) -> float:
    """NaN of nothing."""
    return part / whole if whole else np.nan


def realised_by_effect(
    effects: pd.DataFrame, contributions: Contributions, rules: Mapping[str, Rule], smallest: float = 1e-3
) -> pd.DataFrame:
    """As `realised`, where an expert is useless if the prediction hardly changes when it alone is left out.

    Parameters
    ----------
    effects, contributions, smallest
        As for `bhlib.guarantees.discoveries_by_effect`.
    rules : mapping of str to Rule

    Returns
    -------
    pandas.DataFrame
        One row per rule: ``rule``, ``fdp`` with a 95 % interval ``low``, ``high`` over documents, ``power`` (of the
        experts whose effect is known), ``mean_k``, ``documents`` and ``tokens`` (pairs of a token and a layer). The
        pairs count alike.
    """
    rows = []
    for name, rule in rules.items():
        found = discoveries_by_effect(rule, effects, contributions, smallest)
        drawn = resample(found["domain"], found["document"])
        fdp, hits, useful, mean_k = drawn.means(found[["proportion", "hits", "useful", "kept"]]).T
        low, high = drawn.interval(fdp)
        numbers = {"fdp": fdp[0], "low": low, "high": high, "power": _share(hits[0], useful[0]), "mean_k": mean_k[0]}
        rows.append({"rule": name} | numbers | {"documents": drawn.units, "tokens": len(found)})
    return pd.DataFrame(rows)


# -- does it matter? -----------------------------------------------------------------------------------------


def compare_at_equal_cost(
    model: nn.Module,
    makers: Mapping[str, PValueMaker],
    calibration_logits: Tensor,
    data: Mapping[str, Tensor],
    *,
    mean_experts: tuple[float, ...] = (4.0, 5.0, 6.0),
    static_k: tuple[int, ...] = (3, 4, 5, 6, 7, 8),
    max_k: int = 8,
    documents: Mapping[str, np.ndarray] | None = None,
    **sweep_options,
) -> pd.DataFrame:
    """Loss of BH with different p-values, each at the levels for a wanted number of experts, against static top-k.

    Parameters
    ----------
    model : nn.Module
        Unpatched model.
    makers : mapping of str to PValueMaker
    calibration_logits : Tensor [layers, tokens, experts]
        On which alpha is chosen (`alpha_for_mean_experts`). The number of experts on `data` is somewhat different.
    data : mapping of str to Tensor [sequences, length]
        Token ids by domain, not the text that `calibration_logits` come from.
    mean_experts : tuple of float
    static_k : tuple of int
        Static rules, consecutive; their loss is interpolated linearly between these, NaN outside of them.
    max_k : int
        Most experts that BH gives to a token.
    documents : mapping of str to ndarray [sequences], optional
        The document of each sequence of `data` (`bhlib.comparisons.with_documents`), to be what intervals are over.
    **sweep_options
        For `bhlib.evaluation.sweep`.

    Returns
    -------
    pandas.DataFrame
        One row per maker and number that a level of it gives: ``pvalues``, ``wanted_k``, ``alpha``, ``mean_k``,
        ``loss`` (nats per token), ``static_loss`` (top-k, interpolated at the same ``mean_k``), ``difference`` with
        95 % bootstrap intervals ``low``, ``high`` and ``joint_low``, ``joint_high``
        (`bhlib.comparisons.matched_compute`); ``sequences``, ``units``, ``tokens``.
    """
    settings = {}
    for name, maker in makers.items():
        for k in mean_experts:
            try:
                settings[name, k] = alpha_for_mean_experts(maker, calibration_logits, k, max_k=max_k)
            except ValueError as reason:
                tqdm.write(f"{name}, {k:g} experts is left out: {reason}")
    rules: dict[str, Rule] = {f"top-{k}": TopK(k) for k in static_k}
    rules |= {f"{name}, {k:g}": BH(alpha, makers[name], max_k=max_k) for (name, k), alpha in settings.items()}
    frame = sweep(model, rules, data, **sweep_options)
    tokens = int(frame.groupby("rule")["tokens"].sum().iloc[0])
    frame = frame if documents is None else with_documents(frame, documents)
    matched = matched_compute(frame).set_index("rule").rename(columns={"static": "static_loss"})
    columns = ["mean_k", "loss", "static_loss", "difference", "low", "high", "joint_low", "joint_high"]
    columns += ["sequences", "units"]
    rows = [
        {"pvalues": name, "wanted_k": k, "alpha": alpha} | matched.loc[f"{name}, {k:g}", columns].to_dict()
        for (name, k), alpha in settings.items()
    ]
    return pd.DataFrame(rows).astype({"sequences": int, "units": int}).assign(tokens=tokens)


def kept_mass(rule: Rule, router_logits: Tensor, top_k: int = 8) -> dict[str, float]:
    """How much of the weight of the model's own experts a rule keeps.

    Parameters
    ----------
    rule : Rule
    router_logits : Tensor [layers, tokens, experts]
    top_k : int
        Experts per token of the model itself.

    Returns
    -------
    dict
        ``share``, the probability that falls to the rule's experts over the probability that falls to the `top_k`
        largest, each summed over all pairs of a token and a layer; ``worst_5_percent``, the 5 % quantile of the same
        ratio taken for each pair.

    Notes
    -----
    Of all rules that spend the same number of experts in total, between the same `min_k` and `max_k`, a threshold on
    the probability with one constant for all tokens and layers (`Threshold`) has the largest ``share``: exchanging an
    expert that it keeps for one that it drops can only lower the sum. It does not maximize the mean of the pairs'
    ratios, which counts the same weight for more where the top `top_k` have less of it.
    """
    own = TopK(top_k)
    kept, whole = (
        torch.cat([chosen(logits, layer).weights.sum(dim=-1) for layer, logits in enumerate(router_logits)]).double()
        for chosen in (rule, own)
    )
    return {"share": float(kept.sum() / whole.sum()), "worst_5_percent": float(np.quantile(kept / whole, 0.05))}
