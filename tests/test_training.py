"""The script that trained the demo: it runs, and resumes where it was stopped."""

import csv
import json
import lzma
import subprocess
import sys

import numpy as np
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
