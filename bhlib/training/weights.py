"""What is trained of a model: which weights, and how they take turns with the model's own."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from bhlib.discovery import find_moe_layers

#: What can be trained: routers; routers, and adapters of small rank on the attention; every weight. Experts get no
#: adapters: PEFT wraps their module, and beside the wrapper no patch finds the router.
PARTS = ("router", "lora", "all")

#: Rank and scale of the adapters.
RANK, ALPHA = 8, 16

#: Names of the attention's projections that adapters are put on, as transformers' models call them.
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


class Trained:
    """Weights that are trained, beside the model's own: one or the other are in the model.

    The model's own are its tensors themselves, so that putting them back gives the same bits and takes no time. The
    trained ones are kept in float32 whatever the model's dtype, since a step is often smaller than half precision
    shows.

    Parameters
    ----------
    parameters : dict of str to nn.Parameter
        Of the model, by name.
    """

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        self.parameters = parameters
        self.own = [parameter.data for parameter in parameters.values()]
        self.masters = [own.detach().float().clone() for own in self.own]
        self.working = [master.to(own.dtype) for master, own in zip(self.masters, self.own, strict=True)]

    def put(self) -> None:
        """Put the trained weights into the model."""
        self._set(self.working)

    def take_back(self) -> None:
        """Put the model's own weights back."""
        self._set(self.own)

    def _set(self, tensors: list[Tensor]) -> None:
        for parameter, tensor in zip(self.parameters.values(), tensors, strict=True):
            parameter.data = tensor

    def take_gradients(self) -> list[Tensor]:
        """Move the gradients of the last backward pass to the float32 weights, and return those; zeros for none."""
        for parameter, master in zip(self.parameters.values(), self.masters, strict=True):
            master.grad = torch.zeros_like(master) if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        return self.masters

    @torch.no_grad()
    def follow(self) -> None:
        """Let the weights in the model follow the float32 ones after a step."""
        for working, master in zip(self.working, self.masters, strict=True):
            working.copy_(master)

    def values(self) -> dict[str, Tensor]:
        """The trained weights by name, in the model's dtype, on the CPU."""
        return {name: tensor.cpu().clone() for name, tensor in zip(self.parameters, self.working, strict=True)}


@contextmanager
def training_of(model: nn.Module, train: str) -> Iterator[Trained]:
    """Within the block only some weights of a model want gradients, and `Trained` holds them; then all is as before.

    Parameters
    ----------
    model : nn.Module
        A model that can be patched, not patched.
    train : str
        One of `PARTS`.

    Raises
    ------
    ValueError
        If `train` is none of them, or the attention has no projections that adapters can be put on.
    """
    if train not in PARTS:
        raise ValueError(f"train must be one of {PARTS}, got {train!r}.")
    wanted_before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    adapted = _with_adapters(model) if train == "lora" else None
    try:
        chosen = dict(model.named_parameters()) if train == "all" else _routers(model)
        if adapted is not None:
            chosen |= {name: one for name, one in model.named_parameters() if "lora_" in name}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in chosen)
        trained = Trained(chosen)
        try:
            yield trained
        finally:
            trained.take_back()
    finally:
        if adapted is not None:
            adapted.unload()
        for parameter, wanted in wanted_before.items():
            parameter.requires_grad_(wanted)
            parameter.grad = None


def _routers(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of all routers, by their names in the model."""
    return {
        f"{layer.name}.{name}": parameter
        for layer in find_moe_layers(model)
        for name, parameter in layer.router.named_parameters()
    }


def _with_adapters(model: nn.Module):
    """The model with PEFT's adapters on its attention, in place."""
    from peft import LoraConfig, get_peft_model  # an optional dependency

    present = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    targets = [name for name in PROJECTIONS if name in present]
    if not targets:
        raise ValueError(
            f"{type(model).__name__} has no attention projections called {', '.join(PROJECTIONS)} for adapters to be "
            f"put on: train 'router' or 'all'."
        )
    return get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets))


def changes_of(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Trained weights by their names in the plain model: adapters become the two factors of what they add.

    ``x.lora_A.default.weight`` and ``x.lora_B.default.weight`` become ``x.weight:down`` and ``x.weight:up``, so that
    ``up @ down`` is to be added to ``x.weight``; every other weight stands for itself.
    """
    changes = {}
    for name, value in values.items():
        module, _, factor = name.partition(".lora_")
        if not factor:
            changes[name] = value
        elif factor.startswith("A."):
            changes[f"{module}.weight:down"] = value
        else:
            changes[f"{module}.weight:up"] = value * (ALPHA / RANK)
    return changes
