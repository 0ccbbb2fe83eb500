"""Evaluation against sums by hand."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from models import tiny_olmoe, tokens

from bhlib import BHRoutingIntegration, evaluation
from bhlib.evaluation import (
    bootstrap_mean,
    choose_static_per_layer,
    entropy_thresholds,
    evaluate,
    matched_compute,
    paired_difference,
    summarize,
    sweep,
)
from bhlib.patching import RoutingPatch
from bhlib.pvalues import ConformalNull
from bhlib.rules import BH, EntropyK, Replay, StaticPerLayer, TopK

DATA = {"a": tokens(3, 20, seed=1), "b": tokens(5, 20, seed=2)}


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
    pd.testing.assert_frame_equal(
        evaluate(model, DATA, agreement=True), evaluate(model, DATA, TopK(8), agreement=True), atol=1e-7
    )


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
    pd.testing.assert_frame_equal(
        frame.drop(columns=["kl", "top1_agreement"]), evaluate(model, DATA, TopK(1), batch_size=3)
    )


# -- sweeps ----------------------------------------------------------------------------------------------------

RULES = {"own": None, "top-2": TopK(2), "BH 0.2": BH(0.2)}


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


def test_a_stopped_sweep_goes_on_where_it_was(tmp_path, monkeypatch):
    model, measured = tiny_olmoe(), []

    def stopping(model, data, rule, **options):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(rule)
        return evaluate(model, data, rule, **options)

    wanted = sweep(model, RULES, DATA)
    monkeypatch.setattr(evaluation, "evaluate", stopping)
    with pytest.raises(KeyboardInterrupt):
        sweep(model, RULES, DATA, cache=tmp_path)
    assert measured == [None, TopK(2)] and len(list(tmp_path.iterdir())) == 2
    measured.clear()
    pd.testing.assert_frame_equal(sweep(model, RULES, DATA, cache=tmp_path), wanted, check_exact=True)
    assert measured == [RULES["BH 0.2"]]
    measured[:] = [None, None]  # one more evaluation would raise
    pd.testing.assert_frame_equal(sweep(model, RULES, DATA, cache=tmp_path), wanted, check_exact=True)


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
    with pytest.raises(ValueError, match="'again' cannot be stored, since its repr does not tell records"):
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
    pd.testing.assert_frame_equal(frames[0], sweep(model, RULES, DATA), rtol=1e-5)
    assert len(list(cache.iterdir())) == 3


# -- comparisons -----------------------------------------------------------------------------------------------


def test_bootstrap_covers():
    """A 95 % interval of the mean of 50 normal values covers the truth in about 95 % of 300 trials."""
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(300):
        low, high = bootstrap_mean(rng.normal(size=50), resamples=400, seed=trial)
        covered += low <= 0 <= high
    assert 0.95 - 4 * np.sqrt(0.95 * 0.05 / 300) - 0.02 < covered / 300 <= 1  # percentile intervals are a bit short


def made_up(rules, tokens_per_sequence=None):
    """A sweep's table from {rule: (mean_k, loss)}, each a number or one per sequence."""
    size = max(np.size(part) for pair in rules.values() for part in pair)
    columns = {
        "domain": ["x", "y"] * (size // 2),
        "sequence": np.arange(size) // 2,
        "tokens": 10 if tokens_per_sequence is None else tokens_per_sequence,
        "error": "",
    }
    parts = [pd.DataFrame(columns | {"rule": r, "mean_k": k, "loss": loss}) for r, (k, loss) in rules.items()]
    return pd.concat(parts, ignore_index=True)


def static_curve(size=40, seed=0):
    """Losses of top-1 to top-8: of every sequence its own level, the same gain from each expert."""
    level = np.random.default_rng(seed).normal(3, 1, size)
    return level, {f"top-{k}": (k, level + 1 / k) for k in range(1, 9)}


def test_a_mixture_of_static_rules_is_no_gain():
    """Top-4 on some sequences and top-5 on others is what the interpolation stands for: exactly nothing is won."""
    level, static = static_curve()
    chosen = np.where(np.arange(40) % 3 == 0, 4, 5)
    (row,) = matched_compute(made_up(static | {"mixed": (chosen, level + 1 / chosen)})).to_dict("records")
    assert row["mean_k"] == pytest.approx(chosen.mean())
    assert row["loss"] == pytest.approx((level + 1 / chosen).mean())
    assert row["static"] == pytest.approx(row["loss"])
    assert [row["difference"], row["low"], row["high"]] == pytest.approx([0, 0, 0], abs=1e-12)


def test_a_known_gain_is_found():
    level, static = static_curve()
    gain = np.random.default_rng(1).normal(0.02, 0.01, 40)
    k = np.random.default_rng(2).uniform(3, 5, 40)
    rules = {"better": (4.25, level + 0.75 / 4 + 0.25 / 5 - gain), "top-p 0.4": (k, level + 0.3)}
    table = matched_compute(made_up(static | rules)).set_index("rule")
    assert table.index.tolist() == ["better", "top-p 0.4"] and (table["sequences"] == 40).all()
    better = table.loc["better"]
    assert better["difference"] == pytest.approx(-gain.mean())
    low, high = bootstrap_mean(-gain)  # at a constant mean k the interval is that of the paired differences
    assert [better["low"], better["high"]] == pytest.approx([low, high], abs=0.15 * (high - low))
    by_hand = np.interp(k.mean(), range(1, 9), [np.mean(loss) for _, loss in static.values()])
    assert table.loc["top-p 0.4", "static"] == pytest.approx(by_hand)


def test_intervals_cover_when_spending_follows_difficulty():
    """A rule without merit that gives more experts to some sequences: 0 lies in about 95 % of the intervals."""
    covered, trials = 0, 150
    for trial in range(trials):
        level, static = static_curve(40, seed=trial)
        rng = np.random.default_rng(1000 + trial)
        k = 3 + 4 * (level > 3.5)
        frame = made_up(static | {"rule": (k, level + 1 / k + rng.normal(0, 0.05, 40))})
        # What top-3 and top-7 lose in the same proportion, so that the truth is 0.
        line = 1 / 3 + (1 / 7 - 1 / 3) / 4 * (np.arange(1, 9) - 3)
        for j in range(1, 9):
            frame.loc[frame["rule"] == f"top-{j}", "loss"] = level + line[j - 1]
        (row,) = matched_compute(frame, resamples=300, seed=trial).to_dict("records")
        covered += row["low"] <= 0 <= row["high"]
    assert 0.95 - 4 * np.sqrt(0.95 * 0.05 / trials) - 0.02 < covered / trials <= 1


def test_long_sequences_weigh_more():
    level, static = static_curve(4)
    lengths = np.array([10, 10, 10, 70])
    chosen = np.array([4, 4, 4, 6])
    (row,) = matched_compute(made_up(static | {"r": (chosen, level)}, np.tile(lengths, 1))).to_dict("records")
    assert row["mean_k"] == pytest.approx(5.4)
    assert row["loss"] == pytest.approx((lengths * level).sum() / 100)
    assert row["difference"] == pytest.approx(-(0.6 / 5 + 0.4 / 6))


def test_outside_the_baseline_there_is_no_match():
    level, static = static_curve()
    table = matched_compute(made_up(static | {"r": (9.5, level), "s": (8, level)})).set_index("rule")
    assert table.loc["r", ["static", "difference", "low", "high"]].isna().all()
    assert table.loc["s", "difference"] == pytest.approx(-1 / 8)


def test_matching_needs_a_curve_and_the_same_sequences():
    level, static = static_curve()
    frame = made_up(static | {"r": (4.5, level)})
    with pytest.raises(ValueError, match=r"consecutive k, got \['top-3', 'top-5'\]"):
        matched_compute(frame[frame["rule"].isin(["top-3", "top-5", "r"])])
    with pytest.raises(ValueError, match=r"consecutive k, got \[\]"):
        matched_compute(frame, baseline="static ")
    with pytest.raises(ValueError, match="'r' has no loss for 1 of the 40 sequences"):
        matched_compute(frame.iloc[:-1])


def test_matching_a_real_sweep():
    rules = {f"top-{k}": TopK(k) for k in (1, 2, 3)} | {"two": StaticPerLayer((2, 2, 2)), "BH": BH(0.1, max_k=65)}
    table = matched_compute(sweep(tiny_olmoe(), rules, DATA))
    assert table["rule"].tolist() == ["two"]
    assert table.loc[0, ["difference", "low", "high"]].tolist() == pytest.approx([0, 0, 0], abs=1e-6)


# -- settings of rivals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mean_k", [1, 5 / 3, 2.4, 3])
def test_static_k_per_layer_is_the_best_by_brute_force(mean_k):
    model = tiny_olmoe(num_experts=8, num_experts_per_tok=3)

    def loss(ks):
        return evaluate(model, DATA, StaticPerLayer(ks))["loss"].mean()

    budget = round(3 * mean_k)
    alone = {(at, k): loss([k if i == at else 3 for i in range(3)]) for at in range(3) for k in (1, 2, 3)}
    candidates = [ks for ks in itertools.product((1, 2, 3), repeat=3) if sum(ks) == budget]
    wanted = min(candidates, key=lambda ks: sum(alone[at, k] for at, k in enumerate(ks)))
    assert choose_static_per_layer(model, DATA, mean_k).ks == wanted


def test_static_k_per_layer_wants_a_possible_mean():
    with pytest.raises(ValueError, match="mean_k must lie between 1 and max_k=8, got 9"):
        choose_static_per_layer(tiny_olmoe(), DATA, 9)


@pytest.mark.parametrize("mean_k", [1.5, 4, 7.5])
@pytest.mark.parametrize("slope", [0.5, 1.0, 4.0])
def test_entropy_thresholds_give_the_mean(mean_k, slope):
    spread = torch.linspace(0.3, 4, 500)[:, None]
    logits = torch.randn(2, 500, 64, generator=torch.Generator().manual_seed(0)) * spread
    thresholds = entropy_thresholds(logits, mean_k, slope=slope)
    np.testing.assert_allclose(np.diff(thresholds), 1 / slope)
    rule = EntropyK(thresholds, range(1, 9))
    counts = rule(logits.flatten(0, 1)).counts
    assert counts.double().mean().item() == pytest.approx(mean_k, abs=0.01)
    assert counts[:100].double().mean() >= counts[400:500].double().mean()  # flat probabilities, then peaked ones


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mean_k": 1}, "mean_k must lie strictly between 1 and max_k=8, got 1"),
        ({"mean_k": 4, "max_k": 4}, "mean_k must lie strictly between 1 and max_k=4, got 4"),
        ({"mean_k": 4, "slope": 0.0}, "slope must be a finite number above 0, got 0.0"),
    ],
)
def test_entropy_thresholds_name_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        entropy_thresholds(torch.randn(5, 64), **arguments)
