"""Rules: from a token's router logits to the experts that it activates, with their weights.

A rule answers one question per token, *how many experts, and which*. The weights that the chosen experts get are
not the rule's business but the model's, so they are computed in one place, for every rule alike, from the model's
own convention (`bhlib.weighting`). Every rule is a small frozen dataclass with one method to write, `select` or,
for the rules that always keep the best-scored experts, `count`.

    rule = TopP(p=0.4, max_k=8)
    weights, experts, counts = rule(router_logits)          # Routing, one row per token
"""

from bhlib.rules.base import Forms, Level, PrefixRule, ProbabilityRule, Routing, Rule, TopK
from bhlib.rules.batch import OEA, BatchBH, BatchRule, BatchThreshold
from bhlib.rules.bh import BH
from bhlib.rules.budgets import AllocMoE, SeqTopK
from bhlib.rules.folding import ExFold, Halving
from bhlib.rules.functional import benjamini_hochberg_routing, compare_max_k, topk_routing
from bhlib.rules.importance import ACE, MoDES
from bhlib.rules.names import FAMILIES, RuleFamily, families_of, register
from bhlib.rules.replay import Replay
from bhlib.rules.rivals import EntropyK, KeepMass, MinP, StaticPerLayer, Threshold, TopP, WeightRatio

__all__ = [
    "ACE",
    "BH",
    "FAMILIES",
    "AllocMoE",
    "OEA",
    "BatchBH",
    "BatchRule",
    "BatchThreshold",
    "EntropyK",
    "ExFold",
    "Forms",
    "Halving",
    "KeepMass",
    "Level",
    "MinP",
    "MoDES",
    "PrefixRule",
    "ProbabilityRule",
    "Replay",
    "Routing",
    "Rule",
    "RuleFamily",
    "SeqTopK",
    "StaticPerLayer",
    "Threshold",
    "TopK",
    "TopP",
    "WeightRatio",
    "benjamini_hochberg_routing",
    "compare_max_k",
    "families_of",
    "register",
    "topk_routing",
]
