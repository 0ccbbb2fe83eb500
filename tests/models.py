"""Small real transformers models with random weights, for tests that need no trained one."""

import torch
from transformers import OlmoeConfig, OlmoeForCausalLM


def tiny_olmoe(seed: int = 0, **changes) -> OlmoeForCausalLM:
    """An OLMoE with 64 experts, top 8, three layers, and router logits spread like a trained model's."""
    config = OlmoeConfig(
        **{
            "hidden_size": 64,
            "intermediate_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "vocab_size": 256,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": 0,
        }
        | changes
    )
    torch.manual_seed(seed)
    model = OlmoeForCausalLM(config).eval()
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.mlp.gate.weight, std=0.2)
    return model


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random token ids, none of them padding."""
    return torch.randint(1, 256, shape, generator=torch.Generator().manual_seed(seed))


def state_of(model):
    """All that a patch could leave behind: hooks, attributes, implementations."""
    state = {"config": model.config.get_text_config()._experts_implementation}
    for name, module in model.named_modules():
        state[name] = (
            sorted(vars(module)),
            [list(vars(module)[key].values()) for key in sorted(vars(module)) if key.endswith("hooks")],
        )
    return state
