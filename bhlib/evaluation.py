"""Quality and cost of a routed model: loss per token, accuracy, experts per token; sweeps over rules.

Everything comes as one tidy table with a row per rule and sequence, so that intervals can be drawn from it: sequences
are the independent units, and two rules are compared on the same ones (`paired_difference`).
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from bhlib.patching import RoutingPatch
from bhlib.rules import Rule


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
    logits = model(input_ids=sequences, use_cache=False).logits[:, :-1].float()
    targets = sequences[:, 1:]
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return loss.view_as(targets), logits.argmax(dim=-1) == targets


def evaluate(
    model: nn.Module,
    data: Mapping[str, Tensor],
    rule: Rule | None = None,
    *,
    batch_size: int = 8,
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
    progress : tqdm, optional
        Bar to advance by the number of sequences done.
    **patch_options
        For `RoutingPatch`: temperature, weights.

    Returns
    -------
    pandas.DataFrame
        One row per sequence: ``domain``, ``sequence`` (number in its domain), ``tokens`` (with a loss), ``loss``
        (mean, nats per token), ``accuracy`` (of the next token), ``mean_k`` (experts per token and layer).
    """
    model_device = next(model.parameters()).device
    rows = []
    for domain, sequences in data.items():
        for start in range(0, len(sequences), batch_size):
            batch = sequences[start : start + batch_size].to(model_device)
            if rule is None:
                loss, correct = score_tokens(model, batch)
                mean_k = torch.full((len(batch),), float(model.config.num_experts_per_tok))
            else:
                with RoutingPatch(model, rule, **patch_options) as patch:
                    loss, correct = score_tokens(model, batch)
                counts = torch.from_numpy(patch.records.counts()).float()
                mean_k = counts.view(len(batch), -1).mean(dim=1)
            rows += [
                {
                    "domain": domain,
                    "sequence": start + i,
                    "tokens": loss.shape[1],
                    "loss": loss[i].mean().item(),
                    "accuracy": correct[i].float().mean().item(),
                    "mean_k": mean_k[i].item(),
                }
                for i in range(len(batch))
            ]
            if progress is not None:
                progress.update(len(batch))
    return pd.DataFrame(rows)


def sweep(
    model: nn.Module,
    rules: Mapping[str, Rule | None],
    data: Mapping[str, Tensor],
    *,
    batch_size: int = 8,
    **patch_options,
) -> pd.DataFrame:
    """`evaluate` under several rules: one tidy table with a column ``rule`` of their names, and a progress bar."""
    total = len(rules) * sum(len(sequences) for sequences in data.values())
    parts = []
    with tqdm(total=total, unit="seq", desc="sweep") as bar:
        for name, rule in rules.items():
            bar.set_postfix_str(name)
            part = evaluate(model, data, rule, batch_size=batch_size, progress=bar, **patch_options)
            parts.append(part.assign(rule=name))
    frame = pd.concat(parts, ignore_index=True)
    return frame[["rule", *frame.columns.drop("rule")]]


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

    Returns
    -------
    dict
        ``difference`` (rule minus baseline), ``low``, ``high``, ``sequences``.
    """
    wide = frame.pivot(index=["domain", "sequence"], columns="rule", values=column)
    differences = (wide[rule] - wide[baseline]).to_numpy()
    low, high = bootstrap_mean(differences)
    return {"difference": float(differences.mean()), "low": low, "high": high, "sequences": len(differences)}


def summarize(frame: pd.DataFrame, by: list[str] | None = None) -> pd.DataFrame:
    """Mean loss, accuracy and experts per rule, with a 95 % bootstrap interval of the loss over sequences.

    Parameters
    ----------
    frame : pandas.DataFrame
        As `sweep` returns it.
    by : list of str, optional
        Columns to group by, ``["rule"]`` by default; add ``"domain"`` for a row per domain.
    """
    rows = []
    for key, part in frame.groupby(by or ["rule"], sort=False):
        low, high = bootstrap_mean(part["loss"].to_numpy())
        rows.append(
            dict(zip(by or ["rule"], key, strict=True))
            | {
                "mean_k": part["mean_k"].mean(),
                "loss": part["loss"].mean(),
                "loss_low": low,
                "loss_high": high,
                "accuracy": part["accuracy"].mean(),
                "sequences": len(part),
                "tokens": int(part["tokens"].sum()),
            }
        )
    return pd.DataFrame(rows)
