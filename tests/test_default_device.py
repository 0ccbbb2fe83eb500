"""``torch.set_default_device`` is for the user's own tensors: the package says where each of its own stands."""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch

import bhlib
from bhlib import BHRoutingIntegration, calibrate, load_demo, load_heldout
from bhlib.evaluation import evaluate
from bhlib.rules import BH

PACKAGE = Path(bhlib.__file__).parent

FACTORIES = (
    "arange as_tensor asarray empty eye full linspace logspace ones rand randint randn randperm scalar_tensor tensor "
    "tril_indices triu_indices zeros"
).split()


def test_every_tensor_that_the_package_makes_has_a_device():
    without = [
        f"{path.relative_to(PACKAGE)}:{call.lineno}: {ast.unparse(call)}"
        for path in PACKAGE.rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call)
        and ast.unparse(call.func) in {f"torch.{name}" for name in FACTORIES}
        and "device" not in {keyword.arg for keyword in call.keywords}
    ]
    assert not without, f"give these a device: {without}"


@pytest.fixture
def meta():
    """A default device on which nothing has a value."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


@pytest.fixture(scope="module")
def demo():
    return load_demo()


@pytest.fixture(scope="module")
def model(demo):
    return demo[0]


@pytest.fixture(scope="module")
def texts():
    data = load_heldout("calibration", length=16, max_sequences=2)
    return {domain: data[domain] for domain in ("novels", "python")}


def routed(model, ids, **options):
    with BHRoutingIntegration(model, **options) as bh:
        logits = model(input_ids=ids).logits
    return logits, bh.get_routing_stats()["mean_experts_per_token"]


@pytest.mark.parametrize("pvalues", ["dirichlet", "gaussian"])
@pytest.mark.parametrize("mode", ["patch", "analyze"])
def test_a_patched_model_does_the_same(model, texts, mode, pvalues, request):
    ids, options = texts["novels"], {"mode": mode, "pvalues": pvalues}
    expected = routed(model, ids, **options)
    request.getfixturevalue("meta")
    got = routed(model, ids, **options)
    assert torch.equal(got[0], expected[0]) and got[1] == expected[1]


@pytest.mark.parametrize("null", ["kde", "conformal"])
def test_calibration_and_evaluation_do_the_same(model, texts, null, request):
    def measure():
        fitted = calibrate(model, texts, null=null, max_values=700, progress=False)
        return evaluate(model, texts, BH(0.1, fitted))["loss"]

    expected = measure()
    request.getfixturevalue("meta")
    np.testing.assert_array_equal(measure(), expected)


def test_generation(model, texts, meta):
    ids = texts["python"][:1, :5]
    with BHRoutingIntegration(model) as bh:
        model.generate(ids, max_new_tokens=3, do_sample=False)
    assert len(bh.records.to_frame()) == 7 * len(bh.layers)
    assert np.isfinite(bh.records.coactivation()).all()


def test_held_out_text_is_on_the_cpu(demo, meta):
    for tokenizer in (None, demo[1]):
        data = load_heldout("test", tokenizer=tokenizer, max_sequences=1)
        assert {text.device.type for text in data.values()} == {"cpu"}
