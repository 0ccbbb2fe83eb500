"""Promises about a rule that hold for documents not seen yet: how many useless experts it keeps, what loss it costs.

    measured = measure_contributions(model, text, documents=documents)
    promise = promise_discoveries(measured, alpha=0.1)        # of the experts kept, at most a tenth contribute nothing

    promise = promise_effects(effects, measured, alpha=0.2)   # of the experts kept, a fifth could go unnoticed

    promise = promise_loss(model, text, documents=documents)  # at most 0.5 % worse than the model's own top-k
    with RoutingPatch(model, promise.rule): ...

All choose the level of a rule, whatever rule, on calibration text, and all promise something about the rule as it is
used, with its ``min_k`` and ``max_k``. They promise it of *documents* that are exchangeable with those of the
calibration text: of the same kinds, in the same proportions. A document is a unit, and counts as one however long it
is; its tokens depend on each other, and no number of them stands in for another document.

What each promises, and under which assumptions, is in its docstring: the first two are about an expectation, the last
about a probability.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from bhlib.comparisons import with_documents
from bhlib.contributions import Contributions
from bhlib.evaluation import evaluate
from bhlib.rules import BH, Rule

#: Levels that are tried, the strictest first: their log-odds are evenly spaced.
LEVELS = tuple(float(level) for level in 1 / (1 + np.exp(-np.linspace(-12, 5, 69))))

_PLACE = ["domain", "sequence", "position"]  # which token, in a table of effects

#: Orders of the documents over which the test of a loss is averaged.
ORDERS = 200


@dataclass(frozen=True)
class Promise:
    """A rule at the level that a promise holds for.

    Attributes
    ----------
    rule : Rule
    text : str
        What is promised, in words.
    documents : int
        How many it rests on.
    tried : pandas.DataFrame
        A row for each level that was tried, as the function that made it says.
    """

    rule: Rule
    text: str
    documents: int
    tried: pd.DataFrame


# -- how many of the experts kept are useless ------------------------------------------------------------------


class Discoveries(NamedTuple):
    """What a rule keeps of each token, int64 [layers, tokens].

    Attributes
    ----------
    kept : Tensor
        Experts.
    useless : Tensor
        Those of them that are useless.
    useful : Tensor
        Useful experts of the token, kept or not.
    """

    kept: Tensor
    useless: Tensor
    useful: Tensor

    @property
    def proportion(self) -> Tensor:
        """The false discovery proportion, float64 [layers, tokens]: useless of those kept, 0 where none is."""
        return self.useless.double() / self.kept.clamp(min=1)


def discoveries(rule: Rule, router_logits: Tensor, useless: Tensor) -> Discoveries:
    """What a rule keeps, against what is known of each expert.

    Parameters
    ----------
    rule : Rule
    router_logits : Tensor [layers, tokens, experts]
    useless : Tensor [layers, tokens, experts], bool
        For instance ``contributions.r <= 0.1``.
    """
    layers = []
    for layer, (logits, truth) in enumerate(zip(router_logits, useless, strict=True)):
        routing = rule(logits, layer)
        hit = truth.gather(-1, routing.experts.clamp(min=0)) & (routing.experts >= 0)
        layers.append((routing.counts, hit.sum(-1), (~truth).sum(-1)))
    return Discoveries(*(torch.stack(part) for part in zip(*layers, strict=True)))


def discoveries_by_effect(
    rule: Rule, effects: pd.DataFrame, contributions: Contributions, smallest: float = 1e-3
) -> pd.DataFrame:
    """What a rule keeps, where an expert is useless if the prediction hardly changes when it alone is left out.

    Parameters
    ----------
    rule : Rule
        Which keeps none but experts whose effect is known.
    effects : pandas.DataFrame
        Of some pairs of a token and a layer, as `bhlib.contributions.one_changed` returns it.
    contributions : Contributions
        Of all tokens of the same text, whose logits the rule sees.
    smallest : float
        Divergence of the next token's distribution, in nats, from which on an expert is useful.

    Returns
    -------
    pandas.DataFrame
        One row per pair: ``domain``, ``document``, ``kept`` (experts), ``hits`` (useful ones of them), ``useful`` (kept
        or not), ``proportion`` (useless over kept).

    Raises
    ------
    ValueError
        If the rule keeps an expert whose effect is not known.
    """
    tokens = pd.MultiIndex.from_arrays([contributions.domains, contributions.sequences, contributions.positions])
    parts = []
    for layer, part in effects.groupby("layer"):
        place = part.groupby(_PLACE, sort=False).ngroup().to_numpy(copy=True)
        first = part.iloc[np.unique(place, return_index=True)[1]]
        logits = contributions.logits[layer, tokens.get_indexer(pd.MultiIndex.from_frame(first[_PLACE]))]
        effect = torch.full_like(logits, torch.nan, dtype=torch.float64)
        expert, kl = (torch.tensor(part[name].to_numpy(), device="cpu") for name in ("expert", "kl"))
        effect[torch.from_numpy(place), expert] = kl.double()
        routing = rule(logits, int(layer))
        ends = torch.cat([effect, torch.full_like(effect[:, :1], torch.inf)], dim=1)  # an empty slot, index -1
        of_kept = ends.gather(-1, routing.experts % ends.shape[1])
        if of_kept.isnan().any():
            raise ValueError(
                f"{rule!r} keeps an expert whose effect is not known: measure more ranks, one_changed(..., ranks=...)"
            )
        hits = ((of_kept >= smallest) & (routing.experts >= 0)).sum(-1)
        useful, kept = (effect >= smallest).sum(-1), routing.counts
        numbers = {
            "kept": kept,
            "hits": hits,
            "useful": useful,
            "proportion": (kept - hits).double() / kept.clamp(min=1),
        }
        parts.append(first[["domain", "document"]].assign(**{name: value.numpy() for name, value in numbers.items()}))
    return pd.concat(parts, ignore_index=True)


def promise_discoveries(
    contributions: Contributions,
    alpha: float = 0.1,
    *,
    rule: Rule | None = None,
    levels: Sequence[float] = LEVELS,
    largest: float = 0.1,
) -> Promise:
    """The most lenient level at which at most a share `alpha` of the experts kept are useless: conformal risk control.

    The promise: draw the calibration documents, choose the level, draw one more document. The mean over its tokens and
    the layers of the false discovery proportion (useless experts over experts kept) has an expectation of at most
    `alpha`. It is exact for any number of documents, and assumes that they are exchangeable and nothing else.

    It is no promise for one calibration text (over such texts the realised share varies around its expectation), for
    single tokens, layers or domains, nor for a patched model, whose later layers see other hidden states than those
    that were measured.

    Parameters
    ----------
    contributions : Contributions
        Of calibration text, with its documents (`bhlib.contributions.measure_contributions`).
    alpha : float
        In (0, 1); no smaller than one over the number of documents and one.
    rule : Rule, optional
        Any rule with a level; `BH` with its default p-values if none is given.
    levels : sequence of float
        To be tried, from that with the fewest experts to that with the most: rising for `BH`, falling for `Threshold`.
    largest : float
        Up to which contribution an expert is useless.

    Returns
    -------
    Promise
        Its table has ``level``, ``mean_k``, ``risk`` (mean over documents of the largest false discovery proportion at
        this level or a stricter one: it never falls), and ``corrected``, which may be at most `alpha`. The last row is
        above it, unless all levels are good.

    Raises
    ------
    ValueError
        If there are too few documents for `alpha`, or the strictest level keeps too many useless experts. (The promise
        counts such texts as if nothing were kept.)

    Notes
    -----
    With the risk ``R`` over n documents the corrected one is ``(n R + 1) / (n + 1)``: the document to come may be all
    wrong (Angelopoulos, Bates, Fisch, Lei, Schuster 2024, Conformal risk control, ICLR).
    """
    _, unit = np.unique(contributions.units, return_inverse=True)
    useless = contributions.r <= largest

    def measure(tried: Rule) -> tuple[np.ndarray, float]:
        found = discoveries(tried, contributions.logits, useless)
        return _unit_means(found.proportion.mean(dim=0).numpy(), unit), found.kept.double().mean().item()

    text = f"of the experts kept, at most {alpha:.3g} in expectation contribute {largest:g} of the output or less"
    return _control(measure, int(unit.max()) + 1, alpha, BH() if rule is None else rule, levels, text)


def promise_effects(
    effects: pd.DataFrame,
    contributions: Contributions,
    alpha: float = 0.1,
    *,
    rule: Rule | None = None,
    levels: Sequence[float] = LEVELS,
    smallest: float = 1e-3,
) -> Promise:
    """As `promise_discoveries`, where an expert is useless if the prediction hardly changes when it alone is left out.

    The promise is about a place, a pair of a token and a layer, drawn from one more document. Documents of which
    `effects` has no place do not count.

    Parameters
    ----------
    effects, contributions, smallest
        As for `discoveries_by_effect`: of calibration text.
    alpha, rule, levels
        As for `promise_discoveries`, which says what is returned and raised, too.
    """
    number = effects.groupby(["domain", "document"]).ngroups

    def measure(tried: Rule) -> tuple[np.ndarray, float]:
        found = discoveries_by_effect(tried, effects, contributions, smallest)
        of_document = found["proportion"].groupby([found["domain"], found["document"]]).mean()
        return of_document.to_numpy(), float(found["kept"].mean())

    text = f"of the experts kept, at most {alpha:.3g} in expectation change a prediction by less than {smallest:g} nats"
    return _control(measure, number, alpha, BH() if rule is None else rule, levels, text)


def _control(
    measure: Callable[[Rule], tuple[np.ndarray, float]],
    number: int,
    alpha: float,
    rule: Rule,
    levels: Sequence[float],
    text: str,
) -> Promise:
    """Conformal risk control: `measure` gives the risks [documents] of a rule, and its mean number of experts."""
    if not 0 < alpha < 1:
        raise ValueError(f"alpha is {alpha}, but must lie strictly between 0 and 1")
    if alpha * (number + 1) < 1:
        raise ValueError(
            f"{number:,} documents can promise no alpha below 1/{number + 1:,} = {1 / (number + 1):.3g}, but alpha is "
            f"{alpha:g}: measure contributions on {math.ceil(1 / alpha - 1e-9) - 1:,} documents or more"
        )
    rows, envelope = [], np.zeros(number)
    for level in levels:
        risks, mean_k = measure(rule.at(level))
        envelope = np.maximum(envelope, risks)
        row = {"level": level, "mean_k": mean_k, "risk": envelope.mean()}
        rows.append(row | {"corrected": corrected_risk(envelope)})
        if rows[-1]["corrected"] > alpha:  # so it is at all levels beyond
            break
    table = pd.DataFrame(rows)
    kept = table[table["corrected"] <= alpha]
    if kept.empty:
        raise ValueError(
            f"the level {levels[0]:g} alone has a corrected risk of {rows[0]['corrected']:.3g}, but alpha is "
            f"{alpha:g}: try stricter levels first, another rule, or a larger alpha"
        )
    return Promise(rule.at(float(kept["level"].iloc[-1])), text, number, table)


def corrected_risk(risks: np.ndarray) -> float:
    """The mean risk of documents [n], each in [0, 1], and of one more that is all wrong.

    Of levels whose risks never fall, take the last one at which this is at most alpha: there one more exchangeable
    document has a risk with an expectation of at most alpha.
    """
    return float((risks.sum() + 1) / (len(risks) + 1))


def _unit_means(values: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """Means of `values` [tokens] over the tokens of each unit, by the unit's number."""
    return np.bincount(unit, values) / np.bincount(unit)


# -- how much loss a rule costs --------------------------------------------------------------------------------


def promise_loss(
    model: nn.Module,
    token_ids: Mapping[str, Tensor],
    *,
    documents: Mapping[str, Sequence | np.ndarray] | None = None,
    rule: Rule | None = None,
    levels: Sequence[float] = LEVELS[::-3],
    percent: float = 0.5,
    probability: float = 0.9,
    cap: float = 4.0,
    batch_size: int = 8,
) -> Promise:
    """The level with the fewest experts whose loss is proven to be close to that of the model's own top-k.

    The promise: with a `probability` over the calibration documents, the loss of one more document is expected to be at
    most `percent` above what the unpatched model has on it, where a document that loses more than `cap` per cent counts
    as if it lost `cap`. (Learn then Test: levels are tested one after the other, in the order given, until one fails.)

    It assumes that the documents are independent and of one distribution, and nothing of their tokens. The test is
    valid for any number of documents; that is what the cap is for, since without a bound on what a document may lose
    no finite number of them proves anything about a mean.

    Parameters
    ----------
    model : nn.Module
        Unpatched model.
    token_ids : mapping of str to Tensor [sequences, length]
        Calibration text by domain.
    documents : mapping of str to array_like [sequences], optional
        The document of each sequence (`bhlib.loading.heldout_sequence_documents`); by default each sequence is one.
    rule : Rule, optional
        Any rule with a level; `BH` with its default p-values if none is given.
    levels : sequence of float
        To be tested, from that with the most experts to that with the fewest. Each takes a pass over the text.
    percent : float
        Of the model's own loss on a document, above 0.
    probability : float
        In (0, 1).
    cap : float
        Per cent, above `percent`: chosen beforehand, not by looking at the results. The column ``capped`` says how many
        documents it concerns. The smaller it is, the more the test can show.
    batch_size : int

    Returns
    -------
    Promise
        Its table has the levels that were tested, ``mean_k``, ``percent`` (what a document loses, mean of all),
        ``worst`` (the most that one of them loses), ``capped`` (how many lose more than the cap) and ``pvalue``, of the
        hypothesis that a document is expected to lose more than is promised. The last row failed, unless all passed.

    Raises
    ------
    ValueError
        If the first level fails already, or an argument is out of range.
    """
    if not 0 < percent < cap < math.inf:
        raise ValueError(f"percent is {percent} and cap {cap}, but they must be numbers with 0 < percent < cap")
    if not 0 < probability < 1:
        raise ValueError(f"probability is {probability}, but must lie strictly between 0 and 1")
    rule = BH() if rule is None else rule
    if documents is None:
        documents = {name: np.arange(len(ids)) for name, ids in token_ids.items()}

    def measure(tried: Rule | None) -> pd.DataFrame:
        frame = with_documents(evaluate(model, token_ids, tried, batch_size=batch_size), documents)
        return frame.groupby(["domain", "document"])[["loss", "mean_k"]].mean()

    own, rows = measure(None)["loss"], []
    for level in tqdm(levels, unit="level", desc="loss"):
        found = measure(rule.at(level))
        lost = 100 * (found["loss"] / own - 1)
        row = {"level": level, "mean_k": found["mean_k"].mean(), "percent": lost.mean(), "worst": lost.max()}
        pvalue = betting_pvalue(lost.clip(upper=cap).to_numpy() - percent, cap - percent)
        rows.append(row | {"capped": int((lost > cap).sum()), "pvalue": pvalue})
        if rows[-1]["pvalue"] > 1 - probability:
            break
    table = pd.DataFrame(rows)
    passed = table[table["pvalue"] <= 1 - probability]
    if passed.empty:
        first = rows[0]
        raise ValueError(
            f"no level can be promised: at the first, {first['level']:g}, {len(own):,} documents lose "
            f"{first['percent']:.3g} %, with a p-value of {first['pvalue']:.2g}, but {1 - probability:.3g} is needed. "
            "Begin with a level that has more experts, measure more documents, or allow a larger percent"
        )
    text = f"at most {percent:g} % worse than the model's own routing, with probability {probability:g}"
    return Promise(rule.at(float(passed["level"].iloc[-1])), text, len(own), table)


def betting_pvalue(values: np.ndarray, upper: float, *, seed: int = 0) -> float:
    """P-value of the hypothesis that independent values have a mean of 0 or more, valid for any number of them.

    Parameters
    ----------
    values : ndarray [n]
        Of one distribution on (-infinity, `upper`].
    upper : float
        Above 0, and known beforehand.
    seed : int
        Of the orders.

    Returns
    -------
    float
        At most 1.

    Notes
    -----
    A gambler bets that the next value will be negative: the capital is multiplied by ``1 - b x``, where b, at most
    ``0.9 / upper``, depends on the values before. If the mean is 0 or more, the capital is expected to stay at 1 or
    below, so that its inverse is a p-value by Markov's inequality (Waudby-Smith & Ramdas 2024, JRSS B 86, 1-27). The
    bet is theirs, for a p-value of about 0.1. The capital is averaged over `ORDERS` orders of the values, since the
    mean of such capitals is one too, and the order then says nothing.
    """
    if not upper > 0 or (values > upper * (1 + 1e-9)).any():
        raise ValueError(
            f"upper is {upper}, but must be above 0 and bound the values, the largest of which is {values.max()}"
        )
    generator = np.random.default_rng(seed)
    drawn = np.stack([generator.permutation(values) for _ in range(ORDERS)])
    before = np.arange(1, len(values) + 1)  # how many were seen, with an imaginary first one: 0, with a deviation
    means = np.cumsum(drawn, axis=1) / (before + 1)
    squares = (upper / 4) ** 2 + np.cumsum((drawn - means) ** 2, axis=1)
    variance = np.concatenate([np.full((ORDERS, 1), (upper / 4) ** 2), (squares / (before + 1))[:, :-1]], axis=1)
    bets = np.minimum(np.sqrt(2 * np.log(10) / (len(values) * variance)), 0.9 / upper)
    return float(min(1.0, 1 / np.prod(1 - bets * drawn, axis=1).mean()))
