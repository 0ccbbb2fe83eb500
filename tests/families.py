"""Families of mixtures of experts in transformers: tiny random models, and whether bhlib can patch them.

`test_families` checks each of them on a real model, and ``python tests/families.py`` writes the page that lists them.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from bhlib.weighting import WEIGHTINGS

# Names that configurations use for the same few sizes: each family takes those that it knows.
SIZES = {
    "hidden_size": 64, "intermediate_size": 32, "moe_intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 128, "num_experts": 16,
    "num_local_experts": 16, "n_routed_experts": 16, "num_experts_per_tok": 4, "max_position_embeddings": 128,
    "shared_expert_intermediate_size": 48, "first_k_dense_replace": 0, "pad_token_id": 0, "bos_token_id": None,
    "eos_token_id": None,
}  # fmt: skip

UNKNOWN = "its weights follow from its logits in none of the ways that are known"


@dataclass(frozen=True)
class Family:
    """A model type of transformers; `weighting` as in `bhlib.weighting.WEIGHTINGS`, or `refused` with the reason."""

    model_type: str
    weighting: str | None = None
    refused: str | None = None
    reason: str = ""
    changes: tuple = ()

    def __str__(self) -> str:
        return self.model_type


PATCHED = [
    Family("olmoe", "softmax"),
    Family("flex_olmo", "softmax"),
    Family("mixtral", "normalized"),
    Family("minimax", "normalized"),
    Family("qwen2_moe", "softmax"),
    Family("qwen3_moe", "softmax"),
    Family("cohere2_moe", "softmax_selected"),
    Family("qwen3_next", "normalized"),
    Family("jamba", "softmax"),
    Family("gpt_oss", "softmax_selected"),
    Family("granitemoe", "softmax_selected"),
    Family("granitemoeshared", "softmax_selected"),
    Family("granitemoehybrid", "softmax_selected", changes=(("layer_types", ["attention", "attention"]),)),
]

REFUSED = [
    Family("phimoe", refused=UNKNOWN, reason="SparseMixer: weights from a masked softmax of its own"),
    Family("deepseek_v2", refused=UNKNOWN, reason="weights times a scaling factor"),
    Family("deepseek_v3", refused=UNKNOWN, reason="sigmoid scores, a bias per expert, groups of experts"),
    Family("glm4_moe", refused=UNKNOWN, reason="sigmoid scores, a bias per expert, groups of experts"),
    Family("ernie4_5_moe", refused=UNKNOWN, reason="a bias per expert, learned in training"),
    Family("minimax_m2", refused="it needs more than the hidden states", reason="a bias per expert, passed in"),
    Family("hunyuan_v1_moe", refused="one router with a weight of 16 rows, found 0", reason="router nested deeper"),
    Family("jetmoe", refused="no mixture-of-experts layer", reason="experts written out in the block"),
    Family("llama4_text", refused="no mixture-of-experts layer", reason="experts written out in the block"),
    Family("llama", refused="no mixture-of-experts layer", reason="no experts"),
]


PAGE = Path(__file__).resolve().parent.parent / "bhlib" / "models.md"


def render_page() -> str:
    """The text of `PAGE`."""
    lines = [
        "# Models that can be patched",
        "",
        "Layers are recognized by what they do (`bhlib.find_moe_layers`), so a model that is not in this table may be",
        "patched, too; one that cannot be is refused with the reason. `model_type` is transformers' name of the",
        "architecture; the weights are those of the experts that a token keeps. `python tests/families.py` writes this",
        "page, and a test patches a small random model of each row. Models that are quantized, offloaded, or spread",
        "over processes: [large_models.md](large_models.md).",
        "",
        "| `model_type` | patched | weights, or why not |",
        "|---|---|---|",
        *(f"| `{family}` | yes | {WEIGHTINGS[family.weighting].label} |" for family in PATCHED),
        *(f"| `{family}` | refused | {family.reason} |" for family in REFUSED),
    ]
    return "\n".join(lines) + "\n"


def tiny(family: Family, seed: int = 0) -> PreTrainedModel:
    """A random model of a family, whose router logits are spread like a trained model's."""
    known = AutoConfig.for_model(family.model_type)
    sizes = {name: value for name, value in SIZES.items() if hasattr(known, name)} | dict(family.changes)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family.model_type, **sizes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("correction_bias"):
                torch.nn.init.normal_(parameter, std=0.1)
            elif parameter.dim() == 3:  # stacked experts, left at zero by some families
                torch.nn.init.normal_(parameter, std=0.1)
            elif parameter.dim() == 2 and parameter.shape[0] == 16 and name.endswith(("gate.weight", "router.weight")):
                torch.nn.init.normal_(parameter, std=0.2)
    return model


if __name__ == "__main__":
    PAGE.write_text(render_page(), encoding="utf-8")
