"""How large the outputs of experts are: what is added to the router's logits before a rule selects by them.

    norms = fit_norms(model, load_heldout("calibration"))
    with BHRoutingIntegration(model, alpha=0.01, norms=norms): ...

What an expert adds to its layer is its weight times its output. A router says the weight alone. Here is a guess at the
other factor, the logarithm of the output's norm relative to its layer's mean, and since the logarithm of a weight is
its logit up to a constant of the token, the two add up: a rule that is shown ``router_logits + log_norms`` selects by
weight times norm, whatever the rule. The weights of what it selects stay those of the model.

The guess is one number for each expert, its mean; or it is made from the token's own logits. They are as many linear
views of the hidden state as there are experts, computed already, and tell much of what the experts will make of it: on
the demo nearly as much as a linear function of the hidden state. Most of it is in the largest of them::

    log_norms = constant + slope * edge + sum over experts f among the `near` largest of (logits[f] - edge) * table[f]

with the next largest logit as the edge, so that nothing jumps where an expert comes or goes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from bhlib.layer_files import load_layers, save_layers


class LayerNorms(NamedTuple):
    """The guess of one layer.

    Attributes
    ----------
    constant, slope : Tensor [experts]
    table : Tensor [experts, experts]
        Row f: what expert f, if it is among the largest, says about the norm of each. Without rows the guess is
        `constant`.
    """

    constant: Tensor
    slope: Tensor
    table: Tensor

    def predicted(self, router_logits: Tensor, near: int) -> Tensor:
        """Logarithm of the norm of each expert's output, relative to the layer's mean: float32 [tokens, experts].

        Parameters
        ----------
        router_logits : Tensor [tokens, experts]
        near : int
            How many of a token's largest logits are looked at, fewer than there are experts; 0 for a constant guess.
        """
        if not near:
            return self.constant.expand(router_logits.shape)
        edge, excess, experts = nearest(router_logits, near)
        return torch.addcmul(self.constant, edge, self.slope) + embedding_bag(
            experts, self.table, per_sample_weights=excess, mode="sum"
        )


class LayerGuess(NamedTuple):
    """What a rule is given of one layer: the guess, and how it is made.

    Attributes
    ----------
    norms : LayerNorms
        On the device of the logits.
    near : int
        How many of a token's largest logits it looks at.
    """

    norms: LayerNorms
    near: int

    def log_norms(self, router_logits: Tensor) -> Tensor:
        """Router logits [tokens, experts] in any float dtype -> log norms of the same shape, float32."""
        return self.norms.predicted(router_logits.detach(), self.near)  # what is selected has no gradient


def nearest(router_logits: Tensor, near: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `near` largest logits of each token, as far as they are above the next one.

    Returns
    -------
    edge : Tensor [tokens, 1], float32
        The next one.
    excess : Tensor [tokens, near], float32
    experts : Tensor [tokens, near], int64
    """
    top, experts = router_logits.float().topk(near + 1, dim=-1)
    edge = top[:, near:]
    return edge, top[:, :near] - edge, experts[:, :near]


class OutputNorms:
    """Guesses at the norms of the experts' outputs, layer by layer. Make one with `fit_norms`, or load one.

    Parameters
    ----------
    layers : sequence of LayerNorms
        In order of depth, float32.
    near : int
        How many of a token's largest logits the guess looks at; 0 for one number for each expert.
    model_name : str
        Whose experts these are (`bhlib.discovery.name_of`).

    Attributes
    ----------
    num_layers, num_experts : int
    """

    def __init__(self, layers: Sequence[LayerNorms], near: int, model_name: str) -> None:
        self.layers, self.near, self.model_name = list(layers), near, model_name
        self.num_layers, self.num_experts = len(self.layers), len(self.layers[0].constant)
        self._on_device: dict = {}

    def __call__(self, router_logits: Tensor, layer: int) -> Tensor:
        """Router logits of a layer [..., experts] in any float dtype -> log norms of the same shape, float32."""
        flat = router_logits.reshape(-1, self.num_experts)
        return self.layer(layer, flat.device).log_norms(flat).view(router_logits.shape)

    def layer(self, index: int, device: torch.device) -> LayerGuess:
        """The guess of a layer, on a device."""
        return LayerGuess(self._layer_on(index, device), self.near)

    def shown(self, router_logits: Tensor) -> Tensor:
        """What rules look at: logits of all layers [layers, tokens, experts] with their log norms added.

        Levels for a rule that is shown norms are found on these (`bhlib.levels`).
        """
        return torch.stack([logits + self(logits, layer) for layer, logits in enumerate(router_logits)])

    def prepare(self, layer: int, device: torch.device) -> None:
        """Move ahead what a call looks up, so that no compiler has to see it moved."""
        self._layer_on(layer, device)

    def _layer_on(self, index: int, device: torch.device) -> LayerNorms:
        """That of a layer, on a device; moved once."""
        key = index, str(device)
        if key not in self._on_device:
            with torch.inference_mode(False):  # it outlives the pass that asks first
                self._on_device[key] = LayerNorms(*(part.to(device) for part in self.layers[index]))
        return self._on_device[key]

    def __getstate__(self) -> dict:
        """Without the copies on devices, which are made anew."""
        return vars(self) | {"_on_device": {}}

    def cost(self, hidden_size: int, intermediate_size: int) -> float:
        """Arithmetic of the guess for a token and layer, in experts of three matrices of the model's sizes."""
        products = (self.near + 1) * self.num_experts if self.near else 0
        return products / (3 * hidden_size * intermediate_size)

    def check_model(self, model_name: str, num_layers: int, num_experts: int) -> None:
        """Raise a ValueError if it was fitted on another model."""
        own, asked = (self.num_layers, self.num_experts), (num_layers, num_experts)
        if own != asked or model_name != self.model_name:
            raise ValueError(
                f"these norms were fitted on {self.model_name!r} ({own[0]} layers, {own[1]} experts), but the model is "
                f"{model_name!r} ({asked[0]} layers, {asked[1]} experts): fit them on the model that you patch, "
                f"bhlib.fit_norms(model, token_ids)."
            )

    def save(self, path: str | Path) -> None:
        """Write one safetensors file."""
        about: dict[str, Any] = {"model_name": self.model_name, "near": self.near}
        save_layers(path, "norms", LayerNorms._fields, self.layers, **about)

    def __repr__(self) -> str:
        guess = f"from the {self.near} largest logits" if self.near else "one for each"
        return (
            f"OutputNorms({guess}, {self.num_experts} experts in {self.num_layers} layers, "
            f"fitted on {self.model_name!r})"
        )


def load_norms(path: str | Path) -> OutputNorms:
    """Load what `OutputNorms.save` wrote.

    Raises
    ------
    OSError
        If there is no such file.
    ValueError
        If the file holds no norms, or is damaged.
    """
    found, header = load_layers(path, "norms", LayerNorms._fields, "write them with OutputNorms.save(path)")
    layers = [LayerNorms(*parts) for parts in found]
    experts, near = len(layers[0].constant), header["near"]
    shapes = ((experts,), (experts,), (experts if near else 0, experts))
    for index, layer in enumerate(layers):
        for name, part, shape in zip(LayerNorms._fields, layer, shapes, strict=True):
            if part.shape != shape or not part.isfinite().all():
                raise ValueError(
                    f"{path} is damaged: {name}.{index} is {list(part.shape)}, or not finite, but must be "
                    f"{list(shape)}."
                )
    return OutputNorms(layers, near, header["model_name"])
