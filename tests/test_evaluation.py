"""Evaluation against sums by hand."""

import numpy as np
import pandas as pd
import pytest
import torch
from models import tiny_olmoe, tokens

from bhlib import BHRoutingIntegration
from bhlib.evaluation import bootstrap_mean, evaluate, paired_difference, summarize, sweep
from bhlib.rules import BH, TopK

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
    pd.testing.assert_frame_equal(evaluate(model, DATA), evaluate(model, DATA, TopK(8)))


def test_sweep_is_tidy_and_paired():
    model = tiny_olmoe()
    frame = sweep(model, {"own": None, "top-2": TopK(2)}, DATA)
    assert frame.columns[0] == "rule" and len(frame) == 16
    result = paired_difference(frame, "top-2", "own")
    by_hand = frame.query("rule == 'top-2'")["loss"].to_numpy() - frame.query("rule == 'own'")["loss"].to_numpy()
    assert result["difference"] == pytest.approx(by_hand.mean()) and result["sequences"] == 8
    assert result["low"] < result["difference"] < result["high"]
    summary = summarize(frame, ["rule", "domain"])
    assert len(summary) == 4 and summary["tokens"].sum() == 16 * 19


def test_bootstrap_covers():
    """A 95 % interval of the mean of 50 normal values covers the truth in about 95 % of 300 trials."""
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(300):
        low, high = bootstrap_mean(rng.normal(size=50), resamples=400, seed=trial)
        covered += low <= 0 <= high
    assert 0.95 - 4 * np.sqrt(0.95 * 0.05 / 300) - 0.02 < covered / 300 <= 1  # percentile intervals are a bit short
