"""One model with its text, and everything that is fitted on its own calibration split."""

from collections.abc import Callable, Iterable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from bhlib.compensation import Compensation
from bhlib.discovery import find_moe_layers
from bhlib.figures.ingredients import fit_each, norms_of
from bhlib.figures.stand_ins import mean_for
from bhlib.figures.study import Study
from bhlib.levels import level_for_mean_experts
from bhlib.loading import DEMO
from bhlib.norms import OutputNorms
from bhlib.pvalues import FittedNull
from bhlib.rules import BH, Rule, Threshold, TopK
from bhlib.rules.folding import Halving
from bhlib.texts import read_text

#: Shares of the model's own experts at which rules are compared: three to seven of eight.
SHARES = tuple(k / 8 for k in (3, 4, 5, 6, 7))

#: Rank of the map of a compensation.
RANK = 16


#: Families of rules: what is fitted for one is in its name.
FAMILIES = (
    "threshold",
    "BH",
    "BH, fitted null",
    "fixed cut, fitted null",
    "threshold, norms",
    "BH, norms",
    "BH, fitted null, norms",
    "fixed cut, fitted null, norms",
    "threshold, norms, compensated",
    "BH, fitted null, norms, compensated",
)

#: Of a model that divides weights by their sum, besides: with its own weights, the default of a patch. Without this in
#: their names, and where nothing stands in, families divide by the sum of what is kept (`bhlib.weighting`).
SHARES_OF_TOP = ", shares of the top"
SHARED = tuple(name + SHARES_OF_TOP for name in ("static top-k", "threshold", "BH"))


class Case(NamedTuple):
    """A rule of a family, at the level whose counted cost is wanted, and what the model is patched with besides."""

    family: str
    wanted: float
    rule: Rule
    options: Mapping[str, Any]

    @property
    def name(self) -> str:
        return f"{self.family}, {self.wanted:g}"


class Subject:
    """A trained model on a device, and the held-out text.

    Parameters
    ----------
    folder : path
        Of the model, as `train.py` saves it; it was trained with the embedded model's tokenizer.
    sequences : int, optional
        Of each domain and split, at most; all by default.
    length : int
        Tokens of a sequence.
    """

    def __init__(self, folder: str | Path, sequences: int | None = None, length: int = 512) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
        tokenizer = AutoTokenizer.from_pretrained(DEMO, local_files_only=True)
        text, size = read_text(None, tokenizer), sequences or 16
        self.study = Study(
            model=model, tokenizer=tokenizer, text=text, sequences=size, length=length, tokens_per_pass=8192
        )
        self.model, self.sequences = model, sequences

    @property
    def top_k(self) -> int:
        """Experts per token of the model's own routing."""
        return self.study.top_k

    @property
    def families(self) -> tuple[str, ...]:
        """Those of `FAMILIES`, and of `SHARED` where a token's weights are divided by their sum."""
        return FAMILIES + SHARED * self.normalizes

    @property
    def normalizes(self) -> bool:
        """Whether a token's weights are divided by their sum."""
        return find_moe_layers(self.model)[0].weighting == "normalized"

    def text(self, split: str, step: int = 1) -> tuple[dict[str, Tensor], dict[str, np.ndarray]]:
        """Every step-th sequence of each domain, int64 [sequences, length], and the document of each."""
        read, length = self.study.text, self.study.length
        text, numbers = read.sequences(split, length), read.documents(split, length)
        if self.sequences is not None:
            step = max(step, -(-max(map(len, text.values())) // self.sequences))
        return {name: ids[::step] for name, ids in text.items()}, {name: numbers[name][::step] for name in text}

    def costs(self, shares: Iterable[float] = SHARES) -> list[float]:
        """Shares of the model's own experts, in experts; those that leave a token hardly more than one are left out."""
        return [share * self.top_k for share in shares if share * self.top_k > 1.05]

    @cached_property
    def norms(self) -> OutputNorms:
        return norms_of(self.study)

    @cached_property
    def compensation(self) -> Compensation:
        return self.study.compensation(min(RANK, self.study.hidden_size))

    @cached_property
    def null(self) -> FittedNull:
        """Of the log-probabilities, one for each layer."""
        return self.study.fit_null(statistic="log_prob")

    @cached_property
    def null_of_norms(self) -> FittedNull:
        """Of what a rule is shown beside the norms."""
        return fit_each(self.study, self.norms.shown(self.study.calibration_logits))

    def weights_of(self, family: str) -> dict[str, Any]:
        """With which weights of what is kept a model is patched for a family."""
        recomputed = self.normalizes and "compensated" not in family and not family.endswith(SHARES_OF_TOP)
        return {"weights": "normalized"} if recomputed else {}

    def family(self, name: str) -> tuple[Callable[..., Rule], dict[str, Any]]:
        """How a level makes a rule of a family in `FAMILIES`, and what the model is patched with besides.

        What a family needs is fitted when it is first asked for.
        """
        options = self.weights_of(name) | ({"norms": self.norms} if "norms" in name else {})
        if "compensated" in name:
            options["compensation"] = self.compensation
        if name.startswith("threshold"):
            return partial(Threshold, max_k=self.top_k), options
        make = partial(BH, method="fixed" if name.startswith("fixed cut") else "bh", max_k=self.top_k)
        if "fitted null" in name:
            make = partial(make, pvalues=self.null_of_norms if "norms" in name else self.null)
        return make, options

    def cases(self, names: Iterable[str], costs: Iterable[float]) -> list[Case]:
        """Rules of families at counted costs; those that no level gives are left out, and said."""
        found, costs = [], list(costs)
        for name in names:
            if name.startswith("static"):
                whole = [int(cost) for cost in costs if float(cost).is_integer()]
                found += [Case(name, k, Halving(TopK(k), self.top_k, reference=self.top_k), {}) for k in whole]
                continue
            make, options = self.family(name)
            norms = options.get("norms")
            logits = self.study.thin_logits if norms is None else norms.shown(self.study.thin_logits)
            for cost in costs:
                mean = mean_for(options.get("compensation"), norms, cost, self.study)
                try:
                    if not 1.02 < mean < self.top_k:
                        raise ValueError(f"{mean:.2f} experts are left for {cost:g}")
                    found.append(Case(name, cost, make(level_for_mean_experts(make, logits, mean)), options))
                except ValueError as reason:
                    tqdm.write(f"{name}, {cost:g} is left out: {reason}")
        return found
