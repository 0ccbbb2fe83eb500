"""Hooks that copies do not carry: a copy, a pickle or a saved checkpoint of a hooked module is the plain module."""

import copyreg
from collections import OrderedDict
from collections.abc import Callable
from functools import partial

from torch import nn
from torch.utils.hooks import RemovableHandle


def own_forward(module: nn.Module) -> Callable:
    """The forward of a module, without one that `PrivateHooks.replace_forward` put in its place."""
    return getattr(module.forward, "own", module.forward)


class PrivateHooks:
    """Hooks on modules, which whoever copies or pickles a module leaves behind. True as long as there are any."""

    def __init__(self) -> None:
        self._hooks: list[tuple[nn.Module, RemovableHandle]] = []
        self._forwards: list[tuple[nn.Module, Callable]] = []

    def __bool__(self) -> bool:
        return bool(self._hooks or self._forwards)

    def add(self, module: nn.Module, handle: RemovableHandle) -> None:
        """Take over a hook that was registered on a module."""
        self._hooks.append((module, handle))
        self._hide(module)

    def replace_forward(self, module: nn.Module, forward: Callable) -> None:
        """Put another forward in the place of a module's own, which is its attribute `own`.

        Where somebody has wrapped it meanwhile, it goes on being called, and its attribute `is_in_place` is False.
        """
        vars(module)["forward"] = forward
        self._forwards.append((module, forward))
        self._hide(module)

    def _hide(self, module: nn.Module) -> None:
        # Looked up on the instance by copy.deepcopy and by pickle, so by torch.save and by other processes.
        vars(module)["__reduce_ex__"] = partial(self._reduce_plain, module)

    def remove(self) -> None:
        """Remove all of them, the last first."""
        while self._hooks:
            module, handle = self._hooks.pop()
            handle.remove()
            vars(module).pop("__reduce_ex__", None)
        while self._forwards:
            module, forward = self._forwards.pop()
            forward.is_in_place = False
            if vars(module).get("forward") is forward:
                del vars(module)["forward"]
            for name, value in vars(module).items():  # where someone wrapped the other one meanwhile
                if value is forward:
                    vars(module)[name] = forward.own
            vars(module).pop("__reduce_ex__", None)

    def _reduce_plain(self, module: nn.Module, protocol: int) -> tuple:
        """What `object.__reduce_ex__` would give for a hooked module without these hooks."""
        hidden = {handle.id for _, handle in self._hooks}
        forwards = {id(forward) for _, forward in self._forwards}
        state = {
            name: value for name, value in vars(module).items() if name != "__reduce_ex__" and id(value) not in forwards
        }
        for name, value in state.items():
            if isinstance(value, OrderedDict) and hidden & value.keys() and "hooks" in name:
                state[name] = OrderedDict((key, hook) for key, hook in value.items() if key not in hidden)
        return copyreg.__newobj__, (type(module),), state  # type: ignore[attr-defined]  # typeshed lacks it
