"""Optimizers of the demo's training: Muon, and a trainer that keeps float32 masters of bfloat16 weights.

Muon is due to Jordan et al. (2024), "Muon: An optimizer for hidden layers in neural networks"; its scale and
weight decay follow Liu et al. (2025), "Muon is scalable for LLM training", arXiv 2502.16982.
"""

import re
from pathlib import Path

import torch
from torch import nn


def orthogonalize(matrices: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """Move the singular values of each matrix in a batch [n, rows, columns] to about 1.

    Newton-Schulz steps with Jordan's quintic: values above ~1e-3 of the norm end in [0.7, 1.2].
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    transposed = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if transposed else matrices
    x = x.bfloat16() if x.is_cuda else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if transposed else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalized, scaled to the root mean square 0.2 of a typical AdamW update.

    Parameters are matrices [rows, columns] or stacks of them [n, rows, columns] (the experts of a layer);
    those of the same last two sizes are updated in one batch. A fused gate_up_proj counts as one matrix.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            shapes: dict[torch.Size, list[torch.Tensor]] = {}
            for param in group["params"]:
                if param.grad is not None:
                    shapes.setdefault(param.shape[-2:], []).append(param)
            for (rows, columns), params in shapes.items():
                updates = []
                for param in params:
                    state = self.state[param]
                    if not state:
                        state["momentum"] = torch.zeros_like(param)
                    state["momentum"].lerp_(param.grad, 1 - group["momentum"])
                    update = param.grad.lerp(state["momentum"], group["momentum"])
                    updates.append(update.reshape(-1, rows, columns))
                sizes = [len(update) for update in updates]
                scale = 0.2 * max(rows, columns) ** 0.5
                for param, update in zip(params, orthogonalize(torch.cat(updates)).split(sizes), strict=True):
                    param.mul_(1 - group["lr"] * group["weight_decay"])
                    param.add_(update.view_as(param), alpha=-group["lr"] * scale)


class Trainer:
    """Low-precision weights in the model, float32 masters in two optimizers, one checkpoint file."""

    def __init__(self, model: nn.Module, args):
        named = dict(model.named_parameters())
        self.params = list(named.values())
        self.masters = [p.detach().clone().float() for p in self.params]
        matrices, rest = [], []
        for name, master in zip(named, self.masters, strict=True):
            adam = args.optimizer == "adamw" or re.search("embed|lm_head|gate.weight|norm", name)
            (rest if adam else matrices).append(master)
        groups = [
            {"params": [m for m in rest if m.ndim > 1], "weight_decay": args.weight_decay},
            {"params": [m for m in rest if m.ndim == 1], "weight_decay": 0.0},
        ]
        self.optimizers = [
            torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), eps=1e-10, fused=self.masters[0].is_cuda)
        ]
        if matrices:
            self.optimizers.append(Muon(matrices, lr=args.muon_lr, weight_decay=args.weight_decay))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["peak"] = group["lr"]

    def step(self, factor: float) -> torch.Tensor:
        """Clip the gradient to norm 1, update the masters, copy them into the model; the norm before that."""
        for param, master in zip(self.params, self.masters, strict=True):
            master.grad = param.grad.float()
            param.grad = None
        norm = nn.utils.clip_grad_norm_(self.masters, 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
            optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(self.params, self.masters)
        return norm

    def save(self, path: Path, **progress) -> None:
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        torch.save({"masters": self.masters, "optimizers": optimizers, **progress}, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)

    def load(self, path: Path) -> dict:
        state = torch.load(path, map_location=self.masters[0].device, weights_only=True)
        for master, saved in zip(self.masters, state.pop("masters"), strict=True):
            master.copy_(saved)
        for optimizer, saved in zip(self.optimizers, state.pop("optimizers"), strict=True):
            optimizer.load_state_dict(saved)
        with torch.no_grad():
            torch._foreach_copy_(self.params, self.masters)
        return state
