"""A rival of the compensation: a layer's output, stretched and shifted until its mean and deviation are right again.

Kim et al. 2026, "Distribution-consistent inference for dynamic sparse mixture-of-experts" (arXiv:2609.09241), call it
LDA. The correction is a line per dimension and layer, and knows nothing of the token or of the experts dropped. It
stands where a compensation stands, ``RoutingPatch(model, rule, compensation=alignment)``, after it has been fitted to
the rule (`bhlib.rival_fits.fit_alignment`).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bhlib.compensation import Compensation


class LayerAlignment(NamedTuple):
    """The line of each dimension of one layer's output.

    Attributes
    ----------
    scale, shift : Tensor [hidden]
    num_experts : int
        Of the layer; an index above it marks a dropped expert.
    """

    scale: Tensor
    shift: Tensor
    num_experts: int

    def add(self, output: Tensor, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """The layer's output, corrected for tokens of which an expert was dropped; as `LayerCompensation.add`."""
        drops = (index > self.num_experts).any(dim=-1, keepdim=True)
        return torch.where(drops, output * self.scale + self.shift, output)


class Alignment(Compensation):
    """LDA: what stands in for dropped experts is a line per dimension. Make one with `bhlib.rival_fits.fit_alignment`.

    Parameters
    ----------
    layers : sequence of LayerAlignment
        In order of depth, float32.
    model_name : str
        Whose experts these are (`bhlib.discovery.name_of`).
    """

    layers: list[LayerAlignment]  # type: ignore[assignment]

    def __init__(self, layers: Sequence[LayerAlignment], model_name: str) -> None:
        self.layers, self.model_name = list(layers), model_name
        self.num_layers, self.num_experts = len(self.layers), self.layers[0].num_experts
        self.hidden_size, self.rank = len(self.layers[0].scale), 0
        self._on_device = {}

    def layer(self, index: int, like: Tensor) -> LayerAlignment:  # type: ignore[override]
        key = index, like.device, like.dtype
        if key not in self._on_device:
            with torch.inference_mode(False):
                own = self.layers[index]
                self._on_device[key] = own._replace(scale=own.scale.to(like), shift=own.shift.to(like))
        return self._on_device[key]

    def cost(self, mean_experts: float, top_k: int, intermediate_size: int) -> float:
        """Arithmetic for a token and layer, in experts of three matrices: one product per dimension."""
        return 1 / (3 * intermediate_size)

    def save(self, path: str | Path) -> None:
        raise NotImplementedError("an alignment belongs to one rule at one level, and has no file: fit it anew.")

    def __repr__(self) -> str:
        return f"Alignment({self.num_layers} layers of {self.hidden_size}, fitted on {self.model_name!r})"
