"""What the OLMoE paper asks of a router, for rules that give a variable number of experts.

Router saturation, expert co-activation, domain specialization and vocabulary specialization are defined in section 5 of
Muennighoff et al. 2024, "OLMoE: Open mixture-of-experts language models" (arXiv:2409.02060), for a token's top k. Here
a token's experts are those that a rule selects, however many, and with static top-k the definitions are the paper's.

    seen = observe_selection(model, text, documents, BH(0.01))
    domain_specialization(seen)          # ndarray [layers, experts, domains]
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel

from bhlib.comparisons import Resamples, resample
from bhlib.discovery import find_moe_layers, input_device
from bhlib.patching import RoutingPatch
from bhlib.rules import Rule

#: A token id counts in vocabulary specialization if it occurs this often.
OFTEN = 32


@dataclass(frozen=True)
class Selection:
    """Which experts a rule selected on n sequences.

    Attributes
    ----------
    domain : ndarray [n], str
    document : ndarray [n]
        Of each sequence, in its domain.
    load : ndarray [n, layers, experts], float64
        Share of a sequence's tokens for which an expert was selected.
    together : ndarray [layers, experts, experts], int64
        Tokens for which two experts were selected (`Records.coactivation`).
    by_token : mapping of str to ndarray [layers, vocabulary, experts], float32
        Tokens by id for which an expert was selected: the ``"input"`` id, and the ``"predicted"`` one, which the model
        under the rule thinks most likely to follow.
    occurrences : mapping of str to ndarray [vocabulary], float32
        How often each id was seen.
    """

    domain: np.ndarray
    document: np.ndarray
    load: np.ndarray
    together: np.ndarray
    by_token: Mapping[str, np.ndarray]
    occurrences: Mapping[str, np.ndarray]

    @cached_property
    def drawn(self) -> Resamples:
        """Resamples of the documents."""
        return resample(self.domain, self.document, resamples=400)

    @property
    def domains(self) -> list[str]:
        return sorted(set(self.domain))

    @property
    def mean_k(self) -> np.ndarray:
        """Experts per token of each layer: [layers]."""
        return self.load.sum(axis=2).mean(axis=0)


def selected(experts: Tensor, num_experts: int) -> Tensor:
    """Which experts are among a token's: bool [tokens, experts], of their numbers [tokens, slots].

    A slot that holds a number outside ``0..num_experts - 1`` is empty.
    """
    filled = (experts >= 0) & (experts < num_experts)
    places = torch.where(filled, experts, num_experts).long()
    return torch.zeros(len(experts), num_experts + 1, dtype=torch.bool, device=experts.device).scatter_(
        1, places, True
    )[:, :num_experts]


def saturation(now: Tensor, final: Tensor) -> Tensor:
    """Router saturation: the share of a token's final experts that are selected already; float64 [tokens].

    Parameters
    ----------
    now, final : Tensor [tokens, experts], bool
        What is selected (`selected`) by a router in training and by the trained one, on the same text.

    Notes
    -----
    With static top-k this is the paper's |E(t) and E(T)| / k. Where numbers differ it is divided by |E(T)|; a router
    that selects m experts at random has m / experts, whatever the final one selects.
    """
    return (now & final).sum(dim=1).double() / final.sum(dim=1)


@torch.no_grad()
def observe_selection(
    model: PreTrainedModel,
    data: Mapping[str, Tensor],
    documents: Mapping[str, np.ndarray],
    rule: Rule,
    batch_size: int = 8,
) -> Selection:
    """Run a model under a rule on token ids by domain, each a Tensor [sequences, length] of `documents` [sequences]."""
    layers, device = find_moe_layers(model), input_device(model)
    num_experts, vocabulary = layers[0].num_experts, model.get_input_embeddings().num_embeddings
    shape = len(layers), vocabulary, num_experts
    by_token = {which: torch.zeros(shape, device=device) for which in ("input", "predicted")}
    occurrences = {which: torch.zeros(vocabulary, device=device) for which in by_token}
    together = np.zeros((len(layers), num_experts, num_experts), dtype=np.int64)
    domain, document, load = [], [], []
    with RoutingPatch(model, rule, max_recorded_tokens=None) as patch:
        for name, sequences in data.items():
            domain += [name] * len(sequences)
            document += list(documents[name])
            for batch in sequences.to(device).split(batch_size):
                patch.reset_stats()
                predicted = model(input_ids=batch, use_cache=False).logits.argmax(dim=-1)
                (only,) = patch.records.passes
                together += patch.records.coactivation()
                used = torch.stack(
                    [
                        selected(only.routings[layer.index].experts.to(device).view(batch.numel(), -1), num_experts)
                        for layer in layers
                    ]
                )  # [layers, tokens, experts]
                for which, ids in (("input", batch), ("predicted", predicted)):
                    occurrences[which] += ids.flatten().bincount(minlength=vocabulary)
                    by_token[which].index_add_(1, ids.flatten(), used.float())
                load.append(used.view(len(layers), *batch.shape, -1).double().mean(dim=2).transpose(0, 1).cpu().numpy())
    return Selection(
        np.array(domain),
        np.array(document),
        np.concatenate(load),
        together,
        {which: counts.cpu().numpy() for which, counts in by_token.items()},
        {which: counts.cpu().numpy() for which, counts in occurrences.items()},
    )


def coactivation(seen: Selection) -> np.ndarray:
    """Expert co-activation: the share of expert i's tokens that expert j has too; [layers, experts, experts]."""
    load = np.diagonal(seen.together, axis1=1, axis2=2)
    return seen.together / np.maximum(load, 1)[:, :, None]


def domain_specialization(seen: Selection) -> np.ndarray:
    """Domain specialization: the share of a domain's tokens for which an expert is selected.

    An ndarray [layers, experts, domains], the domains in the order of `Selection.domains`. Its sum over experts is the
    mean number of experts in a domain.
    """
    return _by_domain(seen)[0]


def _by_domain(seen: Selection) -> np.ndarray:
    """`domain_specialization` in the sample and in its resamples: [1 + resamples, layers, experts, domains]."""
    weights, parts = seen.drawn.weights, []
    for name in seen.domains:
        inside = seen.domain == name
        share = weights[:, inside] / weights[:, inside].sum(axis=1, keepdims=True)
        parts.append(np.tensordot(share, seen.load[inside], axes=1))
    return np.stack(parts, axis=-1)


def vocabulary_specialization(seen: Selection, which: str = "input") -> tuple[np.ndarray, np.ndarray]:
    """Vocabulary specialization: the share of a token id's occurrences for which an expert is selected.

    Parameters
    ----------
    seen : Selection
    which : {"input", "predicted"}

    Returns
    -------
    ids : ndarray [tokens]
        Token ids that occur `OFTEN` times or more.
    share : ndarray [layers, tokens, experts]
    """
    ids = np.flatnonzero(seen.occurrences[which] >= OFTEN)
    return ids, seen.by_token[which][:, ids] / seen.occurrences[which][ids][:, None]


def summarize_specialization(seen: Selection) -> pd.DataFrame:
    """How far a rule's experts are specialized, layer by layer.

    Returns
    -------
    pandas.DataFrame
        A row per layer and measure: ``layer``, ``measure``, ``value``, ``low``, ``high`` (95 %, bootstrap over
        documents, where there is one), ``mean_k`` of the layer. Measures that can be compared between rules with
        different numbers of experts:

        - "domain: largest over mean": an expert's specialization in the domain that it is selected for most, over its
          mean over domains; mean of the experts. 1 if domains do not matter.
        - "co-activation: 95th percentile over chance": of all ordered pairs of experts, the co-activation over the
          share of all tokens that the second one has.
        - "input: explained" and "predicted: explained": the share of the entropy of which experts are selected, summed
          over experts as if they were independent, that the token id takes away. 0 if it does not matter.
    """
    by_domain = _by_domain(seen)
    peaks = (by_domain.max(axis=-1) / np.maximum(by_domain.mean(axis=-1), 1e-9)).mean(axis=-1)
    pairs, tokens = coactivation(seen), seen.load.mean(axis=0)
    apart = ~np.eye(tokens.shape[1], dtype=bool)
    rows = []
    for layer, mean_k in enumerate(seen.mean_k):
        low, high = seen.drawn.interval(peaks[:, layer])
        facts = {"layer": layer, "mean_k": mean_k}
        peak = {"value": peaks[0, layer], "low": low, "high": high}
        rows.append(facts | {"measure": "domain: largest over mean"} | peak)
        lift = (pairs[layer] / np.maximum(tokens[layer], 1e-9))[apart]
        measure = "co-activation: 95th percentile over chance"
        rows.append(facts | {"measure": measure, "value": np.quantile(lift, 0.95)})
        for which in seen.by_token:
            rows.append(facts | {"measure": f"{which}: explained", "value": _explained(seen, which, layer)})
    columns = ["layer", "measure", "value", "low", "high", "mean_k"]
    return pd.DataFrame(rows).reindex(columns=columns)


def _explained(seen: Selection, which: str, layer: int) -> float:
    """Share of the entropy of selections that the token id takes away."""
    ids, share = vocabulary_specialization(seen, which)
    if not len(ids):
        return np.nan
    weights = seen.occurrences[which][ids] / seen.occurrences[which][ids].sum()
    left = weights @ _binary_entropy(share[layer])
    whole = _binary_entropy(weights @ share[layer])
    return float(1 - left.sum() / max(whole.sum(), 1e-12))


def _binary_entropy(p: np.ndarray) -> np.ndarray:
    """In nats."""
    p = np.clip(p.astype(float), 1e-12, 1 - 1e-12)
    return -p * np.log(p) - (1 - p) * np.log(1 - p)
