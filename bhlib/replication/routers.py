"""Tables of a router: saturation along its training, and the counts of tokens by class, document and place."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedTokenizerBase

from bhlib.patching import RoutingPatch
from bhlib.replication.subject import Subject
from bhlib.rules import Rule
from bhlib.specialization import saturation, selected

#: Parts that a sequence is divided into.
POSITIONS = 8


def saturation_of(folder: Path, subject: Subject, rules: Mapping[str, Rule]) -> pd.DataFrame:
    """Router saturation at each snapshot of a training (`bhlib/demo/snapshots.py`), by rule, layer and domain.

    Returns
    -------
    pandas.DataFrame
        ``rule``, ``step``, ``layer``, ``domain``, ``saturation``, ``chance`` (what experts at random would have) and
        ``mean_k``; empty if there are no snapshots.
    """
    steps = sorted(int(path.stem) for path in folder.glob("*.npy"))
    domains, rows = sorted(subject.study.text.sequences("validation", subject.study.length)), []
    device, num_experts = subject.model.device, subject.study.num_experts
    for layer in range(subject.study.num_layers if steps else 0):
        logits = {}
        for step in steps:
            kept = np.load(folder / f"{step}.npy", mmap_mode="r")[layer].astype(np.float32)
            logits[step] = torch.from_numpy(kept).to(device)
        for name, rule in rules.items():
            chosen = {step: selected(rule(part, layer).experts, num_experts) for step, part in logits.items()}
            for step, now in chosen.items():
                share = saturation(now, chosen[steps[-1]]).view(len(domains), -1).mean(dim=1).tolist()
                mean_k = now.double().sum(dim=1).view(len(domains), -1).mean(dim=1).tolist()
                rows += [
                    (name, step, layer, domain, value, k / num_experts, k)
                    for domain, value, k in zip(domains, share, mean_k, strict=True)
                ]
    return pd.DataFrame(rows, columns=["rule", "step", "layer", "domain", "saturation", "chance", "mean_k"])


def kinds_of(tokenizer: PreTrainedTokenizerBase, size: int) -> list[str]:
    """The class of each token id below `size`, as a reader would call it."""
    return [_kind_of(tokenizer, number) for number in range(size)]


def _kind_of(tokenizer: PreTrainedTokenizerBase, number: int) -> str:
    text = tokenizer.decode([number])
    bare = text.strip()
    if number in tokenizer.all_special_ids:
        return "end of text"
    if not bare:
        return "white space"
    if bare.isdigit():
        return "digit"
    if bare.isalpha():
        return "word start" if text[0].isspace() else "word, continued"
    return "punctuation or other"


@torch.no_grad()
def who_of(subject: Subject, rules: Mapping[str, Rule]) -> pd.DataFrame:
    """How many experts tokens get, by class, document and place, on every fourth sequence of the test split.

    Returns
    -------
    pandas.DataFrame
        A row per rule, ``domain``, ``document``, ``kind`` (`kinds_of`) and ``position`` (of `POSITIONS` parts of a
        sequence): the sum ``experts`` of the tokens' mean numbers over layers, and ``tokens``.
    """
    text, documents = subject.text("test", 4)
    kinds = np.array(kinds_of(subject.study.tokenizer, subject.model.config.vocab_size))
    parts = []
    for name, rule in rules.items():
        with RoutingPatch(subject.model, rule, max_recorded_tokens=None) as patch:
            for domain, sequences in text.items():
                for sequence, document in zip(sequences, documents[domain], strict=True):
                    patch.reset_stats()
                    subject.model(input_ids=sequence[None].to(subject.model.device), use_cache=False)
                    mean = np.asarray(patch.records.counts()).reshape(len(sequence), -1).mean(axis=1)
                    place = np.arange(len(sequence)) * POSITIONS // len(sequence)
                    cells = pd.DataFrame({"kind": kinds[sequence.numpy()], "position": place, "experts": mean})
                    parts.append(cells.assign(rule=name, domain=domain, document=document))
    by = ["rule", "domain", "document", "kind", "position"]
    grouped = pd.concat(parts, ignore_index=True).groupby(by, sort=False)["experts"]
    return pd.DataFrame({"experts": grouped.sum(), "tokens": grouped.size()}).reset_index()
