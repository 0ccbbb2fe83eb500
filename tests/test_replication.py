"""The same measurements on another model: a tiny one goes through all of them, and its tables are gathered."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

from bhlib.loading import DEMO
from bhlib.replication.evaluate import evaluate_model
from bhlib.replication.gather import gather
from bhlib.replication.mixed import who_gets_many
from bhlib.replication.models import REPLICATES
from bhlib.replication.subject import Subject


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of 16 experts, top 4, as the script saves it, with two snapshots of its routers, the last its own."""
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=4096, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_experts=16, num_experts_per_tok=4, max_position_embeddings=1024, pad_token_id=0, eos_token_id=0,
        bos_token_id=0,
    )  # fmt: skip
    model, folder = OlmoeForCausalLM(config), tmp_path_factory.mktemp("model")
    for layer in model.model.layers:
        layer.mlp.gate.weight.data *= 15  # a router that has something to say
    model.save_pretrained(folder)
    (folder / "snapshots").mkdir()
    rng = np.random.default_rng(0)
    for step in (10, 20):
        logits = 3 * rng.normal(size=(2, 9 * 64, 16)).astype(np.float16)
        np.save(folder / "snapshots" / f"{step}.npy", logits)
    return folder


@pytest.fixture(scope="module")
def tables(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    made = evaluate_model("seed2", folder, out, sequences=3, length=64)
    assert made == ["rules", "defaults", "measures", "saturation", "specialization", "who", "tuner"]
    return out


@pytest.mark.parametrize("normalizes", [True, False])
def test_of_a_model_that_divides_by_the_sum_families_say_whether_that_of_what_is_kept(folder, tmp_path, normalizes):
    model = OlmoeForCausalLM.from_pretrained(folder)
    model.config.norm_topk_prob = normalizes
    model.save_pretrained(tmp_path)
    subject = Subject(tmp_path, sequences=1, length=64)
    assert subject.normalizes == normalizes and ("BH, shares of the top" in subject.families) == normalizes
    recomputed = {"weights": "normalized"} if normalizes else {}
    for name in subject.families:
        plain = "compensated" not in name and "shares" not in name
        assert subject.weights_of(name) == (recomputed if plain else {}), name
    assert subject.family("threshold")[1] == recomputed and subject.family("threshold, shares of the top")[1] == {}


def read(tables, what):
    return pd.read_csv(tables / "seed2" / f"{what}.csv")


def test_rules_are_compared_at_equal_cost(tables):
    table = read(tables, "rules")
    compared = table[table["against"] == "static top-k"]
    assert {"BH", "threshold", "threshold, norms", "BH, fitted null"} <= set(compared["family"])
    assert np.allclose(compared["cost"], compared["wanted"], atol=0.25)
    assert (compared["se"] > 0).all() and (compared["low"] < compared["high"]).all()
    assert "threshold" not in set(table.loc[table["against"] == "threshold", "family"])


def test_saturation_ends_at_1_and_begins_at_chance(tables):
    table = read(tables, "saturation")
    last = table[table["step"] == 20]
    assert last["saturation"].eq(1).all() and set(table["rule"]) >= {"top-4"}
    first = table[(table["step"] == 10) & (table["rule"] == "top-4")]
    assert first["saturation"].mean() == pytest.approx(0.25, abs=0.02) and first["chance"].eq(0.25).all()


def test_what_is_there_is_not_made_again(folder, tables):
    assert evaluate_model("seed2", folder, tables, sequences=3, length=64) == []


def test_an_unknown_replicate_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"no replicate is called 'seed9'; there are: demo, seed2"):
        evaluate_model("seed9", folder, tmp_path)


def test_an_unknown_table_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"no table is called 'rule'; there are: rules, defaults"):
        evaluate_model("seed2", folder, tmp_path, tables=["rule"])


def test_tables_are_gathered(tables, tmp_path):
    metrics = json.loads((DEMO / "metrics.json").read_text(encoding="utf-8"))
    metrics["arguments"] |= {"seed": 2}
    (tables / "seed2" / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    written = gather(tables, tmp_path)
    assert {
        "replicates",
        "generalization",
        "defaults_again",
        "beyond_loss",
        "who_gets_many",
        "router_saturation",
    } <= set(written)
    models = pd.read_csv(tmp_path / "replicates.csv")
    assert models["model"].tolist() == ["seed 2"] and models["tokens"].tolist() == [364249088]
    assert "--seed 2 --steps 5558" in models["command"][0]
    assert pd.read_csv(tmp_path / "router_saturation.csv")["domains"].eq(9).all()
    rules = pd.read_csv(tmp_path / "generalization.csv")
    assert rules["parameters"].eq(models["parameters"][0]).all() and len(rules) == len(read(tables, "rules"))


def test_who_gets_many_finds_what_was_put_in():
    """Digits get one expert more than words, late places a quarter less; documents differ by chance."""
    rng, rows = np.random.default_rng(0), []
    for document in range(40):
        domain, shift = ("a", "b")[document % 2], rng.normal(scale=0.3)
        for kind, more in (("word", 0.0), ("digit", 1.0)):
            for position in range(8):
                tokens = 40 if kind == "word" else 10
                mean = 4 + more + shift - 0.25 * (position >= 4) + rng.normal(scale=0.5 / tokens**0.5)
                rows.append(("m", "r", domain, document, kind, position, mean * tokens, tokens))
    columns = ["model", "rule", "domain", "document", "kind", "position", "experts", "tokens"]
    table = who_gets_many(pd.DataFrame(rows, columns=columns)).set_index(["factor", "value"])
    effect = table["effect"]
    assert effect["kind", "digit"] - effect["kind", "word"] == pytest.approx(1, abs=0.1)
    assert effect["position", 0] - effect["position", 7] == pytest.approx(0.25, abs=0.12)
    assert (table.loc["kind", "effect"] * table.loc["kind", "tokens"]).sum() == pytest.approx(0, abs=1e-6)
    assert table["low"]["domain", "a"] < 0 < table["high"]["domain", "a"]
    assert table["high"]["kind", "digit"] - table["low"]["kind", "digit"] < 0.2


def test_commands_name_options_that_the_script_has():
    script = (DEMO / "train.py").read_text(encoding="utf-8")
    for name, replicate in REPLICATES.items():
        options = [part for part in replicate.command(name).split() if part.startswith("--")]
        assert all(f'"{option}"' in script for option in options), name
    assert len({replicate.label for replicate in REPLICATES.values()}) == len(REPLICATES)
