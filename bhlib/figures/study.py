"""What figures are computed on: a model, its text and what is made of them once for many figures."""

from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bhlib.calibration import collect_router_logits, fit_null, name_of
from bhlib.discovery import find_moe_layers
from bhlib.figures.runs import Run, observe
from bhlib.loading import heldout_sequence_documents, load_demo, load_heldout
from bhlib.pvalues import FittedNull
from bhlib.rules import BH, TopK
from bhlib.sampling import VALUES_PER_LAYER

__all__ = ["Study"]


class Study:
    """The embedded model, on a CUDA device if there is one, and its held-out text; loaded when first needed.

    Parameters
    ----------
    cache : path, optional
        Folder of finished cells for the sweeps that compare rules on the test split (`bhlib.evaluation.sweep`). With
        it a sweep that was stopped goes on where it was, and what is made of a finished one needs no second pass:
        ``make_figures(only=["whole_test_split"], study=Study(cache="cells"))``.
    """

    #: Sequences of each domain on which figures are computed: a compromise between time and intervals.
    sequences_per_domain = 16

    #: Tokens per sequence of the test split.
    length = 512

    #: Tokens per sequence of `validation`, and of the text that the logits below are of.
    window = 256

    def __init__(self, cache: str | Path | None = None) -> None:
        self.cache = cache

    # -- the model -----------------------------------------------------------------------------------------------------

    @cached_property
    def model_and_tokenizer(self) -> tuple:
        model, tokenizer = load_demo()
        return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer

    @property
    def model(self):
        return self.model_and_tokenizer[0]

    @property
    def tokenizer(self):
        return self.model_and_tokenizer[1]

    @property
    def name(self) -> str:
        """The name that calibrations of the model are filed under."""
        return name_of(self.model)

    @cached_property
    def top_k(self) -> int:
        """Experts per token of the model's own routing."""
        return find_moe_layers(self.model)[0].top_k

    @property
    def own(self) -> str:
        """What tables call the model's own routing."""
        return f"top-{self.top_k}"

    @property
    def static_rules(self) -> dict[str, TopK]:
        """Static top-k by its name in tables, up to the model's own: what other rules are measured against."""
        return {f"top-{k}": TopK(k) for k in range(1, self.top_k + 1)}

    @property
    def mean_ks(self) -> tuple[int, ...]:
        """Mean numbers of experts at which rules are compared: from below half of the model's own to one less."""
        return tuple(range(max(1, self.top_k // 2 - 1), self.top_k))

    # -- the text that results are reported on -------------------------------------------------------------------------

    @cached_property
    def test(self) -> dict[str, Tensor]:
        return load_heldout("test", self.length, self.sequences_per_domain)

    @cached_property
    def test_documents(self) -> dict[str, np.ndarray]:
        """The document of each sequence of `test`."""
        return heldout_sequence_documents("test", self.length, self.sequences_per_domain)

    @cached_property
    def whole_test(self) -> dict[str, Tensor]:
        """All of the test split: 14 times what most figures are computed on."""
        return load_heldout("test", self.length)

    @cached_property
    def whole_test_documents(self) -> dict[str, np.ndarray]:
        """The document of each sequence of `whole_test`."""
        return heldout_sequence_documents("test", self.length)

    def every(self, step: int) -> tuple[dict[str, Tensor], dict[str, np.ndarray]]:
        """Every step-th sequence of each domain of `test`, and the document of each."""
        text = {domain: sequences[::step] for domain, sequences in self.test.items()}
        return text, {domain: self.test_documents[domain][::step] for domain in text}

    @cached_property
    def runs(self) -> dict[str, Run]:
        """The model's own top-k and the default BH rule on every second test sequence, token by token."""
        rules = {self.own: TopK(self.top_k), "BH 0.05": BH(max_k=self.top_k)}
        return {name: observe(self.model, *self.every(2), rule) for name, rule in rules.items()}

    # -- the text that settings and nulls are chosen on ----------------------------------------------------------------

    @cached_property
    def validation(self) -> dict[str, Tensor]:
        """Text to choose settings on."""
        return load_heldout("validation", self.window, max(1, self.sequences_per_domain // 2))

    @cached_property
    def validation_documents(self) -> dict[str, np.ndarray]:
        """The document of each sequence of `validation`."""
        return heldout_sequence_documents("validation", self.window, max(1, self.sequences_per_domain // 2))

    @cached_property
    def calibration_logits(self) -> Tensor:
        """Router logits [layers, tokens, experts] on the calibration split: what nulls are fitted on."""
        text = load_heldout("calibration", self.window, max(1, 3 * self.sequences_per_domain // 4))
        return collect_router_logits(self.model, text)

    def fit_null(self, **options) -> FittedNull:
        """A null fitted on `calibration_logits`, as many values of a layer as tokens at most; options of `fit_null`."""
        size = min(VALUES_PER_LAYER, self.calibration_logits.shape[1])
        return fit_null(self.calibration_logits, model_name=self.name, max_values=size, **options)

    @cached_property
    def validation_logits(self) -> Tensor:
        """Router logits [layers, tokens, experts] on `validation`: what nulls are tested on."""
        return collect_router_logits(self.model, self.validation)
