"""What each expert of a token adds, measured, beside what a rule decides about it: `explain_token`.

    explain_token(model, BH(0.05), token_ids, position=12, layer=4)

A decision is explained by what the router says (`bhlib.explain`). Whether it was right depends on what the experts make
of the token (`bhlib.contributions`), those too that nobody asked. Both together are one table, a row per expert.
"""

import numpy as np
import pandas as pd
from torch import Tensor, nn

from bhlib.contributions import Contributions, measure_token
from bhlib.discovery import find_moe_layers
from bhlib.explain import explain
from bhlib.rules import Rule
from bhlib.weighting import of_model

#: What `add_contributions` adds to the table of `bhlib.explain.explain`.
MEASURED = ["own", "r", "along"]


def explain_token(
    model: nn.Module, rule: Rule, token_ids: Tensor, position: int, layer: int, *, temperature: float = 1.0
) -> pd.DataFrame:
    """Why a rule would give a token of a text its experts, and what each of all experts adds.

    The model is not patched: the rule is asked about the logits of the model's own routing, as in analyze mode.

    Parameters
    ----------
    model, token_ids, position
        As for `bhlib.contributions.measure_token`.
    rule : Rule
    layer : int
        MoE layer, from 0.
    temperature : float
        As the rule is called with; it concerns ``weight``, and not ``r`` and ``along``.

    Returns
    -------
    pandas.DataFrame
        The table of `bhlib.explain.explain`, with the columns of `add_contributions`.

    Raises
    ------
    ValueError, RuntimeError
        As `measure_token` and `bhlib.explain.explain`; for a layer that is not there.

    Examples
    --------
    >>> from bhlib import load_demo
    >>> from bhlib.explain_token import explain_token
    >>> from bhlib.rules import BH
    >>> model, tokenizer = load_demo()
    >>> token_ids = tokenizer("def main():", return_tensors="pt")["input_ids"]
    >>> table = explain_token(model, BH(0.05), token_ids, position=-1, layer=4)
    >>> print(f"{table.loc[table['own'], 'along'].sum():.3f}")  # the model's own eight are its layer's output
    1.000
    """
    layers = find_moe_layers(model)
    if not 0 <= layer < len(layers):
        raise ValueError(f"layer is {layer}, but must lie in 0..{len(layers) - 1}, the model's MoE layers")
    measured = measure_token(model, token_ids, position)
    weighting = of_model(layers[layer].weighting, rule.max_k, layers[layer].top_k)
    logits = measured.logits[layer, 0]
    return add_contributions(
        explain(rule, logits, layer, weighting=weighting, temperature=temperature), measured, layer
    )


def add_contributions(table: pd.DataFrame, measured: Contributions, layer: int) -> pd.DataFrame:
    """A table of decisions with what each expert was measured to add.

    Parameters
    ----------
    table : pandas.DataFrame
        What `bhlib.explain.explain` says of the measured tokens, in their order, in this layer.
    measured : Contributions
        Of these tokens; of the model as it is, not patched.
    layer : int

    Returns
    -------
    pandas.DataFrame
        A copy with three columns more, float64 and bool: ``own``, whether the expert is one of the model's own top-k;
        ``r``, the norm of its weighted output over that of the layer's output; ``along``, its part along the layer's
        output, with a sign, which sums to 1 over the model's own.

    Raises
    ------
    ValueError
        If the table has not a row for every expert of every token that was measured.
    """
    num_tokens, num_experts = measured.r.shape[1:]
    if len(table) != num_tokens * num_experts:
        raise ValueError(
            f"the table has {len(table)} rows, but {num_tokens} tokens were measured, with {num_experts} experts each: "
            "explain the same tokens, explain(rule, measured.logits[layer], layer)"
        )
    token = np.arange(num_tokens).repeat(num_experts)
    expert = table["expert"].to_numpy()
    parts = dict(zip(MEASURED, (measured.selected, measured.r.double(), measured.along.double()), strict=True))
    return table.assign(**{name: part[layer].numpy()[token, expert] for name, part in parts.items()})
