"""From a model and text to a fitted null, in one pass: `calibrate`.

    null = calibrate(model, load_heldout("calibration"))
    null.save("null.safetensors")

    null = load_calibration("null.safetensors", model)       # refused if it was fitted on another model
    with BHRoutingIntegration(model, alpha=0.01, pvalues=null) as bh:
        ...

A pass over 50,000 tokens sees three million logits in every layer. Each layer's null is fitted on a *reservoir*: a
sample of fixed size, drawn without replacement and uniformly from all values that the layer showed, so that memory is
bounded however long the text is. The draw depends on the seed and on the order of the tokens, not on the batch size.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from bhlib.discovery import MoELayer, find_moe_layers, name_of, watch
from bhlib.levels import undecided_pvalues
from bhlib.norms import OutputNorms
from bhlib.pvalues import (
    FittedNull,
    PValueMaker,
    check_logits,
    fitted_nulls,
    load_null,
    null_values,
)
from bhlib.sampling import LogitSampler
from bhlib.text_pass import batches, check_plain, check_texts, run_batch


def calibrate(
    model: nn.Module,
    token_ids: Tensor | Mapping[str, Tensor],
    *,
    null: str | type[FittedNull] = "kde",
    statistic: str = "log_prob",
    exclude_top: int | None = None,
    per_expert: bool = False,
    norms: OutputNorms | None = None,
    max_values: int | None = None,
    attention_mask: Tensor | Mapping[str, Tensor] | None = None,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = True,
    **options,
) -> FittedNull:
    """Fit a null on the router logits that a model shows on a text.

    Parameters
    ----------
    model : nn.Module
        A transformers MoE model (`find_moe_layers`), not patched, in evaluation mode, on any device. Its hooks and
        outputs are afterwards what they were before, even after an error.
    token_ids : Tensor [sequences, length], int64, or a mapping of names to such tensors
        For instance ``load_heldout("calibration")``. Not the text that results are reported on.
    null : str or subclass of FittedNull
        ``"kde"`` or ``"conformal"`` (`bhlib.pvalues.NULLS`).
    statistic : str
        A name in `bhlib.pvalues.STATISTICS`. The default reads what the model's own weights read, and is the one that
        lost least on the demo (figure `statistic_matters`).
    exclude_top : int, optional
        How many of each token's largest logits to leave out; by default as many as the model itself selects.
    per_expert : bool
        Whether each expert gets a null of its own.
    norms : OutputNorms, optional
        What the rule will be shown beside the logits (`bhlib.fit_norms`): the levels of ``alpha_for`` are then those
        for ``BHRoutingIntegration(..., norms=norms)``. The null stays that of the logits alone.
    max_values : int, optional
        Size of the sample, by default 50,000 values per layer; with `per_expert`, 4,000 per layer and expert. While
        the model runs a value takes 12 bytes.
    attention_mask : as `token_ids`, optional
        0 for padding, which is not counted.
    batch_size : int
        Sequences per forward pass.
    seed : int
        Of the sample.
    progress : bool
        Whether to show a bar.
    **options
        For the null: ``bw_method`` for ``"kde"``.

    Returns
    -------
    FittedNull
        Also a `PValueMaker`: pass it to `BHRoutingIntegration` as ``pvalues``, or call ``save(path)``. It brings the
        level for a wanted number of experts, ``alpha=null.alpha_for(4.0)``.

    Raises
    ------
    ValueError
        For an unknown null or statistic, ids or a mask of the wrong shape, a model in training mode, logits that are
        not finite, `norms` of another model.
    RuntimeError
        If the model is patched.

    Examples
    --------
    >>> from bhlib import calibrate, load_demo, load_heldout
    >>> model, tokenizer = load_demo()
    >>> text = load_heldout("calibration", length=64, max_sequences=2)
    >>> null = calibrate(model, text, null="conformal", max_values=2_000, progress=False)
    >>> null.num_layers, null.smallest_sample
    (8, 2000)
    """
    layers = find_moe_layers(model)
    exclude_top = layers[0].top_k if exclude_top is None else exclude_top
    num_experts = layers[0].num_experts
    sampler = LogitSampler(len(layers), num_experts, statistic, exclude_top, per_expert, max_values, seed)
    make = _null_class(null)
    if norms is not None:
        norms.check_model(name_of(model), len(layers), num_experts)
    _run(model, layers, token_ids, attention_mask, batch_size, progress, sampler.add)
    fitted = make.fit(sampler.samples(), model_name=name_of(model), **sampler.settings, **options)
    return _with_levels(fitted, sampler.logits(), norms)


def fit_null(
    router_logits: Tensor,
    *,
    model_name: str,
    null: str | type[FittedNull] = "kde",
    statistic: str = "log_prob",
    exclude_top: int = 8,
    per_expert: bool = False,
    max_values: int | None = None,
    seed: int = 0,
    **options,
) -> FittedNull:
    """`calibrate` on logits that are in memory already: one pass over a model, any number of nulls.

    Parameters
    ----------
    router_logits : Tensor [layers, tokens, experts]
        As `collect_router_logits` returns them.
    model_name : str
        Whose logits these are, for instance ``name_of(model)``.
    null, statistic, exclude_top, per_expert, max_values, seed, **options
        As for `calibrate`, which returns the same null for the same tokens.
    """
    num_layers, _, num_experts = router_logits.shape
    sampler = LogitSampler(num_layers, num_experts, statistic, exclude_top, per_expert, max_values, seed)
    for layer, logits in enumerate(router_logits):
        sampler.add(layer, logits)
    fitted = _null_class(null).fit(sampler.samples(), model_name=model_name, **sampler.settings, **options)
    return _with_levels(fitted, sampler.logits())


def collect_router_logits(
    model: nn.Module,
    token_ids: Tensor | Mapping[str, Tensor],
    *,
    attention_mask: Tensor | Mapping[str, Tensor] | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> Tensor:
    """Every router logit of an unpatched model on a text. Parameters and errors as for `calibrate`.

    Returns
    -------
    Tensor [layers, tokens, experts], float32, on the CPU
        Sequence by sequence, padding left out. Not bounded in memory: 4 bytes per logit, which is 2 kB per token for
        the demo's 8 layers of 64 experts.
    """
    layers = find_moe_layers(model)
    parts: list[list[Tensor]] = [[] for _ in layers]

    def take(layer: int, logits: Tensor) -> None:
        parts[layer].append(logits.float().cpu())

    _run(model, layers, token_ids, attention_mask, batch_size, progress, take)
    return torch.stack([torch.cat(part) for part in parts])


def load_calibration(path: str | Path, model: nn.Module) -> FittedNull:
    """Load a null that was fitted on this model, refusing any other.

    Raises
    ------
    ValueError
        If the file is no calibration, or one for a model of another name, number of MoE layers or number of experts;
        the message names both.
    """
    layers = find_moe_layers(model)
    return load_null(path, model_name=name_of(model), num_layers=len(layers), num_experts=layers[0].num_experts)


def _with_levels(null: FittedNull, router_logits: list[Tensor], norms: OutputNorms | None = None) -> FittedNull:
    """The null, with the levels that `FittedNull.alpha_for` reads in its header."""
    if norms is not None:
        router_logits = [logits + norms(logits, layer) for layer, logits in enumerate(router_logits)]
    min_k, max_k = 1, min(8, null.num_experts)
    means = np.arange(min_k + 0.5, max_k, 0.5)
    alphas = np.quantile(undecided_pvalues(null, router_logits, "bh", min_k, max_k), (means - min_k) / (max_k - min_k))
    alphas = np.array([float(f"{alpha:.4g}") for alpha in alphas])  # the sample knows no more digits
    # P-values from few values have steps: of several numbers of experts at one level the first is kept.
    usable = (alphas > np.append(0, alphas[:-1])) & (alphas < 1)
    if usable.any():
        null.header["levels"] = {"mean_experts": means[usable].tolist(), "alpha": alphas[usable].tolist()}
    return null


def tail_factors(
    null: PValueMaker,
    router_logits: Tensor,
    levels: Sequence[float] = (1e-1, 1e-2, 1e-3, 1e-4),
    *,
    statistic: str = "log_prob",
    exclude_top: int = 8,
) -> pd.DataFrame:
    """How far p-values are from the frequencies that they stand for: is the tail of a null right?

    Parameters
    ----------
    null : PValueMaker
    router_logits : Tensor [layers, tokens, experts]
        As `collect_router_logits` returns them; of other text than the null was fitted on, for an honest answer.
    levels : sequence of float
        How far down to look; below ten or so over the number of values it is the sample that is off.
    statistic, exclude_top
        Which values count as null (`bhlib.pvalues.null_values`): those of the experts outside each token's top.

    Returns
    -------
    DataFrame, index layer, a column for each level
        The largest factor, either way, between a p-value and the fraction of null values with one as small, over
        fractions from 1 down to the level. 1 is right.
    """
    rows = []
    for layer, logits in enumerate(router_logits):
        _, experts = null_values(logits, statistic, exclude_top)
        pvals = null(logits, layer).gather(-1, experts).flatten().double().cpu().numpy()
        values, counts = np.unique(pvals, return_counts=True)
        fractions = counts.cumsum() / len(pvals)
        with np.errstate(divide="ignore"):
            off = np.exp(np.abs(np.log(values / fractions)))
        rows.append([off[fractions >= level].max() for level in levels])
    return pd.DataFrame(rows, columns=list(levels)).rename_axis("layer")


# -- the pass over the model ---------------------------------------------------------------------------------


@torch.no_grad()
def _run(
    model: nn.Module,
    layers: list[MoELayer],
    token_ids: Tensor | Mapping[str, Tensor],
    attention_mask: Tensor | Mapping[str, Tensor] | None,
    batch_size: int,
    progress: bool,
    take: Callable[[int, Tensor], None],
) -> None:
    """Run the model and hand over, per forward pass and layer, the logits [real tokens, experts] of each router."""
    texts = check_texts(token_ids, attention_mask)
    check_plain(model, layers)
    valid = None

    def take_real(layer: MoELayer, output: tuple) -> None:
        logits = output[0].reshape(-1, layer.num_experts)
        logits = logits if valid is None else logits[valid.flatten().to(logits.device)]
        check_logits(logits)
        take(layer.index, logits)

    total = sum(len(text.ids) for text in texts)
    with (
        tqdm(total=total, unit="seq", desc="router logits", disable=not progress) as bar,
        watch(layers, take_real),
    ):
        for batch in batches(texts, batch_size):
            valid = None if batch.mask is None else batch.mask.bool()
            run_batch(model, batch)
            bar.update(len(batch.ids))


def _null_class(null: str | type[FittedNull]) -> type[FittedNull]:
    if isinstance(null, type) and issubclass(null, FittedNull):
        return null
    nulls = fitted_nulls()
    if null not in nulls:
        raise ValueError(
            f"null is {null!r}, but must be one of {', '.join(map(repr, nulls))} or a subclass of FittedNull"
        )
    return nulls[null]
