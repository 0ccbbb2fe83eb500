"""Launches that cost little on the host: what was compiled is kept, and started again without asking Triton.

    @quick
    @triton.jit
    def _kernel(x_ptr, out_ptr, num_rows, WIDTH: tl.constexpr): ...

    _kernel[(blocks,)](x, out, num_rows, WIDTH=64, num_warps=2)  # as any kernel of Triton

Triton looks at every argument of every launch in Python; in decoding, where the device waits for the host, that is much
of what the experts cost. What a compiled kernel depends on is the device, the constants, and little of each of the
other arguments: together they are the key to it here.
"""

import functools
from collections.abc import Callable

import torch
import triton
from packaging.version import Version
from torch import Tensor
from triton.runtime import driver

#: Versions of Triton whose compiled kernels are started in the way of `QuickKernel`: from, and before.
KNOWN_VERSIONS = ("3.3", "3.8")


def quick(kernel):
    """A kernel of Triton with quick launches; itself in the interpreter, and in a Triton whose ways are not known."""
    oldest, newest = map(Version, KNOWN_VERSIONS)
    known = oldest <= Version(triton.__version__) < newest
    return QuickKernel(kernel) if known and isinstance(kernel, triton.JITFunction) else kernel


class QuickKernel:
    """A kernel whose first launch of each kind is Triton's own, and whose others are quick.

    Tensors and numbers come by position, in the order of the signature; constants (``tl.constexpr``), which stand
    behind them there, and options (``num_warps``) by name. The device is the current one, as for Triton. A launch with
    other arguments, such as a tensor descriptor, is Triton's own. Hooks that a profiler sets on Triton's launches do
    not see the quick ones; those of torch and of CUDA do.
    """

    def __init__(self, kernel: triton.JITFunction) -> None:
        self.kernel = kernel
        self._compiled: dict[tuple, tuple] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return functools.partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *arguments, **constants) -> None:
        device = torch.cuda.current_device()
        key, values = [device, *constants, *constants.values()], []
        for argument in arguments:
            if isinstance(argument, Tensor):
                key.append(argument.dtype)
                argument = argument.data_ptr()
                key.append(argument % 16)
            elif type(argument) is int:
                key += argument == 1, argument % 16 == 0, argument >> 31  # the last tells 32 bits from 64
            elif type(argument) is float:
                key.append(float)
            elif argument is None:
                key.append(None)
            else:
                self.kernel[grid](*arguments, **constants)
                return
            values.append(argument)
        key = tuple(key)
        if key not in self._compiled:
            compiled = self.kernel[grid](*arguments, **constants)
            last = [constants[name] for name in self.kernel.arg_names[len(arguments) :]]  # Triton passes them on, too
            self._compiled[key] = compiled.run, compiled.function, compiled.packed_metadata, last
            return
        run, function, metadata, last = self._compiled[key]
        stream = driver.active.get_current_stream(device)
        run(*grid, *(1,) * (3 - len(grid)), stream, function, metadata, None, None, None, *values, *last)  # no hooks
