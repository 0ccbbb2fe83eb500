"""What the demo's model card reports: loss per domain at static top-k, and the balance of the experts."""

import numpy as np
import torch
import torch.nn.functional as F
from transformers import OlmoeForCausalLM


@torch.no_grad()
def evaluate(
    model: OlmoeForCausalLM, arrays: dict[str, np.ndarray], split: str, top_ks: tuple[int, ...] = (1, 2, 4, 8, 16)
) -> dict:
    """Loss per domain in nats per token at static top-k, and the experts' shares at the model's own top-k.

    `top_ks` that a layer has too few experts for are left out, and the model's own is always there.
    Each domain is cut into windows of 1024 tokens without overlap; the first token of a window is not scored.
    Shares are fractions of all (token, slot) pairs of the split, one list per layer.
    """
    model.eval()
    gates = [layer.mlp.gate for layer in model.model.layers]
    own, length = model.config.num_experts_per_tok, model.config.max_position_embeddings
    counts = torch.zeros(len(gates), model.config.num_experts, device=model.device)
    wanted = sorted({own} | {top_k for top_k in top_ks if top_k <= model.config.num_experts})
    result = {"loss": {str(top_k): {} for top_k in wanted}}
    for top_k in wanted:
        loss = result["loss"][str(top_k)]
        for gate in gates:
            gate.top_k = top_k
        for name, tokens in arrays.items():
            if not name.startswith(split + "/"):
                continue
            windows = torch.from_numpy(tokens.astype(np.int64)).to(model.device).split(length)
            total = 0.0
            for rows in zip(*[iter(windows)] * 8, strict=False):
                rows = torch.stack(rows)
                output = model.model(rows[:, :-1], use_cache=False, output_router_logits=True)
                logits = model.lm_head(output.last_hidden_state).float()
                total += F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum").item()
                for layer, router in enumerate(output.router_logits if top_k == own else ()):
                    chosen = router.topk(own, -1).indices.flatten()
                    counts[layer] += chosen.bincount(minlength=counts.shape[1])
            loss[name.split("/")[1]] = total / (len(windows) // 8 * 8 * (length - 1))
        loss["mean"] = float(np.mean(list(loss.values())))
    for gate in gates:
        gate.top_k = own
    shares = counts / counts.sum(-1, keepdim=True)
    entropy = -(shares * shares.clamp_min(1e-12).log()).sum(-1) / np.log(shares.shape[1])
    return result | {
        "expert_share": {
            "max_over_uniform": (shares.max(-1).values * shares.shape[1]).tolist(),
            "min_over_uniform": (shares.min(-1).values * shares.shape[1]).tolist(),
            "normalized_entropy": entropy.tolist(),
        }
    }
