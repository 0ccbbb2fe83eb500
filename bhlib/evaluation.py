"""Quality and cost of a routed model: loss, accuracy, experts per token, load, time; sweeps over rules.

Everything comes as one tidy table with a row per rule and sequence, so that intervals can be drawn from it
(`bhlib.comparisons`): two rules on the same sequences, or a rule against static top-k at the same cost.

    rules = {f"top-{k}": TopK(k) for k in range(1, 9)} | {"BH 0.05": BH(0.05), "top-p 0.4": TopP(0.4)}
    frame = sweep(model, rules, load_heldout("validation"), cache="sweeps")
    matched_compute(frame)
"""

import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from tqdm.auto import tqdm

from bhlib.cells import cell_path, open_folder, read_cell, sweep_key, write_cell

# What is made of the tables below is reached from here too.
from bhlib.comparisons import matched_compute, paired_difference, summarize  # noqa: F401
from bhlib.discovery import find_moe_layers, input_device
from bhlib.patching import RoutingPatch
from bhlib.records import Records
from bhlib.rules import Rule, TopK

#: What `evaluate` and `sweep` hand on to `RoutingPatch`.
PATCH_OPTIONS = ("temperature", "weights", "kernels", "compensation", "norms")

# -- one rule --------------------------------------------------------------------------------------------------


@torch.no_grad()
def score_tokens(model: nn.Module, sequences: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of every token but the first of each sequence, and whether it was the model's best guess.

    Parameters
    ----------
    model : nn.Module
        A causal language model, patched or not.
    sequences : Tensor [sequences, length], int64
        Token ids, no padding.

    Returns
    -------
    loss : Tensor [sequences, length - 1], float32
        Cross-entropy in nats.
    correct : Tensor [sequences, length - 1], bool
    """
    return _score(_next_token_logits(model, sequences), sequences)


def _next_token_logits(model: nn.Module, sequences: Tensor) -> Tensor:
    """Logits [sequences, length - 1, vocabulary], float32, that predict all tokens but the first."""
    return model(input_ids=sequences, use_cache=False).logits[:, :-1].float()


def _score(logits: Tensor, sequences: Tensor) -> tuple[Tensor, Tensor]:
    targets = sequences[:, 1:]
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return loss.view_as(targets), logits.argmax(dim=-1) == targets


def _agreement(logits: Tensor, reference: Tensor) -> dict[str, float]:
    """How near one sequence's logits [tokens, vocabulary] are to those of the unpatched model."""
    own = torch.log_softmax(reference, dim=-1)
    divergence = (own.exp() * (own - torch.log_softmax(logits, dim=-1))).sum(dim=-1)
    same = logits.argmax(dim=-1) == reference.argmax(dim=-1)
    return {"kl": divergence.mean().item(), "top1_agreement": same.float().mean().item()}


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: Mapping[str, Tensor],
    rule: Rule | None = None,
    *,
    batch_size: int = 8,
    agreement: bool = False,
    progress: tqdm | None = None,
    **patch_options,
) -> pd.DataFrame:
    """Evaluate a model under a rule.

    Parameters
    ----------
    model : nn.Module
        Unpatched model.
    data : mapping of str to Tensor [sequences, length]
        Token ids by domain (`bhlib.load_heldout`).
    rule : Rule or None
        None for the model's own routing.
    batch_size : int
        Sequences per forward pass.
    agreement : bool
        Compare with the unpatched model, which costs a second forward pass of each batch.
    progress : tqdm, optional
        Bar to advance by the number of sequences done.
    **patch_options
        For `RoutingPatch`: temperature, weights, kernels, compensation, norms.

    Returns
    -------
    pandas.DataFrame
        One row per sequence: ``domain``, ``sequence`` (number in its domain), ``tokens`` (with a loss), ``loss``
        (mean, nats per token; its exponential is the perplexity), ``accuracy`` (of the next token), ``mean_k``
        (experts per token and layer), ``cost`` (arithmetic per token and layer, in experts: those, and what stands in
        for others, see below), ``rows`` (pairs of a token and an expert, all layers together), ``load_entropy`` (how
        evenly they fall on the experts, see below) and ``seconds``. With `agreement` also ``kl`` (divergence of the
        patched model's next-token distribution from the unpatched one's, KL(unpatched || patched), nats per token) and
        ``top1_agreement`` (share of tokens for which both have the same best guess).

    Raises
    ------
    TypeError
        If an option is none of these five.

    Notes
    -----
    The rule is put into the model once: one that goes from pass to pass, as `Replay` does, sees the batches in order.

    ``cost`` is ``mean_k`` where nothing stands in for dropped experts. A compensation adds its own arithmetic
    (`bhlib.compensation.Compensation.cost`), and so do norms that a rule looks at. Counted are products; the router,
    which every rule needs, is not.

    ``rows`` is read from the records: the pairs that were selected. They are the rows that the experts' matrices
    multiply, since no others are handed to the experts (`bhlib.experts`); the tests count them in the products.

    ``load_entropy`` is the entropy of the distribution of a layer's pairs over its experts, divided by the log of the
    number of experts (1 if even, 0 if one expert does everything), averaged over layers. It is that of one sequence:
    a longer text, or one of several domains, spreads its load more evenly.

    ``seconds`` is wall time, a sequence's share of its batch's forward pass with the recording in it, for the model's
    own routing too. It is the one column that differs from run to run, and says nothing while the machine does
    something else; the first batch may be slow.
    """
    _check_options(patch_options)
    with _patched(model, rule, patch_options) as patch:
        return evaluate_patched(patch, data, batch_size, agreement, progress)


def _patched(model: nn.Module, rule: Rule | None, options: Mapping[str, Any]) -> RoutingPatch:
    """A patch that records what `evaluate` reads."""
    if rule is None:  # the model routes itself, and a rule that would do the same records it
        rule, options = TopK(find_moe_layers(model)[0].top_k), {"mode": "analyze"}
    return RoutingPatch(model, rule, max_recorded_tokens=None, **options)


@torch.no_grad()
def evaluate_patched(
    patch: RoutingPatch, data: Mapping[str, Tensor], batch_size: int, agreement: bool, progress: tqdm | None
) -> pd.DataFrame:
    """`evaluate` under the rule of a patch that is in place, and that keeps all its rows.

    Parameters
    ----------
    patch : RoutingPatch
        In place, made with ``max_recorded_tokens=None``; what it has recorded before is forgotten.
    data, batch_size, agreement
        As for `evaluate`, and so is the table that is returned.
    progress : tqdm or None
        Moved on by every sequence.
    """
    device, rows = input_device(patch.model), []
    for domain, sequences in data.items():
        for start in range(0, len(sequences), batch_size):
            batch = sequences[start : start + batch_size].to(device)
            patch.reset_stats()
            started = _now(device)
            logits = _next_token_logits(patch.model, batch)
            seconds = _now(device) - started
            load = _expert_load(patch.records, len(batch))
            reference = _unpatched_logits(patch, batch) if agreement and patch.mode == "patch" else logits
            rows += [
                {"domain": domain, "sequence": start + i}
                | row
                | {"seconds": seconds / len(batch)}
                | (_agreement(logits[i], reference[i]) if agreement else {})
                for i, row in enumerate(_measure(patch, logits, batch, load))
            ]
            if progress is not None:
                progress.update(len(batch))
    return pd.DataFrame(rows)


def _check_options(options: Mapping[str, object]) -> None:
    """Raise a TypeError for an option that is not for whoever calls `evaluate`."""
    for name in options:
        if name not in PATCH_OPTIONS:
            raise TypeError(
                f"evaluate() and sweep() take no {name!r}: they record every token of one batch after the other, and "
                f"hand on to RoutingPatch only {', '.join(PATCH_OPTIONS)}. Leave {name!r} out."
            )


def _unpatched_logits(patch: RoutingPatch, batch: Tensor) -> Tensor:
    """What the model gives by itself; the rule goes on afterwards where it was."""
    patch.unpatch_model()
    logits = _next_token_logits(patch.model, batch)
    patch.patch_model(rewind=False)
    return logits


def _measure(patch: RoutingPatch, logits: Tensor, batch: Tensor, load: Tensor) -> list[dict[str, float]]:
    """What there is to say of each sequence of a batch, from its logits and its load [sequences, layers, experts]."""
    loss, correct = _score(logits, batch)
    pairs, entropy = load.sum(dim=(1, 2)), _load_entropy(load)
    mean_ks = [one / (batch.shape[1] * load.shape[1]) for one in pairs.tolist()]
    return [
        {
            "tokens": loss.shape[1],
            "loss": loss[i].mean().item(),
            "accuracy": correct[i].float().mean().item(),
            "mean_k": mean_ks[i],
            "cost": counted_cost(patch, mean_ks[i]),
            "rows": pairs[i].item(),
            "load_entropy": entropy[i].item(),
        }
        for i in range(len(batch))
    ]


def counted_cost(patch: RoutingPatch, mean_k: float) -> float:
    """Arithmetic of a token and layer in experts, if so many are computed on average and others stood in for."""
    if patch.mode == "analyze":
        return mean_k
    layer, cost = patch.layers[0], mean_k
    if patch.compensation is not None:
        cost += patch.compensation.cost(mean_k, layer.top_k, layer.intermediate_size)
    norms = getattr(patch, "norms", None)
    if norms is not None:
        cost += norms.cost(layer.router.weight.shape[-1], layer.intermediate_size)
    return cost


def _now(device: torch.device) -> float:
    """Seconds on a clock, all work on the device done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _expert_load(records: Records, num_sequences: int) -> Tensor:
    """How many tokens used an expert: int64 [sequences, layers, experts], of one recorded pass without padding."""
    (only,) = records.passes
    shape = num_sequences, records.num_layers, records.num_experts + 1
    load = torch.zeros(shape, dtype=torch.int64, device="cpu")
    for layer, routing in only.routings.items():
        slots = routing.experts.cpu().long().view(num_sequences, -1)
        slots = slots.masked_fill(slots < 0, records.num_experts)  # one column more for the empty ones
        load[:, layer].scatter_add_(1, slots, torch.ones_like(slots))
    return load[..., : records.num_experts]


def _load_entropy(load: Tensor) -> Tensor:
    """Entropy relative to uniform, mean of the layers: float64 [sequences]; layers without load are left out."""
    share = load.double() / load.sum(dim=-1, keepdim=True)
    return (torch.special.entr(share).sum(dim=-1) / np.log(load.shape[-1])).nanmean(dim=-1)


# -- many rules ------------------------------------------------------------------------------------------------


def sweep(
    model: nn.Module,
    rules: Mapping[str, Rule | None],
    data: Mapping[str, Tensor],
    *,
    cache: str | Path | None = None,
    batch_size: int = 8,
    agreement: bool = False,
    **patch_options,
) -> pd.DataFrame:
    """`evaluate` under several rules: one tidy table, and a progress bar.

    Parameters
    ----------
    model, data, batch_size, agreement, **patch_options
        As for `evaluate`.
    rules : mapping of str to Rule or None
        What to measure, by the name that it gets in the table; None is the model's own routing.
    cache : path, optional
        Folder of finished cells, one CSV per rule. A cell that is there is read instead of computed, so that a sweep
        that was stopped goes on where it was. A cell's file is named after its rule, with a hash of what its
        numbers depend on, bhlib's code included (`bhlib.cells`); one that was damaged is computed again, with a
        warning that names it. Rules and p-values of your own are not stored: sweep them without a cache.

    Returns
    -------
    pandas.DataFrame
        The columns of `evaluate` after ``rule``, and ``error`` at the end. A rule that raised an exception has one
        row, with the exception in ``error`` and no numbers; it is not stored, and is tried again next time. For all
        other rows ``error`` is empty.

    Raises
    ------
    TypeError
        As `evaluate`.
    ValueError
        If there is a `cache`, and a rule or its p-values are not bhlib's, or a `Replay`.
    RuntimeError
        If there is a `cache`, and bhlib's files have changed after they were imported.
    OSError
        If the folder `cache` cannot be made or written to, or a cell not be read.

    Notes
    -----
    Started by ``accelerate launch`` (on CPUs by ``torchrun``), the processes share the rules among them, each on the
    model that it was given, and all get the whole table: the same as one process makes but for ``seconds``, since a
    rule is never split.
    Rules of one kind and with the same bounds that follow each other, such as the levels of one family, are put into
    the model one after the other without it being restored in between, so that a compiled model is compiled once.
    Machines without a common `cache` folder work too, but after a stop only the first one's cells are found.
    """
    _check_options(patch_options)
    state = PartialState(cpu=not torch.cuda.is_available())
    paths = {}
    if cache is not None:
        open_folder(cache)
        key = sweep_key(model, data, {"agreement": agreement} | patch_options)
        paths = {name: cell_path(cache, name, rule, key) for name, rule in rules.items()}
    # One process looks what is finished, so that all divide the same rest.
    parts = {}
    if state.is_main_process:
        found = {name: read_cell(path) for name, path in paths.items() if path.exists()}
        parts = {name: part.assign(error="") for name, part in found.items() if part is not None}
    rest = broadcast_object_list([[name for name in rules if name not in parts]])[0]
    mine = rest[state.process_index :: state.num_processes]

    per_cell = sum(len(sequences) for sequences in data.values())
    with (
        tqdm(total=len(mine) * per_cell, unit="seq", desc="sweep", disable=not state.is_main_process) as bar,
        ExitStack() as in_place,
    ):
        patch = None
        for done, name in enumerate(mine, start=1):
            bar.set_postfix_str(name)
            rule = rules[name]
            try:
                if patch is not None and rule is not None and _follows(rule, patch):
                    patch.rule = rule
                else:
                    in_place.close()
                    patch = in_place.enter_context(_patched(model, rule, patch_options))
                part = evaluate_patched(patch, data, batch_size, agreement, bar)
            except Exception as error:
                in_place.close()
                patch = None
                parts[name] = pd.DataFrame([{"error": f"{type(error).__name__}: {error}"}])
                bar.update(done * per_cell - bar.n)
            else:
                if paths:
                    write_cell(part, paths[name])
                parts[name] = part.assign(error="")
    parts = dict(gather_object(list(parts.items())))
    frame = pd.concat([parts[name].assign(rule=name) for name in rules], ignore_index=True)
    return frame[["rule", *frame.columns.drop(["rule", "error"]), "error"]]


def _follows(rule: Rule, patch: RoutingPatch) -> bool:
    """Whether a patch that is in place can go on with another rule: of the same kind, as the next level of a sweep is.

    Compiled code then stays compiled.
    """
    last = patch.rule
    return patch.mode == "patch" and (type(rule), rule.min_k, rule.max_k) == (type(last), last.min_k, last.max_k)
