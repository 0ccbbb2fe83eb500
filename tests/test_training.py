"""The script that trained the demo: it runs, and resumes where it was stopped."""

import csv
import json
import lzma
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM

from bhlib import find_moe_layers, load_heldout
from bhlib.loading import DEMO

SMALL = "--layers 1 --hidden 64 --width 32 --rows 2 --length 64 --steps 6 --warmup 2 --device cpu --splits".split()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A corpus in the script's format, of held-out text, since the real one is not in the repository."""
    folder = tmp_path_factory.mktemp("corpus")
    for domain, sequences in load_heldout("calibration").items():
        with lzma.open(folder / f"{domain}.npy.xz", "wb", preset=0) as file:
            np.save(file, sequences.flatten().numpy().astype(np.uint16))
    return folder


def train(corpus, folder, *more):
    command = [sys.executable, DEMO / "train.py", "--corpus", corpus, "--out", folder / "out"]
    run = subprocess.run(
        [str(part) for part in (*command, "--checkpoint", folder / "checkpoint", *SMALL[:-1], *more, SMALL[-1])],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr
    with (folder / "out" / "train_log.csv").open() as file:
        return list(csv.DictReader(file)), run.stdout


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "out").state_dict()


def test_a_stopped_training_resumes_to_the_same_weights(corpus, tmp_path):
    whole, _ = train(corpus, tmp_path / "whole")
    _, first = train(corpus, tmp_path / "parts", "--stop-at", 3)
    parts, second = train(corpus, tmp_path / "parts")
    assert "stopped at step 3 of 6" in first and "from step 3" in second
    assert int(parts[-1]["step"]) == int(whole[-1]["step"]) == 6
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "out")
    assert len(find_moe_layers(model)) == 1


def test_other_pools_are_trained_and_their_routers_kept_along_the_way(corpus, tmp_path):
    pool = ("--experts", 16, "--top-k", 2, "--load-balance", 0.1, "--norm-topk-prob", "--snapshots", 0.5, 1)
    log, _ = train(corpus, tmp_path, *pool)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    config = model.config
    assert (config.num_experts, config.num_experts_per_tok, config.norm_topk_prob) == (16, 2, True)
    assert config.router_aux_loss_coef == 0.1 and 2 <= float(log[-1]["load_balance"]) < 3  # top_k if even
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["arguments"]["experts"] == 16 and metrics["training"]["steps"] == 6
    kept = {int(path.stem): np.load(path) for path in (tmp_path / "out" / "snapshots").glob("*.npy")}
    assert sorted(kept) == [3, 6]
    text = torch.cat([ids[:1] for _, ids in sorted(load_heldout("validation", length=1024).items())])
    with torch.no_grad():
        logits = model(text, output_router_logits=True, use_cache=False).router_logits
    assert kept[6].shape == (1, text.numel(), 16)
    assert torch.allclose(torch.stack(logits), torch.from_numpy(kept[6]).float(), atol=0.02)  # saved in bfloat16
    assert not np.array_equal(kept[3], kept[6])


def test_the_card_is_rendered_from_the_metrics():
    """No number in it was typed: rendering again gives the committed file."""
    before = (DEMO / "README.md").read_text(encoding="utf-8")
    script = f"import sys; sys.path.insert(0, {str(DEMO)!r}); import card; import json; from pathlib import Path\n" + (
        "read = lambda name: json.loads((card.HERE / name).read_text())\n"
        "sys.stdout.write(card.render(read('metrics.json'), read('heldout.json'), read('config.json')))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == before.strip()


def test_the_metrics_say_that_the_gate_has_learned():
    loss = json.loads((DEMO / "metrics.json").read_text())["test"]["loss"]
    assert loss["1"]["mean"] - loss["8"]["mean"] >= 0.3


# -- the runs behind the figure `training` ---------------------------------------------------------------------------


@pytest.fixture
def scripts(monkeypatch):
    """The scripts beside the model can be imported."""
    monkeypatch.syspath_prepend(str(DEMO))


@pytest.mark.parametrize("kind", ["st-kept", "st-all", "penalty-0.1"])
def test_gates_change_gradients_and_nothing_else(scripts, kind):
    from models import tiny_olmoe, tokens
    from tuning_gates import gated

    from bhlib import RoutingPatch
    from bhlib.rules import BH

    model, ids, found = tiny_olmoe(), tokens(2, 24), {}
    for one in ("kept", kind):
        model.zero_grad()
        with RoutingPatch(model, BH(0.01)), gated(model, one):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
        found[one] = loss.item(), model.model.layers[0].mlp.gate.weight.grad.clone()
    assert found[kind][0] == pytest.approx(found["kept"][0], rel=1e-5)
    assert not torch.allclose(found[kind][1], found["kept"][1], rtol=1e-3)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_table_reads_losses_at_the_same_number_of_experts(scripts):
    """Losses that are known: a curve of BH, one seed above and one below it, against a static rule."""
    from tuning_table import make_table

    domain, document = np.repeat(["a", "b"], 6), np.tile([0, 0, 1, 1, 2, 2], 2)
    place = {"domain": domain, "sequence": np.tile(range(6), 2), "document": document, "tokens": 63}
    noise, rows, cells = np.linspace(-0.1, 0.1, 12), [], []

    def add(name, train, method, k, seed, levels, draw=np.nan):
        cells.append(
            {"name": name, "part": name[0], "train": train, "method": method, "k": k, "seed": seed,
             "tokens": 0 if train == "none" else int(name.split()[4]),
             "valid_loss": np.nan, "valid_k": np.nan, "lr": 1.0, "w": 0.5, "gate": "kept", "draw": draw}
        )  # fmt: skip
        for level, (mean_k, loss) in levels.items():
            rows.append(pd.DataFrame(place | {"rule": f"{name}|{level}", "mean_k": mean_k, "loss": loss + noise}))

    for seed, above in ((1, 0.01), (2, -0.01)):
        curve = {level: (level + 0.05, 3 - 0.1 * np.log(level + 0.05) + above) for level in (3.8, 4.0, 4.2)}
        add(f"A all BH 4 1000 s{seed}", "all", "BH", 4, seed, curve)
        add(f"A all top-4 4 1000 s{seed}", "all", "top-4", 4, seed, {4: (4.0, 2.9)})
    add("0 none top-8 8 0 s0", "none", "top-8", 8, 0, {8: (8.0, 2.8)})
    add("A all BH 4 3000 s1", "all", "BH", 4, 1, {4.0: (4.0, 2.7)})
    add("C all BH elastic 1000 s1 low", "all", "BH", "(2, 7.5)", 1, {4.0: (4.0, 2.6), 8: (8.0, 2.5)}, "low")
    table = make_table(pd.DataFrame(cells), pd.concat(rows))
    found = table[table["kind"] == "difference"]
    longer = found[found["tokens"] == 3000].set_index("versus")
    assert longer["difference"].to_dict() == {"untuned top-8": pytest.approx(-0.1)}
    elastic = found[found["k"] == "elastic"].set_index(["versus", "mean_k"])
    assert elastic.loc[("untuned top-8", 8.0), "difference"] == pytest.approx(-0.3)
    assert elastic.loc[("all weights BH", 4.0), "difference"] == pytest.approx(2.6 - 3 + 0.1 * np.log(4), abs=1e-6)
    differences = found[(found["tokens"] == 1000) & (found["k"] != "elastic")].set_index("versus")
    row = differences.loc["all weights top-4"]
    assert row["difference"] == pytest.approx(3 - 0.1 * np.log(4) - 2.9, abs=1e-6)
    assert row["low"] <= row["difference"] <= row["high"]
    assert row["high"] - row["low"] == pytest.approx(0, abs=1e-9)  # both have the same noise
    assert (row["seeds"], row["units"]) == (2, 6)
    assert row["seed_sd"] == pytest.approx(np.std([0.01, -0.01], ddof=1), abs=1e-6)
    assert differences.loc["untuned top-8", "percent"] == pytest.approx(
        100 * ((3 - 0.1 * np.log(4)) / 2.8 - 1), abs=1e-4
    )
    curves = table[table["kind"] == "curve"]
    assert list(curves["mean_k"].round(2)) == [4.05, 4.0, 8.0, 4.0, 8.0, 4.0]  # what was not trained is in it once
    assert list(curves["tokens"]) == [1000] * 5 + [3000]


def test_settings_are_chosen_by_validation_loss_alone(scripts):
    """Of each method by itself. Gates and what was not trained do not count; processes leave a file each."""
    from tuning_runs import SETTINGS, choice_cells, final_cells, settings_from

    cells = pd.DataFrame(choice_cells(1000))
    rng = np.random.default_rng(0)
    cells["valid_loss"] = rng.permutation(len(cells)) + 10.0
    best = {}
    for wanted in (("all", "BH"), ("router", "BH"), ("all", "top-4"), ("all", "top-8")):
        candidates = cells[(cells["train"] == wanted[0]) & (cells["method"] == wanted[1]) & (cells["gate"] == "kept")]
        row = candidates.index[rng.integers(len(candidates))]
        cells.loc[row, "valid_loss"] = 1.0
        best[" ".join(wanted)] = (cells.loc[row, "lr"], cells.loc[row, "w"])
    cells.loc[(cells["gate"] != "kept") | (cells["train"] == "none"), "valid_loss"] = 0.0
    halves = pd.concat([cells[::2].reset_index(drop=True), cells[1::2].reset_index(drop=True)])
    chosen = settings_from(halves)
    assert chosen == best
    final = final_cells(5000, SETTINGS | chosen)
    assert len({cell["name"] for cell in final}) == len(final)
    told = {f"{cell['train']} {cell['method']}": (cell["lr"], cell["w"]) for cell in final}
    assert {name: told[name] for name in best} == best
    assert told["all threshold"] == best["all BH"]
