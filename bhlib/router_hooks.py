"""What a patch puts on one router: a hook that replaces its answer, or looks on; or a forward in place of its own.

And what it puts on the router's experts, if something stands in for those that are dropped.
"""

from typing import Protocol

import torch
from torch import Tensor, nn

from bhlib import kernels
from bhlib.compensation import Compensation
from bhlib.discovery import MoELayer, implementation_of, linear_logits
from bhlib.experts import is_twin
from bhlib.hooks import NewForward
from bhlib.rules import Forms, Routing


class Patch(Protocol):
    """What a hook asks of its patch (`bhlib.patching.RoutingPatch`)."""

    mode: str

    def check_open(self) -> None: ...

    def route(self, layer: MoELayer, router_logits: Tensor, dtype: torch.dtype) -> Forms: ...

    def record(self, seen: "Seen", routing: Routing, router_logits: Tensor) -> None: ...


class Seen:
    """What compiled code was shown of one layer while it was followed: nothing, before and after a pass."""

    routing: Routing | None = None
    logits: Tensor | None = None

    def __init__(self, layer: MoELayer) -> None:
        self.layer = layer


class RouterHook:
    """Forward hook of one router: replaces its weights and indices, or only looks on."""

    def __init__(self, patch: Patch, seen: Seen) -> None:
        self.patch, self.seen = patch, seen

    def __call__(self, router: nn.Module, args: tuple, output: tuple) -> tuple | None:
        router_logits, weights, _ = output
        routed = self.decide(router_logits, weights.dtype)
        return None if self.patch.mode == "analyze" else routed

    def decide(self, router_logits: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Route, and record: what the router is to return, with weights in a dtype."""
        patch, layer = self.patch, self.seen.layer
        patch.check_open()
        forms = patch.route(layer, router_logits, dtype)
        if forms.exact is not None:
            patch.record(self.seen, Routing(forms.exact, forms.experts, forms.counts), router_logits)
        implementation = implementation_of(layer.experts)
        if patch.mode == "patch" and not is_twin(implementation):
            raise RuntimeError(
                f"The experts implementation was set to {implementation!r} while the model was patched, and cannot "
                f"skip empty slots: set it before patching, or unpatch first."
            )
        return router_logits, forms.weights, forms.experts


class RouterForward(RouterHook, NewForward):
    """Forward of one router, in the place of its own: the logits, and the rule's weights and indices.

    The softmax and the top-k, which a hook would throw away, are never computed. For routers that are
    `MoELayer.linear`.
    """

    def __init__(self, patch: Patch, seen: Seen) -> None:
        RouterHook.__init__(self, patch, seen)
        NewForward.__init__(self, seen.layer.router)

    def __call__(self, hidden_states: Tensor) -> tuple:  # type: ignore[override]
        layer = self.seen.layer
        if not self.is_in_place:  # whoever wrapped it meanwhile still calls it
            return self.own(hidden_states)
        if layer.router.training:  # some add noise then
            router_logits, weights, _ = self.own(hidden_states)
            return self.decide(router_logits, weights.dtype)
        router_logits = linear_logits(layer.router, hidden_states)
        dtype = router_logits.dtype
        if not layer.casts:  # as its scores
            dtype = torch.float32 if layer.narrows else torch.promote_types(dtype, torch.float32)
        return self.decide(router_logits, dtype)


class CompensatedForward(NewForward):
    """Forward of a layer's experts, in the place of their own: theirs, and what stands in for dropped ones.

    Where the kernels compute the experts, they add it too, in the same launches.
    """

    def __init__(self, layer: MoELayer, compensation: Compensation, by_kernels: bool) -> None:
        super().__init__(layer.experts)
        self.layer, self.compensation = layer, compensation
        self.by_kernels = by_kernels and compensation.has_kernels

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        routing = top_k_index, top_k_weights
        if not self.is_in_place:  # whoever wrapped it meanwhile still calls it
            return self.own(hidden_states, *routing)
        if self.by_kernels and kernels.inputs_fit(self.layer.experts, hidden_states, top_k_weights):
            from bhlib.kernels.forward import experts_forward  # imports Triton, which not everybody has

            part = self.compensation.layer(self.layer.index, hidden_states)
            return experts_forward(self.layer.experts, hidden_states, *routing, missing=part)
        return self.complete(self.layer.experts, (hidden_states, *routing), self.own(hidden_states, *routing))

    def complete(self, experts: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """A forward hook, where the forward is not the class's: the output of the experts, and what is missing."""
        return self.compensation.layer(self.layer.index, output).complete(output, *args)
