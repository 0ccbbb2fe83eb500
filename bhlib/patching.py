"""Patch the routers of a model with a rule, or watch what it would do; restore them.

    with BHRoutingIntegration(model, alpha=0.05) as bh:
        model.generate(**inputs)
        print(bh.get_routing_stats())

The patch gives each router a forward that computes its logits and leaves the rest to the rule, or, where a router has
to run itself, adds a forward hook that replaces its weights and indices (`bhlib.router_hooks`). And it names the
pair-wise twin of the model's experts implementation in its configuration (`bhlib.experts`). Nothing else is touched,
and all is taken back when the block ends, however it ends. A copy, a pickle or a saved checkpoint of a patched model is
the plain model.
"""

import inspect
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

import pandas as pd
import torch
from torch import Tensor, nn

from bhlib import experts as pairwise
from bhlib import kernels as triton_kernels
from bhlib.compensation import Compensation
from bhlib.compiled_passes import enroll, record
from bhlib.discovery import (
    MoELayer,
    as_scored,
    find_body,
    find_moe_layers,
    implementation_of,
    implementations_changed,
    name_of,
)
from bhlib.explain import explain
from bhlib.hooks import PrivateHooks
from bhlib.norms import OutputNorms
from bhlib.passes import PassNote, PassReader, find_cache, is_packed, shape_of, special_tokens
from bhlib.penalties import load_balancing_loss
from bhlib.pvalues import PValueMaker, check_logits, check_temperature, make_pvalues
from bhlib.recorded_passes import RunningPass
from bhlib.records import MAX_RECORDED_TOKENS, Records
from bhlib.router_hooks import CompensatedForward, RouterForward, RouterHook, Seen
from bhlib.rules import BH, Forms, Level, Routing, Rule
from bhlib.stats import RoutingStats
from bhlib.weighting import WEIGHTINGS, of_model

MODES = ("patch", "analyze")

#: How long a patch waits for other threads to notice that it is being taken back.
PATIENCE_SECONDS = 60.0

#: Routers under a patch or an analysis now: model code that is patched twice would route twice. The patches are held
#: weakly, since they hold the routers; the hooks in the model keep a patch alive as long as the model.
_patched_routers: WeakKeyDictionary[nn.Module, "weakref.ref[RoutingPatch]"] = WeakKeyDictionary()


class RoutingPatch:
    """Route a model by a rule, or watch what the rule would do.

    In training, gradients flow through the weights of the experts that the rule selected, to the router, to those
    experts and to all below; the decision itself has none. The Triton kernels, which have no backward, stay away where
    gradients are wanted: on a CUDA device `bhlib.sorted_pairs` computes the selected experts then, in the place of
    ``grouped_mm``, or any other implementation that the model has, over the selected pairs; on a CPU the loop has a
    backward. Modules in training mode are computed without kernels even where no gradient is wanted, so that gradient
    checkpointing, which runs layers twice, selects the same experts twice, with the same bits, and counts them once.
    Move the level after ``backward()``. The load-balancing loss that transformers adds under
    ``output_router_logits=True`` does not know the rule: it takes the ``num_experts_per_tok`` largest of a token's
    logits, and so balances the model's own top-k, whatever was selected. `load_balancing_loss` is for what was.

    Parameters
    ----------
    model : nn.Module
        A transformers MoE model (`find_moe_layers`).
    rule : Rule
        Any rule of `bhlib.rules`.
    temperature : float
        Divides the logits in the softmax that the weights are read from.
    mode : {"patch", "analyze"}
        ``"analyze"`` leaves every output of the model untouched, bit for bit, and records what the rule would select.
    collect_stats : bool
        Whether to record; without, a patched forward pass does no work beyond the routing itself.
    max_recorded_tokens : int or None
        Bound on the tokens whose decisions are kept row by row (`bhlib.records`); None keeps all, 0 none. What comes
        after is in the statistics, which are complete anyway, and reading the rows warns that they are not.
    record_logits : bool
        Whether to keep the router logits with the rows, for `explain`. They take the room of all experts: 2 kB more
        per token for 16 layers of 64 experts in bfloat16, 4 kB in float32 (`bhlib.records`).
    weights : str
        ``"model"`` (the default) for the weights that the model itself gives to the best `max_k` experts of a token:
        what the rule drops of them is missing, and changes no weight of those kept. A model that divides weights by
        their sum (``norm_topk_prob``) divides by that of these `max_k`. Where `max_k` is above its own top-k, the model
        has no such weights, and they are computed as by the convention's name: let `max_k` be its own top-k.
        Or one of `bhlib.weighting.WEIGHTINGS`: that convention, computed again on what is kept, so that weights which
        are divided by their sum (``"normalized"``) sum to 1, and are the larger the more is dropped.
    kernels : bool or "auto"
        Whether something of `bhlib` may compute: on a CUDA device `bhlib.kernels` the routing and the experts, in half
        precision and without gradients, and `bhlib.sorted_pairs` the experts with gradients; on a CPU the experts.
        ``"auto"`` (the default) lets them, unless the rule is static top-k with the model's own k, or the model's
        experts implementation is not in `bhlib.experts.REPLACEABLE`. False always uses the model's own implementation,
        so that a pass in which the rule selects exactly the model's own experts gives the model's own logits, bit for
        bit; with kernels that holds on a CPU, and on CUDA up to rounding. True demands those for CUDA, and refuses a
        machine or a model that cannot use them.
    compensation : Compensation, optional
        What stands in for the experts of the model's own top-k that the rule drops (`bhlib.compensation`). Whatever the
        convention, weights are then those that the model itself would give. In analyze mode it has no part.
    norms : OutputNorms, optional
        How large the outputs of the experts are (`bhlib.norms`): the rule then selects by weight times norm, whatever
        the rule. The weights of what it selects stay those of the model.

    Attributes
    ----------
    layers : list of MoELayer
    records : Records
    """

    def __init__(
        self,
        model: nn.Module,
        rule: Rule,
        *,
        temperature: float = 1.0,
        mode: str = "patch",
        collect_stats: bool = True,
        max_recorded_tokens: int | None = MAX_RECORDED_TOKENS,
        record_logits: bool = False,
        weights: str = "model",
        kernels: bool | str = "auto",
        compensation: Compensation | None = None,
        norms: OutputNorms | None = None,
    ) -> None:
        if kernels not in (True, False, "auto"):
            raise ValueError(f"kernels must be True, False or 'auto', got {kernels!r}.")
        if mode not in MODES:
            raise ValueError(
                f"mode must be one of {MODES}, got {mode!r}: 'patch' routes by the rule, 'analyze' only watches."
            )
        if weights not in ("model", *WEIGHTINGS):
            raise ValueError(f"weights must be 'model' or one of {tuple(WEIGHTINGS)}, got {weights!r}.")
        if record_logits and not collect_stats:
            raise ValueError("record_logits=True keeps the logits with the records: leave collect_stats=True.")
        check_temperature(temperature)
        self.model, self._rule, self.temperature, self.mode = model, rule, temperature, mode
        self.collect_stats, self.record_logits, self.weights = collect_stats, record_logits, weights
        self.compensation, self.norms = compensation, norms
        self.layers = find_moe_layers(model)
        self._check(rule)
        if compensation is not None:
            self._check_compensation(compensation)
        if norms is not None:
            self._check_norms(norms)
        self.kernels = mode == "patch" and self._choose_kernels(kernels)
        first = self.layers[0]
        reader = PassReader(*special_tokens(model))
        self.records = Records(len(self.layers), first.num_experts, first.top_k, max_recorded_tokens, reader)
        self._hooks = PrivateHooks()
        self._implementations = ExitStack()  # how to set them back
        self._local = threading.local()
        self._body = find_body(model, self.layers)
        self._input_names = tuple(inspect.signature(self._body.forward).parameters)
        self._seen = [Seen(layer) for layer in self.layers]
        self._number = enroll(self)
        self._is_open = False  # to forward passes
        self._is_followed = False  # by a compiler: the pass that is running
        self._running: set[threading.Thread] = set()

    # -- patching and restoring ------------------------------------------------------------------------------

    @property
    def rule(self) -> Rule:
        """The rule that routes. Another can be set while the patch is in place; the next pass goes by it."""
        return self._rule

    @rule.setter
    def rule(self, rule: Rule) -> None:
        self._check(rule)
        if self.is_patched:
            rule.rewind()
            self._prepare(rule)
        self._rule = rule
        self._compiles_whole = self._expects_whole_graphs()

    @property
    def level(self) -> Any:
        """The level of the rule: one number, or one for each sequence of a batch; None if the rule has none.

        It can be set while the patch is in place. The next pass goes by it, and nothing is compiled anew.
        """
        return self._rule.level

    @level.setter
    def level(self, level: Level) -> None:
        self.rule = self._rule.at(level)

    @property
    def is_patched(self) -> bool:
        """Whether hooks are in place now."""
        return bool(self._hooks)

    @property
    def compensates(self) -> bool:
        """Whether something is added for dropped experts."""
        return self.compensation is not None and self.mode == "patch"

    def patch_model(self, *, rewind: bool = True) -> "RoutingPatch":
        """Put the hooks in place; returns self. Raises RuntimeError if the model is patched already.

        The rule forgets earlier passes, unless `rewind` is False.
        """
        for layer in self.layers:
            if layer.router in _patched_routers:
                raise RuntimeError(
                    f"{type(self.model).__name__} is patched already (by {_patched_routers[layer.router]()!r}): "
                    f"call unpatch_model() on that patch, or leave its `with` block, first."
                )
        try:
            if rewind:
                self._rule.rewind()
            self._is_open, self._rule_of_pass = True, self._rule
            self._compiles_whole = self._expects_whole_graphs()
            self._ticket = torch.zeros(1, device=self.layers[-1].router.weight.device)
            for layer in self.layers:
                _patched_routers[layer.router] = weakref.ref(self)
                self._hook_router(layer)
            if self.mode == "patch":
                twins = implementations_changed(self.layers, lambda name: pairwise.twin(name, self.kernels))
                self._implementations.enter_context(twins)
            if self.compensates:
                for layer in self.layers:
                    self._hook_experts(layer)
            self._prepare(self._rule)
            body = self._body
            self._hooks.add(body, body.register_forward_pre_hook(self._enter, with_kwargs=True))
            self._hooks.add(body, body.register_forward_hook(self._leave, with_kwargs=True, always_call=True))
            _forget_compiled_code()
        except BaseException:
            self.unpatch_model()
            raise
        return self

    def unpatch_model(self) -> None:
        """Take everything back. Does nothing if the model is not patched.

        A forward pass that another thread is running meanwhile raises a RuntimeError there, at its next router; this
        call waits until it has.
        """
        self._is_open = False
        deadline = time.monotonic() + PATIENCE_SECONDS
        others = self._running - {threading.current_thread()}
        while any(thread.is_alive() for thread in others & self._running) and time.monotonic() < deadline:
            time.sleep(0.001)
        self._running.clear()
        if self._hooks:
            _forget_compiled_code()
        self._hooks.remove()
        self._implementations.close()
        for layer in self.layers:
            if layer.router in _patched_routers and _patched_routers[layer.router]() is self:
                del _patched_routers[layer.router]

    def _choose_kernels(self, wanted: bool | str) -> bool:
        """Whether to use the kernels; raises if they are demanded and cannot be used."""
        if wanted == "auto":
            own_k = self._rule.min_k == self._rule.max_k == self.layers[0].top_k
            experts = [layer.experts for layer in self.layers]
            replaceable = all(implementation_of(module) in pairwise.REPLACEABLE for module in experts)
            return not own_k and replaceable and pairwise.can_be_faster(experts)
        if wanted:
            triton_kernels.demand({layer.name: layer.experts for layer in self.layers})
        return bool(wanted)

    def _check(self, rule: Rule) -> None:
        """Raise if a rule cannot route the model."""
        for num_experts in dict.fromkeys(layer.num_experts for layer in self.layers):
            rule.check_model(len(self.layers), num_experts)

    def _check_compensation(self, compensation: Compensation) -> None:
        """Raise if a compensation cannot stand in for experts of the model."""
        if not isinstance(compensation, Compensation):
            raise TypeError(
                f"compensation must be what bhlib.fit_compensation or bhlib.load_compensation gives, got "
                f"{compensation!r} of type {type(compensation).__name__}."
            )
        first = self.layers[0]
        if first.experts.num_experts != first.num_experts:
            raise ValueError(
                f"{type(self.model).__name__} is spread over processes by its experts, and each would add the "
                f"compensation: leave compensation out, or load the model without expert parallelism."
            )
        hidden_size = first.router.weight.shape[-1]
        compensation.check_model(name_of(self.model), len(self.layers), first.num_experts, hidden_size)

    def _check_norms(self, norms: OutputNorms) -> None:
        """Raise if norms are none, or those of another model's experts."""
        if not isinstance(norms, OutputNorms):
            raise TypeError(
                f"norms must be what bhlib.fit_norms or bhlib.load_norms gives, got {norms!r} of type "
                f"{type(norms).__name__}."
            )
        norms.check_model(name_of(self.model), len(self.layers), self.layers[0].num_experts)

    def _prepare(self, rule: Rule) -> None:
        """Let a rule compute ahead what it looks up."""
        for layer in self.layers:
            device = layer.router.weight.device
            rule.prepare(layer.num_experts, layer.index, device)
            if self.norms is not None:
                self.norms.prepare(layer.index, device)

    def _hook_router(self, layer: MoELayer) -> None:
        """Replace the forward of a router, or look at what it returns where it has to run, or is not its class's."""
        router, seen = layer.router, self._seen[layer.index]
        if self.mode == "patch" and layer.linear and "forward" not in vars(router):
            self._hooks.replace_forward(router, RouterForward(self, seen))
        else:
            self._hooks.add(router, router.register_forward_hook(RouterHook(self, seen)))

    def _hook_experts(self, layer: MoELayer) -> None:
        """Replace the forward of a layer's experts by one that completes it, or complete what it gives."""
        assert self.compensation is not None
        experts = layer.experts
        forward = CompensatedForward(layer, self.compensation, self.kernels)
        if "forward" not in vars(experts):
            self._hooks.replace_forward(experts, forward)
        else:
            self._hooks.add(experts, experts.register_forward_hook(forward.complete))

    def _expects_whole_graphs(self) -> bool:
        """Whether a compiler can make one graph of a pass: no loop over experts, no rule that counts passes."""
        if type(self._rule).end_pass is not Rule.end_pass:
            return False
        experts = [layer.experts for layer in self.layers]
        if self.mode == "analyze":
            return all(implementation_of(module) not in (None, "eager") for module in experts)
        return self.kernels and all(triton_kernels.module_fits(m) and triton_kernels.weights_fit(m) for m in experts)

    def __enter__(self) -> "RoutingPatch":
        return self.patch_model()

    def __exit__(self, *exception) -> None:
        self.unpatch_model()

    # -- what happens in a forward pass ------------------------------------------------------------------------

    def route(self, layer: MoELayer, router_logits: Tensor, dtype: torch.dtype) -> Forms:
        """Apply the rule to one layer's logits [tokens, experts]; weights for the model in a dtype."""
        if router_logits.device.type == "cpu" and not torch.compiler.is_compiling():  # a device would be waited for
            check_logits(router_logits)
        router_logits = as_scored(router_logits, layer.narrows)
        self._check_repetition()
        return self._rule.forms(
            router_logits,
            layer.index,
            weighting=self._weighting(layer),
            temperature=self.temperature,
            dtype=dtype,
            exact=self.collect_stats,
            fused=self.kernels and not layer.router.training,  # to decide alike when checkpointing repeats the pass
            own_k=layer.top_k if self.compensates else 0,
            norms=None if self.norms is None else self.norms.layer(layer.index, router_logits.device),
        )

    def _weighting(self, layer: MoELayer) -> str:
        if self.weights != "model":
            return self.weights
        return of_model(layer.weighting, self._rule.max_k, layer.top_k)

    def _check_repetition(self) -> None:
        """Raise a RuntimeError if gradient checkpointing repeats a layer, and the rule may decide otherwise now."""
        if torch.compiler.is_compiling() or not _in_backward():
            return
        if self._rule is not self._rule_of_pass:
            raise RuntimeError(
                f"The rule was set to {self._rule!r} between a forward pass by {self._rule_of_pass!r} and its backward "
                f"pass, in which gradient checkpointing runs layers again: set rules and levels after backward()."
            )
        if type(self._rule).end_pass is not Rule.end_pass:
            raise RuntimeError(
                f"{type(self._rule).__name__} decides about a whole forward pass, and gradient checkpointing runs "
                f"layers again after its end: train without gradient checkpointing, or by a rule that looks at tokens "
                f"one by one."
            )

    def check_open(self) -> None:
        """Raise a RuntimeError if the patch was taken back since the forward pass began."""
        if not self._is_open:
            raise RuntimeError(
                f"The patch of {type(self.model).__name__} was taken back while another thread ran the model, and its "
                f"forward pass was given up: wait for the thread (join) before the `with` block ends."
            )

    def _can_be_followed(self) -> bool:
        """Whether a compiler that meets the beginning of a pass follows it to its end."""
        if not (torch.compiler.is_compiling() and self._compiles_whole):
            return False
        in_training = self.mode == "patch" and self.model.training  # where kernels stay away from the experts
        return not (in_training or triton_kernels.gradients_wanted(*self.model.parameters()))

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if getattr(module, "_is_replica", False):
            raise RuntimeError(
                f"{type(self.model).__name__} was patched before torch.nn.DataParallel copied it to several devices, "
                f"and its copies would route by the routers of the first: start one process for each device "
                f"(accelerate launch, torchrun), or show one device only (CUDA_VISIBLE_DEVICES=0)."
            )
        # For the routers and the end of this pass: a layer may also be compiled alone, in a pass that is not.
        self._is_followed = self._can_be_followed()
        if not self._is_followed:
            self._begin_pass(args, kwargs)

    def _leave(self, module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        if not (torch.compiler.is_compiling() and self._is_followed):
            self._end_pass(output)
            return
        self._is_followed = False
        if self.collect_stats:
            self._record_followed(args, kwargs, output)

    def _inputs(self, args: tuple, kwargs: dict) -> dict[str, Any]:
        return dict(zip(self._input_names, args, strict=False)) | kwargs if args else kwargs

    @torch.compiler.disable  # to count is not the compiler's business
    def _begin_pass(self, args: tuple, kwargs: dict) -> None:
        self._running.add(threading.current_thread())  # before the look whether the patch is open, or it might not wait
        self._local.current = None
        self.check_open()
        self._rule_of_pass = self._rule
        inputs = self._inputs(args, kwargs)
        if type(self._rule).begin_pass is not Rule.begin_pass:
            self._rule.begin_pass(*shape_of(inputs))
        if self.collect_stats:
            self._local.current = self.records.begin(self.records.reader.note(inputs), self._rule)

    @torch.compiler.disable
    def _end_pass(self, output: object) -> None:
        """`output` is None if an exception ends the pass."""
        self._running.discard(threading.current_thread())
        finished, self._local.current = getattr(self._local, "current", None), None
        if output is None:
            return
        self._rule.end_pass()
        if finished is not None:
            if not finished.routings:
                warnings.warn(
                    f"A forward pass of {type(self._body).__name__} ran none of the routers that were patched, so that "
                    f"nothing was routed: whoever replaces routers (an adapter, in its modules_to_save) has to do so "
                    f"before the model is patched.",
                    stacklevel=2,
                )
            self.records.end(finished)
            cache = _cache_of(output)
            if cache is not None and isinstance(finished.tokens, PassNote):
                self.records.reader.follow(finished.tokens, cache)

    def record(self, seen: "Seen", routing: Routing, router_logits: Tensor) -> None:
        """Record what a layer decided in the pass that is running."""
        layer = seen.layer
        logits = as_scored(router_logits, layer.narrows) if self.record_logits else None
        if torch.compiler.is_compiling() and self._is_followed:
            seen.routing, seen.logits = routing, logits
        else:
            self._record(layer, routing, logits)

    @torch.compiler.disable
    def _record(self, layer: MoELayer, routing: Routing, logits: Tensor | None) -> None:
        current = getattr(self._local, "current", None)
        if current is not None and layer.index in current.routings and not _is_running(self._body):
            current = self._local.current = None  # of a pass that was interrupted
        if current is not None:
            current.add(layer.index, routing, logits)
        elif not _in_backward():  # else gradient checkpointing repeats a pass that has been counted
            warnings.warn(
                f"{layer.name!r} was run outside a forward pass of {type(self._body).__name__}: its tokens are routed, "
                f"but not recorded. Call the model, or patch the part that you call.",
                stacklevel=2,
            )

    # -- the same where a compiler follows: nothing may be known to Python but what stays as it is --------------

    def _record_followed(self, args: tuple, kwargs: dict, output: object) -> None:
        """Record a pass that has come to its end, and forget what the compiler was shown of it."""
        inputs = self._inputs(args, kwargs)
        routings = {one.layer.index: one.routing for one in self._seen if one.routing is not None}
        logits = {one.layer.index: one.logits for one in self._seen if one.logits is not None}
        for one in self._seen:
            one.routing = one.logits = None
        cache, made = find_cache(inputs.values()), _cache_of(output)
        stays = made is None if cache is None else isinstance(cache.get_seq_length(), Tensor)
        if stays and not is_packed(inputs):
            record(self._number, self._ticket, inputs, cache, routings, logits)
        else:  # a cache that grows, and sequences in a row, give every pass another shape anyway
            self._record_by_python(inputs, made if cache is None else cache, routings, logits)

    @torch.compiler.disable
    def _record_by_python(
        self, inputs: dict[str, Any], cache: Any | None, routings: dict[int, Routing], logits: dict[int, Tensor]
    ) -> None:
        note = self.records.reader.note(inputs, cache)
        self.records.end(RunningPass(note, self._rule, routings, logits))

    def take(
        self, note: PassNote, keys: Tensor | None, routings: dict[int, Routing], logits: dict[int, Tensor]
    ) -> None:
        """Take in a pass that compiled code has run (`bhlib.compiled_passes`), on the cache with these keys."""
        if keys is not None:
            note.cached = self.records.reader.cached_at(keys)
        self.records.end(RunningPass(note, self._rule, routings, logits))

    # -- results -----------------------------------------------------------------------------------------------

    def get_routing_stats(self) -> RoutingStats:
        """Exact statistics of every token routed since the last reset, padding not counted."""
        about = {"mode": self.mode, "alpha": getattr(self._rule, "alpha", None)}
        return RoutingStats(self.records.stats(would=self.mode == "analyze") | about)

    def explain(self, token: int | tuple[int, int], layer: int) -> pd.DataFrame:
        """Why a recorded token got its experts in a layer: the table of `bhlib.explain.explain`, a row per expert.

        What is kept, and with which weights, is as it was routed; what the rule looked at is computed again from the
        logits of that moment, which ``record_logits=True`` has kept.

        Parameters
        ----------
        token : (int, int) or int
            ``(sequence, position)``, as in a row of ``records.to_frame()``: ``(0, 12)`` is the thirteenth token of the
            first sequence. Or the token's number among the rows of ``records.counts()``; -1 is the last one routed.
        layer : int
            MoE layer, from 0.

        Raises
        ------
        IndexError
            If there is no such token or layer.
        ValueError
            If logits were not recorded, the layer did not run, or several recorded tokens have that place (then their
            numbers are named).
        """
        logits, routing = self.records.find(token, layer)
        log_norms = None if self.norms is None else self.norms(logits[None], layer)[0]
        return explain(
            self.records.rule_of(token) or self._rule,
            logits,
            layer,
            weighting=self._weighting(self.layers[layer]),
            temperature=self.temperature,
            routing=routing,
            log_norms=log_norms,
        )

    def load_balancing_loss(self, router_logits: Sequence[Tensor], attention_mask: Tensor | None = None) -> Tensor:
        """How evenly the experts are used that the rule selects: `bhlib.penalties.load_balancing_loss`.

        Parameters
        ----------
        router_logits : sequence of Tensor [tokens, experts]
            By MoE layer: of the model's output, under ``output_router_logits=True``.
        attention_mask : Tensor [batch, length], optional
            0 for padding, which is left out.

        Raises
        ------
        ValueError
            If there are not as many logits as layers, or the rule decides about whole passes: give what
            `records` hold of a pass to `bhlib.penalties.load_balancing_loss` then.
        """
        if type(self._rule).end_pass is not Rule.end_pass:
            raise ValueError(
                f"{type(self._rule).__name__} decides about a whole forward pass, not from logits alone: use "
                f"bhlib.penalties.load_balancing_loss with the experts in records.passes."
            )
        pairs = zip(self.layers, router_logits, strict=True)
        with torch.no_grad():
            experts = [self.route(layer, logits, torch.float32).experts for layer, logits in pairs]
        return load_balancing_loss(router_logits, experts, attention_mask)

    def reset_stats(self) -> None:
        """Forget what was recorded."""
        self.records.reset()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self.model).__name__}, {self.rule!r}, mode={self.mode!r})"


class BHRoutingIntegration(RoutingPatch):
    """Benjamini–Hochberg routing of a model: each token gets the experts that are significant at level `alpha`.

    Parameters
    ----------
    model : nn.Module
        A transformers MoE model such as `OlmoeForCausalLM`.
    alpha : float, or a sequence of float
        Level of the procedure, in (0, 1): one, or one for each sequence of a batch.
    temperature : float
        Divides the logits in the softmax that the weights are read from, > 0.
    min_k, max_k : int
        Bounds on the number of experts per token; `max_k` may exceed the model's own top-k.
    mode : {"patch", "analyze"}
    collect_stats : bool
    pvalues : PValueMaker or str
        Where the p-values come from (`bhlib.pvalues`); ``"dirichlet"`` needs no calibration.
    method : str
        Multiple-testing procedure (`bhlib.procedures`).
    layer_weights : sequence of float, optional
        A factor per MoE layer on the odds of `alpha` (`bhlib.tuning.choose_layer_weights`).
    weights, max_recorded_tokens, record_logits, kernels, compensation, norms
        See `RoutingPatch`.

    Examples
    --------
    >>> from bhlib import BHRoutingIntegration, load_demo
    >>> model, tokenizer = load_demo()
    >>> inputs = tokenizer("def main():", return_tensors="pt")
    >>> with BHRoutingIntegration(model, alpha=0.05) as bh:
    ...     _ = model(**inputs)
    >>> bh.get_routing_stats()["top_k"]
    8
    """

    rule: BH

    def __init__(
        self,
        model: nn.Module,
        alpha: Level = 0.05,
        temperature: float = 1.0,
        min_k: int = 1,
        max_k: int = 8,
        mode: str = "patch",
        collect_stats: bool = True,
        *,
        pvalues: PValueMaker | str = "dirichlet",
        method: str = "bh",
        layer_weights: Sequence[float] | None = None,
        weights: str = "model",
        max_recorded_tokens: int | None = MAX_RECORDED_TOKENS,
        record_logits: bool = False,
        kernels: bool | str = "auto",
        compensation: Compensation | None = None,
        norms: OutputNorms | None = None,
    ) -> None:
        check_temperature(temperature)
        super().__init__(
            model,
            BH(alpha, make_pvalues(pvalues, temperature), method, layer_weights, min_k=min_k, max_k=max_k),
            temperature=temperature,
            mode=mode,
            collect_stats=collect_stats,
            weights=weights,
            max_recorded_tokens=max_recorded_tokens,
            record_logits=record_logits,
            kernels=kernels,
            compensation=compensation,
            norms=norms,
        )

    @property
    def alpha(self) -> float | tuple[float, ...]:
        """The level of the procedure: one number, or one for each sequence of a batch. Can be set as `level` can."""
        return self.level

    @alpha.setter
    def alpha(self, alpha: Level) -> None:
        self.level = alpha

    @property
    def min_k(self) -> int:
        return self.rule.min_k

    @property
    def max_k(self) -> int:
        return self.rule.max_k


def _cache_of(output: object) -> Any | None:
    """The key-value cache among what a forward returns."""
    return find_cache(output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else ())


def _is_running(module: nn.Module) -> bool:
    """Whether a method of a module is being run by this thread."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_locals.get("self") is not module:
        frame = frame.f_back
    return frame is not None


def _in_backward() -> bool:
    """Whether autograd is running this code: gradient checkpointing, that repeats a part of a forward pass."""
    return torch._C._current_graph_task_id() >= 0


def _forget_compiled_code() -> None:
    """Compiled code does not check whether hooks have come or gone since, so it must be compiled anew."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
