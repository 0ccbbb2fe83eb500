"""Train a model for a rule, and keep what has changed.

    tuned = tune(model, load_heldout("calibration", length=128), mean_k=4.0)
    tuned.save("tuned.safetensors")
    with load_tuned("tuned.safetensors").routing(model) as patch: ...

`bhlib.tuning` is something else: it chooses settings of rules for a model whose weights stay.
"""

from bhlib.training.controller import LevelController, settle
from bhlib.training.loop import LEARNING_RATES, Plan, tune
from bhlib.training.tuned import Tuned, TunedRouting, load_tuned

__all__ = ["LEARNING_RATES", "LevelController", "Plan", "Tuned", "TunedRouting", "load_tuned", "settle", "tune"]
