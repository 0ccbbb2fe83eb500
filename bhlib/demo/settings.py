"""Choose the settings of rules that differ by layer for the embedded model, on its calibration text.

    python -m bhlib.demo.settings        # writes settings.json beside this file; some minutes on a GPU

They are those of `bhlib.tuning.choose_settings`, with weights chosen where the rule gives four experts per token.
"""

import json

import torch

from bhlib.calibration import collect_router_logits
from bhlib.loading import DEMO, load_demo, load_heldout
from bhlib.tuning import choose_settings

MEAN_K = (3, 4, 5, 6, 7)


def choose_demo_settings(length: int = 512) -> dict:
    """Choose them anew, on a GPU if there is one."""
    model = load_demo()[0].to("cuda" if torch.cuda.is_available() else "cpu")
    text = load_heldout("calibration", length)
    logits = collect_router_logits(model, text)[:, ::10]
    chosen = choose_settings(model, text, logits, MEAN_K, 4, batch_size=32)
    return {"calibration_tokens": sum(sequences.numel() for sequences in text.values())} | chosen


if __name__ == "__main__":
    chosen = json.dumps(choose_demo_settings(), indent=1)
    (DEMO / "settings.json").write_text(chosen + "\n", encoding="utf-8")
    print(chosen)
