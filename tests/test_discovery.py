"""Watching the layers of a model, and switching the implementation of their experts: both end with the block."""

from pathlib import Path

import pytest
import torch
from models import state_of, tiny_olmoe, tokens

import bhlib
from bhlib.discovery import find_moe_layers, implementation_of, implementations_changed, watch


def test_watching_shows_every_layer_and_changes_nothing():
    model = tiny_olmoe()
    state, layers, ids = state_of(model), find_moe_layers(model), tokens(2, 7)
    before, seen = model(input_ids=ids).logits, []
    with watch(layers, lambda layer, output: seen.append((layer.index, *output)) or "not the output"):
        assert torch.equal(model(input_ids=ids).logits, before)
    assert [index for index, *_ in seen] == [0, 1, 2] and state_of(model) == state
    for _, logits, weights, experts in seen:
        assert logits.shape == (14, 64) and weights.shape == experts.shape == (14, 8)


def test_experts_are_watched_before_and_after_they_run():
    model, seen = tiny_olmoe(), []
    options = {"module": "experts", "before": lambda layer: seen.append((layer.index, "before"))}
    with watch(find_moe_layers(model), lambda layer, output: seen.append((layer.index, output.shape)), **options):
        model(input_ids=tokens(1, 5))
    assert seen == [(index, what) for index in range(3) for what in ("before", (5, 64))]


@pytest.mark.parametrize("context", [watch, implementations_changed])
def test_an_error_leaves_nothing_behind(context):
    model = tiny_olmoe()
    state = state_of(model)

    def stop(*_):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), context(find_moe_layers(model), stop):
        model(input_ids=tokens(1, 5))
    assert state_of(model) == state


def test_an_implementation_is_changed_once_per_configuration():
    model = tiny_olmoe()
    model.set_experts_implementation("batched_mm")
    with implementations_changed(find_moe_layers(model), lambda name: f"not {name}"):
        assert implementation_of(model) == "not batched_mm"
    assert implementation_of(model) == "batched_mm"


def test_one_module_touches_the_private_attribute_of_transformers():
    package = Path(bhlib.__file__).parent
    touching = [path for path in package.rglob("*.py") if "._experts_implementation" in path.read_text("utf-8")]
    assert touching == [package / "discovery.py"]
