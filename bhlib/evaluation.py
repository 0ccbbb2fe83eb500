"""Quality and cost of a routed model: loss, accuracy, experts per token, load, time; sweeps over rules.

Everything comes as one tidy table with a row per rule and sequence, so that intervals can be drawn from it
(`bhlib.comparisons`): two rules on the same sequences, or a rule against static top-k at the same cost.

    rules = {f"top-{k}": TopK(k) for k in range(1, 9)} | {"BH 0.05": BH(0.05), "top-p 0.4": TopP(0.4)}
    frame = sweep(model, rules, load_heldout("validation"), cache="sweeps")
    matched_compute(frame)
"""

import hashlib
import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from tqdm.auto import tqdm

# What is made of the tables below is reached from here too.
from bhlib.comparisons import bootstrap_mean, matched_compute, paired_difference, summarize  # noqa: F401
from bhlib.patching import RoutingPatch, find_moe_layers
from bhlib.records import Records
from bhlib.rules import Rule, TopK

#: Version of the stored cells: part of their names, to be raised when what a cell means changes.
CELL_FORMAT = 2

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
        For `RoutingPatch`: temperature, weights.

    Returns
    -------
    pandas.DataFrame
        One row per sequence: ``domain``, ``sequence`` (number in its domain), ``tokens`` (with a loss), ``loss``
        (mean, nats per token; its exponential is the perplexity), ``accuracy`` (of the next token), ``mean_k``
        (experts per token and layer), ``rows`` (pairs of a token and an expert, all layers together), ``load_entropy``
        (how evenly they fall on the experts, see below) and ``seconds``. With `agreement` also ``kl`` (divergence of
        the patched model's next-token distribution from the unpatched one's, KL(unpatched || patched), nats per token)
        and ``top1_agreement`` (share of tokens for which both have the same best guess).

    Notes
    -----
    ``rows`` is read from the records: the pairs that were selected. They are the rows that the experts' matrices
    multiply, since no others are handed to the experts (`bhlib.experts`); the tests count them in the products.

    ``load_entropy`` is the entropy of the distribution of a layer's pairs over its experts, divided by the log of the
    number of experts (1 if even, 0 if one expert does everything), averaged over layers. It is that of one sequence:
    a longer text, or one of several domains, spreads its load more evenly.

    ``seconds`` is wall time, a sequence's share of its batch's forward pass with the recording in it, for the model's
    own routing too. It is the one column that differs from run to run, and says nothing while the machine does
    something else; the first batch may be slow.
    """
    device = next(model.parameters()).device
    watched, options = rule, patch_options
    if rule is None:  # the model routes itself, and a rule that would do the same records it
        watched, options = TopK(find_moe_layers(model)[0].top_k), {"mode": "analyze"}
    rows = []
    for domain, sequences in data.items():
        for start in range(0, len(sequences), batch_size):
            batch = sequences[start : start + batch_size].to(device)
            with RoutingPatch(model, watched, max_recorded_tokens=None, **options) as patch:
                started = _now(device)
                logits = _next_token_logits(model, batch)
                seconds = _now(device) - started
            load = _expert_load(patch.records, len(batch))
            pairs, entropy = load.sum(dim=(1, 2)), _load_entropy(load)
            reference = logits if rule is None or not agreement else _next_token_logits(model, batch)
            loss, correct = _score(logits, batch)
            rows += [
                {
                    "domain": domain,
                    "sequence": start + i,
                    "tokens": loss.shape[1],
                    "loss": loss[i].mean().item(),
                    "accuracy": correct[i].float().mean().item(),
                    "mean_k": pairs[i].item() / (batch.shape[1] * load.shape[1]),
                    "rows": pairs[i].item(),
                    "load_entropy": entropy[i].item(),
                    "seconds": seconds / len(batch),
                }
                | (_agreement(logits[i], reference[i]) if agreement else {})
                for i in range(len(batch))
            ]
            if progress is not None:
                progress.update(len(batch))
    return pd.DataFrame(rows)


def _now(device: torch.device) -> float:
    """Seconds on a clock, all work on the device done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _expert_load(records: Records, num_sequences: int) -> Tensor:
    """How many tokens used an expert: int64 [sequences, layers, experts], of one recorded pass without padding."""
    (only,) = records.passes
    load = torch.zeros(num_sequences, records.num_layers, records.num_experts + 1, dtype=torch.int64)
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
        that was stopped goes on where it was. A cell's file is named after its rule, with a hash of everything that
        its numbers depend on (`cell_path`).

    Returns
    -------
    pandas.DataFrame
        The columns of `evaluate` behind ``rule``, and ``error`` at the end. A rule that raised an exception has one
        row, with the exception in ``error`` and no numbers; it is not stored, and is tried again next time. For all
        other rows ``error`` is empty.

    Notes
    -----
    Started by ``accelerate launch`` (on CPUs by ``torchrun``), the processes share the rules among them, each on the
    model that it was given, and all get the whole table: the same as one process makes but for ``seconds``, since a
    rule is never split.
    Machines without a common `cache` folder work too, but after a stop only the first one's cells are found.
    """
    state = PartialState(cpu=not torch.cuda.is_available())
    paths = {}
    if cache is not None:
        options = {"agreement": agreement} | patch_options
        key = _data_fingerprint(data) + _model_fingerprint(model) + repr(sorted(options.items()))
        paths = {name: cell_path(cache, name, rule, key) for name, rule in rules.items()}
    # One process looks what is finished, so that all divide the same rest.
    parts = {}
    if state.is_main_process:
        parts = {name: _read_cell(path) for name, path in paths.items() if path.exists()}
    rest = broadcast_object_list([[name for name in rules if name not in parts]])[0]
    mine = rest[state.process_index :: state.num_processes]

    per_cell = sum(len(sequences) for sequences in data.values())
    with tqdm(total=len(mine) * per_cell, unit="seq", desc="sweep", disable=not state.is_main_process) as bar:
        for done, name in enumerate(mine, start=1):
            bar.set_postfix_str(name)
            try:
                part = evaluate(
                    model, data, rules[name], batch_size=batch_size, agreement=agreement, progress=bar, **patch_options
                )
            except Exception as error:
                parts[name] = pd.DataFrame([{"error": f"{type(error).__name__}: {error}"}])
                bar.update(done * per_cell - bar.n)
            else:
                if paths:
                    _write_cell(part, paths[name])
                parts[name] = part.assign(error="")
    parts = dict(gather_object(list(parts.items())))
    frame = pd.concat([parts[name].assign(rule=name) for name in rules], ignore_index=True)
    return frame[["rule", *frame.columns.drop(["rule", "error"]), "error"]]


def cell_path(folder: str | Path, name: str, rule: Rule | None, key: str) -> Path:
    """The file of one cell of a sweep: the rule's name, and a hash of what its numbers depend on.

    Parameters
    ----------
    folder : path
    name : str
        What the rule is called; only for people who look into the folder.
    rule : Rule or None
        Told apart by its ``repr``, and by the tables of a fitted null.
    key : str
        The rest: data, model and options.

    Raises
    ------
    ValueError
        If the rule holds something that its ``repr`` leaves out, as `Replay` does.
    """
    hidden = [part.name for part in fields(rule) if part.init and not part.repr] if is_dataclass(rule) else []
    if hidden:
        raise ValueError(
            f"the rule {name!r} cannot be stored, since its repr does not tell {', '.join(hidden)}: "
            f"evaluate it without a cache, sweep(..., cache=None)."
        )
    digest = hashlib.sha256(f"{CELL_FORMAT} {rule!r} {key}".encode())
    for part, tensor in sorted(getattr(getattr(rule, "pvalues", None), "tensors", {}).items()):
        digest.update(part.encode() + _bytes(tensor))
    return Path(folder) / f"{re.sub(r'[^A-Za-z0-9.]+', '-', name).strip('-')}-{digest.hexdigest()[:16]}.csv"


#: Columns of whole numbers.
_COUNTS = ("sequence", "tokens", "rows")


def _write_cell(part: pd.DataFrame, path: Path) -> None:
    """All of the file or none of it, whenever the process is stopped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    part.to_csv(unfinished, index=False, na_rep="nan", lineterminator="\n")
    unfinished.replace(path)


def _read_cell(path: Path) -> pd.DataFrame:
    """What was written, to the bit: numpy reads back exactly what pandas prints, `read_csv` not in all versions."""
    part = pd.read_csv(path, dtype=str, keep_default_na=False)
    for column in part.columns.drop("domain"):
        part[column] = np.array(part[column], dtype="int64" if column in _COUNTS else "float64")
    return part.assign(error="")


def _bytes(tensor: Tensor) -> bytes:
    """Type, shape and contents."""
    tensor = tensor.detach().cpu().contiguous()
    return f"{tensor.dtype}{tuple(tensor.shape)}".encode() + tensor.view(-1).view(torch.uint8).numpy().tobytes()


def _data_fingerprint(data: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for domain, sequences in data.items():
        digest.update(domain.encode() + _bytes(sequences))
    return digest.hexdigest()


def _model_fingerprint(model: nn.Module, sample: int = 4096) -> str:
    """Hash of the configuration, and of up to `sample` evenly spaced numbers of each parameter.

    A sample, since all of a 7-billion-parameter model would take minutes; any training changes it.
    """
    config = {key: value for key, value in model.config.to_dict().items() if key not in _NOT_THE_MODEL}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        digest.update(f"{name}{tuple(parameter.shape)}".encode() + _bytes(flat[:: max(1, len(flat) // sample)]))
    return digest.hexdigest()


#: Entries of a configuration that say where a model comes from, not what it is.
_NOT_THE_MODEL = ("_name_or_path", "transformers_version")
