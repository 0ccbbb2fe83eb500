"""The families of rules by name: one entry brings a rule into the sweep command, the comparisons and their figures.

    register(RuleFamily("above average", Look(BLUE, "*", "-."), AboveAverage))

From then on ``python -m bhlib sweep --rules above-average:3,4`` measures it, and every figure that compares families
finds the level that gives a wanted mean number of experts (`bhlib.figures.families`), measures it and draws it.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bhlib.looks import BLACK, BLUE, GREEN, ORANGE, PINK, RED, SKY, YELLOW, Look, free_look
from bhlib.rules.base import Rule, TopK
from bhlib.rules.bh import BH
from bhlib.rules.budgets import AllocMoE, SeqTopK
from bhlib.rules.rivals import MinP, Threshold, TopP, WeightRatio


@dataclass(frozen=True)
class RuleFamily:
    """Rules of one kind, with more experts or fewer.

    Parameters
    ----------
    name : str
        What people call it: in tables, legends and the text of notebooks.
    look : Look
        Its colour, marker and line in every figure. No two families have the same.
    make : callable, optional
        Makes a rule of a level, for instance the class. None if the rules of the family need more than one number.
    is_rival : bool
        Whether it is among the rules that `BH` is compared with at equal cost. Its levels then have to lie in (0, 1),
        with numbers of experts that rise or fall with them, unless `bhlib.figures.families.FITTED` knows another way.
    command : str
        What the sweep command calls it: by default the name in lower case, with hyphens for spaces.
    written : str
        How a rule of the family is called, with ``{}`` for the level: by default the name and the level.
    """

    name: str
    look: Look
    make: Callable[[float], Rule] | None = None
    is_rival: bool = field(default=True, kw_only=True)
    command: str = field(default="", kw_only=True)
    written: str = field(default="", kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "command", self.command or self.name.lower().replace(" ", "-"))
        object.__setattr__(self, "written", self.written or f"{self.name} {{}}")

    def level_of(self, rule: Rule) -> float:
        """The level of one of its rules, for tables; NaN for a rule without."""
        return np.nan if rule.level is None else rule.level


#: Every family by its name, in the order of legends and of tables.
FAMILIES: dict[str, RuleFamily] = {}


def register(family: RuleFamily) -> RuleFamily:
    """Enter a family in `FAMILIES`.

    Raises
    ------
    TypeError
        If it has no `Look`.
    ValueError
        If its name, its command or its look is another's.
    """
    looks = {other.look: name for name, other in FAMILIES.items()}
    if not isinstance(family.look, Look):
        raise TypeError(
            f"the family {family.name!r} needs a look to be seen in figures, got {family.look!r}: {_suggestion()}"
        )
    if family.look in looks:
        raise ValueError(f"the look of {family.name!r} is that of {looks[family.look]!r}: {_suggestion()}")
    if family.name in FAMILIES or family.command in {other.command for other in FAMILIES.values()}:
        raise ValueError(f"{family.name!r} ({family.command}) is registered already: choose another name.")
    FAMILIES[family.name] = family
    return family


def _suggestion() -> str:
    return f"free is for instance {free_look(family.look for family in FAMILIES.values())}."


def families_of(names: Iterable[str]) -> list[RuleFamily]:
    """The families of these names, in the order of `FAMILIES`; ValueError if one is none of them."""
    names = set(names)
    unknown = names - FAMILIES.keys()
    if unknown:
        raise ValueError(
            f"no family is registered as {sorted(unknown)}; there are: {', '.join(FAMILIES)}. "
            f"Enter it with bhlib.rules.names.register."
        )
    return [family for name, family in FAMILIES.items() if name in names]


def _top_k(k: Any) -> TopK:
    return TopK(int(k) if k == int(k) else k)  # TopK says what is wrong with half an expert


for _family in (
    RuleFamily("static top-k", Look(BLACK, "s"), _top_k, is_rival=False, command="top-k", written="top-{}"),
    RuleFamily("BH", Look(BLUE, "o"), BH, is_rival=False),
    RuleFamily("BH, layer weights", Look(BLUE, "^", "--"), None, is_rival=False),
    RuleFamily("BH, fitted null", Look(BLUE, "p", ":"), None, is_rival=False),
    RuleFamily("fixed cut, fitted null", Look(GREEN, "d", ":"), None, is_rival=False),
    RuleFamily("threshold", Look(GREEN, "D"), Threshold),
    RuleFamily("threshold, layer weights", Look(GREEN, "v", "--"), None, is_rival=False),
    RuleFamily("top-p", Look(RED, "P"), TopP),
    RuleFamily("min-p", Look(ORANGE, "X"), MinP),
    RuleFamily("entropy", Look(PINK, "h")),
    RuleFamily("weight ratio", Look(SKY, "<"), WeightRatio),
    RuleFamily("static per layer", Look(YELLOW, ">", "--")),
    RuleFamily("SeqTopK", Look(RED, "*", ":"), SeqTopK, is_rival=False, command="seq-top-k"),
    RuleFamily("Alloc-MoE", Look(ORANGE, "s", "--"), AllocMoE, is_rival=False),
    RuleFamily("MoDES", Look(PINK, "o", "--"), is_rival=False),
    RuleFamily("ACE", Look(SKY, "D", "--"), is_rival=False),
    RuleFamily("halving", Look(BLACK, "<", ":"), is_rival=False),
    RuleFamily("ExFold", Look(BLACK, "P", "--"), is_rival=False),
    RuleFamily("LDA", Look(BLACK, "X", "-."), is_rival=False),
    # Of a batch, whose size they have to be told where a text is measured: see the figure `batch_bytes`.
    RuleFamily("OEA", Look(RED, "*", "--"), None, is_rival=False),
    RuleFamily("BH, batch weights", Look(BLUE, "D", "-."), None, is_rival=False),
    RuleFamily("BH, free experts", Look(SKY, "v", ":"), None, is_rival=False),
    RuleFamily("batch threshold", Look(GREEN, "P", "-."), None, is_rival=False),
):
    register(_family)
