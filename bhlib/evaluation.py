"""Quality and cost of a routed model: loss per token, accuracy, experts per token; sweeps over rules.

Everything comes as one tidy table with a row per rule and sequence, so that intervals can be drawn from it: sequences
are the independent units, and two rules are compared on the same ones (`paired_difference`), or a rule with static
top-k at the same cost (`matched_compute`).

    rules = {f"top-{k}": TopK(k) for k in range(1, 9)} | {"BH 0.05": BH(0.05), "top-p 0.4": TopP(0.4)}
    frame = sweep(model, rules, load_heldout("validation"), cache="sweeps")
    matched_compute(frame)
"""

import hashlib
import json
import os
import re
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

from bhlib.patching import RoutingPatch, find_moe_layers
from bhlib.rules import Rule, StaticPerLayer, router_scores

#: Version of the stored cells: part of their names, to be raised when what a cell means changes.
CELL_FORMAT = 1

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
        (experts per token and layer). With `agreement` also ``kl`` (divergence of the patched model's next-token
        distribution from the unpatched one's, KL(unpatched || patched), nats per token) and ``top1_agreement``
        (share of tokens for which both have the same best guess).
    """
    model_device = next(model.parameters()).device
    rows = []
    for domain, sequences in data.items():
        for start in range(0, len(sequences), batch_size):
            batch = sequences[start : start + batch_size].to(model_device)
            if rule is None:
                logits = _next_token_logits(model, batch)
                mean_k = torch.full((len(batch),), float(model.config.num_experts_per_tok))
            else:
                with RoutingPatch(model, rule, **patch_options) as patch:
                    logits = _next_token_logits(model, batch)
                counts = torch.from_numpy(patch.records.counts()).float()
                mean_k = counts.view(len(batch), -1).mean(dim=1)
            reference = logits if rule is None or not agreement else _next_token_logits(model, batch)
            loss, correct = _score(logits, batch)
            rows += [
                {
                    "domain": domain,
                    "sequence": start + i,
                    "tokens": loss.shape[1],
                    "loss": loss[i].mean().item(),
                    "accuracy": correct[i].float().mean().item(),
                    "mean_k": mean_k[i].item(),
                }
                | (_agreement(logits[i], reference[i]) if agreement else {})
                for i in range(len(batch))
            ]
            if progress is not None:
                progress.update(len(batch))
    return pd.DataFrame(rows)


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
    model that it was given, and all get the whole table: the same as one process makes, since a rule is never split.
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
        part[column] = np.array(part[column], dtype="int64" if column in ("sequence", "tokens") else "float64")
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

# -- comparisons -----------------------------------------------------------------------------------------------


def bootstrap_mean(
    values: np.ndarray, *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean over independent units (rows of `values`)."""
    values = np.asarray(values, dtype=float)
    draws = np.random.default_rng(seed).integers(0, len(values), size=(resamples, len(values)))
    tail = (1 - level) / 2
    low, high = np.quantile(values[draws].mean(axis=1), [tail, 1 - tail])
    return float(low), float(high)


def paired_difference(frame: pd.DataFrame, rule: str, baseline: str, column: str = "loss") -> dict[str, float]:
    """Mean difference of two rules on the same sequences, with its 95 % bootstrap interval.

    Parameters
    ----------
    frame : pandas.DataFrame
        As `sweep` returns it.
    rule, baseline : str
        Names in its column ``rule``.
    column : str
        What to compare.

    Returns
    -------
    dict
        ``difference`` (rule minus baseline), ``low``, ``high``, ``sequences``.

    Raises
    ------
    ValueError
        If a rule is not in the table, has failed, or was measured on other sequences.
    """
    wide = _wide(frame[frame["rule"].isin([rule, baseline])], column)
    for name in (rule, baseline):
        _check_measured(frame, name, wide.columns)
    differences = (wide[rule] - wide[baseline]).to_numpy()
    low, high = bootstrap_mean(differences)
    return {"difference": float(differences.mean()), "low": low, "high": high, "sequences": len(differences)}


def matched_compute(
    frame: pd.DataFrame,
    baseline: str = "top-",
    column: str = "loss",
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Each rule against static top-k at the same mean number of experts, with bootstrap intervals.

    Static top-k exists at integer k only. Between them its loss is interpolated linearly, at the mean number of
    experts of the rule over all tokens, layers and sequences: what a mixture of top-k and top-(k+1) would lose that
    decides at random, so a cost that can be had without looking at the token. All means are over tokens.

    Parameters
    ----------
    frame : pandas.DataFrame
        As `sweep` returns it, all rules on the same sequences.
    baseline : str
        Prefix of the static rules: with ``"top-"``, those called ``top-1``, ``top-2``, ... Every integer between the
        smallest and the largest has to be there, since a longer chord of a convex curve flatters the rule.
    column : str
        What to compare: ``loss``, ``accuracy``, ``kl``.
    level, resamples, seed
        Of the percentile bootstrap over sequences. Each resample draws whole sequences, with all rules' results on
        them, and repeats everything: the rule's mean k, the interpolation, the difference. So a rule that gives more
        experts to some sequences is compared at what it spends on those that were drawn.

    Returns
    -------
    pandas.DataFrame
        One row per rule that is no baseline: ``rule``, ``mean_k``, the `column`, ``static`` (that of static top-k at
        the same mean k), ``difference`` (rule minus static), ``low``, ``high``, ``sequences``. ``static`` and the
        difference are NaN for a rule whose mean k lies outside the baseline's. Rules that failed are left out.

    Raises
    ------
    ValueError
        If there are fewer than two baselines, one is missing in between, or rules differ in their sequences.
    """
    values, experts = _wide(frame, column), _wide(frame, "mean_k")
    weight = _wide(frame, "tokens").iloc[:, 0].to_numpy(dtype=float)
    static = sorted(int(name[len(baseline) :]) for name in values if re.fullmatch(re.escape(baseline) + r"\d+", name))
    if len(static) < 2 or static != list(range(static[0], static[-1] + 1)):
        raise ValueError(
            f"static top-k is needed at two or more consecutive k, got {[f'{baseline}{k}' for k in static]}: "
            f'add {{f"{baseline}{{k}}": TopK(k) for k in range(1, 9)}} to the rules of the sweep.'
        )
    names = [f"{baseline}{k}" for k in static]
    # Row 0 weighs every sequence once; each further row is a resample.
    draws = np.random.default_rng(seed).multinomial(len(weight), np.full(len(weight), 1 / len(weight)), size=resamples)
    weights = np.vstack([np.ones(len(weight)), draws]) * weight
    weights /= weights.sum(axis=1, keepdims=True)
    curve = weights @ values[names].to_numpy()
    tail = (1 - level) / 2
    rows = []
    for rule in values.columns.drop(names):
        mean_k, quality = weights @ experts[rule].to_numpy(), weights @ values[rule].to_numpy()
        matched = _interpolate(curve, mean_k - static[0])
        inside = static[0] <= round(mean_k[0], 6) <= static[-1]
        difference = quality - matched if inside else np.full(len(quality), np.nan)
        low, high = np.quantile(difference[1:], [tail, 1 - tail])
        rows.append(
            {
                "rule": rule,
                "mean_k": mean_k[0],
                column: quality[0],
                "static": matched[0] if inside else np.nan,
                "difference": difference[0],
                "low": low,
                "high": high,
                "sequences": len(weight),
            }
        )
    columns = ["rule", "mean_k", column, "static", "difference", "low", "high", "sequences"]
    return pd.DataFrame(rows, columns=columns)


def _interpolate(curves: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Each row of `curves` [rows, points] at its own position in 0..points - 1; beyond that, its end."""
    positions = positions.clip(0, curves.shape[1] - 1)
    left = np.minimum(positions.astype(int), curves.shape[1] - 2)
    share, row = positions - left, np.arange(len(curves))
    return (1 - share) * curves[row, left] + share * curves[row, left + 1]


def _measured(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows that hold numbers."""
    return frame[frame["error"] == ""] if "error" in frame else frame


def _check_measured(frame: pd.DataFrame, rule: str, measured: pd.Index) -> None:
    if rule not in measured:
        failed = frame.loc[frame["rule"] == rule, "error"].tolist() if "error" in frame else []
        why = f"failed in this sweep: {failed[0]}" if failed else "is not in this table"
        raise ValueError(f"the rule {rule!r} {why}. Measured: {', '.join(_measured(frame)['rule'].unique())}.")


def _wide(frame: pd.DataFrame, column: str) -> pd.DataFrame:
    """One row per sequence, one column per rule in the table's order."""
    frame = _measured(frame)
    wide = frame.pivot(index=["domain", "sequence"], columns="rule", values=column)[frame["rule"].unique()]
    if wide.isna().any(axis=None):
        rule = wide.columns[wide.isna().any()][0]
        raise ValueError(
            f"{rule!r} has no {column} for {int(wide[rule].isna().sum())} of the {len(wide)} sequences: compare rules "
            f"that were measured on the same ones, by one sweep."
        )
    return wide


def summarize(frame: pd.DataFrame, by: list[str] | None = None) -> pd.DataFrame:
    """Mean loss, perplexity, accuracy and experts per rule, with a 95 % bootstrap interval of the loss over sequences.

    Parameters
    ----------
    frame : pandas.DataFrame
        As `sweep` returns it. Rules that failed are left out.
    by : list of str, optional
        Columns to group by, ``["rule"]`` by default; add ``"domain"`` for a row per domain.

    Returns
    -------
    pandas.DataFrame
        The columns of `by`, ``mean_k``, ``loss``, ``loss_low``, ``loss_high``, ``perplexity`` (exponential of the
        mean loss), ``accuracy``, where measured ``kl`` and ``top1_agreement``, ``sequences``, ``tokens``.
    """
    rows = []
    for key, part in _measured(frame).groupby(by or ["rule"], sort=False):
        low, high = bootstrap_mean(part["loss"].to_numpy())
        rows.append(
            dict(zip(by or ["rule"], key, strict=True))
            | {
                "mean_k": part["mean_k"].mean(),
                "loss": part["loss"].mean(),
                "loss_low": low,
                "loss_high": high,
                "perplexity": float(np.exp(part["loss"].mean())),
                "accuracy": part["accuracy"].mean(),
            }
            | {column: part[column].mean() for column in ("kl", "top1_agreement") if column in part}
            | {"sequences": len(part), "tokens": int(part["tokens"].sum())}
        )
    return pd.DataFrame(rows)


# -- settings of rivals, from calibration data -----------------------------------------------------------------


def choose_static_per_layer(
    model: nn.Module,
    data: Mapping[str, Tensor],
    mean_k: float,
    *,
    max_k: int | None = None,
    batch_size: int = 8,
) -> StaticPerLayer:
    """Distribute a budget of experts over the layers, by what each layer alone loses with fewer.

    The loss of the model is measured with k experts in one layer and `max_k` in all others, for every layer and k.
    As if the layers' losses added up, the best numbers that sum to the budget are then found exactly, by dynamic
    programming. (LExI, arXiv:2509.02753, searches in the same way, with the change of the layer's output for the loss.)

    Parameters
    ----------
    model : nn.Module
        Unpatched model.
    data : mapping of str to Tensor [sequences, length]
        Calibration text by domain.
    mean_k : float
        Mean experts per token and layer; the nearest that whole numbers allow.
    max_k : int, optional
        Most experts of a layer; by default the model's own top-k.
    batch_size : int
        Sequences per forward pass.

    Returns
    -------
    StaticPerLayer

    Raises
    ------
    ValueError
        If `mean_k` is not between 1 and `max_k`.
    """
    layers = find_moe_layers(model)
    most = layers[0].top_k if max_k is None else max_k
    if not 1 <= mean_k <= most:
        raise ValueError(f"mean_k must lie between 1 and max_k={most}, got {mean_k}.")
    full = (most,) * len(layers)
    whole = evaluate(model, data, StaticPerLayer(full), batch_size=batch_size)["loss"].mean()
    best = {0: (0.0, ())}  # experts spent so far -> least loss, and how
    for layer in tqdm(range(len(layers)), unit="layer", desc="static k per layer"):
        added = {most: 0.0}
        for k in range(1, most):
            rule = StaticPerLayer((*full[:layer], k, *full[layer + 1 :]))
            added[k] = evaluate(model, data, rule, batch_size=batch_size)["loss"].mean() - whole
        extended = {}
        for spent, (loss, ks) in best.items():
            for k, more in added.items():
                extended[spent + k] = min(extended.get(spent + k, (np.inf, ())), (loss + more, (*ks, k)))
        best = extended
    return StaticPerLayer(best[round(mean_k * len(layers))][1])


def entropy_thresholds(
    router_logits: Tensor, mean_k: float, *, slope: float = 1.0, max_k: int = 8
) -> tuple[float, ...]:
    """Thresholds for `EntropyK` with ks = 1, 2, ..., `max_k` that give `mean_k` experts on calibration logits.

    k is the offset plus `slope` times the entropy, rounded and cut to 1..`max_k`; the offset is found by bisection.

    Parameters
    ----------
    router_logits : Tensor [..., experts]
        Of any tokens and layers (`bhlib.calibration.collect_router_logits`).
    mean_k : float
        Wanted mean, strictly between 1 and `max_k`.
    slope : float
        Experts per nat of entropy, > 0.
    max_k : int
        Most experts of a token.

    Returns
    -------
    tuple of float
        ``max_k - 1`` entropies in nats, 1 / slope apart: ``EntropyK(thresholds, range(1, max_k + 1))``.

    Raises
    ------
    ValueError
        If `mean_k` or `slope` is out of range.
    """
    if not 1 < mean_k < max_k:
        raise ValueError(f"mean_k must lie strictly between 1 and max_k={max_k}, got {mean_k}.")
    if not 0 < slope < np.inf:
        raise ValueError(f"slope must be a finite number above 0, got {slope}.")
    entropy = np.sort(torch.special.entr(router_scores(router_logits)).sum(dim=-1).flatten().double().cpu().numpy())
    steps = (np.arange(1, max_k) - mean_k + 0.5) / slope

    def mean_at(shift: float) -> float:
        return 1 + (1 - np.searchsorted(entropy, steps + shift, side="right") / len(entropy)).sum()

    reach = max_k / slope + 1
    low, high = entropy[0] - reach, entropy[-1] + reach  # max_k experts for every token, and 1
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_at(middle) > mean_k else (low, middle)
    return tuple((steps + high).tolist())
