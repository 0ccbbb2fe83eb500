"""A patched model trains: where gradients come, that they are right, and under what they come unchanged."""

import socket
from contextlib import nullcontext

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from families import PATCHED, tiny
from models import state_of, tiny_olmoe, tokens
from peft import LoraConfig, get_peft_model
from test_compensation import random_compensation
from test_norms import random_norms
from torch.autograd import gradcheck
from torch.func import functional_call
from torch.testing import assert_close
from transformers import OlmoeForCausalLM, Trainer, TrainingArguments

from bhlib import kernels
from bhlib.compensation import LayerCompensation
from bhlib.discovery import find_moe_layers
from bhlib.expert_loop import loop_forward
from bhlib.experts import pairwise_forward
from bhlib.norms import LayerGuess, LayerNorms
from bhlib.patching import BHRoutingIntegration, RoutingPatch
from bhlib.rules import BH, Replay, Threshold, TopK
from bhlib.rules.budgets import SeqTopK
from bhlib.weighting import WEIGHTINGS, of_top

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
IDS = tokens(2, 10)


def train_once(model, patch=None, *, half=False):
    """One pass forward and back over `IDS`: the loss, and the gradients by name."""
    model.train().zero_grad()
    with patch or nullcontext():
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same_bits(one, other):
    (loss, gradients), (other_loss, other_gradients) = one, other
    assert torch.equal(loss, other_loss)
    pairs = [(name, gradient, other_gradients[name]) for name, gradient in gradients.items()]
    assert [name for name, one, two in pairs if (one is not two) and not torch.equal(one, two)] == []


@pytest.fixture(params=["as on a CPU", "as on a GPU"])
def computed(request, monkeypatch):
    """By the loop over experts, or by sorted pairs, which take the place of grouped_mm on a CUDA device."""
    if request.param == "as on a GPU":
        monkeypatch.setattr("bhlib.sorted_pairs.DEVICES", ("cpu",))


both_ways = pytest.mark.usefixtures("computed")


# -- where they come -------------------------------------------------------------------------------------------------


@both_ways
@pytest.mark.parametrize("use_kernels", ["auto", False])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_they_reach_the_routers_the_kept_experts_and_all_below(implementation, half, use_kernels):
    """Of an expert that no token kept they are zero, exactly."""
    model = tiny_olmoe()
    model.set_experts_implementation(implementation)
    patch = BHRoutingIntegration(model, 0.01, kernels=use_kernels)
    _, gradients = train_once(model, patch, half=half)
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
    assert [name for name, gradient in gradients.items() if not gradient.any()] == []
    for index, routing in patch.records.passes[0].routings.items():
        experts = routing.experts.view(2, 10, -1)[:, :-1]  # nothing is to be predicted from the last tokens
        kept = torch.zeros(64, dtype=torch.bool)
        kept[experts[experts >= 0].long()] = True
        assert 8 < kept.sum() < 60
        for name in ("gate_up_proj", "down_proj"):
            gradient = gradients[f"model.layers.{index}.mlp.experts.{name}"]
            assert torch.equal(gradient.flatten(1).any(dim=1), kept), name


@both_ways
@pytest.mark.parametrize("use_kernels", ["auto", False])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_under_the_models_own_rule_they_are_its_own_bit_for_bit(implementation, half, use_kernels):
    model = tiny_olmoe()
    model.set_experts_implementation(implementation)
    own = train_once(model, half=half)
    assert_same_bits(train_once(model, RoutingPatch(model, TopK(8), kernels=use_kernels), half=half), own)
    own_by_bh = BHRoutingIntegration(model, min_k=8, kernels=use_kernels)
    assert_same_bits(train_once(model, own_by_bh, half=half), own)


@both_ways
@pytest.mark.parametrize("use_kernels", ["auto", False])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_they_are_those_of_the_dense_mask(implementation, use_kernels):
    """The same selection, computed by the unpatched model with weight 0 for what was dropped."""
    model, rule = tiny_olmoe(), BH(0.01)
    model.set_experts_implementation(implementation)
    loss, gradients = train_once(model, RoutingPatch(model, rule, kernels=use_kernels))

    def mask(router, args, output):
        weights, experts, _ = rule(output[0])
        return output[0], weights, experts.clamp(min=0)

    for layer in find_moe_layers(model):
        layer.router.register_forward_hook(mask)
    expected_loss, expected = train_once(model)
    assert_close(loss, expected_loss)
    assert_close(gradients, expected)


def test_analyze_mode_leaves_them_alone():
    model = tiny_olmoe()
    own = train_once(model)
    assert_same_bits(train_once(model, BHRoutingIntegration(model, mode="analyze")), own)


@pytest.mark.parametrize("collect_stats", [True, False])
def test_to_record_does_not_change_them(collect_stats):
    model = tiny_olmoe()
    plain = train_once(model, BHRoutingIntegration(model, collect_stats=not collect_stats))
    assert_same_bits(train_once(model, BHRoutingIntegration(model, collect_stats=collect_stats)), plain)


@both_ways
def test_a_decision_by_norms_has_none():
    """So they are those of the same experts, imposed."""
    model = tiny_olmoe()
    patch = BHRoutingIntegration(model, norms=random_norms(model))
    got = train_once(model, patch)
    assert patch.get_routing_stats()["std_experts_per_token"] > 0
    assert_same_bits(train_once(model, RoutingPatch(model, Replay(patch.records))), got)


@both_ways
def test_what_stands_in_passes_them_on():
    model = tiny_olmoe()
    _, gradients = train_once(model, BHRoutingIntegration(model, 0.01, compensation=random_compensation(model)))
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients.values())


@both_ways
def test_routers_alone_are_trained():
    model = tiny_olmoe().requires_grad_(False)
    gates = [layer.mlp.gate.weight.requires_grad_() for layer in model.model.layers]
    _, gradients = train_once(model, BHRoutingIntegration(model, 0.01))
    assert all(gate.grad.any() for gate in gates) and sum(one is not None for one in gradients.values()) == 3


ADAPTED = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "routers": {"target_modules": [], "target_parameters": ["mlp.gate.weight"]},
    "experts": {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    "whole routers": {"target_modules": ["q_proj"], "modules_to_save": ["gate"]},
}


@both_ways
@pytest.mark.parametrize("what", ADAPTED)
def test_adapters_are_trained(what):
    adapted = get_peft_model(tiny_olmoe(), LoraConfig(**ADAPTED[what], init_lora_weights=False))
    own = train_once(adapted)
    assert_same_bits(train_once(adapted, RoutingPatch(adapted, TopK(8))), own)
    patch = BHRoutingIntegration(adapted, 0.01)
    _, gradients = train_once(adapted, patch)
    wanted = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert {name for name, gradient in gradients.items() if gradient is not None and gradient.any()} == wanted
    assert 1 < patch.get_routing_stats()["mean_experts_per_token"] < 8


def test_a_router_that_is_replaced_under_the_patch_does_not_go_unnoticed():
    model = tiny_olmoe()
    with BHRoutingIntegration(model):
        adapted = get_peft_model(model, LoraConfig(**ADAPTED["whole routers"]))
        with pytest.warns(UserWarning, match="ran none of the routers that were patched, .* before the model is"):
            adapted(input_ids=IDS)


# -- that they are right ---------------------------------------------------------------------------------------------


def in_float64(way, weighting, rule, norms=None, compensation=None):
    """A routed layer as a function of its hidden states and its three weights, and tensors to check it on."""
    sizes = {"hidden_size": 4, "intermediate_size": 2, "num_experts": 6, "num_attention_heads": 1}
    experts = tiny_olmoe(num_hidden_layers=1, num_key_value_heads=1, **sizes).model.layers[0].mlp.experts.double()
    forward = loop_forward if way == "loop" else lambda *inputs: pairwise_forward(way, *inputs)

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = experts

        def forward(self, hidden, gate):
            own_k = 3 if compensation is not None else 0
            options = {"weighting": weighting, "dtype": torch.float64, "own_k": own_k, "norms": norms}
            weights, index, _, _ = rule.forms(hidden @ gate.T, **options)
            output = forward(self.experts, hidden, index, weights)
            return output if compensation is None else compensation.complete(output, hidden, index, weights)

    layer, parameters = Layer(), dict(experts.named_parameters(prefix="experts"))
    inputs = torch.randn(5, 4), torch.randn(6, 4), *(torch.randn(one.shape) for one in parameters.values())

    def call(hidden, gate, *matrices):
        return functional_call(layer, dict(zip(parameters, matrices, strict=True)), (hidden, gate))

    return call, [one.double().requires_grad_() for one in inputs]


@pytest.mark.parametrize("way", ("eager", "batched_mm", "loop"))  # there is no grouped product of float64
@pytest.mark.parametrize("weighting", [*WEIGHTINGS, of_top("normalized"), of_top("softmax_selected")])
def test_gradcheck_of_a_routed_layer(way, weighting):
    rule = Threshold(0.2, max_k=3)
    call, inputs = in_float64(way, weighting, rule)
    assert len(set(rule(inputs[0] @ inputs[1].T).counts.tolist())) > 1
    assert gradcheck(call, inputs)


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("weighting", ["softmax", "normalized"])
def test_gradcheck_of_a_layer_with_norms_and_what_stands_in(weighting, rank):
    parts = torch.cat([torch.zeros(1, 4), torch.randn(6, 4)]), torch.randn(rank, 4), torch.randn(rank, 4)
    compensation = LayerCompensation(*(part.double() for part in parts))
    rule = Threshold(0.3, max_k=3)
    norms = LayerGuess(LayerNorms(torch.randn(6), torch.randn(6), torch.randn(6, 6)), near=3)
    call, inputs = in_float64("eager", weighting, rule, norms, compensation)
    assert gradcheck(call, inputs)


def test_gradcheck_of_a_patched_models_layer():
    """Of a family whose routers stay in float64: those of OLMoE and of most others go on in float32."""
    model = tiny(next(family for family in PATCHED if family.model_type == "gpt_oss")).double()
    model.set_experts_implementation("eager")
    with RoutingPatch(model, BH(0.3, max_k=4), collect_stats=False) as patch:
        name = patch.layers[0].name.rpartition(".")[0]
        block, hidden = model.get_submodule(name), torch.randn(1, 4, 64, dtype=torch.float64).requires_grad_()
        counts = patch.rule(patch.layers[0].router(hidden.flatten(0, 1))[0]).counts
        assert len(set(counts.tolist())) > 1

        def call(hidden):
            output = block(hidden)
            return output[0] if isinstance(output, tuple) else output

        assert gradcheck(call, hidden, fast_mode=True)


# -- gradient checkpointing ------------------------------------------------------------------------------------------


@both_ways
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("with_more", [False, True])
def test_checkpointing_selects_the_same_experts_and_counts_them_once(reentrant, half, with_more):
    model, results, counts = tiny_olmoe(), [], []
    more = {"norms": random_norms(model), "compensation": random_compensation(model)} if with_more else {}
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        patch = BHRoutingIntegration(model, **more)
        results.append(train_once(model, patch, half=half))
        counts.append(patch.records.counts())
    assert_same_bits(*results)
    assert (counts[0] == counts[1]).all() and counts[1].shape == (20, 3)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_repetition_that_would_decide_otherwise_is_refused(reentrant):
    model = tiny_olmoe().train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with BHRoutingIntegration(model, 0.05) as bh:
        loss = model(input_ids=IDS, labels=IDS).loss
        bh.alpha = 0.5
        with pytest.raises(RuntimeError, match=r"set to BH\(.*alpha=0.5.* between .* after backward\(\)"):
            loss.backward()
        model(input_ids=IDS, labels=IDS).loss.backward()
    with RoutingPatch(model, SeqTopK(4)):
        loss = model(input_ids=IDS, labels=IDS).loss
        with pytest.raises(RuntimeError, match="SeqTopK decides about a whole forward pass, .* without gradient check"):
            loss.backward()


# -- who computes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", ["hidden", "weights", "gate_up_proj", "down_proj", None])
def test_kernels_stay_away_where_a_gradient_is_wanted(wanted, monkeypatch):
    """Of anything: with routers alone in training, only the weights of the experts have one."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    module = tiny_olmoe().model.layers[0].mlp.experts.half().requires_grad_(False)
    tensors = {"hidden": torch.randn(3, 64).half(), "weights": torch.rand(3, 8).half()}
    tensors |= {name: getattr(module, name) for name in ("gate_up_proj", "down_proj")}
    if wanted:
        tensors[wanted].requires_grad_()
    assert kernels.inputs_fit(module, tensors["hidden"], tensors["weights"]) == (wanted is None)
    with torch.no_grad():
        assert kernels.inputs_fit(module, tensors["hidden"], tensors["weights"])
        assert not kernels.inputs_fit(module.train(), tensors["hidden"], tensors["weights"])


def test_copies_on_several_devices_are_refused():
    model = tiny_olmoe()
    with BHRoutingIntegration(model):
        copy = model.model._replicate_for_data_parallel()  # what torch.nn.DataParallel calls
        with pytest.raises(RuntimeError, match=r"before torch.nn.DataParallel copied it .* one process for each"):
            copy(input_ids=IDS)
        model(input_ids=IDS)


# -- trainers of others ----------------------------------------------------------------------------------------------


@pytest.fixture
def alone(monkeypatch):
    """Without a network, and with settings of accelerate that no other test sees."""

    def refuse(*args, **options):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def assert_trained(model, before, bh, losses):
    assert losses[-1] < losses[0] and bh.is_patched
    assert [name for name, weight in model.state_dict().items() if torch.equal(weight, before[name])] == []
    stats = bh.get_routing_stats()
    assert stats["total_tokens"] == len(losses) * IDS.numel() and 1 < stats["mean_experts_per_token"] < 8


@both_ways
@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer(alone, tmp_path, checkpointing):
    """Patch, then train: no subclass. What it saves is the plain model."""
    model = tiny_olmoe()
    before, state = {name: weight.clone() for name, weight in model.state_dict().items()}, state_of(model.model)
    options = TrainingArguments(
        tmp_path, max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2, logging_steps=1, save_steps=3,
        use_cpu=True, report_to=[], disable_tqdm=True, gradient_checkpointing=checkpointing,
    )  # fmt: skip
    with BHRoutingIntegration(model) as bh:
        trainer = Trainer(model, options, train_dataset=[{"input_ids": row, "labels": row} for row in IDS])
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert_trained(model, before, bh, losses)
        restored = OlmoeForCausalLM.from_pretrained(tmp_path / "checkpoint-3")
    assert_plain(model, restored, state)


@both_ways
def test_accelerate(alone, tmp_path):
    model = tiny_olmoe().train()
    before, state = {name: weight.clone() for name, weight in model.state_dict().items()}, state_of(model.model)
    accelerator, losses = Accelerator(cpu=True, mixed_precision="bf16"), []
    with BHRoutingIntegration(model) as bh:
        prepared, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
        for _ in range(3):
            loss = prepared(input_ids=IDS, labels=IDS).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        plain = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
        assert plain is model
        assert_trained(model, before, bh, losses)
        model.save_pretrained(tmp_path)
        restored = OlmoeForCausalLM.from_pretrained(tmp_path)
    assert_plain(model, restored, state)


def assert_plain(model, restored, state):
    """After the patch: nothing of it is left, and what was saved under it computes what the model does."""
    now = state_of(model.model)  # of which transformers changes other parts for gradient checkpointing
    assert [name for name in now if ".mlp" in name and now[name] != state[name]] == []
    assert not (model.model._forward_hooks or model.model._forward_pre_hooks)
    with torch.no_grad():
        outputs = [one.eval()(input_ids=IDS, use_cache=False).logits for one in (model, restored)]
    assert torch.equal(*outputs)
    assert_close(restored.state_dict(), model.state_dict(), rtol=0, atol=0)
