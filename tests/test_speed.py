"""The GPU benchmark: what can be tested without a GPU, and one short run on a CUDA device."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from models import tiny_olmoe, tokens

from bhlib import find_moe_layers
from bhlib.__main__ import main
from bhlib.figures.speed import draw_speed
from bhlib.rules import TopK
from bhlib.speed import bench_speed, whole_model
from bhlib.speed.goals import check_goals, fastest
from bhlib.speed.layer import block_floor, exact_counts, random_routing
from bhlib.speed.results import COLUMNS, Candidate, Results

LIMITS = {"bytes_per_second": 1e12, "operations_per_second": 1e14}
MACHINE = {"gpu": "a GPU", "clocks": "1 GHz", "versions": "torch 0"}
OWN, OURS = Candidate("grouped_mm", "transformers", 8), Candidate("kernels", "bhlib", 4)


@pytest.fixture
def results(tmp_path):
    return Results(tmp_path / "speed.csv", ["block"], MACHINE, LIMITS)


# -- what is measured --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mean_k", [1, 3.5, 8])
def test_counts_have_the_mean_that_is_asked_for(mean_k):
    counts = exact_counts(100, mean_k, 8)
    assert counts.sum() == round(100 * mean_k) and counts.min() >= 1 and counts.max() <= 8
    assert mean_k in (1, 8) or counts.float().std() > 0.5


def test_impossible_mean_is_refused():
    with pytest.raises(ValueError, match="mean_k must lie between 1 and max_k=8, got 9"):
        exact_counts(10, 9, 8)


def test_random_routing_fills_the_slots_that_it_says():
    index, weights = random_routing(50, 4, device="cpu")
    filled = index < 64
    assert filled.sum() == 200 and not weights[~filled].any() and (weights[filled] > 0).all()
    assert all(len(set(row[row < 64].tolist())) == (row < 64).sum() for row in index)


def test_floor_of_a_layer_counted_by_hand():
    index = torch.tensor([[0, 1, 64], [1, 64, 64]])  # two experts in use, three pairs, two tokens
    bytes_moved = 2 * (2 * 3 * 2048 * 1024 + 2 * 2 * 2048)
    assert block_floor(index, 64, 2048, 1024, LIMITS) == pytest.approx(bytes_moved / 1e12)
    slow = LIMITS | {"operations_per_second": 1e6}
    assert block_floor(index, 64, 2048, 1024, slow) == pytest.approx(3 * 3 * 2 * 2048 * 1024 / 1e6)


@pytest.fixture(scope="module")
def model():
    model = tiny_olmoe().requires_grad_(False)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.mlp.gate.weight, std=0.3)
    return model


def test_floor_of_a_model_counted_by_its_weights(model):
    """One token that selects every expert needs every weight once, but for the other rows of the embedding."""
    config = model.config
    everything = [torch.arange(config.num_experts)[None]] * config.num_hidden_layers
    moved = 2 * (model.num_parameters() - config.vocab_size * config.hidden_size)
    slow = {"bytes_per_second": 1.0, "operations_per_second": 1e30}
    assert whole_model.model_floor(model, everything, 1, 1, 0, slow) == moved
    cache = 2 * 2 * config.num_hidden_layers * 3 * 10 * config.hidden_size  # keys and values of 3 x 10 tokens
    assert config.num_key_value_heads == config.num_attention_heads
    assert whole_model.model_floor(model, everything, 3, 1, 10, slow) == moved + cache


def test_rules_give_the_mean_k_that_they_are_named_for(model):
    ids = tokens(4, 64)
    for k, rule in whole_model.rules_by_mean_k(model, ids).items():
        with whole_model.RoutingPatch(model, rule, kernels=False):
            selected = whole_model.selected_experts(model, lambda: model(input_ids=ids))
        # The levels were found on the unpatched model: a patched layer changes what the next one sees.
        assert whole_model.mean_filled(model, selected) == pytest.approx(k, abs=0.7)


def test_no_experts_leaves_the_rest_of_the_pass(model):
    ids = tokens(1, 5)
    before = model(input_ids=ids).logits
    with whole_model.run_by(find_moe_layers(model), whole_model.NO_EXPERTS):
        without = model(input_ids=ids, output_hidden_states=True)
        selected = whole_model.selected_experts(model, lambda: model(input_ids=ids))
    assert whole_model.mean_filled(model, selected) == 0
    assert not torch.equal(without.logits, before) and torch.equal(model(input_ids=ids).logits, before)
    with whole_model.RoutingPatch(model, TopK(1), kernels=False):
        assert whole_model.mean_filled(model, whole_model.selected_experts(model, lambda: model(input_ids=ids))) == 1


def test_importing_the_benchmarks_registers_nothing():
    script = """
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
before = set(ALL_EXPERTS_FUNCTIONS.keys())
import bhlib.benchmarks, bhlib.speed
assert set(ALL_EXPERTS_FUNCTIONS.keys()) == before, set(ALL_EXPERTS_FUNCTIONS.keys()) - before
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr


# -- the table ---------------------------------------------------------------------------------------------------


def test_rows_and_ratios(results):
    results.add("block", "eager", 1, OWN, 8, np.array([8e-6, 10e-6, 12e-6]), 2e-6)
    results.add("block", "graph", 1, OWN, 8, np.array([4e-6] * 3), 2e-6)
    results.add("block", "eager", 1, OURS, 4, np.array([2e-6] * 3), 1e-6)
    table = pd.read_csv(results.path)
    assert list(table.columns) == list(COLUMNS)
    assert table.loc[0, ["q1_us", "median_us", "q3_us", "rounds"]].tolist() == [9, 10, 11, 3]
    assert table["speedup"].tolist() == [1, 1, 5] and table["best_speedup"].tolist() == [0.4, 1, 2]
    assert table["over_floor"].tolist() == [5, 2, 2] and set(table["gpu"]) == {"a GPU"}


def test_what_fails_is_a_row_and_the_run_goes_on(results, capsys):
    with results.attempt("block", "eager", 8, OWN):
        raise torch.OutOfMemoryError("32 GiB wanted\nand more lines")
    with results.attempt("block", "eager", 8, OURS):
        results.add("block", "eager", 8, OURS, 4, np.array([1e-6]), 1e-6)
    table = pd.read_csv(results.path)
    assert table["error"].tolist()[0] == "OutOfMemoryError: 32 GiB wanted" and len(table) == 2
    assert np.isnan(table["median_us"][0]) and np.isnan(table["speedup"][1])
    assert "32 GiB wanted" in capsys.readouterr().out


def test_a_second_run_replaces_its_stages_only(results):
    for stage in ("router", "block"):
        results.add(stage, "eager", 1, OWN, 8, np.array([1e-6]), 1e-6)
    second = Results(results.path, ["block"], MACHINE | {"gpu": "another GPU"}, LIMITS)
    second.add("block", "graph", 1, OWN, 8, np.array([3e-6]), 1e-6)
    table = pd.read_csv(results.path)
    assert table[["stage", "mode", "gpu"]].values.tolist() == [
        ["router", "eager", "a GPU"], ["block", "graph", "another GPU"],
    ]  # fmt: skip


# -- goals and figure --------------------------------------------------------------------------------------------


def full_table(tmp_path):
    """Every stage that goals or figure look at; ours takes k / 10 of transformers' time, and no expert a tenth."""
    results = Results(tmp_path / "speed.csv", [], MACHINE, LIMITS)
    sizes = {"block": (1, 512, 16_384), "prefill": (512, 4096, 16_384), "decode": (1, 8, 32), "generate": (1, 8, 32)}
    for stage, row in sizes.items():
        for size in row:
            more = {"peak_gib": 10.0} if stage != "block" else {}
            own = Candidate("batched_mm", "transformers", 8)
            results.add(stage, "graph", size, own, 8, np.full(5, 1e-3), 3e-4, **more)
            for k in (2, 4, 8):
                more |= {"recompiled": 0} if stage == "generate" else {}
                ours = Candidate("patched", "bhlib", k)
                results.add(stage, "graph", size, ours, k, np.full(5, k * 1e-4), k * 5e-5, **more)
            if stage != "block":
                results.add(stage, "graph", size, Candidate("no experts", "neither", 0), 0, np.full(5, 1e-4), 5e-5)
    return results.table()


def test_goals_follow_from_the_table(tmp_path):
    rules = {"rule": ["unpatched", "top-4", "BH, alpha=0.01"], "mean_k": [8, 4, 4.1], "model_ratio": [1.0, 0.25, 0.5]}
    cpu = pd.DataFrame(rules | {"tokens": 4096, "threads": 2})
    goals = check_goals(full_table(tmp_path), cpu).set_index("goal")
    block = goals.loc["experts of a layer, 512 tokens, k = 4: speedup"]
    assert block["reached"] == pytest.approx(2.5) and block["at_most"] == pytest.approx(5) and not block["met"]
    prefill = goals.loc["prefill of 16,384 tokens, k = 4: speedup"]
    assert prefill["without_experts"] == pytest.approx(10) and prefill["met"]
    assert goals.loc["generate(), batch 1, k = 4: speedup", "met"]
    assert not goals.loc["generate(), batch 8, k = 4: speedup", "met"]
    assert goals.loc["generate(): graphs compiled anew when counts change", "met"]
    assert goals.loc["decode: peak memory over the least of transformers", "reached"] == 1
    assert goals.filter(like="CPU threads", axis=0)["reached"].tolist() == [2.0]
    router = goals.filter(like="router", axis=0)  # not measured: not reached
    assert len(router) == 6 and router["reached"].isna().all() and not router["met"].any()


def test_the_fastest_is_chosen_among_what_was_measured(tmp_path):
    table = full_table(tmp_path)
    table.loc[(table["k"] == 2), "median_us"] = np.nan
    assert fastest(table, "bhlib", stage="block", tokens=1)["k"] == 4
    assert fastest(table, "bhlib", stage="block", tokens=2) is None


def test_figure_shows_times_floor_and_ideal(tmp_path):
    fig = draw_speed(full_table(tmp_path))
    panels = [axes for axes in fig.axes if axes.get_visible()]
    assert len(panels) == 12
    lines = {line.get_label(): line.get_xydata() for line in panels[0].lines}
    ideal = next(data for label, data in lines.items() if label.startswith("ideal"))
    assert ideal[:, 1].tolist() == pytest.approx([0, 1000])
    floor = next(data for label, data in lines.items() if label.startswith("floor"))
    assert floor.ravel().tolist() == pytest.approx([2, 100, 4, 200, 8, 400])
    assert "1 GHz" in fig.texts[-1].get_text() and "medians of 5" in fig.texts[-1].get_text()


# -- the command -------------------------------------------------------------------------------------------------


def test_command_names_the_stages():
    with pytest.raises(ValueError, match="no stage is called 'all'; there are: router, block"):
        main(["bench", "speed", "--only", "all"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests the error where there is no CUDA device")
def test_without_a_gpu_it_says_so(tmp_path):
    with pytest.raises(RuntimeError, match="bench speed needs a CUDA device"):
        bench_speed(tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_short_run(tmp_path):
    table = bench_speed(tmp_path, ["router"], quick=True)
    assert table["error"].isna().all() and (table["median_us"] > 0).all()
    assert set(table["name"]) == {"softmax + topk", "BH, torch", "BH, kernel", "an empty kernel"}
