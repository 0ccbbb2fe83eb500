"""Quantized models: patched where the experts' modules stay what they are, otherwise refused by name.

``make quantized`` brings torchao and bitsandbytes; `bhlib/large_models.md` says what these tests have shown.
"""

import re
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from families import Family, tiny
from models import state_of, tiny_olmoe, tokens
from packaging.version import Version
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    FineGrainedFP8Config,
    Mxfp4Config,
    OlmoeConfig,
    OlmoeForCausalLM,
)

import bhlib
from bhlib import BHRoutingIntegration, RoutingPatch, find_moe_layers, load_olmoe
from bhlib.loading import DEMO
from bhlib.rules import TopK

pytestmark = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.24"), reason="what is quantized, and how, is of transformers 5.24"
)

PAGE = (Path(bhlib.__file__).parent / "large_models.md").read_text(encoding="utf-8")

MODELS = {
    "olmoe": lambda: tiny_olmoe(hidden_size=128, intermediate_size=64),
    "mixtral": lambda: tiny(Family("mixtral")),
    "qwen3_moe": lambda: tiny(Family("qwen3_moe")),
}


@pytest.fixture(params=MODELS)
def folder(request, tmp_path):
    """A checkpoint in 16 bits."""
    MODELS[request.param]().bfloat16().save_pretrained(tmp_path)
    return tmp_path


def load(folder, quantization, **options):
    options = {"dtype": torch.bfloat16, "device_map": "cpu"} | options
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, **options).eval()


@torch.no_grad()
def check_patch(model):
    """The model's own top-k as the rule gives its own bits; BH gives other ones, generates, and leaves nothing."""
    ids = tokens(2, 9) % 128
    before, state, layers = model(input_ids=ids).logits, state_of(model), find_moe_layers(model)
    with RoutingPatch(model, TopK(layers[0].top_k)):
        assert torch.equal(model(input_ids=ids).logits, before)
    with BHRoutingIntegration(model, alpha=0.2) as bh:
        assert not torch.equal(model(input_ids=ids).logits, before)
        assert 1 < bh.records.counts().mean() < layers[0].top_k
        assert model.generate(ids[:1], max_new_tokens=3, min_new_tokens=3, do_sample=False).shape == (1, 12)
    assert torch.equal(model(input_ids=ids).logits, before) and state_of(model) == state


def bits_of_experts(model):
    """Storage per weight of the first layer's experts."""
    weights = find_moe_layers(model)[0].experts.gate_up_proj
    stored = getattr(weights, "qdata", weights)
    return 8 * stored.numel() * stored.element_size() / weights.numel()


@pytest.mark.parametrize(
    ("number", "implementation"), [("Int8", "eager"), ("Float8", "eager"), ("Float8", "grouped_mm")]
)
def test_torchao_quantizes_experts_that_are_named(number, implementation, folder):
    quantization = pytest.importorskip("torchao.quantization")
    one_byte = getattr(quantization, f"{number}WeightOnlyConfig")()
    experts = quantization.FqnToConfig({rf"re:.*experts\.{name}": one_byte for name in ("gate_up_proj", "down_proj")})
    model = load(folder, transformers.TorchAoConfig(experts), experts_implementation=implementation)
    assert bits_of_experts(model) == 8
    check_patch(model)


def test_the_lines_of_the_page_quantize_the_experts():
    pytest.importorskip("torchao")
    code = re.search(r"```python\n(from torchao.*?)```", PAGE, re.DOTALL)[1]
    names = {"load_olmoe": partial(load_olmoe, str(DEMO), device_map="cpu")}
    exec(code, names)
    assert bits_of_experts(names["model"]) == 8
    check_patch(names["model"])


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_leaves_experts_in_16_bits(bits, folder):
    pytest.importorskip("bitsandbytes")
    model = load(folder, BitsAndBytesConfig(**{f"load_in_{bits}bit": True}))
    assert type(model.model.layers[0].self_attn.q_proj).__name__ == {4: "Linear4bit", 8: "Linear8bitLt"}[bits]
    assert bits_of_experts(model) == 16
    check_patch(model)


def test_an_fp8_checkpoint_is_patched_if_it_is_dequantized(tmp_path):
    """In the layout of the hub: a matrix per expert, a scale per block of 128 x 128."""
    plain = MODELS["olmoe"]().bfloat16()
    plain.config.quantization_config = FineGrainedFP8Config().to_dict()
    plain.config.save_pretrained(tmp_path)
    state = {}

    def quantize(name, matrix):
        scale = matrix.abs().max().float() / 448
        state[f"{name}.weight"] = (matrix / scale).to(torch.float8_e4m3fn)
        state[f"{name}.weight_scale_inv"] = scale.reshape(1, 1)

    for name, tensor in plain.state_dict().items():
        prefix, _, matrices = name.rpartition("experts.")
        for expert, matrix in enumerate(tensor if prefix else ()):
            names = ("gate_proj", "up_proj") if matrices == "gate_up_proj" else ("down_proj",)
            for part, rows in zip(names, matrix.chunk(len(names)), strict=True):
                quantize(f"{prefix}experts.{expert}.{part}", rows)
        if name.endswith("_proj.weight"):
            quantize(name.removesuffix(".weight"), tensor)
        elif not prefix:
            state[name] = tensor
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = load(tmp_path, FineGrainedFP8Config(dequantize=True))
    assert bits_of_experts(model) == 16
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.07, atol=1e-3)
    check_patch(model)


REFUSAL = (
    r"Its quantization \({}\) replaces the experts' modules by its own. Load it with dequantize=True .*large_models.md"
)


def test_fp8_experts_are_refused_by_name():
    from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear

    model = replace_with_fp8_linear(tiny_olmoe(), quantization_config=FineGrainedFP8Config())
    model.quantization_method = FineGrainedFP8Config().quant_method  # as from_pretrained does
    refusal = r"'model.layers.0.mlp.experts' \(FP8Experts\) dispatches through FP8ExpertsInterface, .*"
    with pytest.raises(ValueError, match=refusal + REFUSAL.format("fp8")):
        BHRoutingIntegration(model)


def test_mxfp4_experts_are_refused_by_name():
    from transformers.integrations.mxfp4 import Mxfp4GptOssExperts, Mxfp4GptOssMLP

    model = tiny(Family("gpt_oss"))
    for layer in model.model.layers:  # as from_pretrained does, where there are kernels for it
        layer.mlp = Mxfp4GptOssMLP(layer.mlp.router, Mxfp4GptOssExperts(model.config))
    model.quantization_method = Mxfp4Config().quant_method
    with pytest.raises(
        ValueError, match="GptOssForCausalLM has no mixture-of-experts layer .*" + REFUSAL.format("mxfp4")
    ):
        BHRoutingIntegration(model)


def test_the_page_states_the_sizes_of_olmoe():
    with torch.device("meta"):
        model = OlmoeForCausalLM(OlmoeConfig(intermediate_size=1024))
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    total, experts = sum(sizes.values()), sum(size for name, size in sizes.items() if ".experts." in name)
    linear = sum(size for name, size in sizes.items() if ".self_attn." in name and "norm" not in name)
    assert f"{experts / 1e9:.2f} of the {total / 1e9:.2f} billion weights" in PAGE
    saved = {"none": 0, "4bit": 1.5 * linear, "8bit": linear, "int8": experts, "float8": experts, "fp8": 0}
    rows = re.findall(r"^\| (.*?) \| .* \| ([\d.]+) GiB \|$", PAGE.partition("What is left")[0], re.MULTILINE)
    assert len(rows) == len(saved)
    for (row, stated), (key, bytes_saved) in zip(rows, saved.items(), strict=True):
        assert key in row and stated == f"{(2 * total - bytes_saved) / 2**30:.1f}", row
    for card, memory in {"T4": 15, "L4": 22, "A100": 40}.items():
        left = [f"{memory - (2 * total - saved[key]) / 2**30:.0f} GiB" for key in ("none", "int8")]
        row = next(line for line in PAGE.splitlines() if line.startswith(f"| {card}"))
        assert re.findall(r"\d+ GiB", row) == [f"{memory} GiB", *left], row
