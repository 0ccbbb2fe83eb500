"""What figures are computed on: a model, its text, the settings of rules for it, and what many figures share."""

import json
import math
import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from bhlib.calibration import collect_router_logits, fit_null, name_of
from bhlib.cells import model_key, sweep_key
from bhlib.compensating import fit_ranks
from bhlib.compensation import Compensation
from bhlib.discovery import MoELayer, find_moe_layers, input_device
from bhlib.figures.about import DEMO, About
from bhlib.figures.runs import Run, observe
from bhlib.figures.tables import write_whole
from bhlib.loading import load_demo, load_settings
from bhlib.pvalues import FittedNull
from bhlib.rules import BH, TopK
from bhlib.sampling import VALUES_PER_LAYER
from bhlib.texts import Text, read_text
from bhlib.tuning import choose_settings

__all__ = ["Study"]

#: Sequences of a forward pass, at most.
SEQUENCES_PER_PASS = 8

#: One in this many tokens is enough to find the level that gives a mean number of experts.
THIN = 8

#: Tokens that compensations are fitted on, at most.
FITTING_TOKENS = 100_000

#: Ranks of the map of a compensation that figures look at.
RANKS = (0, 4, 8, 16, 32)

#: Router logits of a split take no more than this many bytes, in memory and in a study's folder.
LOGITS_BYTES = 2**30


class Study:
    """A model, a text, settings of rules that were chosen for the two, and what many figures share.

    By default the embedded model, on a CUDA device if there is one, and its held-out text; loaded when first needed.

    Parameters
    ----------
    cache : path, optional
        Folder of finished cells for sweeps (`bhlib.evaluation.sweep`). With it a sweep that was stopped goes on where
        it was, and what is made of a finished one needs no second pass:
        ``make_figures(only=["whole_test_split"], study=Study(cache="cells"))``. Router logits are kept there too.
    model : nn.Module, optional
        A model that can be patched (`find_moe_layers`) and gives a token two experts or more, unpatched, in evaluation
        mode, where it is to run.
    tokenizer : PreTrainedTokenizerBase, optional
        The model's.
    text : Text, optional
        By default the held-out text of the repository, in the tokens of the model.
    sequences : int
        Of each domain on which figures are computed: a compromise between time and intervals.
    length : int
        Tokens per sequence of the test split.
    tokens_per_pass : int
        Of a forward pass, at most, or one sequence: fewer take less memory.
    folder : path, optional
        Where `settings` are kept, and read again if they are of this model, this text and these sizes.

    Raises
    ------
    ValueError
        If the model gives a token one expert, so that there is nothing to save, or a sequence is longer than it reads.
    """

    def __init__(
        self,
        cache: str | Path | None = None,
        *,
        model: nn.Module | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        text: Text | None = None,
        sequences: int = 16,
        length: int = 512,
        tokens_per_pass: int = 4096,
        folder: str | Path | None = None,
    ) -> None:
        self.cache = cache
        self._compensations: dict[int, Compensation] = {}
        self.folder = folder
        self.is_demo = model is None
        self.sequences_per_domain = sequences
        self.length = length
        self.tokens_per_pass = tokens_per_pass
        #: Tokens per sequence of `validation`, and of the text that settings are chosen and logits collected on.
        self.window = length // 2
        if model is not None:
            self.model_and_tokenizer = model, tokenizer
            self._check()
        if text is not None:
            self.text = text

    def _check(self) -> None:
        longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or self.length
        if self.length > longest:
            raise ValueError(
                f"length must be at most {longest}, the longest text that this model reads; got {self.length}."
            )
        if self.top_k < 2:
            raise ValueError(
                f"{self.name} gives a token one expert, so no rule can give it fewer: figures need a model with two or "
                f"more."
            )

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
    def device(self) -> torch.device:
        """Where the model takes its inputs."""
        return input_device(self.model)

    @property
    def name(self) -> str:
        """The name that calibrations of the model are filed under."""
        return name_of(self.model)

    @cached_property
    def _layers(self) -> list[MoELayer]:
        return find_moe_layers(self.model)

    @property
    def top_k(self) -> int:
        """Experts per token of the model's own routing."""
        return self._layers[0].top_k

    @property
    def num_layers(self) -> int:
        """MoE layers of the model."""
        return len(self._layers)

    @property
    def num_experts(self) -> int:
        """Experts of each layer."""
        return self._layers[0].num_experts

    @property
    def hidden_size(self) -> int:
        """Numbers of a hidden state."""
        return self._layers[0].router.weight.shape[-1]

    @property
    def intermediate_size(self) -> int:
        """Numbers between the two matrices of an expert."""
        return self._layers[0].intermediate_size

    @cached_property
    def about(self) -> About:
        """What pictures say of the model and the text."""
        if self.is_demo:
            return DEMO
        family = self.model.config.get_text_config().model_type
        return About(self.name, family, self.num_layers, self.num_experts, self.top_k, self.text.name)

    @cached_property
    def identity(self) -> dict[str, str | int]:
        """What tables and settings belong to: another model, other text or other sizes have others."""
        sizes = {"sequences": self.sequences_per_domain, "length": self.length}
        return {"model": model_key(self.model), "text": self.text.key} | sizes

    # -- rules ---------------------------------------------------------------------------------------------------------

    @property
    def own(self) -> str:
        """What tables call the model's own routing."""
        return f"top-{self.top_k}"

    @property
    def static_rules(self) -> dict[str, TopK]:
        """Static top-k by its name in tables, up to the model's own: what other rules are measured against."""
        return {f"top-{k}": TopK(k) for k in range(1, self.top_k + 1)}

    @property
    def mean_ks(self) -> tuple[float, ...]:
        """Mean numbers of experts at which rules are compared: from below half of the model's own to one less.

        Below top-5 there are too few whole numbers, and those are taken that divide what lies between 1 and top-k.
        """
        if self.top_k >= 5:
            return tuple(range(self.top_k // 2 - 1, self.top_k))
        parts = 4 if self.top_k == 2 else 2 * (self.top_k - 1)
        return tuple(1 + (self.top_k - 1) * i / parts for i in range(1, parts))

    @property
    def half(self) -> float:
        """The mean number of experts at which weights of layers are chosen."""
        return max(self.top_k / 2, 1.5)

    @cached_property
    def settings(self) -> dict:
        """Settings of rules that differ by layer (`bhlib.tuning.choose_settings`).

        The embedded model brings its own; for another they are chosen on `calibration`, which takes some hundred passes
        over it, each of them a cell in `cache`.
        """
        if self.is_demo:
            return load_settings()
        file = Path(self.folder) / "settings.json" if self.folder else None
        # One process looks, so that all choose or none.
        found = json.loads(file.read_text("utf-8")) if file and file.exists() else {}
        state = PartialState(cpu=not torch.cuda.is_available())
        (found,) = broadcast_object_list([found])
        if found.get("of") == self.identity:
            return found["settings"]
        settings = choose_settings(
            self.model, self.calibration, self.thin_logits, self.mean_ks, self.half,
            batch_size=self.batch_size(self.window), cache=self.cache,
        )  # fmt: skip
        if file and state.is_main_process:
            write_whole(file, json.dumps({"of": self.identity, "settings": settings}, indent=1) + "\n")
        return settings

    # -- the text ------------------------------------------------------------------------------------------------------

    @cached_property
    def text(self) -> Text:
        return read_text(None, self.tokenizer)

    def check_text(self) -> None:
        """Refuse a text that is too short, and warn of one of too few documents for intervals (`Text.check`)."""
        self.text.check(self.length, self.sequences_per_domain, ["test"])
        self.text.check(self.window, self.few, ["validation"])
        self.text.check(self.window, self.few, ["calibration"], documents=1)

    def batch_size(self, length: int) -> int:
        """Sequences of a length in one forward pass."""
        return max(1, min(SEQUENCES_PER_PASS, self.tokens_per_pass // length))

    @property
    def few(self) -> int:
        """Sequences of a domain in `validation`."""
        return max(1, self.sequences_per_domain // 2)

    # -- the text that results are reported on -------------------------------------------------------------------------

    @cached_property
    def test(self) -> dict[str, Tensor]:
        return self.text.sequences("test", self.length, self.sequences_per_domain)

    @cached_property
    def test_documents(self) -> dict[str, np.ndarray]:
        """The document of each sequence of `test`."""
        return self.text.documents("test", self.length, self.sequences_per_domain)

    @cached_property
    def whole_test(self) -> dict[str, Tensor]:
        """All of the test split: 14 times what most figures are computed on."""
        return self.text.sequences("test", self.length)

    @cached_property
    def whole_test_documents(self) -> dict[str, np.ndarray]:
        """The document of each sequence of `whole_test`."""
        return self.text.documents("test", self.length)

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
        return self.text.sequences("validation", self.window, self.few)

    @cached_property
    def validation_documents(self) -> dict[str, np.ndarray]:
        """The document of each sequence of `validation`."""
        return self.text.documents("validation", self.window, self.few)

    @cached_property
    def calibration(self) -> dict[str, Tensor]:
        """Text to fit nulls on."""
        return self.text.sequences("calibration", self.window, self._to_fit_on)

    @cached_property
    def calibration_documents(self) -> dict[str, np.ndarray]:
        """The document of each sequence of `calibration`."""
        return self.text.documents("calibration", self.window, self._to_fit_on)

    @property
    def _to_fit_on(self) -> int:
        """Sequences of a domain in `calibration`."""
        return max(1, 3 * self.sequences_per_domain // 4)

    @cached_property
    def calibration_logits(self) -> Tensor:
        """Router logits [layers, tokens, experts] on `calibration` (`bounded`): what nulls are fitted on."""
        return self._logits("calibration", self.calibration)

    @cached_property
    def validation_logits(self) -> Tensor:
        """Router logits [layers, tokens, experts] on `validation` (`bounded`): what nulls are tested on."""
        return self._logits("validation", self.validation)

    @cached_property
    def thin_logits(self) -> Tensor:
        """Some of `calibration_logits`, on `device`: enough to find levels on, which looks at them many times."""
        return self.calibration_logits[:, ::THIN].to(self.device)

    def _logits(self, split: str, text: Mapping[str, Tensor]) -> Tensor:
        """Router logits on a text (`bounded`), collected once for all processes if there is a `cache`."""
        text = self.bounded(text)
        batch_size = self.batch_size(self.window)
        if self.cache is None:
            return collect_router_logits(self.model, text, batch_size=batch_size)
        path = Path(self.cache) / f"logits-{split}-{sweep_key(self.model, text, {})[:16]}.safetensors"
        with PartialState(cpu=not torch.cuda.is_available()).main_process_first():
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                unfinished = path.with_suffix(f".{os.getpid()}.tmp")
                save_file({"logits": collect_router_logits(self.model, text, batch_size=batch_size)}, unfinished)
                unfinished.replace(path)
        return load_file(path)["logits"]

    def compensation(self, rank: int) -> Compensation:
        """What stands in for dropped experts, with a map of this rank; those of `RANKS` are fitted once, together."""
        if rank not in self._compensations:
            ranks = {rank, *(one for one in RANKS if one <= self.hidden_size)}
            options = {"batch_size": self.batch_size(self.window), "progress": False}
            self._compensations = fit_ranks(self.model, self.fitting_text, sorted(ranks), **options)
        return self._compensations[rank]

    @cached_property
    def fitting_text(self) -> dict[str, Tensor]:
        """Text to fit compensations on: all of the calibration split, or `FITTING_TOKENS` spread over each domain.

        A mean per expert and a map take more of it than a null.
        """
        text = self.text.sequences("calibration", self.window)
        most = max(1, FITTING_TOKENS // (len(text) * self.window))
        return {domain: sequences[:: -(-len(sequences) // most)] for domain, sequences in text.items()}

    def bounded(self, text: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A text, or every second, third, ... sequence of each of its domains if all logits exceed `LOGITS_BYTES`."""
        tokens = sum(sequences.numel() for sequences in text.values())
        step = max(1, math.ceil(4 * self.num_layers * self.num_experts * tokens / LOGITS_BYTES))
        return {domain: sequences[::step] for domain, sequences in text.items()}

    def fit_null(self, **options) -> FittedNull:
        """A null fitted on `calibration_logits`, as many values of a layer as tokens at most; options of `fit_null`."""
        size = min(VALUES_PER_LAYER, self.calibration_logits.shape[1])
        options = {"exclude_top": self.top_k} | options
        return fit_null(self.calibration_logits, model_name=self.name, max_values=size, **options)
