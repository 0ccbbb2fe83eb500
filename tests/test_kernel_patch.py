"""A model that is patched with kernels: same outputs as without them, whole graphs for the compiler."""

import os

import numpy as np
import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("without a CUDA device the kernels run in Triton's interpreter: make kernels", allow_module_level=True)
pytest.importorskip("triton", reason="the kernels need Triton, which comes with torch for CUDA on Linux")

from models import tiny_olmoe, tokens  # noqa: E402
from torch._dynamo.utils import counters  # noqa: E402
from transformers import CompileConfig  # noqa: E402

from bhlib import BHRoutingIntegration, RoutingPatch  # noqa: E402
from bhlib.compensation import Compensation, LayerCompensation  # noqa: E402
from bhlib.discovery import name_of  # noqa: E402
from bhlib.norms import LayerNorms, OutputNorms  # noqa: E402
from bhlib.rules import BH, Threshold, TopK  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"


@pytest.fixture(scope="module")
def model():
    changes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_experts": 8}
    model = tiny_olmoe(num_experts_per_tok=3, **changes).to(DEVICE, torch.float16).requires_grad_(False)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.mlp.gate.weight, std=0.5)
        for matrices in layer.mlp.experts.parameters():  # so large that it shows in the logits which experts ran
            torch.nn.init.normal_(matrices, std=0.2)
    return model


def logits_of(model, ids):
    return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("length", [1, 5])
def test_kernels_change_rounding_only(model, length):
    ids = tokens(1, length).to(DEVICE)
    own = logits_of(model, ids)
    with BHRoutingIntegration(model, alpha=0.5, max_k=4, kernels=False) as plain:
        expected = logits_of(model, ids)
    with BHRoutingIntegration(model, alpha=0.5, max_k=4, kernels=True) as bh:
        got = logits_of(model, ids)
        assert model.config._experts_implementation.startswith("bh_kernels_")
    assert (bh.records.counts() == plain.records.counts()).all()
    torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-3)
    assert not torch.allclose(own, expected, rtol=1e-2, atol=1e-3), "nothing was routed"
    assert torch.equal(logits_of(model, ids), own)


@pytest.mark.parametrize("rank", [0, 2])
def test_what_stands_in_for_dropped_experts_comes_by_kernels_too(model, rank):
    ids, generator = tokens(1, 4).to(DEVICE), torch.Generator().manual_seed(0)

    def draw(*shape):
        return 0.3 * torch.randn(*shape, generator=generator)

    layers = [
        LayerCompensation(torch.cat([torch.zeros(1, 32), draw(8, 32)]), draw(rank, 32), draw(rank, 32))
        for _ in range(2)
    ]
    options = {"alpha": 0.05, "max_k": 3, "compensation": Compensation(layers, name_of(model))}
    with BHRoutingIntegration(model, kernels=False, **options) as plain:
        expected = logits_of(model, ids)
    with BHRoutingIntegration(model, kernels=True, **options) as bh:
        got = logits_of(model, ids)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.equal(logits_of(compiled, ids), got)
    assert plain.get_routing_stats()["sparsity_gain"] > 0
    assert plain.records.to_frame()["experts"].equals(bh.records.to_frame()["experts"][: len(plain.records.to_frame())])
    torch.testing.assert_close(got, expected, rtol=1e-2, atol=2e-3)
    with BHRoutingIntegration(model, alpha=0.05, max_k=3, kernels=True):
        assert not torch.allclose(logits_of(model, ids), expected, rtol=1e-2, atol=2e-3), "nothing was added"


@pytest.mark.parametrize("compensated", [False, True])
def test_norms_are_guessed_by_the_kernel_that_routes(model, compensated):
    """The same decisions as without kernels, the same statistics, and one graph for the compiler."""
    ids, generator = tokens(1, 4).to(DEVICE), torch.Generator().manual_seed(0)

    def draw(*shape):
        return 0.3 * torch.randn(*shape, generator=generator)

    norms = OutputNorms([LayerNorms(draw(8), draw(8), draw(8, 8)) for _ in range(2)], 3, name_of(model))
    options = {"norms": norms}
    if compensated:
        means = [torch.cat([torch.zeros(1, 32), draw(8, 32)]) for _ in range(2)]
        layers = [LayerCompensation(table, draw(2, 32), draw(2, 32)) for table in means]
        options["compensation"] = Compensation(layers, name_of(model))
    for rule in (BH(0.2, max_k=4), Threshold(0.1, max_k=4)):
        with RoutingPatch(model, rule, kernels=False, **options) as plain:
            expected = logits_of(model, ids)
        with RoutingPatch(model, rule, kernels=True, **options) as patch:
            assert rule.kernel_cuts(8, 0, ids.device) is not None
            got = logits_of(model, ids)
            found, wanted = (one.records.to_frame() for one in (patch, plain))
            assert found["experts"].equals(wanted["experts"]) and found["count"].equals(wanted["count"])
            assert patch.get_routing_stats() == plain.get_routing_stats()
            compiled = torch.compile(model, backend="eager", fullgraph=True)
            assert torch.equal(logits_of(compiled, ids), got)
        torch.testing.assert_close(got, expected, rtol=1e-2, atol=2e-3)
        with RoutingPatch(model, rule, kernels=False, **options | {"norms": None}) as without:
            logits_of(model, ids)
        assert not without.records.to_frame()["experts"].equals(wanted["experts"]), "the norms change nothing"


@pytest.mark.parametrize("collect_stats", [False, True])
def test_compiled_whole(model, collect_stats):
    ids = tokens(1, 4).to(DEVICE)
    with BHRoutingIntegration(model, alpha=0.5, max_k=4, kernels=True, collect_stats=collect_stats) as bh:
        expected = logits_of(model, ids)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.equal(logits_of(compiled, ids), expected)
    if collect_stats:
        first, second = (one.routings for one in bh.records.passes)
        for layer, routing in first.items():
            assert all(torch.equal(one, other) for one, other in zip(routing, second[layer], strict=True))


def test_a_level_is_moved_between_passes_of_a_compiled_model(model):
    """And two sequences of one batch are each routed as alone, at levels of their own."""
    ids = tokens(2, 4).to(DEVICE)
    torch.compiler.reset()
    counters.clear()
    with BHRoutingIntegration(model, alpha=0.01, max_k=4, kernels=True) as bh:
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        for alpha in (0.01, 0.9, 0.2):
            bh.alpha = alpha
            logits_of(compiled, ids)
        assert counters["stats"]["unique_graphs"] == 1
        few, many, some = bh.records.counts().reshape(3, -1)
        assert few.sum() < some.sum() < many.sum()
        bh.reset_stats()
        bh.alpha = (0.01, 0.9)
        logits_of(compiled, ids)
        both = bh.records.counts()
    expected = [few.reshape(2, 4, -1)[0], many.reshape(2, 4, -1)[1]]
    assert (both == np.concatenate(expected)).all()


@pytest.mark.parametrize("collect_stats", [False, True])
def test_generation_compiles_once_whatever_the_counts(model, collect_stats):
    """generate() with a static cache: one graph, which holds for prompts whose tokens use other numbers of experts."""
    torch.compiler.reset()
    vars(model).pop("_compiled_call", None)
    config = CompileConfig(backend="eager", mode=None, fullgraph=True)
    config._compile_all_devices = True  # generate() compiles for accelerators only, if not told so
    options = {"max_new_tokens": 3, "do_sample": False, "cache_implementation": "static", "compile_config": config}
    with RoutingPatch(model, BH(alpha=0.1, max_k=4), kernels=True, collect_stats=collect_stats) as patch:
        counters.clear()
        sequences = [model.generate(tokens(2, 4, seed=seed).to(DEVICE), **options) for seed in range(2)]
        assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    with BHRoutingIntegration(model, alpha=0.1, max_k=4, kernels=True) as bh:
        for sequence in sequences:
            logits_of(model, sequence[:, :-1])
    if collect_stats:  # the same tokens at the same places, in prompts and steps or all at once
        places = ["sequence", "position", "layer"]
        recorded, expected = (one.records.to_frame().sort_values(places) for one in (patch, bh))
        assert (recorded[[*places, "token_id"]].to_numpy() == expected[[*places, "token_id"]].to_numpy()).all()
    assert bh.get_routing_stats()["std_experts_per_token"] > 0.3


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("wanted", ["mlp.gate.weight", "layers.0.mlp.experts.down_proj"])
def test_gradients_take_the_other_path(model, wanted, training):
    """Those of the routers alone too, of which the experts see no more than their weights."""
    parameters = [one.requires_grad_() for name, one in model.named_parameters() if name.endswith(wanted)]
    gradients = []
    try:
        model.train(training)
        for use_kernels in (False, True):
            with BHRoutingIntegration(model, 0.5, max_k=4, kernels=use_kernels):
                loss = logits_of(model, tokens(1, 4).to(DEVICE)).float().square().mean()
            gradients.append(torch.autograd.grad(loss, parameters))
    finally:
        model.eval().requires_grad_(False)
    assert all(gradient.any() for gradient in gradients[0])
    torch.testing.assert_close(*gradients)


def test_routers_in_training_mode_decide_without_kernels(model):
    """A pass that gradient checkpointing repeats may begin without gradients, and must decide alike."""
    weights = []
    for use_kernels in (False, True):
        with BHRoutingIntegration(model.train(), 0.5, max_k=4, kernels=use_kernels) as bh, torch.no_grad():
            logits_of(model, tokens(1, 4).to(DEVICE))
        weights.append(bh.records.passes[0].routings[0].weights)
    model.eval()
    assert torch.equal(*weights)


def test_wrong_switch(model):
    with pytest.raises(ValueError, match="kernels must be True, False or 'auto', got 'fast'"):
        RoutingPatch(model, TopK(2), kernels="fast")
