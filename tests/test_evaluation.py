"""Evaluation against sums by hand."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from models import state_of, tiny_olmoe, tokens
from rows import count_rows

from bhlib import BHRoutingIntegration, evaluation
from bhlib.comparisons import paired_difference, summarize
from bhlib.discovery import find_moe_layers
from bhlib.evaluation import evaluate, evaluate_patched, sweep
from bhlib.patching import RoutingPatch
from bhlib.pvalues import ConformalNull
from bhlib.rules import BH, Replay, TopK, TopP

RULES = {"own": None, "top-2": TopK(2), "BH 0.2": BH(0.2)}
DATA = {"a": tokens(3, 20, seed=1), "b": tokens(5, 20, seed=2)}


def assert_same_table(one, other, **options):
    """All columns but the one that is wall time."""
    pd.testing.assert_frame_equal(one.drop(columns="seconds"), other.drop(columns="seconds"), **options)


def test_loss_is_the_models_own():
    model = tiny_olmoe()
    frame = evaluate(model, DATA, batch_size=2)
    assert len(frame) == 8 and (frame["tokens"] == 19).all() and (frame["mean_k"] == 8).all()
    for row in frame.itertuples():
        ids = DATA[row.domain][row.sequence][None]
        with torch.no_grad():
            output = model(input_ids=ids, labels=ids)
        assert row.loss == pytest.approx(output.loss.item(), rel=1e-4)
        correct = output.logits[0, :-1].argmax(-1) == ids[0, 1:]
        assert row.accuracy == pytest.approx(correct.float().mean().item())


def test_a_rule_is_applied_and_counted():
    model = tiny_olmoe()
    frame = evaluate(model, DATA, BH(0.2), batch_size=3)
    for row in frame.itertuples():
        ids = DATA[row.domain][row.sequence][None]
        with BHRoutingIntegration(model, alpha=0.2) as bh, torch.no_grad():
            loss = model(input_ids=ids, labels=ids).loss.item()
        assert row.loss == pytest.approx(loss, rel=1e-4)
        assert row.mean_k == pytest.approx(bh.get_routing_stats()["mean_experts_per_token"], abs=0.05)


def test_own_rule_equals_no_rule():
    model = tiny_olmoe()
    assert_same_table(evaluate(model, DATA, agreement=True), evaluate(model, DATA, TopK(8), agreement=True), atol=1e-7)


@pytest.mark.parametrize("rule", [None, TopK(4), BH(0.2), BH(0.2, min_k=0)], ids=["own", "top-4", "BH", "BH, min_k=0"])
def test_rows_are_those_that_the_products_have(rule):
    model = tiny_olmoe()
    with count_rows(*(layer.experts for layer in find_moe_layers(model))) as counter:
        frame = evaluate(model, DATA, rule, batch_size=3)
    assert counter.rows == {"gate_up_proj": frame["rows"].sum(), "down_proj": frame["rows"].sum()}
    np.testing.assert_allclose(frame["rows"], frame["mean_k"] * 20 * 3)


def test_no_graph_of_gradients_is_kept():
    """It would take several times the memory, and no kernel computes what wants gradients."""
    model, seen = tiny_olmoe(), []
    model.lm_head.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    assert all(parameter.requires_grad for parameter in model.parameters())
    evaluate(model, DATA, BH(0.2))
    sweep(model, {"BH": BH(0.2)}, DATA)
    assert seen and not any(seen)


def test_load_entropy_by_hand():
    """The model's own routing, sequence by sequence, expert by expert."""
    model = tiny_olmoe()
    for row in evaluate(model, DATA, batch_size=2).itertuples():
        with torch.no_grad():
            layers = model(DATA[row.domain][row.sequence][None], output_router_logits=True).router_logits
        entropies = []
        for logits in layers:
            load = np.bincount(logits.topk(8).indices.flatten(), minlength=64)
            entropies.append(scipy.stats.entropy(load, base=64))
        assert row.load_entropy == pytest.approx(np.mean(entropies))


def test_load_entropy_between_one_expert_and_all():
    model = tiny_olmoe()
    assert evaluate(model, DATA, TopK(64))["load_entropy"].tolist() == pytest.approx([1] * 8)
    for layer in model.model.layers:  # no logit but 0, so the first expert is everybody's best
        torch.nn.init.zeros_(layer.mlp.gate.weight)
    assert evaluate(model, DATA, TopK(1))["load_entropy"].tolist() == [0] * 8
    assert evaluate(model, DATA, TopK(8))["load_entropy"].tolist() == pytest.approx([np.log(8) / np.log(64)] * 8)


def test_seconds_are_those_of_the_forward_passes(monkeypatch):
    """By a clock that goes on by a second whenever it is read: one second a batch, whatever else is done."""
    ticks = itertools.count()
    monkeypatch.setattr(evaluation.time, "perf_counter", lambda: float(next(ticks)))
    frame = evaluate(tiny_olmoe(), DATA, TopK(2), batch_size=2, agreement=True)
    assert frame["seconds"].tolist() == [1 / 2, 1 / 2, 1] + [1 / 2] * 4 + [1]


def test_agreement_is_with_the_unpatched_model():
    model = tiny_olmoe(initializer_range=0.3)  # experts that matter
    own = evaluate(model, DATA, agreement=True)
    assert (own["kl"] == 0).all() and (own["top1_agreement"] == 1).all()
    frame = evaluate(model, DATA, TopK(1), batch_size=3, agreement=True)
    for row in frame.itertuples():
        ids = DATA[row.domain][row.sequence][None]
        with torch.no_grad():
            p = model(ids).logits[0, :-1].double().softmax(-1)
            with RoutingPatch(model, TopK(1)):
                q = model(ids).logits[0, :-1].double().softmax(-1)
        assert row.kl == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-3) and row.kl > 1e-4
        assert row.top1_agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    assert frame["top1_agreement"].mean() < 1
    assert_same_table(frame.drop(columns=["kl", "top1_agreement"]), evaluate(model, DATA, TopK(1), batch_size=3))


@pytest.mark.parametrize("agreement", [False, True])
def test_a_replay_goes_on_from_batch_to_batch(agreement):
    """Recorded on the same batches, it gives the same numbers: each batch gets its own recorded pass."""
    model = tiny_olmoe(initializer_range=0.3)
    before = state_of(model)
    with RoutingPatch(model, BH(0.2), max_recorded_tokens=None) as patch, torch.no_grad():
        for sequences in DATA.values():
            for batch in sequences.split(2):
                model(batch, use_cache=False)
    wanted = evaluate(model, DATA, BH(0.2), batch_size=2, agreement=agreement)
    again = Replay(patch.records)
    for _ in range(2):  # and each evaluation begins with the first
        found = evaluate(model, DATA, again, batch_size=2, agreement=agreement)
        assert_same_table(found, wanted, check_exact=True)
    assert state_of(model) == before


def test_options_that_are_not_for_evaluate():
    for measure in (evaluate, lambda *args, **kwargs: sweep(args[0], {"top-2": args[2]}, args[1], **kwargs)):
        for option in ({"max_recorded_tokens": 10}, {"mode": "analyze"}, {"collect_stats": False}):
            with pytest.raises(
                TypeError,
                match=f"take no '{next(iter(option))}'.* temperature, .*, compensation, norms. Leave",
            ):
                measure(tiny_olmoe(), DATA, TopK(2), **option)


@pytest.mark.parametrize("how", ["device_map", "cpu_offload", "disk_offload"])
def test_offloaded_models(how, tmp_path):
    """Their weights are on the meta device while they are not used; cells are found, and told apart, all the same."""
    cells, wanted = tmp_path / "cells", sweep(tiny_olmoe(), RULES, DATA, agreement=True)
    for seed in (0, 1):
        model = tiny_olmoe(seed)
        if how == "cpu_offload":
            cpu_offload(model, execution_device="cpu")
        elif how == "disk_offload":
            disk_offload(model, tmp_path / str(seed), execution_device="cpu")
        else:
            places = {"model.embed_tokens": "disk", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
            places |= {f"model.layers.{i}": ("cpu", "disk")[i % 2] for i in range(3)}
            dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path / str(seed), force_hooks=True)
        assert any(parameter.is_meta for parameter in model.parameters())
        found = sweep(model, RULES, DATA, cache=cells, agreement=True)
        assert (found["error"] == "").all() and len(list(cells.iterdir())) == 3 * (seed + 1)
        if seed == 0:
            assert_same_table(found, wanted)
            assert_same_table(sweep(model, RULES, DATA, cache=cells, agreement=True), found, check_exact=True)
        assert len(list(cells.iterdir())) == 3 * (seed + 1)


# -- sweeps ----------------------------------------------------------------------------------------------------


def test_sweep_is_tidy_and_paired():
    model = tiny_olmoe()
    frame = sweep(model, {"own": None, "top-2": TopK(2)}, DATA)
    assert frame.columns[0] == "rule" and len(frame) == 16 and (frame["error"] == "").all()
    result = paired_difference(frame, "top-2", "own")
    by_hand = frame.query("rule == 'top-2'")["loss"].to_numpy() - frame.query("rule == 'own'")["loss"].to_numpy()
    assert result["difference"] == pytest.approx(by_hand.mean()) and result["sequences"] == 8
    assert result["low"] < result["difference"] < result["high"]
    summary = summarize(frame, ["rule", "domain"])
    assert len(summary) == 4 and summary["tokens"].sum() == 16 * 19
    np.testing.assert_allclose(summary["perplexity"], np.exp(summary["loss"]))
    by_hand = frame.groupby(["rule", "domain"], sort=False)
    for column in ("rows", "seconds"):
        np.testing.assert_allclose(summary[column], by_hand[column].sum())
    np.testing.assert_allclose(summary["load_entropy"], by_hand["load_entropy"].mean())


def test_a_stopped_sweep_goes_on_where_it_was(tmp_path, monkeypatch):
    model, measured = tiny_olmoe(), []

    def stopping(patch, *options):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(patch.rule if patch.mode == "patch" else None)
        return evaluate_patched(patch, *options)

    wanted = sweep(model, RULES, DATA)
    monkeypatch.setattr(evaluation, "evaluate_patched", stopping)
    with pytest.raises(KeyboardInterrupt):
        sweep(model, RULES, DATA, cache=tmp_path)
    assert measured == [None, TopK(2)] and len(list(tmp_path.iterdir())) == 2
    measured.clear()
    assert_same_table(sweep(model, RULES, DATA, cache=tmp_path), wanted, check_exact=True)
    assert measured == [RULES["BH 0.2"]]
    measured[:] = [None, None]  # one more evaluation would raise
    assert_same_table(sweep(model, RULES, DATA, cache=tmp_path), wanted, check_exact=True)


def test_what_changes_the_numbers_changes_the_cell(tmp_path):
    model, rule = tiny_olmoe(), {"a/b c": TopK(2)}
    few, many = (
        {"n": ConformalNull.fit([torch.arange(1000.0) * scale] * 3, model_name="m", num_experts=64)}
        for scale in (0.001, 0.002)
    )
    bh = [BH(0.1, null["n"]) for null in (few, many)]
    assert repr(bh[0]) == repr(bh[1])
    runs = [
        lambda: sweep(model, rule, DATA, cache=tmp_path),
        lambda: sweep(model, {"a/b c": TopK(3)}, DATA, cache=tmp_path),
        lambda: sweep(model, rule, {"a": DATA["a"]}, cache=tmp_path),
        lambda: sweep(model, rule, {"c": DATA["a"], "b": DATA["b"]}, cache=tmp_path),
        lambda: sweep(tiny_olmoe(seed=1), rule, DATA, cache=tmp_path),
        lambda: sweep(tiny_olmoe(norm_topk_prob=True), rule, DATA, cache=tmp_path),
        lambda: sweep(model, rule, DATA, cache=tmp_path, temperature=2.0),
        lambda: sweep(model, rule, DATA, cache=tmp_path, agreement=True),
        lambda: sweep(model, {"BH": bh[0]}, DATA, cache=tmp_path),
        lambda: sweep(model, {"BH": bh[1]}, DATA, cache=tmp_path),
    ]
    for number, run in enumerate(runs, start=1):
        run()
        assert len(list(tmp_path.iterdir())) == number
    for run in runs:
        run()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == len(runs) and names[0].startswith("BH-") and names[-1].startswith("a-b-c-")


def test_a_rule_that_fails_is_a_row(tmp_path):
    model = tiny_olmoe()
    rules = {"top-2": TopK(2), "too many": BH(0.1, max_k=65), "top-3": TopK(3), "top-8": TopK(8)}
    frame = sweep(model, rules, DATA, cache=tmp_path)
    failed = frame[frame["error"] != ""]
    assert failed["rule"].tolist() == ["too many"] and failed["loss"].isna().all() and len(frame) == 25
    assert "ValueError: max_k must not exceed the number of experts, got max_k=65" in failed["error"].item()
    assert len(list(tmp_path.iterdir())) == 3
    assert summarize(frame)["rule"].tolist() == ["top-2", "top-3", "top-8"]
    with pytest.raises(
        ValueError, match=r"'too many' failed in this sweep: ValueError: max_k .* Measured: top-2, top-3"
    ):
        paired_difference(frame, "too many", "top-2")
    with pytest.raises(ValueError, match="'top-5' is not in this table"):
        paired_difference(frame, "top-2", "top-5")


def test_a_replay_is_not_stored(tmp_path):
    model = tiny_olmoe()
    with BHRoutingIntegration(model, alpha=0.2) as bh, torch.no_grad():
        model(DATA["a"])
    rules = {"again": Replay(bh.records)}
    with pytest.raises(ValueError, match="'again' cannot be stored, since it imposes what one run recorded"):
        sweep(model, rules, DATA, cache=tmp_path)
    frame = sweep(model, rules, {"a": DATA["a"]})
    assert frame["loss"].tolist() == pytest.approx(evaluate(model, {"a": DATA["a"]}, BH(0.2))["loss"].tolist())


SHARED_SWEEP = """
import sys
import torch
from accelerate import PartialState
from test_evaluation import DATA, RULES, sweep
from models import tiny_olmoe
torch.set_num_threads(1)
state = PartialState(cpu=True)
assert state.num_processes == 2
frame = sweep(tiny_olmoe(), RULES, DATA, cache=sys.argv[1])
frame.to_pickle(f"{sys.argv[2]}/{state.process_index}.pkl")
state.destroy_process_group()  # left open, its threads may abort the process as it ends
"""


def test_two_processes_make_the_same_table(tmp_path):
    """As `accelerate launch` starts them: each computes some cells (one was finished before), both get all of them."""
    script, cache, out = tmp_path / "shared.py", tmp_path / "cache", tmp_path / "out"
    script.write_text(SHARED_SWEEP, encoding="utf-8")
    out.mkdir()
    model = tiny_olmoe()
    sweep(model, {"top-2": RULES["top-2"]}, DATA, cache=cache)
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, str(script), str(cache), str(out)]
    subprocess.run(command, check=True, timeout=240, env=os.environ | {"PYTHONPATH": path})
    frames = [pd.read_pickle(out / f"{rank}.pkl") for rank in (0, 1)]
    pd.testing.assert_frame_equal(*frames, check_exact=True)
    assert_same_table(frames[0], sweep(model, RULES, DATA), rtol=1e-5)
    assert len(list(cache.iterdir())) == 3


# -- settings of rivals ----------------------------------------------------------------------------------------


def test_levels_of_one_family_are_swept_in_one_patch(monkeypatch):
    """The numbers are those of each rule alone; a rule that fails does not spoil the next one."""
    model, patched = tiny_olmoe(), []
    own = RoutingPatch.patch_model

    def patch_model(patch, **options):
        patched.append(patch.rule)
        return own(patch, **options)

    monkeypatch.setattr(RoutingPatch, "patch_model", patch_model)
    swept = [
        BH(0.01),
        BH(0.1, layer_weights=(1, 2)),
        BH(0.05),
        BH(0.3),
        BH(0.3, max_k=4),
        TopK(2),
        None,
        TopP(0.2),
        TopP(0.6),
    ]
    rules = {f"{number} {rule}": rule for number, rule in enumerate(swept)}
    frame = sweep(model, rules, DATA)
    assert patched == [swept[0], *swept[2:3], *swept[4:6], TopK(8), swept[7]]
    for name, rule in rules.items():
        part = frame[frame["rule"] == name].reset_index(drop=True)
        if rule is swept[1]:
            assert "layer_weights has 2 entries for a model of 3 MoE layers" in part["error"].item()
        else:
            assert_same_table(part.drop(columns=["rule", "error"]), evaluate(model, DATA, rule), check_dtype=False)
