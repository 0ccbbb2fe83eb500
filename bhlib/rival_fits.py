"""What rival rules and corrections are fitted with: on calibration text, or from the experts' own matrices.

rule = MoDES(0.02, layer_importance(model, data))
rule = ExFold(TopK(4), 8, **fit_folding(model, data))
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from bhlib.alignment import Alignment, LayerAlignment
from bhlib.compensating import explain_missing
from bhlib.discovery import MoELayer, find_moe_layers, input_device, name_of
from bhlib.evaluation import sweep
from bhlib.expert_loop import is_plain
from bhlib.layer_passes import LayerPass, expert_output, watch_layers, watch_text
from bhlib.rules import AllocMoE, Rule, StaticPerLayer
from bhlib.text_pass import batches, check_plain, check_texts

#: ExFold's, as published: added to the energy of an output that another is projected on; bounds of the projection.
FOLDING_RIDGE, FOLDING_BOUND = 1e-3, 4.0

#: Of a standard deviation, before LDA divides by it.
TINY = 1e-6

# -- MoDES -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def layer_importance(
    model: nn.Module, token_ids: Tensor | Mapping[str, Tensor], *, batch_size: int = 8
) -> tuple[float, ...]:
    """How far the prediction moves if all experts of a layer are skipped, for `bhlib.rules.MoDES`.

    The divergence KL(own || without the layer), averaged over tokens, divided by that of the layer for which it is
    largest (Huang et al. 2025, arXiv:2511.15690).

    Parameters
    ----------
    model, token_ids, batch_size
        As for `bhlib.calibrate`; without padding.
    """
    layers, texts = find_moe_layers(model), check_texts(token_ids, None)
    check_plain(model, layers)
    total = np.zeros(len(layers))
    for batch in batches(texts, batch_size):
        ids = batch.ids.to(input_device(model))

        def logits(ids: Tensor = ids) -> Tensor:
            found = model(input_ids=ids, use_cache=False).logits
            return log_softmax(found.to(torch.promote_types(found.dtype, torch.float32)), dim=-1)

        own = logits()
        for layer in layers:
            with watch_layers([layer], lambda _, seen: torch.zeros_like(seen.output)):
                total[layer.index] += float((own.exp() * (own - logits())).sum())
    return tuple(float(one) for one in total / total.max())


# -- Alloc-MoE -------------------------------------------------------------------------------------------------


def allocate_layers(
    model: nn.Module,
    data: Mapping[str, Tensor],
    mean_ks: Iterable[float],
    *,
    batch_size: int = 8,
    cache: str | Path | None = None,
) -> dict[float, AllocMoE]:
    """Budgets of the layers, for `bhlib.rules.AllocMoE`: "Alloc-L" of Liu et al. 2026 (arXiv:2604.08133).

    The perplexity is measured with k experts in one layer, one in all layers after it and the model's own top-k in all
    before it, so that no later layer makes up for what is missing. The whole numbers with the least sum of these that
    add up to the budget are found by dynamic programming.

    Parameters
    ----------
    model : nn.Module
        Unpatched model.
    data : mapping of str to Tensor [sequences, length]
        Calibration text by domain.
    mean_ks : iterable of float
        Mean experts per token and layer, between 1 and the model's own top-k; for each the nearest that whole numbers
        allow.
    batch_size : int
        Sequences per forward pass.
    cache : path, optional
        Folder of finished cells, as for `sweep`.
    """
    layers = find_moe_layers(model)
    most, mean_ks = layers[0].top_k, list(mean_ks)
    for mean_k in mean_ks:
        if not 1 <= mean_k <= most:
            raise ValueError(f"mean_ks must lie between 1 and {most}, the model's own top-k, got {mean_k}.")
    rules: dict[str, Rule | None] = {
        f"{k} in layer {i}, then 1": StaticPerLayer((most,) * i + (k,) + (1,) * (len(layers) - i - 1))
        for i in range(len(layers))
        for k in range(1, most + 1)
    }
    frame = sweep(model, rules, data, batch_size=batch_size, cache=cache)
    failed = frame[frame["error"] != ""]
    if len(failed):
        raise RuntimeError(f"{failed['rule'].iloc[0]} could not be measured: {failed['error'].iloc[0]}")
    loss = frame.groupby("rule", sort=False)["loss"].mean().to_numpy()
    budgets = least_sums(np.exp(loss).reshape(len(layers), most))
    return {mean_k: AllocMoE(budgets[round(mean_k * len(layers))], max_k=most) for mean_k in mean_ks}


def least_sums(costs: np.ndarray) -> dict[int, tuple[int, ...]]:
    """For every total, the numbers 1, 2, ... of each row with this total whose costs [rows, numbers] are least."""
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for row in costs:
        extended: dict[int, tuple[float, tuple[int, ...]]] = {}
        for spent, (cost, chosen) in best.items():
            for number, more in enumerate(row, start=1):
                entry = cost + more, (*chosen, number)
                extended[spent + number] = min(extended.get(spent + number, (np.inf, ())), entry)
        best = extended
    return {spent: chosen for spent, (_, chosen) in best.items()}


# -- ACE -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def expert_gains(model: nn.Module) -> dict[str, Tensor]:
    """What each expert amplifies, from the model's parameters alone, for `bhlib.rules.ACE` (arXiv:2609.05228).

    Returns
    -------
    dict of Tensor [layers, experts], float32, of mean 1 in each layer
        ``amplification``: with g the scale of the norm before the experts, U, A and D the transposed matrices up, gate
        and down, the geometric mean of |gU| |gAD| and |gA| |gUD| (Frobenius norms).
        ``along_router``: norm of what the expert makes of its row of the router, the mean of all rows subtracted and
        the rest of mean square 1, over the norm of that.

    Raises
    ------
    ValueError
        If experts are no gate and two matrices each, or no norm is found before them.
    """
    layers = find_moe_layers(model)
    gains = [_gains(model, layer) for layer in layers]
    tables = (torch.stack([pair[i] / pair[i].mean() for pair in gains]).float().cpu() for i in range(2))
    return dict(zip(("amplification", "along_router"), tables, strict=True))


def _gains(model: nn.Module, layer: MoELayer) -> tuple[Tensor, Tensor]:
    if not is_plain(layer.experts):
        raise ValueError(
            f"the experts beside {layer.name!r} are no gate and two matrices each: ACE does not know them."
        )
    scale = _norm_before(model, layer).float()[:, None]
    gates, ups = layer.experts.gate_up_proj.float().mT.chunk(2, dim=2)  # [experts, hidden, intermediate]
    downs = layer.experts.down_proj.float().mT
    gates, ups = scale * gates, scale * ups
    one = ups.norm(dim=(1, 2)) * (gates @ downs).norm(dim=(1, 2))
    other = gates.norm(dim=(1, 2)) * (ups @ downs).norm(dim=(1, 2))
    rows = layer.router.weight - layer.router.weight.mean(dim=0)
    rows = rows / rows.float().square().mean(dim=1, keepdim=True).sqrt().to(rows)
    answers = torch.cat([expert_output(layer, rows[e, None], e) for e in range(layer.num_experts)])
    return (one * other).sqrt(), answers.norm(dim=1) / rows.float().norm(dim=1)


def _norm_before(model: nn.Module, layer: MoELayer) -> Tensor:
    """The scale [hidden] of the norm whose output the experts are given."""
    block = layer.name.rsplit(".", 2)[0]
    for name, module in model.get_submodule(block).named_children():
        if name == "post_attention_layernorm":
            return cast(Tensor, module.weight)
    raise ValueError(f"{block!r} has no post_attention_layernorm, whose scale ACE needs: leave ACE out.")


# -- ExFold ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def fit_folding(
    model: nn.Module, token_ids: Tensor | Mapping[str, Tensor], *, batch_size: int = 8
) -> dict[str, Tensor]:
    """How like each other the outputs of experts are that tokens are given together, for `bhlib.rules.ExFold`.

    Of outputs u and v of two experts i and j for the same token, weighted by the norm of u, s(i, j) is the sum of their
    products over the sum of the squares of v, between -4 and 4 (arXiv:2608.24938 and the code of its authors).

    Parameters
    ----------
    model, token_ids, batch_size
        As for `bhlib.calibrate`; without padding.

    Returns
    -------
    dict of Tensor [layers, experts, experts], float32
        ``scales``: s(i, j). ``losses``: the share of the energy of i that s(i, j) times j leaves; infinite on the
        diagonal, and for pairs that no token was given.
    """
    layers, texts = find_moe_layers(model), check_texts(token_ids, None)
    check_plain(model, layers)
    num = layers[0].num_experts
    sums = [torch.zeros(3, num * num, dtype=torch.float64, device=layer.router.weight.device) for layer in layers]

    def take(layer: MoELayer, seen: LayerPass, _: int) -> None:
        outputs = _each_output(layer, seen)
        products = outputs @ outputs.mT
        squares = outputs.square().sum(dim=-1)
        weight = squares.sqrt()[:, :, None]
        pairs = (seen.experts[:, :, None] * num + seen.experts[:, None, :]).flatten()
        for row, part in enumerate((products, squares[:, None, :], squares[:, :, None])):
            sums[layer.index][row].index_add_(0, pairs, (part * weight).expand_as(products).flatten().double())

    watch_text(model, layers, texts, batch_size, take)
    products, targets, sources = (part.view(-1, num, num).cpu() for part in torch.stack(sums, dim=1))
    scales = (products / (targets + FOLDING_RIDGE)).clamp(-FOLDING_BOUND, FOLDING_BOUND)
    losses = (sources - 2 * scales * products + scales.square() * targets).clamp(min=0) / sources
    unseen = (sources == 0) | torch.eye(num, dtype=torch.bool, device="cpu")
    return {"scales": scales.float(), "losses": losses.masked_fill(unseen, torch.inf).float()}


def _each_output(layer: MoELayer, seen: LayerPass) -> Tensor:
    """What each of a token's experts makes of it, not weighted: float32 [tokens, top_k, hidden]."""
    tokens, slots = seen.experts.shape
    hidden = seen.hidden.repeat_interleave(slots, dim=0)
    return expert_output(layer, hidden, seen.experts.flatten()).view(tokens, slots, -1)


# -- LDA -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def fit_alignment(
    model: nn.Module, token_ids: Tensor | Mapping[str, Tensor], rules: Mapping[str, Rule], *, batch_size: int = 8
) -> dict[str, Alignment]:
    """Mean and deviation of each dimension of each layer's output, with and without what rules drop: `Alignment`.

    All layers before the one that is looked at run as in the model itself (Kim et al. 2026, arXiv:2609.09241).

    Parameters
    ----------
    model, token_ids, batch_size
        As for `bhlib.calibrate`; without padding.
    rules : mapping of str to Rule
        All are fitted in the same pass; each needs a fit of its own.
    """
    layers, texts = find_moe_layers(model), check_texts(token_ids, None)
    check_plain(model, layers)
    hidden = layers[0].router.weight.shape[-1]
    sums = {
        name: [torch.zeros(5, hidden, dtype=torch.float64, device=layer.router.weight.device) for layer in layers]
        for name in rules
    }

    def take(layer: MoELayer, seen: LayerPass, _: int) -> None:
        for name, rule in rules.items():
            features, missing = explain_missing(layer, seen, rule, False)
            drops = (features != 0).any(dim=1)
            own = seen.output[drops].double()
            less = own - missing[drops].double()
            parts = (torch.ones_like(own), own, own.square(), less, less.square())
            sums[name][layer.index] += torch.stack([part.sum(dim=0) for part in parts])

    watch_text(model, layers, texts, batch_size, take)
    fitted = {}
    for name, of_layers in sums.items():
        parts = [
            _align(*part.cpu(), num_experts=layer.num_experts) for part, layer in zip(of_layers, layers, strict=True)
        ]
        fitted[name] = Alignment(parts, name_of(model))
    return fitted


def _align(count: Tensor, own: Tensor, own_squares: Tensor, less: Tensor, less_squares: Tensor, *, num_experts: int):
    """The line on which a dimension's mean and deviation without what was dropped become those of the model itself."""
    count = count.clamp(min=1)
    own, less = own / count, less / count
    own_spread = (own_squares / count - own.square()).clamp(min=0).sqrt()
    less_spread = (less_squares / count - less.square()).clamp(min=0).sqrt()
    scale = own_spread / (less_spread + TINY) if count[0] > 1 else torch.ones_like(own)
    return LayerAlignment(scale.float(), (own - scale * less).float(), num_experts)
