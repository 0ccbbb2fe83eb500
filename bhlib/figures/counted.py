"""What is left for experts of a counted cost, when something else is paid from it too."""

from bhlib.compensation import Compensation
from bhlib.figures.study import Study
from bhlib.norms import OutputNorms


def mean_for(compensation: Compensation | None, norms: OutputNorms | None, cost: float, study: Study) -> float:
    """The mean number of experts that leaves so much for what stands in for the others, and for choosing them."""
    if norms is not None:
        cost -= norms.cost(study.hidden_size, study.intermediate_size)
    if compensation is None:
        return cost
    sizes = study.top_k, study.intermediate_size
    none, one = compensation.cost(0, *sizes), compensation.cost(1, *sizes)
    return (cost - none) / (1 + one - none)
