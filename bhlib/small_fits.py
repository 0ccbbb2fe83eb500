"""What the explorer fits when it is first asked for: nulls and compensations, on a little calibration text.

    fits = SmallFits(model, tokenizer)
    rule = BH(0.1, fits.null("contribution"))
    evaluate(model, data, rule, compensation=fits.compensation(rank=16))

Each is fitted once, in seconds for the demo. They are good for a first look; what is reported is fitted on the whole
calibration split (`bhlib.calibrate`, `bhlib.fit_compensation`, notebook 08).
"""

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from bhlib.calibration import collect_router_logits, fit_null
from bhlib.compensating import fit_compensation
from bhlib.compensation import Compensation
from bhlib.contributions import Contributions, measure_contributions
from bhlib.discovery import find_moe_layers, name_of
from bhlib.loading import DEMO, heldout_tokens, load_heldout
from bhlib.pvalues import NULLS, ContributionNull, PValueMaker

#: The name of the null of measured contributions, which is not among `NULLS`: it is fitted to more than logits.
CONTRIBUTION = ContributionNull.name

#: Up to which contribution an expert counts as useless: a tenth of the norm of the layer's output.
LARGEST = 0.1

#: Tokens of each document's beginning whose contributions are measured: documents are what counts.
PER_DOCUMENT = 32

Fit = TypeVar("Fit")


def heldout_texts(split: str = "validation", length: int = 256) -> dict[str, str]:
    """The beginning of each domain's held-out text, as text: for any model and tokenizer.

    Parameters
    ----------
    split : {"calibration", "validation", "test"}
    length : int
        Tokens of the demo's tokenizer.
    """
    tokenizer = AutoTokenizer.from_pretrained(DEMO, local_files_only=True)
    parts = load_heldout(split, length, max_sequences=1)
    return {domain: tokenizer.decode(ids[0], skip_special_tokens=True) for domain, ids in parts.items()}


class SmallFits:
    """Nulls and compensations of a model, each fitted when it is first asked for.

    Parameters
    ----------
    model : nn.Module
        Not patched when something is fitted.
    tokenizer : PreTrainedTokenizerBase
    note : callable
        Gets a few words about what is being fitted; what it returns is a context that lasts until it is.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        note: Callable[[str], AbstractContextManager] = nullcontext,
    ) -> None:
        self.model, self.tokenizer, self._note = model, tokenizer, note
        self._fitted: dict[Hashable, object] = {}

    def null(self, name: str, statistic: str = "log_prob", max_k: int = 8) -> PValueMaker:
        """A null that needs calibration, by name.

        Parameters
        ----------
        name : str
            In `NULLS`, or ``"contribution"`` for a `ContributionNull`.
        statistic : str
            For those in `NULLS`.
        max_k : int
            The most experts that the rule may keep; a `ContributionNull` depends on it.
        """
        if name == CONTRIBUTION:
            return self._once((name, max_k), f"the {name} null", lambda: self._contribution_null(max_k))
        what = f"the {name} null of {statistic}"
        return self._once((name, statistic), what, lambda: self._null_of_logits(name, statistic))

    def compensation(self, rank: int = 0) -> Compensation:
        """What stands in for dropped experts: their means, and a map of this rank, or of the hidden size if that is
        smaller."""
        return self._once(("compensation", rank), "what stands in for experts", lambda: self._compensation(rank))

    def _once(self, key: Hashable, what: str, fit: Callable[[], Fit]) -> Fit:
        if key not in self._fitted:
            with self._note(f"fitting {what} on calibration text"):
                self._fitted[key] = fit()
        return self._fitted[key]  # type: ignore[return-value]

    def _null_of_logits(self, name: str, statistic: str) -> PValueMaker:
        top_k = find_moe_layers(self.model)[0].top_k
        return fit_null(
            self._logits, model_name=name_of(self.model), null=name, statistic=statistic, exclude_top=top_k,
            max_values=NULLS[name].max_values,
        )  # fmt: skip

    def _contribution_null(self, max_k: int) -> ContributionNull:
        seen, name = self._contributions, name_of(self.model)
        return ContributionNull.from_contributions(
            seen.r, seen.logits, seen.units, model_name=name, largest=LARGEST, max_k=max_k
        )

    def _compensation(self, rank: int) -> Compensation:
        text = load_heldout("calibration", length=64, max_sequences=8, tokenizer=self.tokenizer)
        rank = min(rank, find_moe_layers(self.model)[0].router.weight.shape[-1])
        # Small batches, so that several are held out to choose the strength of the ridge.
        return fit_compensation(self.model, text, rank=rank, batch_size=4, progress=False)

    @cached_property
    def _logits(self) -> Tensor:
        texts = heldout_texts("calibration").items()
        token_ids = {name: self.tokenizer(text, return_tensors="pt")["input_ids"] for name, text in texts}
        return collect_router_logits(self.model, token_ids, progress=False)

    @cached_property
    def _contributions(self) -> Contributions:
        beginnings = {}
        for domain, documents in heldout_tokens("calibration", self.tokenizer).items():
            rows = [document[:PER_DOCUMENT] for document in documents if len(document) >= PER_DOCUMENT]
            if rows:
                beginnings[domain] = torch.stack(rows)
        return measure_contributions(self.model, beginnings, progress=False)  # each row is a document
