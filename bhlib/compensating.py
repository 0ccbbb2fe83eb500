"""Fit what stands in for dropped experts: `fit_compensation`."""

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from bhlib.calibration import _batches, _check_plain, _pieces, name_of
from bhlib.compensation import Compensation, LayerCompensation
from bhlib.discovery import MoELayer, find_moe_layers, implementation_of
from bhlib.experts import pairwise_forward
from bhlib.rules import Rule


class NormalEquations:
    """Sums of products of features F [tokens, features] and of what they are to explain, Y [tokens, hidden]."""

    def __init__(self) -> None:
        self.gram = self.cross = self.total = 0.0
        self.tokens = 0

    def add(self, features: Tensor, wanted: Tensor) -> None:
        features, wanted = features.double(), wanted.double()
        self.gram = self.gram + features.T @ features
        self.cross = self.cross + features.T @ wanted
        self.total = self.total + float(wanted.square().sum())
        self.tokens += len(features)

    def error(self, solution: Tensor) -> float:
        return self.total - 2 * float((solution * self.cross).sum()) + float((solution * (self.gram @ solution)).sum())


@torch.no_grad()
def collect(model, token_ids, rule, batch_size=8, progress=True):
    layers = find_moe_layers(model)
    pieces = _pieces(token_ids, None)
    _check_plain(model, layers)
    body = getattr(model, "base_model", model)
    device = next(model.parameters()).device
    equations = [NormalEquations() for _ in layers]
    logits: dict[int, Tensor] = {}

    def see_router(layer: MoELayer, module, args, output):
        logits[layer.index] = output[0].reshape(-1, layer.num_experts)

    def see_experts(layer: MoELayer, module, args):
        hidden, index, weights = args
        routing = rule(logits.pop(layer.index), layer.index, weighting=layer.weighting)
        kept = (index[:, :, None] == routing.experts[:, None, :]).any(dim=2)
        dropped = index.masked_fill(kept, layer.num_experts)
        missing = pairwise_forward(implementation_of(module) or "eager", module, hidden, dropped, weights)
        lost = torch.zeros(len(hidden), layer.num_experts).scatter_(1, index, weights.masked_fill(kept, 0.0).float())
        features = torch.cat([lost, lost.sum(dim=1, keepdim=True) * hidden.float()], dim=1)
        equations[layer.index].add(features, missing.float())

    with ExitStack() as hooks, tqdm(total=sum(len(i) for i, _ in pieces), unit="seq", disable=not progress) as bar:
        for layer in layers:
            hooks.callback(layer.router.register_forward_hook(partial(see_router, layer)).remove)
            hooks.callback(layer.experts.register_forward_pre_hook(partial(see_experts, layer)).remove)
        for ids, _ in _batches(pieces, batch_size):
            body(input_ids=ids.to(device), use_cache=False)
            bar.update(len(ids))
    return equations


def solve(equation: NormalEquations, num_experts: int, rank: int, ridge: float = 1e-2) -> LayerCompensation:
    gram, cross = equation.gram, equation.cross
    penal = torch.zeros(len(gram), dtype=gram.dtype)
    penal[:num_experts] = gram.diagonal()[:num_experts].mean() * 1e-4
    penal[num_experts:] = gram.diagonal()[num_experts:].mean() * ridge
    hidden = cross.shape[1]
    if rank == 0:
        m = torch.linalg.solve(gram[:num_experts, :num_experts] + penal[:num_experts].diag(), cross[:num_experts])
        down, up = torch.zeros(0, hidden), torch.zeros(hidden, 0)
    else:
        full = torch.linalg.solve(gram + penal.diag(), cross)
        w = full[num_experts:]
        # reduced rank: principal directions of fitted part given the table is refitted
        a, b = gram[:num_experts, :num_experts] + penal[:num_experts].diag(), gram[:num_experts, num_experts:]
        schur = gram[num_experts:, num_experts:] + penal[num_experts:].diag() - b.T @ torch.linalg.solve(a, b)
        fitted = w.T @ schur @ w
        vectors = torch.linalg.eigh(fitted).eigenvectors[:, -rank:]
        w = w @ vectors @ vectors.T
        m = torch.linalg.solve(a, cross[:num_experts] - b @ w)
        up, down = vectors, (full[num_experts:] @ vectors).T
    means = torch.cat([torch.zeros(1, hidden, dtype=m.dtype), m])
    return LayerCompensation(means.float(), down.float().contiguous(), up.float().contiguous())


def fit_compensation(model, token_ids, *, rule: Rule, rank: int = 0, ridge=1e-2, equations=None) -> Compensation:
    layers = find_moe_layers(model)
    equations = equations or collect(model, token_ids, rule)
    return Compensation([solve(e, layers[0].num_experts, rank, ridge) for e in equations], name_of(model))
