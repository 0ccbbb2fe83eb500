"""Does a patched model write what the model itself writes? `text_agreement`."""

from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from bhlib.discovery import input_device
from bhlib.evaluation import evaluate
from bhlib.patching import RoutingPatch
from bhlib.rules import Rule


@torch.no_grad()
def text_agreement(model: nn.Module, prompts: Tensor, rule: Rule, length: int = 30, **patch_options) -> pd.DataFrame:
    """Texts that a patched model writes greedily, beside those of the model itself.

    Parameters
    ----------
    model : nn.Module
        Unpatched model.
    prompts : Tensor [prompts, tokens], int64
        Without padding.
    rule : Rule
    length : int
        Tokens to write.
    **patch_options
        As for `bhlib.evaluation.evaluate`.

    Returns
    -------
    pandas.DataFrame
        A row per prompt: ``same`` (share of the tokens that are equal to the model's own in the same place), ``until``
        (tokens before the first that differs), and, read along the text that the model itself has written, prompt
        included, ``kl`` (divergence of the patched model's prediction from the model's own, nats per token),
        ``top1_agreement`` (share of tokens for which both have the same best guess), ``mean_k`` and ``cost``.
    """
    prompts = prompts.to(input_device(model))
    settings = {"do_sample": False, "min_new_tokens": length, "max_new_tokens": length}
    generate: Any = model.generate

    def write() -> Tensor:
        return generate(prompts, attention_mask=torch.ones_like(prompts), **settings)

    own = write()
    with RoutingPatch(model, rule, collect_stats=False, **patch_options):
        equal = (write() == own)[:, prompts.shape[1] :]
    read = evaluate(model, {"text": own}, rule, agreement=True, **patch_options)
    until = equal.long().cumprod(dim=1).sum(dim=1)
    texts = {"same": equal.float().mean(dim=1).tolist(), "until": until.tolist()}
    return pd.DataFrame(texts).join(read[["kl", "top1_agreement", "mean_k", "cost"]])
