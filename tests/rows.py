"""Count the rows that go through the experts' matrices, where they are multiplied: in PyTorch's dispatcher."""

from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


class _RowCounter(TorchDispatchMode):
    def __init__(self, hidden: int, intermediate: int):
        super().__init__()
        if hidden == intermediate:
            raise ValueError("hidden and intermediate width must differ, to tell the two products apart")
        self.names = {hidden: "gate_up_proj", intermediate: "down_proj"}
        self.rows = {"gate_up_proj": 0, "down_proj": 0}
        self.inside = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.inside:
            if func in (aten.mm.default, aten.mm.out):  # eager loop, or a grouped product that falls back on one
                self.rows[self.names[args[0].shape[-1]]] += args[0].shape[0]
            elif func is aten.addmm.default:  # eager loop with a bias
                self.rows[self.names[args[1].shape[-1]]] += args[1].shape[0]
            elif func is aten.bmm.default:  # batched_mm: one small product per pair
                weight = args[0] if args[0].shape[-2] != 1 else args[1].transpose(-1, -2)
                self.rows[self.names[weight.shape[-1]]] += args[0].shape[0]
            elif func is aten._grouped_mm.default:
                offsets = args[2] if len(args) > 2 else kwargs["offs"]
                self.rows[self.names[args[0].shape[-1]]] += int(offsets[-1])
        return func(*args, **kwargs)


@contextmanager
def count_rows(*modules):
    """Within the block, count rows multiplied by `gate_up_proj` and `down_proj` inside these experts modules.

    Yields an object whose dict ``rows`` is filled in as the products happen.
    """
    # The layout of the down projection, [experts, hidden, intermediate] or transposed, tells the widths.
    hidden, intermediate = modules[0].down_proj.shape[1:]
    if modules[0].is_transposed:
        hidden, intermediate = intermediate, hidden
    counter = _RowCounter(hidden, intermediate)

    def enter(*_):
        counter.inside += 1

    def leave(*_):
        counter.inside -= 1

    handles = [m.register_forward_pre_hook(enter) for m in modules]
    handles += [m.register_forward_hook(leave, always_call=True) for m in modules]
    try:
        with counter:
            yield counter
    finally:
        for handle in handles:
            handle.remove()
