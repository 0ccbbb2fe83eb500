"""How series look in figures: colours that colour-blind readers can tell apart, with markers and lines."""

from collections.abc import Iterable
from itertools import product
from typing import NamedTuple

#: Colours that colour-blind readers can tell apart (Okabe & Ito 2008).
BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PINK = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
COLORS = (BLUE, RED, GREEN, ORANGE, PINK, SKY, BLACK, YELLOW)
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "<", ">", "d", "p", "h", "*")
LINES = ("-", "--", ":", "-.")


class Look(NamedTuple):
    """A colour, a marker and a line style, as matplotlib takes them."""

    color: str
    marker: str
    linestyle: str = "-"


def free_look(taken: Iterable[Look]) -> Look:
    """A look that can be told from those that are taken.

    There are eight colours, so beyond eight series one comes back: with the marker that is used least, and with a line
    that its colour does not have yet.

    Raises
    ------
    ValueError
        If all are taken.
    """
    taken = list(taken)
    colors, markers = [look.color for look in taken], [look.marker for look in taken]
    free = [Look(*look) for look in product(COLORS, MARKERS, LINES) if look not in taken]
    if not free:
        raise ValueError(f"all {len(taken)} looks are taken.")
    lines = {(look.color, look.linestyle) for look in taken}
    return min(
        free,
        key=lambda look: ((look.color, look.linestyle) in lines, markers.count(look.marker), colors.count(look.color)),
    )
