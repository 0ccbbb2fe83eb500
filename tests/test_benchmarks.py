"""Benchmarks: the loops that serve as a yardstick do the same work, and the tables say what was measured."""

import pandas as pd
import pytest
import torch
from models import state_of, tiny_olmoe, tokens

from bhlib.__main__ import main
from bhlib.benchmarks import BASELINE, bench_call, bench_routing, format_call, format_routing, loop_reject, loop_route
from bhlib.procedures import PROCEDURES, reject
from bhlib.pvalues import TokenGaussian
from bhlib.rules import BH


def random_logits(tokens):
    return 2 * torch.randn(tokens, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("alpha", [0.05, 0.3])
def test_the_loop_routes_as_the_rule_does(alpha):
    logits = random_logits(300)
    weights, experts, counts = BH(alpha, TokenGaussian())(logits)
    slow_weights, slow_experts, slow_counts = loop_route(logits.double().numpy(), alpha, 8)
    assert counts.tolist() == slow_counts.tolist() and counts.float().std() > 0.5
    assert experts.tolist() == slow_experts.tolist()
    torch.testing.assert_close(weights.double(), torch.from_numpy(slow_weights), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("method", "statsmodels_name"), [("bh", "fdr_bh"), ("tsbky", "fdr_tsbky")])
def test_the_loop_rejects_as_the_procedure_does(method, statsmodels_name):
    pvals = TokenGaussian()(random_logits(300)).double()
    found = reject(pvals, 0.05, method)
    assert found.any() and found.tolist() == loop_reject(pvals.numpy(), 0.05, statsmodels_name).tolist()


def test_the_table_has_a_row_for_everything():
    table = bench_routing(64, 16, max_k=4, loop_tokens=8, min_run_time=0.001, devices=["cpu"])
    assert set(table["group"]) == {"router", "rule", "p-values", "procedure", "loop"}
    assert set(table.loc[table["group"] == "procedure", "operation"]) == set(PROCEDURES)
    for null in ("dirichlet", "gaussian", "kde", "conformal", "kde per expert"):
        assert (table["operation"] == null).sum() == 1 and (table["operation"] == f"BH, {null}").sum() == 1
    assert (table["ns_per_token"] > 0).all() and (table["iqr_ns"] >= 0).all() and (table["repetitions"] >= 1).all()
    assert (table.loc[table["group"] == "loop", "tokens"] == 8).all() and (table["experts"] == 16).all()
    baseline = table[table["operation"] == BASELINE].iloc[0]
    assert baseline["relative"] == 1
    expected = table["ns_per_token"] / baseline["ns_per_token"]
    pd.testing.assert_series_equal(table["relative"], expected, check_names=False)
    text = format_routing(table)
    assert text.startswith("cpu, ") and "64 tokens x 16 experts" in text and "BH, kde per expert" in text


def test_the_call_is_timed_in_turns_and_leaves_no_trace():
    model, threads = tiny_olmoe(), torch.get_num_threads()
    before = state_of(model)
    table = bench_call(model, tokens(1, 4), tokens(2, 16), new_tokens=3, repetitions=4, threads=1)
    names = ["unpatched", "patched", "no statistics"]
    assert table[["call", "name"]].values.tolist() == [[c, n] for c in ("generate()", "prefill") for n in names]
    assert (table["cpu_q1"] <= table["cpu_ms"]).all() and (table["cpu_ms"] <= table["cpu_q3"]).all()
    assert table["tokens"].tolist() == [3, 3, 3, 32, 32, 32] and (table["threads"] == 1).all()
    own = table["name"] == "unpatched"
    assert (table.loc[own, "ratio"] == 1).all() and (table.loc[own, "mean_k"] == 8).all()
    assert table.loc[~own, "mean_k"].between(1, 7.5).all()
    assert state_of(model) == before and torch.get_num_threads() == threads
    text = format_call(table)
    assert "each of 3 tokens" in text and "prefill of 32 tokens" in text and "no statistics" in text


def test_command_line(tmp_path, capsys):
    path = tmp_path / "routing.csv"
    main(["bench", "routing", "--tokens", "32", "--experts", "16", "--seconds", "0.001", "--csv", str(path)])
    assert BASELINE in capsys.readouterr().out
    assert len(pd.read_csv(path)) >= 20
