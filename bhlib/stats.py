"""The statistics of a run, computed from exact counts."""

import numpy as np


class RoutingStats(dict):
    """Statistics of a run: a dict that names its keys when one is missing, and prints as a sentence.

    Keys
    ----
    mean_experts_per_token, std_experts_per_token : float
        Of the number of experts that were activated, over all pairs of a token and a layer.
    sparsity_gain : float
        1 - mean / top_k: the fraction of the model's own expert computations that was saved; negative if more
        were made.
    total_tokens : int
        Tokens routed, padding not counted.
    total_forward_passes : int
    top_k : int
        What the model itself activates.
    mean_experts_per_layer, std_experts_per_layer : list of float
    histogram : list of int
        Entry k is the number of (token, layer) pairs with k experts.
    bh_would_select_mean, bh_would_select_std, bh_would_sparsity_gain : float
        In analyze mode only: of the number that the rule would have activated. There the first three keys describe
        the untouched model, and the lists describe the rule.
    mode : str
        ``"patch"`` or ``"analyze"``; this and the next from a patch, not from its `Records`.
    alpha : float or None
        Level of the rule, if it has one.
    """

    def __missing__(self, key: str):
        raise KeyError(f"{key!r} is not among the statistics: {', '.join(self)}.")

    def __repr__(self) -> str:
        if not self["total_tokens"]:
            return "RoutingStats: nothing was routed yet"
        would = "bh_would_select_mean" in self
        mean, std, gain = (
            self[key]
            for key in (
                ("bh_would_select_mean", "bh_would_select_std", "bh_would_sparsity_gain")
                if would
                else ("mean_experts_per_token", "std_experts_per_token", "sparsity_gain")
            )
        )
        verb = "would use" if would else "used"
        return (
            f"RoutingStats: {self['total_tokens']} tokens {verb} {mean:.2f} ± {std:.2f} experts per layer "
            f"instead of {self['top_k']} ({100 * gain:.1f} % fewer)"
        )


def mean_std(histogram: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation of counts given how often each of 0, 1, 2, … occurred; NaN if none did."""
    total = histogram.sum()
    if not total:
        return float("nan"), float("nan")
    values = np.arange(len(histogram))
    mean = (values * histogram).sum() / total
    return float(mean), float(np.sqrt(((values - mean) ** 2 * histogram).sum() / total))
