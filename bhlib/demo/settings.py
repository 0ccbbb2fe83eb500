"""Choose the settings of rules that differ by layer for the embedded model, on its calibration text.

    python -m bhlib.demo.settings        # writes settings.json beside this file; some minutes on a GPU

``layer_weights`` holds a weight per layer for `BH`, by its method (`bhlib.tuning.choose_layer_weights`), chosen where
the rule gives four experts per token; ``static_per_layer`` the whole numbers for `StaticPerLayer`, by their mean.
"""

import json

import torch

from bhlib.calibration import collect_router_logits
from bhlib.levels import level_for_mean_experts
from bhlib.loading import DEMO, load_demo, load_heldout
from bhlib.rules import BH
from bhlib.tuning import choose_layer_weights, choose_static_per_layer

MEAN_K = (3, 4, 5, 6, 7)


def choose_settings(length: int = 512) -> dict:
    """Choose them anew, on a GPU if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_demo()[0].to(device)
    text = load_heldout("calibration", length)
    logits = collect_router_logits(model, text)[:, ::10]
    weights = {}
    for method in ("bh", "fixed"):
        alpha = level_for_mean_experts(lambda level, method=method: BH(level, method=method), logits, 4)
        weights[method] = choose_layer_weights(model, text, BH(alpha, method=method), batch_size=32)
    static = choose_static_per_layer(model, text, MEAN_K, batch_size=32)
    return {
        "calibration_tokens": sum(sequences.numel() for sequences in text.values()),
        "layer_weights": {method: [round(w, 4) for w in chosen] for method, chosen in weights.items()},
        "static_per_layer": {k: rule.ks for k, rule in static.items()},
    }


if __name__ == "__main__":
    chosen = json.dumps(choose_settings(), indent=1)
    (DEMO / "settings.json").write_text(chosen + "\n", encoding="utf-8")
    print(chosen)
