"""The GPU benchmark: what can be tested without a GPU, and one short run on a CUDA device."""

import inspect
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager, nullcontext

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.container import BarContainer
from models import tiny_olmoe, tokens
from transformers import StaticCache

from bhlib import find_moe_layers
from bhlib.__main__ import main
from bhlib.figures.speed import draw_speed
from bhlib.rules import TopK
from bhlib.speed import bench_speed, call, whole_model
from bhlib.speed.goals import check_goals, fastest
from bhlib.speed.layer import block_floor, exact_counts, find_rivals, full_size_experts, random_routing
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


def test_a_rival_that_does_not_run_is_one_row_that_says_so(results, monkeypatch):
    """None in the place of a module is a failing import; sonicmoe does not run in float32."""
    monkeypatch.setitem(sys.modules, "scattermoe", None)
    assert find_rivals(results, tiny_olmoe().model.layers[0].mlp.experts) == {}
    rows = pd.DataFrame(results.rows).set_index("name")
    assert rows.index.tolist() == ["scattermoe", "sonicmoe"] and set(rows["by"]) == {"others"}
    assert rows["error"]["scattermoe"].startswith("ModuleNotFoundError: ") and rows["error"]["sonicmoe"]


def test_importing_the_benchmarks_registers_nothing():
    script = """
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
before = set(ALL_EXPERTS_FUNCTIONS.keys())
import bhlib.benchmarks, bhlib.speed
assert set(ALL_EXPERTS_FUNCTIONS.keys()) == before, set(ALL_EXPERTS_FUNCTIONS.keys()) - before
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr


def test_a_cache_is_passed_by_the_name_that_this_transformers_gives_it(model):
    cache = StaticCache(config=model.config, max_cache_len=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(input_ids=tokens(1, 5), use_cache=True, **{whole_model.cache_argument(model): cache})
    assert cache.get_seq_length() == 5
    assert whole_model.cache_argument(model) in inspect.signature(model.forward).parameters


# -- the call ----------------------------------------------------------------------------------------------------


class HostEvent:
    """Stands in for an event of a CUDA device where there is none: notes the time of the host."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.time = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 1e3 * (end.time - self.time)


@pytest.fixture(scope="module")
def called(tmp_path_factory):
    """The table of the stage "call" on a small model without a GPU, where transformers compiles nothing."""
    small = tiny_olmoe(vocab_size=512, num_hidden_layers=2).requires_grad_(False)
    path = tmp_path_factory.mktemp("call") / "speed.csv"
    with pytest.MonkeyPatch.context() as patched, torch.no_grad():
        patched.setattr(torch.cuda, "Event", HostEvent)
        patched.setattr(call, "load_model", lambda name: small)
        patched.setattr(call, "PREFILL", 64)
        patched.setattr(call, "PROMPTS", (12, 8))
        patched.setattr(call, "NEW_TOKENS", {"eager": 12, "compiled": 12})
        call.bench_call(Results(path, ["call"], MACHINE, LIMITS), LIMITS, quick=True)
    return pd.read_csv(path)


def test_the_call_is_measured_unpatched_patched_and_without_statistics(called):
    rows = called[called["name"] != "level moved"].set_index(["mode", "tokens", "name"])
    places = [("prefill", 64), ("eager", 1), ("eager", 8), ("compiled", 1), ("compiled", 8)]
    names = ["unpatched", "patched", "no statistics", "no experts"]
    assert list(rows.index) == [(*place, name) for place in places for name in names]
    assert rows["error"].isna().all() and (rows["rounds"] == 3).all() and (rows["median_us"] > 0).all()
    assert (rows.xs("unpatched", level="name")["speedup"] == 1).all()
    mean_k = rows["mean_k"].unstack("name")
    assert (mean_k["unpatched"] == 8).all() and (mean_k["no experts"] == 0).all()
    assert mean_k["patched"].between(3, 5).all() and mean_k["patched"].equals(mean_k["no statistics"])
    assert (rows.loc["compiled", ["graphs", "graph_breaks", "recompiled"]] == 0).all(axis=None)


def test_a_call_that_fails_is_a_row_and_the_others_go_on(results, model, monkeypatch):
    def broken(ids, **_):
        raise RuntimeError("no room")

    monkeypatch.setattr(torch.cuda, "Event", HostEvent)
    monkeypatch.setattr(call, "NEW_TOKENS", {"compiled": 12})

    @contextmanager
    def failing():
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(model, "generate", broken)
            yield

    with torch.no_grad():
        call._compiled(results, LIMITS, model, {OURS: failing, OWN: nullcontext}, 0.1, [tokens(1, 9), tokens(1, 5)], 1)
    table = pd.read_csv(results.path)
    assert table["name"].tolist() == [OURS.name, OWN.name] and table["error"].tolist()[0] == "RuntimeError: no room"
    assert table["median_us"].isna().tolist() == [True, False]


def test_the_level_is_moved_while_the_patch_stays(called):
    rows = called[called["mode"] == "compiled"].pivot(index="tokens", columns="name", values="mean_k")
    assert (rows["level moved"] < rows["patched"] - 1).all()


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
    sizes = {
        "block": (1, 512, 4096, 16_384),
        "prefill": (512, 4096, 16_384),
        "decode": (1, 8, 32),
        "generate": (1, 8, 32),
    }
    for stage, row in sizes.items():
        for size in row:
            more = {"peak_gib": 10.0} if stage != "block" else {}
            own = Candidate("batched_mm", "transformers", 8)
            results.add(stage, "graph", size, own, 8, np.full(5, 1e-3), 3e-4, **more)
            for k in (2, 4, 8):
                ours = Candidate("kernels" if stage == "block" else "patched", "bhlib", k)
                results.add(stage, "graph", size, ours, k, np.full(5, k * 1e-4), k * 5e-5, **more)
            for name, longer in (("means", 1.02), ("means and map", 1.1)) if stage == "block" else ():
                ours = Candidate(f"kernels, {name}", "bhlib", 4)
                results.add(stage, "graph", size, ours, 4, np.full(5, longer * 4e-4), 2e-4)
            if stage != "block":
                results.add(stage, "graph", size, Candidate("no experts", "neither", 0), 0, np.full(5, 1e-4), 5e-5)
    for mode, row in {"prefill": (4096,), "eager": (1, 8, 32), "compiled": (1, 8, 32)}.items():
        for size in row:
            milliseconds = {("unpatched", "transformers", 8): 6, (*call.PATCHED,): 3, (*call.NO_STATISTICS,): 2}
            for one, spent in (milliseconds | {("no experts", "neither", 0): 1.5}).items():
                compiled = {"graphs": 1, "graph_breaks": 0, "recompiled": 0} if mode == "compiled" else {}
                results.add("call", mode, size, Candidate(*one), one[2], np.full(5, spent / 1e3), 1e-3, **compiled)
    results.add("call", "compiled", 8, call.MOVED, 2, np.full(5, 3e-3), 1e-3, graphs=2, graph_breaks=0, recompiled=1)
    return results.table()


def test_goals_follow_from_the_table(tmp_path):
    names = {"call": 2 * ["generate()"] + 2 * ["prefill"], "name": 2 * ["unpatched", "patched"]}
    cpu = pd.DataFrame(names | {"ratio": [1.0, 1.04, 1.0, 0.8]})
    goals = check_goals(full_table(tmp_path), cpu).set_index("goal")
    calls = goals.filter(like="the call", axis=0)
    eager = calls.loc["the call, eager generate(), batch 8, k = 4: speedup"]
    assert eager["reached"] == pytest.approx(2) and eager["without_experts"] == pytest.approx(4) and eager["met"]
    assert not calls.loc["the call, compiled generate(), batch 8, k = 4: speedup", "met"]  # 2.9 are wanted
    statistics = calls.loc["the call, compiled, batch 1: time over no statistics"]
    assert statistics["reached"] == pytest.approx(1.5) and not statistics["met"]
    graphs = calls.filter(like="graphs", axis=0)
    assert graphs["reached"].tolist() == [1, 0, 2, 1] and graphs["met"].tolist() == [True, True, False, False]
    on_cpu = calls.filter(like="CPU", axis=0)
    assert on_cpu["reached"].tolist() == [1.04, 1.25] and on_cpu["met"].tolist() == [True, False]
    floors = goals.filter(like="time over the floor", axis=0)  # twice the floor, at either k
    assert floors["reached"].tolist() == pytest.approx([2, 2, 2, 2]) and not floors["met"].any()
    block = goals.loc["experts of a layer, 512 tokens, k = 4: speedup"]
    assert block["reached"] == pytest.approx(2.5) and block["at_most"] == pytest.approx(5) and not block["met"]
    stands_in = goals.filter(like="over without", axis=0)["reached"].dropna()  # in graphs, at 1 and 512 tokens
    assert stands_in.tolist() == pytest.approx([1.02, 1.02, 1.1, 1.1])
    prefill = goals.loc["prefill of 16,384 tokens, k = 4: speedup"]
    assert prefill["without_experts"] == pytest.approx(10) and prefill["met"]
    assert goals.loc["generate(), batch 1, k = 4: over the best of all", "met"]
    assert not goals.loc["generate(), batch 8, k = 4: over the best of all", "met"]
    assert goals.loc["decode: peak memory over the least of transformers", "reached"] == 1
    router = goals.filter(like="router", axis=0)  # not measured: not reached
    assert len(router) == 6 and router["reached"].isna().all() and not router["met"].any()


def test_the_fastest_is_chosen_among_what_was_measured(tmp_path):
    table = full_table(tmp_path)
    table.loc[(table["k"] == 2), "median_us"] = np.nan
    assert fastest(table, "bhlib", stage="block", tokens=1)["k"] == 4
    assert fastest(table, "bhlib", stage="block", tokens=2) is None


def test_figure_shows_times_floor_and_ideal(tmp_path):
    fig = draw_speed(full_table(tmp_path))
    panels = [axes for axes in fig.axes if axes.get_visible() and not axes.patches]
    assert len(panels) == 12
    lines = {line.get_label(): line.get_xydata() for line in panels[0].lines}
    ideal = next(data for label, data in lines.items() if label.startswith("ideal"))
    assert ideal[:, 1].tolist() == pytest.approx([0, 1000])
    floor = next(data for label, data in lines.items() if label.startswith("floor"))
    assert floor.ravel().tolist() == pytest.approx([2, 100, 4, 200, 8, 400])
    assert "1 GHz" in fig.texts[-1].get_text() and "medians of 5" in fig.texts[-1].get_text()


def test_figure_begins_with_the_call_as_a_share_of_the_unpatched_time(tmp_path):
    table = full_table(tmp_path)
    fig = draw_speed(table)
    panels = [axes for axes in fig.axes if axes.patches]
    assert [len(axes.get_xticklabels()) for axes in panels] == [3, 3, 1]
    bars = [group for group in panels[1].containers if isinstance(group, BarContainer)]
    heights = {group.get_label().partition(",")[0]: [bar.get_height() for bar in group] for group in bars}
    shares = {"patched as in the README": 1 / 2, "the same": 1 / 3, "no expert at all": 1 / 4}
    assert heights == {label: pytest.approx([share] * 3) for label, share in shares.items()}
    assert panels[1].get_xticklabels()[2].get_text() == "32 sequences\n6 ms"
    assert len(draw_speed(table[table["stage"] == "call"]).axes) == 3
    assert not any(axes.patches for axes in draw_speed(table[table["stage"] != "call"]).axes)


# -- the command -------------------------------------------------------------------------------------------------


def test_command_names_the_stages():
    with pytest.raises(ValueError, match="no stage is called 'all'; there are: call, router, block"):
        main(["bench", "speed", "--only", "all"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests the error where there is no CUDA device")
def test_without_a_gpu_it_says_so(tmp_path):
    with pytest.raises(RuntimeError, match="bench speed needs a CUDA device"):
        bench_speed(tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_rivals_compute_what_the_kernels_compute(results):
    module = full_size_experts()
    rivals = find_rivals(results, module)
    if not rivals:
        pytest.skip("neither scattermoe nor sonicmoe is installed")
    from bhlib.kernels.forward import experts_forward  # imports Triton, which not everybody has

    hidden = torch.randn(200, module.hidden_dim, device="cuda", dtype=torch.bfloat16)
    for k in (8, 4):
        routing = random_routing(200, k)
        expected = experts_forward(module, hidden, *routing).float()
        for forward in rivals.values():
            assert (forward(hidden, *routing).float() - expected).norm() < 1e-2 * expected.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_short_run(tmp_path):
    table = bench_speed(tmp_path, ["router"], quick=True)
    assert table["error"].isna().all() and (table["median_us"] > 0).all()
    by_norms = {"BH, norms, torch", "BH, norms, kernel"}
    assert set(table["name"]) == {"softmax + topk", "BH, torch", "BH, kernel", "an empty kernel"} | by_norms
