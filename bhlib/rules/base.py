"""What every rule is: its question, its bounds, and what follows from its answer."""

import numbers
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from bhlib import kernels
from bhlib.norms import LayerGuess
from bhlib.procedures import is_whole
from bhlib.rules.routing import Forms, Routing, mark_dropped
from bhlib.weighting import find_weighting, probabilities

#: One number, or one for each sequence of a batch.
Level = float | Sequence[float]


@dataclass(frozen=True)
class Rule:
    """Base of all rules. Subclasses write `select`; everything else follows.

    A rule of your own is a frozen dataclass with one method::

        @dataclass(frozen=True)
        class AboveAverage(ProbabilityRule):
            factor: float = 4.0  # keep the experts whose probability is above `factor` times the mean of all
            level_name = "factor"

            def count(self, top, probs, layer):
                return (top > self.level_for(top) / probs.shape[-1]).sum(dim=-1)

        with RoutingPatch(model, AboveAverage(factor=3.0, max_k=16)) as patch: ...

    One entry in `bhlib.rules.names` brings it into the sweep command and into every figure that compares rules.

    Parameters
    ----------
    min_k, max_k : int
        Bounds on the number of experts per token, 0 <= min_k <= max_k. If a rule asks for fewer than `min_k`,
        the next best are added; if for more than `max_k`, only the best are kept.

    Attributes
    ----------
    level_name : str or None
        The field that gives more experts or fewer, such as `alpha` of `BH`: the rule's level. None if there is none.

    Notes
    -----
    A level is one number, or one for each sequence of a batch. The tokens of a call are then divided among the numbers,
    the first of as many equal parts at the first level and so on, as the rows of a batch follow each other; every
    sequence is routed as it would be alone. A rule that reads its level with `level_for`, and not from the field, can
    do this, and in compiled code its level moves (`at`) without a new compilation.
    """

    min_k: int = field(default=1, kw_only=True)
    max_k: int = field(default=8, kw_only=True)
    _level_tensors: dict = field(default_factory=dict, init=False, repr=False, compare=False)

    level_name: ClassVar[str | None] = None

    #: Whether the experts that it keeps are always the best-scored ones.
    is_prefix: ClassVar[bool] = False

    _upper_bound = "max_k"  # what the user calls the largest number of experts

    def __post_init__(self) -> None:
        for name in ("min_k", "max_k"):
            value = getattr(self, name)
            if not is_whole(value):
                raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}.")
            object.__setattr__(self, name, int(value))
        if self.min_k < 0:
            raise ValueError(f"min_k must be 0 or more, got {self.min_k}; 1 is the usual choice.")
        if self.max_k < 1:
            raise ValueError(f"max_k must be 1 or more, got {self.max_k}.")
        if self.min_k > self.max_k:
            raise ValueError(
                f"min_k must not exceed max_k, got min_k={self.min_k} and max_k={self.max_k}: "
                f"lower min_k or raise max_k."
            )
        self._settle_level()

    @property
    def level(self) -> Any:
        """The level: a number, a tuple with one for each sequence of a batch, or None for a rule without."""
        return None if self.level_name is None else getattr(self, self.level_name)

    def at(self, level: Level) -> Self:
        """The same rule at another level, one number or one for each sequence of a batch.

        What this rule has computed ahead from its level, the new one has too.

        Raises
        ------
        TypeError
            If the rule has no level. A level that it does not take is refused as when a rule is made.
        """
        if self.level_name is None:
            raise TypeError(f"{self!r} has no level to move: make another {type(self).__name__} and use that.")
        changed: dict[str, Any] = {self.level_name: level}
        moved = replace(self, **changed)
        moved._prepare_like(self)
        return moved

    def level_for(self, values: Tensor) -> Tensor:
        """The level as a tensor, to be compared with `values` [tokens, ...] in their dtype.

        Returns
        -------
        Tensor [] or [tokens, 1]
            The latter if the level differs by sequence.

        Raises
        ------
        ValueError
            If the tokens cannot be divided among the levels.
        """
        level = self._level_tensor(values.dtype, values.device)
        return level if level.dim() == 0 else by_token(level, len(values))[:, None]

    def _level_tensor(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """What depends on the level, as a tensor that is kept: [...] for one level, [levels, ...] for several."""
        key = dtype, str(device)
        if key not in self._level_tensors:
            if torch.compiler.is_compiling():  # a tensor of the trace holds no values that could be kept
                return torch.tensor(self._level_values(), dtype=dtype, device=device)
            with torch.inference_mode(False):  # else it could not be used in training later
                self._level_tensors[key] = torch.tensor(self._level_values(), dtype=dtype, device=device)
        return self._level_tensors[key]

    def _level_values(self) -> Any:
        """The numbers in `_level_tensor`."""
        return self.level

    def _prepare_like(self, other: Self) -> None:
        """Compute ahead what another rule of this kind has."""
        for dtype, device in other._level_tensors:
            self._level_tensor(dtype, torch.device(device))

    def _settle_level(self) -> None:
        """Check the level, and keep it."""
        if self.level_name is not None:
            object.__setattr__(self, self.level_name, self._checked(self.level))

    def _checked(self, level: Any) -> Any:
        """A level as it is kept: one number as it is, several as a tuple of floats."""
        several = isinstance(level, Sequence) and not isinstance(level, str)
        if not several and getattr(level, "ndim", 0) != 1:  # of an array or a tensor
            self._check_level(level)
            return level
        levels = level.tolist() if hasattr(level, "tolist") else level
        if not levels:
            raise ValueError(
                f"{self.level_name} must be one number, or one for each sequence of a batch, got {level!r}."
            )
        for one in levels:
            self._check_level(one)
        return tuple(map(float, levels))

    def _check_level(self, level: float) -> None:
        """Raise if this is no level of the rule."""
        if isinstance(level, bool) or not isinstance(level, numbers.Real):
            raise TypeError(f"{self.level_name} must be a number, got {level!r} of type {type(level).__name__}.")

    def select(self, router_logits: Tensor, scores: Tensor, layer: int | None) -> tuple[Tensor, Tensor]:
        """Rank the experts and say how many to keep.

        Parameters
        ----------
        router_logits : Tensor [tokens, experts]
            Logits in the model's dtype.
        scores : Tensor [tokens, experts], float32 or wider
            What the model ranks its experts by (`bhlib.weighting.Weighting.scores`).
        layer : int or None
            Index of the MoE layer, for rules whose parameters differ by layer.

        Returns
        -------
        order : Tensor [tokens, max_k], int64
            Experts, best first.
        counts : Tensor [tokens], int64
            How many of them to keep, between min_k and max_k.
        """
        raise NotImplementedError(f"{type(self).__name__} has to define select() or count().")

    def __call__(
        self,
        router_logits: Tensor,
        layer: int | None = None,
        *,
        weighting: str = "softmax",
        temperature: float = 1.0,
        log_norms: Tensor | None = None,
    ) -> Routing:
        """Route tokens: router logits [tokens, experts] in any float dtype -> `Routing`.

        `weighting` is a name in `bhlib.weighting.WEIGHTINGS`, and where that divides by a sum, it is the sum of what is
        kept; or what `bhlib.weighting.of_top` makes of such a name, by which a patch routes: weights are then those
        among the best `max_k`, kept or not. `temperature` divides the logits that the weights are made of. `log_norms`
        [tokens, experts] is added to the logits that experts are selected by, and to no others (`bhlib.norms`).
        """
        return self._route(router_logits, layer, weighting, temperature, -1, log_norms)

    def _route(
        self,
        router_logits: Tensor,
        layer: int | None,
        weighting: str,
        temperature: float,
        empty: int,
        log_norms: Tensor | None = None,
    ) -> Routing:
        """A call, with this number in an empty slot."""
        self.check_num_experts(router_logits.shape[-1])
        convention = find_weighting(weighting)
        scores = convention.scores(router_logits, temperature)
        if log_norms is None:
            order, counts = self.select(router_logits, scores, layer)
        else:
            looked_at = router_logits + log_norms
            order, counts = self.select(looked_at, convention.scores(looked_at, temperature), layer)
        kept = torch.arange(order.shape[-1], device=order.device) < counts[:, None]
        weights = convention.weigh(scores, order, kept, are_best=self.is_prefix and log_norms is None)
        return Routing(weights, order.masked_fill(~kept, empty), counts)

    def prepare(self, num_experts: int, layer: int, device: torch.device) -> None:
        """Compute ahead what a call or `fused` looks up, so that no compiler has to see it computed."""
        if self.level_name is not None:
            self._level_tensor(torch.float32, device)

    def fused(
        self,
        router_logits: Tensor,
        layer: int | None = None,
        *,
        weighting: str = "softmax",
        temperature: float = 1.0,
        norms: LayerGuess | None = None,
    ) -> Routing:
        """The same routing, with the same options, by a kernel where rule and device have one, else in torch.

        A kernel takes sums in another order: weights agree to 1e-5, and a statistic so close to its threshold that
        rounding decides may fall on the other side. With `norms` the logarithms of the norms that they guess are added
        to the logits that experts are selected by.
        """
        forms = self._by_kernel(router_logits, layer, weighting, temperature, torch.float32, True, norms=norms)
        if forms is None or forms.exact is None:
            log_norms = None if norms is None else norms.log_norms(router_logits)
            return self(router_logits, layer, weighting=weighting, temperature=temperature, log_norms=log_norms)
        empty = forms.experts == router_logits.shape[-1]
        return Routing(forms.exact, forms.experts.masked_fill(empty, -1), forms.counts)

    def forms(
        self,
        router_logits: Tensor,
        layer: int | None = None,
        *,
        weighting: str = "softmax",
        temperature: float = 1.0,
        dtype: torch.dtype,
        exact: bool = False,
        fused: bool = False,
        own_k: int = 0,
        norms: LayerGuess | None = None,
    ) -> Forms:
        """A call, in the form in which a model takes its answer.

        Parameters
        ----------
        dtype : torch.dtype
            Of the weights for the model.
        exact : bool
            Whether to give the weights as they are computed too.
        fused : bool
            Whether a kernel may route, as in `fused`.
        own_k : int
            The model's own top-k, if what is dropped of it is to be marked (`bhlib.rules.routing.mark_dropped`).
        norms : LayerGuess, optional
            How large the outputs of the experts are (`bhlib.norms`): experts are selected by weight times norm.
        """
        forms = None
        if fused:
            forms = self._by_kernel(router_logits, layer, weighting, temperature, dtype, exact, own_k, norms)
        if forms is not None:
            return forms
        num_experts = router_logits.shape[-1]
        log_norms = None if norms is None else norms.log_norms(router_logits)
        weights, experts, counts = self._route(router_logits, layer, weighting, temperature, num_experts, log_norms)
        if own_k:
            is_prefix = self.is_prefix and self.max_k <= own_k and log_norms is None
            options: dict[str, Any] = {"weighting": weighting, "temperature": temperature, "is_prefix": is_prefix}
            weights, experts, exact_weights = mark_dropped(experts, router_logits, own_k, **options)
            return Forms(weights.to(dtype), experts, counts, exact_weights if exact else None)
        return Forms(weights.to(dtype), experts, counts, weights if exact else None)

    def _by_kernel(
        self,
        router_logits: Tensor,
        layer: int | None,
        weighting: str,
        temperature: float,
        dtype: torch.dtype,
        exact: bool,
        own_k: int = 0,
        norms: LayerGuess | None = None,
    ) -> Forms | None:
        """`forms` of one launch of the routing kernel.

        None if it has none for the rule, weights or device, or a gradient is wanted.
        """
        if kernels.gradients_wanted(router_logits) or own_k and norms is None and self.max_k > own_k:
            return None
        code, num_experts = find_weighting(weighting).kernel, router_logits.shape[-1]
        if code is None or router_logits.dtype == torch.float64:
            return None
        form = self.kernel_cuts(num_experts, layer, router_logits.device)
        if form is None:
            return None
        from bhlib.kernels.routing import bh_route  # imports Triton, which not everybody has

        statistic, exclude_top, cuts = form
        if cuts.dim() == 2:
            tokens_each(len(router_logits), len(cuts))
        more = exact and (dtype != torch.float32 or own_k > 0)
        weights, experts, counts, *full = bh_route(
            router_logits,
            cuts,
            statistic=statistic,
            exclude_top=exclude_top,
            min_k=self.min_k,
            max_k=self.max_k,
            weighting=code,
            temperature=temperature,
            weights_dtype=dtype,
            empty=num_experts,
            exact=more,
            own_k=own_k,
            norms=None if norms is None else norms.norms,
            near=0 if norms is None else norms.near,
        )
        return Forms(weights, experts, counts, full[0] if more else weights if exact else None)

    def kernel_cuts(self, num_experts: int, layer: int | None, device: torch.device) -> tuple[str, int, Tensor] | None:
        """What the routing kernel compares with what (`bhlib.kernels.routing.cut_table`).

        None if it cannot run on the device, or cannot decide as the rule does: as most rules.
        """
        return None

    def rewind(self) -> None:
        """Forget earlier passes; called whenever the rule is put into a model. Most rules remember none."""

    def begin_pass(self, shape: tuple[int, int], past: Any, valid: Tensor | None) -> None:
        """Called before each forward pass, of a rule that overrides it and `end_pass`. Most rules look at one token.

        Parameters
        ----------
        shape : (int, int)
            Sequences and tokens of each; the rows that a call routes are these, sequence by sequence.
        past : int or Tensor [], int64
            Tokens of a cache that the pass goes on with.
        valid : Tensor [batch, length], bool, or None
            False for padding, by the attention mask; None without a mask.
        """

    def end_pass(self) -> None:
        """Called after each forward pass of the model that comes to its end. Most rules have no use for it."""

    def check_model(self, num_layers: int, num_experts: int) -> None:
        """Raise if the rule cannot route a model of this many MoE layers and experts."""
        self.check_num_experts(num_experts)

    def check_num_experts(self, num_experts: int) -> None:
        """Raise if the rule cannot work with this many experts."""
        if self.max_k > num_experts:
            name, value = self._upper_bound, getattr(self, self._upper_bound)
            mend = f"{num_experts} at most" if isinstance(value, tuple) else f"{name}={num_experts} to allow them all"
            raise ValueError(
                f"{name} must not exceed the number of experts, got {name}={value} for {num_experts} experts: "
                f"use {mend}."
            )


@dataclass(frozen=True)
class PrefixRule(Rule):
    """A rule that keeps the best-scored experts of a token: subclasses say how many.

    Scores are what the model ranks by, which for some families are raw logits: a rule that looks at their size is a
    `ProbabilityRule`.
    """

    is_prefix = True

    def select(self, router_logits: Tensor, scores: Tensor, layer: int | None) -> tuple[Tensor, Tensor]:
        top, order = torch.topk(scores, self.max_k, dim=-1)
        return order, self.count(top, scores, layer).clamp(self.min_k, self.max_k)

    def count(self, top: Tensor, scores: Tensor, layer: int | None) -> Tensor:
        """Number of experts per token [tokens] int64, from the sorted best scores `top` [tokens, max_k]."""
        raise NotImplementedError(f"{type(self).__name__} has to define count().")


@dataclass(frozen=True)
class ProbabilityRule(PrefixRule):
    """A rule that counts experts by their probabilities, the softmax of the logits at temperature 1.

    So a temperature changes the weights of the kept experts and not their number, as for `BH`; and a rule means the
    same for models that rank their experts by logits (``softmax_selected``), or whose weights are no softmax.
    """

    def select(self, router_logits: Tensor, scores: Tensor, layer: int | None) -> tuple[Tensor, Tensor]:
        order = torch.topk(scores, self.max_k, dim=-1).indices
        probs = probabilities(router_logits)
        return order, self.count(probs.gather(-1, order), probs, layer).clamp(self.min_k, self.max_k)

    def count(self, top: Tensor, probs: Tensor, layer: int | None) -> Tensor:
        """Number of experts per token [tokens] int64.

        Parameters
        ----------
        top : Tensor [tokens, max_k]
            Probabilities of the best experts, largest first.
        probs : Tensor [tokens, experts]
            Probabilities of all.
        layer : int or None
        """
        raise NotImplementedError(f"{type(self).__name__} has to define count().")


@dataclass(frozen=True)
class TopK(PrefixRule):
    """Static top-k, the model's own rule: the same `k` for every token.

    ``TopK(8)`` on a model with ``num_experts_per_tok=8`` gives the model's own outputs, bit for bit.
    """

    k: int = 8

    _upper_bound = "k"

    def __post_init__(self) -> None:
        if not is_whole(self.k) or self.k < 1:
            raise ValueError(f"k must be an int of 1 or more, got {self.k!r}.")
        for name in ("k", "min_k", "max_k"):
            object.__setattr__(self, name, int(self.k))

    def count(self, top: Tensor, scores: Tensor, layer: int | None) -> Tensor:
        return torch.full(top.shape[:1], self.k, device=top.device)


def each(level: Any) -> tuple:
    """The numbers of a level: those of several, or the one."""
    return level if isinstance(level, tuple) else (level,)


def by_token(values: Tensor, num_tokens: int) -> Tensor:
    """What differs by sequence [sequences, ...], for each token of a batch [num_tokens, ...]."""
    return values.repeat_interleave(tokens_each(num_tokens, len(values)), dim=0)


def tokens_each(num_tokens: int, num_levels: int) -> int:
    """How many tokens each of several levels is for.

    Raises
    ------
    ValueError
        If the tokens cannot be divided among the levels.
    """
    if num_tokens % num_levels:
        raise ValueError(
            f"{num_tokens} tokens cannot be divided among {num_levels} levels: give one level for each sequence of the "
            f"batch, or a single one for all."
        )
    return num_tokens // num_levels
