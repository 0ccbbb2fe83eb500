"""`Replay`: the routing of one run, imposed on another."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bhlib.rules.base import Routing, Rule


@dataclass(frozen=True)
class Replay(Rule):
    """Impose the routing that was recorded in one run on another, forward pass by forward pass.

        with BHRoutingIntegration(model, alpha=0.05) as bh:
            model(**inputs)
        with RoutingPatch(model, Replay(bh.records)):
            model(**inputs)  # the same logits, bit for bit

    Whenever the rule is put into a model it begins with the first recorded pass (`rewind`), and goes on to the next one
    when a pass comes to its end; one that is aborted is repeated. Passes are told apart by their order alone: one
    thread at a time, and no gradient checkpointing, which runs layers again after the end of their pass.

    Parameters
    ----------
    records : Records
        What a patch has recorded, in either mode (`bhlib.records`).
    weights : {"model", "recorded"}
        ``"model"`` computes the weights of the recorded experts from the logits of the moment, by the model's
        convention; ``"recorded"`` imposes the recorded weights too.

    Raises
    ------
    ValueError
        If the recording was cut short by its bound, or has other layers, experts or tokens than the model is run on.
    RuntimeError
        If the model is run for more passes than were recorded.
    """

    records: Any = field(repr=False)
    weights: str = "model"
    _number: int = field(default=0, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.weights not in ("model", "recorded"):
            raise ValueError(f"weights must be 'model' or 'recorded', got {self.weights!r}.")
        if self.records.truncated:
            raise ValueError(
                f"The recording was cut short by max_recorded_tokens={self.records.max_tokens} and cannot be replayed: "
                f"record with max_recorded_tokens=None."
            )
        if not self.records.passes:
            raise ValueError("The recording is empty: run the model inside the patch first.")
        slots = [routing.experts.shape[-1] for one in self.records.passes for routing in one.routings.values()]
        object.__setattr__(self, "min_k", 0)
        object.__setattr__(self, "max_k", max(slots))

    def rewind(self) -> None:
        """Begin with the first recorded pass again."""
        object.__setattr__(self, "_number", 0)

    def end_pass(self) -> None:
        """Go on to the next recorded pass."""
        object.__setattr__(self, "_number", self._number + 1)

    def check_num_experts(self, num_experts: int) -> None:
        if num_experts != self.records.num_experts:
            raise ValueError(
                f"The routing of {self.records.num_experts} experts cannot be replayed on {num_experts}: "
                f"record it with the same model."
            )

    def check_model(self, num_layers: int, num_experts: int) -> None:
        super().check_model(num_layers, num_experts)
        if num_layers != self.records.num_layers:
            raise ValueError(
                f"The routing of {self.records.num_layers} MoE layers cannot be replayed on {num_layers}: "
                f"record it with the same model."
            )

    def _route(
        self,
        router_logits: Tensor,
        layer: int | None,
        weighting: str,
        temperature: float,
        empty: int,
        log_norms: Tensor | None = None,
    ) -> Routing:
        if self.weights == "model":
            return super()._route(router_logits, layer, weighting, temperature, empty, log_norms)
        self.check_num_experts(router_logits.shape[-1])
        weights, experts, counts = self._recorded(router_logits, layer)
        return Routing(weights, experts.masked_fill(experts < 0, empty), counts)

    def select(self, router_logits: Tensor, scores: Tensor, layer: int | None) -> tuple[Tensor, Tensor]:
        _, experts, counts = self._recorded(router_logits, layer)
        return experts.clamp(min=0), counts

    def _recorded(self, router_logits: Tensor, layer: int | None) -> Routing:
        """Decisions of a layer in the recorded pass that is being repeated, on the device of the logits."""
        number, passes = self._number, self.records.passes
        if number == len(passes):
            raise RuntimeError(
                f"The recording holds {len(passes)} forward passes, and MoE layer {layer} is run once more: record as "
                f"many passes as are replayed, or call rewind() to begin anew."
            )
        if layer not in passes[number].routings:
            raise ValueError(f"The recorded forward pass {number} has no MoE layer {layer}.")
        routing = passes[number].routings[layer]
        if len(routing.counts) != len(router_logits):
            raise ValueError(
                f"The recorded forward pass {number} routed {len(routing.counts)} tokens, and now there are "
                f"{len(router_logits)}: replay on the inputs that were recorded."
            )
        device = router_logits.device
        return Routing(
            routing.weights.to(device), routing.experts.to(device, torch.int64), routing.counts.to(device, torch.int64)
        )
