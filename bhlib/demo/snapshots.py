"""What the routers say to a fixed held-out text while they are trained, for router saturation (`--snapshots`)."""

from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file
from transformers import OlmoeForCausalLM

HELDOUT = Path(__file__).parent / "heldout.safetensors"
SPLIT, WINDOW = "validation", 1024  # the first window of each domain: 9,216 tokens


class Snapshots:
    """Router logits on the same text at given shares of a schedule, one file `STEP.npy` in a folder for each.

    A file holds float16 [layers, tokens, experts]: which experts a rule selects at a step follows from it. Taking one
    draws no random number and changes nothing in the model.
    """

    def __init__(self, folder: Path, shares: list[float], device: torch.device):
        self.folder, self.shares = folder, shares
        arrays = load_file(HELDOUT)
        rows = [arrays[name][:WINDOW].astype(np.int64) for name in sorted(arrays) if name.startswith(f"{SPLIT}/")]
        self.text = torch.from_numpy(np.stack(rows)).to(device)

    def due(self, step: int, total: int | None) -> bool:
        """Whether the model after this many steps of so long a schedule is to be looked at."""
        return bool(total) and step in {max(1, round(share * total)) for share in self.shares}

    @torch.no_grad()
    def take(self, model: OlmoeForCausalLM, step: int) -> None:
        """Write what the routers say now."""
        logits = model.model(self.text, use_cache=False, output_router_logits=True).router_logits
        self.folder.mkdir(parents=True, exist_ok=True)
        np.save(self.folder / f"{step}.npy", torch.stack(logits).half().cpu().numpy())
