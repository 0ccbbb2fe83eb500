"""Rules that divide a budget among several tokens: the experts of one depend on what the others would have taken.

Such a rule has to know which tokens belong together. A patch tells it whenever a pass begins (`Rule.begin_pass`).
Called by itself it takes all tokens that it is given for one sequence. One thread at a time.
"""

import numbers
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bhlib.rules.base import Level, ProbabilityRule


class PassShape(NamedTuple):
    """Which tokens of a pass belong together: [batch, length] of them, and which are no padding (None: all)."""

    batch: int
    length: int
    valid: Tensor | None


@dataclass(frozen=True)
class _Budget(ProbabilityRule):
    """A rule that gives tokens `min_k` experts each, and what is left to their most probable others."""

    _shape: list[PassShape] = field(default_factory=list, init=False, repr=False, compare=False)

    def begin_pass(self, shape: tuple[int, int], past: Any, valid: Tensor | None) -> None:
        self._shape[:] = [PassShape(*shape, valid)]

    def end_pass(self) -> None:
        self._shape.clear()

    def rewind(self) -> None:
        self._shape.clear()

    def _groups(self, num_tokens: int) -> tuple[int, Tensor | None]:
        """How many groups of equal length share a budget each, and which tokens are no padding."""
        raise NotImplementedError

    def budget(self, top: Tensor, layer: int | None) -> Tensor:
        """Experts that each token adds to the budget of its group: [] or [tokens, 1]."""
        raise NotImplementedError

    def count(self, top: Tensor, probs: Tensor, layer: int | None) -> Tensor:
        groups, valid = self._groups(len(top))
        valid = torch.ones(len(top), dtype=torch.bool, device=top.device) if valid is None else valid.to(top.device)
        own = (self.budget(top, layer).expand(len(top), 1)[:, 0] * valid).double().view(groups, -1).sum(dim=1)
        left = own.round() - self.min_k * valid.view(groups, -1).sum(dim=1)
        others = top[:, self.min_k :].masked_fill(~valid[:, None], -1.0).reshape(groups, -1)
        order = others.argsort(dim=1, descending=True, stable=True)
        taken = torch.arange(others.shape[1], device=top.device) < left[:, None]
        taken = torch.zeros_like(taken).scatter(1, order, taken).view(len(top), -1)
        return self.min_k + (taken & valid[:, None]).sum(dim=-1)


@dataclass(frozen=True)
class SeqTopK(_Budget):
    """One budget for a sequence: of all experts of its T tokens, the T k most probable.

    Wen et al. 2025, "Route experts by sequence, not by token" (arXiv:2511.06494), there for training and fine-tuning;
    each token gets one expert at least, and k + 2 at most.

    Which experts a token gets depends on the tokens *after* it, so that the rule is for texts that are read at once. It
    refuses a pass that goes on with a sequence, as decoding does. (The paper's online form gives the m-th token what
    is left of m k; since what was spent cannot be taken back, that is k for every token.) Padding, by the attention
    mask, takes nothing from the budget and adds nothing to it.

    Parameters
    ----------
    k : float
        Mean number of experts; where T k is no whole number, the nearest.
    """

    k: Level = 4.0

    level_name = "k"

    def _check_level(self, level: float) -> None:
        _check_mean(self, "k", level)

    def begin_pass(self, shape: tuple[int, int], past: Any, valid: Tensor | None) -> None:
        if not isinstance(past, int) or past:
            raise ValueError(
                f"{self!r} divides the budget of a whole sequence, and this pass goes on with one, as decoding does: "
                f"read texts in one pass, or generate under a rule that looks at one token, such as Threshold."
            )
        super().begin_pass(shape, past, valid)

    def _groups(self, num_tokens: int) -> tuple[int, Tensor | None]:
        if not self._shape:
            return 1, None
        (shape,) = self._shape
        _check_tokens(self, shape, num_tokens)
        return shape.batch, None if shape.valid is None else shape.valid.flatten()

    def budget(self, top: Tensor, layer: int | None) -> Tensor:
        return self.level_for(top)


@dataclass(frozen=True)
class AllocMoE(_Budget):
    """A budget for each layer, divided among the tokens of a pass: one expert each, the others by probability.

    Liu et al. 2026 (arXiv:2604.08133): "Alloc-T" with one expert for every token, and, if `ks` differ, the budgets of
    "Alloc-L", which `bhlib.rival_fits.allocate_layers` finds.

    All tokens of a pass share the budget, whatever their sequences: in decoding those of a batch, and a sequence alone
    has k experts at each step. So what a text gets depends on how it is batched, and on the tokens after it. Padding,
    by the attention mask, takes nothing from the budget and adds nothing to it.

    Parameters
    ----------
    ks : float or sequence of float
        Mean number of experts in each MoE layer, in order of depth; one number for all layers.
    """

    ks: Any = 4.0

    def __post_init__(self) -> None:
        ks = tuple(self.ks) if isinstance(self.ks, Sequence) else self.ks
        object.__setattr__(self, "ks", ks)
        super().__post_init__()
        for k in ks if isinstance(ks, tuple) else (ks,):
            _check_mean(self, "ks", k)
        if ks == ():
            raise ValueError("ks must be one number, or one for each MoE layer, got ().")

    def check_model(self, num_layers: int, num_experts: int) -> None:
        super().check_model(num_layers, num_experts)
        if isinstance(self.ks, tuple) and num_layers != len(self.ks):
            raise ValueError(
                f"ks has {len(self.ks)} entries for a model of {num_layers} MoE layers: give one for each layer."
            )

    def _groups(self, num_tokens: int) -> tuple[int, Tensor | None]:
        if not self._shape:
            return 1, None
        (shape,) = self._shape
        _check_tokens(self, shape, num_tokens)
        return 1, None if shape.valid is None else shape.valid.flatten()

    def budget(self, top: Tensor, layer: int | None) -> Tensor:
        if not isinstance(self.ks, tuple):
            return torch.tensor(float(self.ks), dtype=top.dtype, device=top.device)
        if layer is None or not 0 <= layer < len(self.ks):
            raise ValueError(f"layer must lie in 0..{len(self.ks) - 1} for ks={self.ks}, got {layer}.")
        return torch.tensor(float(self.ks[layer]), dtype=top.dtype, device=top.device)


def _check_mean(rule: _Budget, name: str, mean: float) -> None:
    """Raise if no token could be given so many experts on average."""
    if isinstance(mean, bool) or not isinstance(mean, numbers.Real) or not rule.min_k <= mean <= rule.max_k:
        raise ValueError(
            f"{name} must lie between min_k={rule.min_k} and max_k={rule.max_k}, since it is a mean of numbers of "
            f"experts, got {mean!r}."
        )


def _check_tokens(rule: _Budget, shape: PassShape, num_tokens: int) -> None:
    if num_tokens != shape.batch * shape.length:
        raise ValueError(
            f"{rule!r} was told of a pass of {shape.batch} x {shape.length} tokens, and a layer routes {num_tokens}: "
            f"use it with models whose layers see all tokens of a pass."
        )
