"""Benjamini–Hochberg routing of mixture-of-experts models.

Each token activates as many experts as the Benjamini–Hochberg procedure finds significant at level ``alpha``, instead
of a fixed number. See the notebooks for the theory, and `BHRoutingIntegration` for the way in.
"""

from bhlib.calibration import calibrate, load_calibration
from bhlib.compensating import fit_compensation
from bhlib.compensation import load_compensation
from bhlib.discovery import find_moe_layers
from bhlib.fitting_norms import fit_norms
from bhlib.loading import load_demo, load_heldout, load_olmoe
from bhlib.norms import load_norms
from bhlib.patching import BHRoutingIntegration, RoutingPatch
from bhlib.rules import benjamini_hochberg_routing, topk_routing
from bhlib.texts import read_text

__version__ = "0.2.0.dev0"

__all__ = [
    "BHRoutingIntegration",
    "RoutingPatch",
    "benjamini_hochberg_routing",
    "calibrate",
    "find_moe_layers",
    "fit_compensation",
    "fit_norms",
    "load_calibration",
    "load_compensation",
    "load_demo",
    "load_heldout",
    "load_norms",
    "load_olmoe",
    "read_text",
    "topk_routing",
]
