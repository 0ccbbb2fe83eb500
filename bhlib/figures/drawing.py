"""One style for all figures, and a Figure that notebooks show."""

from io import BytesIO

import matplotlib
from matplotlib.figure import Figure

from bhlib.looks import COLORS

STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "figure.dpi": 110,
    "savefig.dpi": 200,
    "pdf.fonttype": 42,
    "axes.prop_cycle": matplotlib.cycler(color=COLORS),
}


class Picture(Figure):
    """A Figure that a notebook shows, whatever backend is chosen, and that nobody has to close."""

    def _repr_png_(self) -> bytes:
        buffer = BytesIO()
        with matplotlib.rc_context(STYLE):
            self.savefig(buffer, format="png", dpi=110, bbox_inches="tight", metadata={"Software": None})
        return buffer.getvalue()
