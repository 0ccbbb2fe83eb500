"""What stands in for dropped experts: the mean output of each, and a linear map of the hidden state that all share.

    compensation = fit_compensation(model, load_heldout("calibration"), rank=16)
    with BHRoutingIntegration(model, alpha=0.01, compensation=compensation): ...

For an expert e of its top-k that a rule drops, the model would have added ``w_e E_e(x)``. Under a compensation it adds
``w_e (m_e + U V x)``: a row of a table, weighted as the expert would have been, and one product of small rank for all
dropped experts of a token together. Where nothing is dropped nothing is added, not even a zero.

A routing says which experts were dropped, and with which weights (`bhlib.rules.routing.mark_dropped`).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, linear

from bhlib.layer_files import load_layers, save_layers


class LayerCompensation(NamedTuple):
    """What one layer adds for experts that were dropped.

    Attributes
    ----------
    means : Tensor [1 + experts, hidden]
        Zeros, and the mean output of each expert.
    down, up : Tensor [rank, hidden]
        The linear map, ``up.T @ down``; of rank 0 there is none.
    """

    means: Tensor
    down: Tensor
    up: Tensor

    @property
    def num_experts(self) -> int:
        return len(self.means) - 1

    def missing(self, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """What is to be added to the layer's output [tokens, hidden].

        Parameters
        ----------
        hidden_states : Tensor [tokens, hidden]
            What the experts were given.
        index, weights : Tensor [tokens, slots]
            As `bhlib.rules.routing.mark_dropped` leaves them.
        """
        rows = (index - self.num_experts).clamp(min=0)  # of a kept expert: the zeros
        weights = weights.to(self.means.dtype)
        total = embedding_bag(rows, self.means, per_sample_weights=weights, mode="sum")
        if len(self.down):
            mass = weights.masked_fill(rows == 0, 0.0).sum(dim=-1, keepdim=True)
            total = total + mass * self._mapped(hidden_states.to(total.dtype))
        return total

    def complete(self, output: Tensor, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """The layer's output [tokens, hidden] with what is `missing`."""
        return output + self.missing(hidden_states, index, weights)

    def alone(self, hidden_states: Tensor, expert: int) -> Tensor:
        """What stands in for one expert, not weighted: [tokens, hidden] of hidden states of that shape."""
        total = self.means[1 + expert].expand(hidden_states.shape)
        return total + self._mapped(hidden_states.to(total.dtype)) if len(self.down) else total

    def _mapped(self, hidden_states: Tensor) -> Tensor:
        return linear(hidden_states, self.down) @ self.up


class Compensation:
    """What stands in for dropped experts, layer by layer. Make one with `fit_compensation`, or load one.

    Parameters
    ----------
    layers : sequence of LayerCompensation
        In order of depth, float32.
    model_name : str
        Whose experts these are (`bhlib.discovery.name_of`).

    Attributes
    ----------
    num_layers, num_experts, hidden_size, rank : int
    """

    #: Whether the kernels of the experts can add it.
    has_kernels: ClassVar[bool] = True

    def __init__(self, layers: Sequence[LayerCompensation], model_name: str) -> None:
        self.layers, self.model_name = list(layers), model_name
        self.num_layers = len(self.layers)
        self.num_experts, self.hidden_size = self.layers[0].num_experts, self.layers[0].means.shape[1]
        self.rank = len(self.layers[0].down)
        self._on_device: dict = {}

    def layer(self, index: int, like: Tensor) -> LayerCompensation:
        """That of a layer, on the device of a tensor and in its dtype; moved once."""
        key = index, like.device, like.dtype
        if key not in self._on_device:
            with torch.inference_mode(False):  # it outlives the pass that asks first
                self._on_device[key] = LayerCompensation(*(part.to(like).contiguous() for part in self.layers[index]))
        return self._on_device[key]

    def cost(self, mean_experts: float, top_k: int, intermediate_size: int) -> float:
        """Arithmetic of the compensation for a token and layer, in experts of three matrices.

        Parameters
        ----------
        mean_experts : float
            How many of its `top_k` experts a token keeps. The others take a row of the table each.
        top_k, intermediate_size : int
            Of the model.
        """
        expert = 3 * self.hidden_size * intermediate_size
        dropped = max(top_k - mean_experts, 0)
        return (dropped * self.hidden_size + 2 * self.rank * self.hidden_size) / expert

    def check_model(self, model_name: str, num_layers: int, num_experts: int, hidden_size: int) -> None:
        """Raise a ValueError if it was fitted on another model."""
        own = {"layers": self.num_layers, "experts": self.num_experts, "hidden size": self.hidden_size}
        asked = {"layers": num_layers, "experts": num_experts, "hidden size": hidden_size}
        if own != asked or model_name != self.model_name:
            raise ValueError(
                f"this compensation was fitted on {self.model_name!r} ({_listed(own)}), but the model is "
                f"{model_name!r} ({_listed(asked)}): fit one on the model that you patch, "
                f"bhlib.fit_compensation(model, token_ids)."
            )

    def save(self, path: str | Path) -> None:
        """Write one safetensors file."""
        save_layers(path, "compensation", LayerCompensation._fields, self.layers, model_name=self.model_name)

    def __repr__(self) -> str:
        return (
            f"Compensation(means of {self.num_experts} experts, rank {self.rank}, {self.num_layers} layers of "
            f"{self.hidden_size}, fitted on {self.model_name!r})"
        )


def load_compensation(path: str | Path) -> Compensation:
    """Load what `Compensation.save` wrote.

    Raises
    ------
    OSError
        If there is no such file.
    ValueError
        If the file holds no compensation, or is damaged.
    """
    found, header = load_layers(
        path, "compensation", LayerCompensation._fields, "write one with Compensation.save(path)"
    )
    return Compensation([LayerCompensation(*parts) for parts in found], header["model_name"])


def _listed(facts: dict[str, int]) -> str:
    return ", ".join(f"{value} {name}" for name, value in facts.items())
