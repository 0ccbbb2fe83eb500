"""What each expert adds to its layer, measured: by its output, and by what the model says without it.

    measured = measure_contributions(model, load_heldout("calibration"), max_tokens=2_000)
    (measured.r > 0.1).sum(-1)               # how many experts of a token matter, [layers, tokens]

    effects = one_changed(model, load_heldout("calibration"), num_tokens=100)
    effects.query("selected").groupby("rank")["kl"].mean()

A router's weight says how much of an expert's output is taken, not how large that output is, nor where it points. Here
every expert is computed, those too that the model does not select. `measure_contributions` compares each one's weighted
output with the output of the layer; `one_changed` leaves one expert out, or adds one, and recomputes the rest of the
network.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from bhlib.discovery import MoELayer
from bhlib.layer_passes import LayerPass, expert_output, scores_of, watch_layers, weights_of_all, whole_layers
from bhlib.pvalues import check_logits
from bhlib.text_pass import Batch, Piece, batches, check_texts, run_batch
from bhlib.weighting import find_weighting

#: Instead of the norm of a layer's output that is zero.
_SMALLEST_NORM = 1e-30


@dataclass(frozen=True)
class Contributions:
    """What every expert adds for every token of a text, layer by layer.

    Attributes
    ----------
    r : Tensor [layers, tokens, experts], float32
        Norm of weight times output, over the norm of the layer's output, which is the sum over the model's own top-k.
        (An expert that all tokens share is not in that sum.) The weight of an expert outside the top-k is the one that
        it would get if it were added to them: where weights are probabilities its own probability, where they are
        divided by their sum its share of a sum that it is part of.
    along : Tensor [layers, tokens, experts], float32
        The part of that along the layer's output, over its norm, with a sign: over the model's own top-k they sum to 1.
    norms : Tensor [layers, tokens, experts], float32
        Norm of each expert's output, not weighted.
    logits : Tensor [layers, tokens, experts], float32
        Of the router.
    selected : Tensor [layers, tokens, experts], bool
        The model's own top-k.
    domains : ndarray [tokens] of str
        Name of the text that each token is of.
    sequences, positions : ndarray [tokens], int64
        Number of its sequence in that text, and of the token in the sequence.
    documents : ndarray [tokens], int64
        Number of its document in that text: tokens of one document are not independent. All tensors are on the CPU.
    """

    r: Tensor
    along: Tensor
    norms: Tensor
    logits: Tensor
    selected: Tensor
    domains: np.ndarray
    sequences: np.ndarray
    positions: np.ndarray
    documents: np.ndarray

    @property
    def units(self) -> np.ndarray:
        """Number of each token's document among those of all texts, int64 [tokens]: the unit of an interval."""
        pairs = pd.MultiIndex.from_arrays([self.domains, self.documents])
        return pairs.factorize()[0]


def _measured(layer: MoELayer, seen: LayerPass) -> dict[str, Tensor]:
    """The tensors of `Contributions` for one layer, each [rows, experts]."""
    weights, output = weights_of_all(layer, seen), seen.output.float()
    norms, dots = torch.empty_like(weights), torch.empty_like(weights)
    if len(output) == 1:  # all experts in one call, which takes about as long as one expert's
        every = torch.arange(layer.num_experts, device=output.device)
        alone = expert_output(layer, seen.hidden.expand(len(every), -1), every)
        norms[0], dots[0] = alone.norm(dim=-1), (alone * output).sum(dim=-1)
    else:
        for expert in range(layer.num_experts):
            alone = expert_output(layer, seen.hidden, expert)
            norms[:, expert] = alone.norm(dim=-1)
            dots[:, expert] = (alone * output).sum(dim=-1)
    whole = output.norm(dim=-1, keepdim=True).clamp(min=_SMALLEST_NORM)
    return {
        "r": weights * norms / whole,
        "along": weights * (dots / whole) / whole,
        "norms": norms,
        "logits": seen.logits.float(),
        "selected": torch.zeros_like(weights, dtype=torch.bool).scatter(-1, seen.experts, True),
    }


@torch.no_grad()
def measure_contributions(
    model: nn.Module,
    token_ids: Tensor | Mapping[str, Tensor],
    *,
    documents: Mapping[str, Sequence | np.ndarray] | None = None,
    max_tokens: int | None = None,
    attention_mask: Tensor | Mapping[str, Tensor] | None = None,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> Contributions:
    """Compute all experts of a model for the tokens of a text, in one pass.

    Parameters
    ----------
    model, token_ids, attention_mask, batch_size, progress
        As for `bhlib.calibrate`.
    documents : mapping of str to array_like [sequences], optional
        The document of each sequence of each text (`bhlib.loading.heldout_sequence_documents`). By default each
        sequence is a document. A tensor without a name is called ``"token_ids"``.
    max_tokens : int, optional
        How many tokens to measure, drawn uniformly and without replacement. By default all. The result takes 17 bytes
        per token, layer and expert: 9 kB per token for the demo.
    seed : int
        Of the sample.

    Raises
    ------
    ValueError
        For ids, a mask or documents of the wrong shape, a model in training mode, logits that are not finite, a model
        whose experts are spread over processes.
    RuntimeError
        If the model is patched.
    """
    layers, texts = whole_layers(model), check_texts(token_ids, attention_mask)
    documents = _check_documents(documents, texts)
    wanted = _sample_tokens(texts, max_tokens, seed)
    parts: list[list[dict[str, Tensor]]] = [[] for _ in layers]
    rows = torch.empty(0, dtype=torch.int64, device="cpu")

    def take(layer: MoELayer, seen: LayerPass) -> None:
        seen = seen.at(rows)
        check_logits(seen.logits)
        parts[layer.index].append({name: part.cpu() for name, part in _measured(layer, seen).items()})

    places = []
    with (
        tqdm(total=sum(len(text.ids) for text in texts), unit="seq", desc="experts", disable=not progress) as bar,
        watch_layers(layers, take),
    ):
        for batch in batches(texts, batch_size):
            part = wanted[batch.name][batch.first : batch.first + len(batch.ids)]
            rows = part.flatten().nonzero().flatten()
            if len(rows):
                run_batch(model, batch)
                sequences, positions = (number.numpy() for number in part.nonzero(as_tuple=True))
                places.append((batch.name, sequences + batch.first, positions))
            bar.update(len(batch.ids))
    tensors = {
        name: torch.stack([torch.cat([part[name] for part in of_layer]) for of_layer in parts]) for name in parts[0][0]
    }
    return Contributions(
        **tensors,
        domains=np.concatenate([np.full(len(positions), name) for name, _, positions in places]),
        sequences=np.concatenate([sequences for _, sequences, _ in places]),
        positions=np.concatenate([positions for _, _, positions in places]),
        documents=np.concatenate([documents[name][sequences] for name, sequences, _ in places]),
    )


@torch.no_grad()
def measure_token(model: nn.Module, token_ids: Tensor, position: int = -1) -> Contributions:
    """Compute all experts of a model for one token of a text: what `measure_contributions` says of that token.

    The model runs once, over the text up to the token.

    Parameters
    ----------
    model : nn.Module
        As for `bhlib.calibrate`, and causal: what comes after the token is not read.
    token_ids : Tensor [1, length], int64
    position : int
        The token's place in it, from 0, or from the end if negative.

    Returns
    -------
    Contributions
        Of one token.

    Raises
    ------
    ValueError, RuntimeError
        As `measure_contributions`; for several sequences, or a position that is not there.
    """
    layers, (text,) = whole_layers(model), check_texts(token_ids, None)
    count, length = text.ids.shape
    if count != 1 or not -length <= position < length:
        raise ValueError(
            f"position is {position} in token_ids of shape {tuple(text.ids.shape)}, but must lie in "
            f"{-length}..{length - 1}, in one sequence: token_ids[number : number + 1]"
        )
    position %= length
    parts: list[dict[str, Tensor]] = []

    def take(layer: MoELayer, seen: LayerPass) -> None:
        last = seen.at(torch.tensor([position], device="cpu"))
        check_logits(last.logits)
        parts.append({name: part.cpu() for name, part in _measured(layer, last).items()})

    with watch_layers(layers, take):
        run_batch(model, Batch(text.name, 0, text.ids[:, : position + 1], None))
    return Contributions(
        **{name: torch.stack([part[name] for part in parts]) for name in parts[0]},
        domains=np.array([text.name]),
        sequences=np.array([0]),
        positions=np.array([position]),
        documents=np.array([0]),
    )


def _check_documents(
    documents: Mapping[str, Sequence | np.ndarray] | None, texts: Sequence[Piece]
) -> dict[str, np.ndarray]:
    """The document of each sequence, int64 [sequences] by text; by default its own."""
    found = {}
    for text in texts:
        numbers = np.arange(len(text.ids)) if documents is None else np.asarray(documents.get(text.name, ()))
        if numbers.shape != (len(text.ids),):
            raise ValueError(
                f"documents[{text.name!r}] has shape {numbers.shape}, but there are {len(text.ids)} sequences: give "
                "the number of a document for each"
            )
        found[text.name] = numbers.astype(np.int64)
    return found


def _sample_tokens(texts: Sequence[Piece], max_tokens: int | None, seed: int) -> dict[str, Tensor]:
    """Which tokens to measure, bool [sequences, length] by text: all that are no padding, or a sample of them."""
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}, but must be 1 or more; None measures all tokens")
    real = [torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool() for _, ids, mask in texts]
    flat = torch.cat([mask.flatten() for mask in real]).cpu()
    candidates = flat.nonzero().flatten().numpy()
    if max_tokens is not None and max_tokens < len(candidates):
        drawn = np.random.default_rng(seed).choice(candidates, max_tokens, replace=False)
        flat = torch.zeros_like(flat)
        flat[torch.from_numpy(drawn)] = True
    chosen = flat.split([mask.numel() for mask in real])
    return {text.name: part.view(text.ids.shape) for text, part in zip(texts, chosen, strict=True)}


# -- one expert more, or one fewer ---------------------------------------------------------------------------------


class _Change(NamedTuple):
    """One expert of a token, in one layer, that is left out if it was selected, and else added."""

    layer: int
    position: int
    expert: int
    rank: int
    selected: bool
    row: Tensor  # [hidden], the output of the layer for the token then


@torch.no_grad()
def one_changed(
    model: nn.Module,
    token_ids: Tensor | Mapping[str, Tensor],
    *,
    num_tokens: int = 100,
    ranks: int | None = None,
    documents: Mapping[str, Sequence | np.ndarray] | None = None,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """What the model says when one expert of one token, in one layer, is left out or added alone.

    Pairs of a token and a layer are drawn at random. For each, its best experts are changed one at a time, in one layer
    and for one token only, and the network after it is recomputed. What is left gets the weights that the model's own
    convention gives it.

    Parameters
    ----------
    model, token_ids, documents, seed, progress
        As for `measure_contributions`; a causal language model, sequences of two tokens or more without padding.
    num_tokens : int
        Pairs of a token and a layer, drawn uniformly and without replacement from those with a next token to predict.
    ranks : int, optional
        How many experts of each, by the router's score: up to the model's own top-k they are left out, beyond added. By
        default these k.
    batch_size : int
        Copies of a sequence per forward pass, of which one stays as it is. A change costs one sequence, so
        ``num_tokens * ranks`` are computed: take short ones.

    Returns
    -------
    pandas.DataFrame
        A row per change. ``domain``, ``sequence``, ``document``, ``position``, ``layer``, ``rank`` (1 is the best),
        ``expert``, ``selected`` (by the model itself; the expert was left out, else added); ``kl``, KL(unchanged ||
        changed) of the prediction of the next token, and ``loss_change`` of it, nats; ``kl_after`` and
        ``loss_change_after``, the sums of these over all later predictions of the sequence.

    Raises
    ------
    ValueError, RuntimeError
        As `measure_contributions`; for `num_tokens`, `ranks` or `batch_size` that are not possible.
    """
    layers, texts = whole_layers(model), check_texts(token_ids, None)
    documents = _check_documents(documents, texts)
    ranks = layers[0].top_k if ranks is None else ranks
    if not 1 <= ranks <= layers[0].num_experts:
        raise ValueError(f"ranks is {ranks}, but must lie in 1..{layers[0].num_experts}, the number of experts")
    if batch_size < 2:
        raise ValueError(f"batch_size is {batch_size}, but must be 2 or more: one copy stays unchanged")
    tables, by_name = [], {text.name: text.ids for text in texts}
    drawn = _sample_places(texts, len(layers), num_tokens, seed)
    with tqdm(total=num_tokens * ranks, unit="change", desc="one changed", disable=not progress) as bar:
        for (name, sequence), places in drawn:
            ids = by_name[name][sequence]
            changes = _changes(model, layers, ids, places, ranks)
            table = pd.DataFrame([change._asdict() for change in changes]).drop(columns="row")
            table = table.assign(domain=name, sequence=sequence, document=documents[name][sequence])
            effects = []
            for first in range(0, len(changes), batch_size - 1):
                part = changes[first : first + batch_size - 1]
                effects += _effects(_changed_logits(model, layers, ids, part), ids, part)
                bar.update(len(part))
            tables.append(pd.concat([table, pd.DataFrame(effects)], axis=1))
    order = ["domain", "sequence", "document", "position", "layer", "rank", "expert", "selected"]
    return pd.concat(tables, ignore_index=True)[[*order, "kl", "loss_change", "kl_after", "loss_change_after"]]


def _sample_places(
    texts: Sequence[Piece], num_layers: int, num_tokens: int, seed: int
) -> list[tuple[tuple[str, int], list[tuple[int, int]]]]:
    """By (text, sequence): the (position, layer) to change."""
    short = [text.name for text in texts if text.ids.shape[1] < 2]
    if short:
        raise ValueError(f"the sequences of {short[0]} have one token: a prediction needs two or more")
    shapes = [(len(text.ids), text.ids.shape[1] - 1, num_layers) for text in texts]
    sizes = [int(np.prod(shape)) for shape in shapes]
    if not 1 <= num_tokens <= sum(sizes):
        raise ValueError(f"num_tokens is {num_tokens}, but must lie in 1..{sum(sizes)}, the pairs of a token and layer")
    numbers = np.sort(np.random.default_rng(seed).choice(sum(sizes), num_tokens, replace=False))
    starts = np.cumsum([0, *sizes])
    places: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for number in numbers:
        text = int(np.searchsorted(starts, number, side="right")) - 1
        sequence, position, layer = (int(i) for i in np.unravel_index(number - starts[text], shapes[text]))
        places.setdefault((texts[text].name, sequence), []).append((position, layer))
    return list(places.items())


def _changes(
    model: nn.Module, layers: Sequence[MoELayer], ids: Tensor, places: list[tuple[int, int]], ranks: int
) -> list[_Change]:
    """The changes at some places of a sequence, with what the layer gives then."""
    changes: list[_Change] = []

    def take(layer: MoELayer, seen: LayerPass) -> None:
        for position in [position for position, number in places if number == layer.index]:
            here = seen.at(torch.tensor([position], device="cpu"))
            own, ranking = here.experts[0].tolist(), scores_of(layer, here)[0].argsort(descending=True).tolist()
            best = [*own, *(expert for expert in ranking if expert not in own)]
            for rank, expert in enumerate(best[:ranks], start=1):
                kept = [e for e in own if e != expert] if expert in own else [*own, expert]
                row = _layer_output(layer, here, kept)
                changes.append(_Change(layer.index, position, expert, rank, expert in own, row))

    with watch_layers(layers, take):
        run_batch(model, next(batches([Piece("", ids[None], None)], 1)))
    return changes


def _layer_output(layer: MoELayer, seen: LayerPass, experts: list[int]) -> Tensor:
    """What a layer gives for one token [hidden] that selects these experts."""
    if not experts:
        return torch.zeros_like(seen.output[0])
    index = torch.tensor([experts], device=seen.experts.device)
    scores = scores_of(layer, seen).gather(-1, index)
    weights = find_weighting(layer.weighting).weights(scores, torch.ones_like(scores, dtype=torch.bool))
    return layer.experts.forward(seen.hidden, index, weights.to(seen.weights.dtype))[0]


def _changed_logits(model: nn.Module, layers: Sequence[MoELayer], ids: Tensor, changes: Sequence[_Change]) -> Tensor:
    """Logits [1 + changes, length, vocabulary] of copies of a sequence, the first unchanged."""

    def put(layer: MoELayer, seen: LayerPass) -> Tensor | None:
        output = seen.output.clone()
        for copy, change in enumerate(changes, start=1):
            if change.layer == layer.index:
                output[copy * len(ids) + change.position] = change.row
        return output

    with watch_layers([layers[number] for number in {change.layer for change in changes}], put):
        copies = ids.to(next(model.parameters()).device).expand(1 + len(changes), -1)
        return model(input_ids=copies, use_cache=False).logits


def _effects(logits: Tensor, ids: Tensor, changes: Sequence[_Change]) -> list[dict[str, float]]:
    """What each change does to the predictions from its token on."""
    own, effects = logits[0].float().log_softmax(dim=-1), []
    targets = ids[1:].to(logits.device)
    for changed, change in zip(logits[1:], changes, strict=True):
        rest = slice(change.position, None)
        before, after = own[rest], changed[rest].float().log_softmax(dim=-1)
        kl = (before.exp() * (before - after)).sum(dim=-1)
        loss = (before - after)[:-1].gather(-1, targets[rest, None]).squeeze(-1)
        effects.append(
            {
                "kl": kl[0].item(),
                "loss_change": loss[0].item(),
                "kl_after": kl[1:].sum().item(),
                "loss_change_after": loss[1:].sum().item(),
            }
        )
    return effects
