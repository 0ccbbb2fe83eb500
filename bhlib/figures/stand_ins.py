"""What stands in for dropped experts in figures, and what it leaves of a counted cost for experts."""

from typing import NamedTuple

from bhlib.compensation import Compensation
from bhlib.figures.ingredients import norms_of
from bhlib.figures.study import Study
from bhlib.norms import OutputNorms

#: Counted costs that rules are given levels for, where the model's own top-k is 8; others in proportion.
COSTS = (3.0, 4.0, 5.0, 6.0)

#: Rank of the map.
RANK = 16


class StandIn(NamedTuple):
    """What stands in for dropped experts: the rank of its map, None for nothing; and whether norms choose these."""

    rank: int | None
    by_norms: bool = False


STAND_INS = {
    "nothing": StandIn(None),
    "means": StandIn(0),
    f"means and a map of rank {RANK}": StandIn(RANK),
    "the same, chosen by norms,": StandIn(RANK, by_norms=True),
}


def fitted(study: Study, stands_in: StandIn) -> tuple[Compensation | None, OutputNorms | None]:
    """What a model is patched with."""
    compensation = None if stands_in.rank is None else study.compensation(stands_in.rank)
    return compensation, norms_of(study) if stands_in.by_norms else None


def costs_of(study: Study) -> tuple[float, ...]:
    """`COSTS`, in the model's own experts."""
    return tuple(cost * study.top_k / 8 for cost in COSTS)


def mean_for(compensation: Compensation | None, norms: OutputNorms | None, cost: float, study: Study) -> float:
    """The mean number of experts that leaves so much for what stands in for the others, and for choosing them."""
    if norms is not None:
        cost -= norms.cost(study.hidden_size, study.intermediate_size)
    if compensation is None:
        return cost
    sizes = study.top_k, study.intermediate_size
    none, one = compensation.cost(0, *sizes), compensation.cost(1, *sizes)
    return (cost - none) / (1 + one - none)
