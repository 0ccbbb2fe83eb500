"""``python -m bhlib figures --model``: the figures of other models than the embedded one, in folders of their own."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from models import tiny_olmoe
from torch.testing._internal.two_tensor import TwoTensor
from transformers import MixtralConfig, MixtralForCausalLM, OlmoeConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

from bhlib import load_demo, load_olmoe
from bhlib.__main__ import main
from bhlib.cells import model_key
from bhlib.figures import FIGURES, Study, predecessor
from bhlib.figures.about import DEMO, about_of
from bhlib.figures.families import rivals
from bhlib.figures.tables import read_table, to_csv
from bhlib.levels import mean_experts
from bhlib.loading import heldout_documents
from bhlib.texts import read_text

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

#: Sizes that are the same for all models here; the tokenizer is the embedded model's, with 4,096 tokens.
SIZES = {
    "hidden_size": 32, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 4096,
    "max_position_embeddings": 128, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip

MODELS = {
    "olmoe": lambda: tiny_olmoe(**SIZES, num_hidden_layers=16),
    "mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(**SIZES, num_hidden_layers=2, num_local_experts=8, num_experts_per_tok=2)
    ),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **SIZES, num_hidden_layers=2, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=16, head_dim=16,
            norm_topk_prob=True,
        )
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints of `MODELS`, each with the embedded model's tokenizer, and a text of one domain."""
    folder = tmp_path_factory.mktemp("study")
    _, tokenizer = load_demo()
    for name, make in MODELS.items():
        torch.manual_seed(0)
        model = make()
        for parameter, values in model.named_parameters():
            if parameter.endswith("gate.weight"):  # logits spread like a trained model's
                torch.nn.init.normal_(values, std=0.4)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    text = "".join(heldout_documents("validation")["novels"])
    lines = [json.dumps({"text": text[start : start + 600]}) for start in range(0, 14_400, 600)]
    (folder / "novels.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def command(folder, model, out, *options):
    """The words of the command, for a small study."""
    source = ["--model", str(folder / model), "--text", str(folder / "novels.jsonl"), "--folder", str(out)]
    return ["figures", *source, "--sequences", "4", "--length", "32", *options]


def only(*names):
    return [word for name in names for word in ("--only", name)]


@pytest.fixture(scope="module")
def mixtral(folder):
    """The folder of a study from start to end: 8 experts, top 2, two layers."""
    out = folder / "mixtral figures"
    main(command(folder, "mixtral", out))
    return out


# -- the whole command -------------------------------------------------------------------------------------------------


def test_every_figure_is_drawn_or_says_why_not(mixtral):
    entries = json.loads((mixtral / "study.json").read_text(encoding="utf-8"))["figures"]
    wanted = {name for name, spec in FIGURES.items() if spec.of_model and spec.is_computed(named=False)}
    assert entries.keys() == wanted
    assert {name for name in wanted if "table" not in entries[name]} == {"renormalization"}
    assert "between 1 and 2 there is none" in entries["renormalization"]["refused"]
    for name in wanted - {"renormalization"}:
        assert (mixtral / f"{name}.png").stat().st_size > 5_000 and (mixtral / f"{name}.csv").exists()
        assert entries[name]["minutes"] > 0 and entries[name]["peak_gib"] > 0
    rules = read_table(mixtral / "loss_vs_experts.csv")
    assert rules["mean_k"].max() == 2 and {"top-1", "top-2", "BH, fitted null, k = 1.5"} <= set(rules["rule"])
    assert {"BH, layer weights", "static per layer", "entropy", "min-p"} <= set(rules["family"])
    assert read_table(mixtral / "token_layer_map.csv")["count"].between(1, 2).all()


def test_the_page_shows_all_of_it(mixtral):
    page = (mixtral / "index.html").read_text(encoding="utf-8")
    assert "mixtral (mixtral): 2 MoE layers of 8 experts, top-2; novels.jsonl" in page
    assert page.count("<img ") == len(list(mixtral.glob("*.png"))) == len(list(mixtral.glob("*.csv")))
    assert "no meaning for this model: static top-2 and BH are compared at whole numbers" in page
    assert "not of a model" in page and "--only whole_test_split" in page
    assert torch.__version__ in page and "peak memory, GiB" in page and "An earlier study" not in page


def test_pictures_say_which_model_they_are_of(mixtral):
    draw = FIGURES["experts_vs_alpha"].draw
    table = read_table(mixtral / "experts_vs_alpha.csv")
    assert about_of(table) == DEMO  # a table alone is the embedded model's
    (line,) = [line for line in draw(table).axes[0].lines if "own" in str(line.get_label())]
    assert line.get_label() == "the model's own top-8" and line.get_ydata()[0] == 8
    mine = Study(model=MODELS["mixtral"](), tokenizer=load_demo()[1], length=32).about.put_on(table)
    (line,) = [line for line in draw(mine).axes[0].lines if "own" in str(line.get_label())]
    assert line.get_label() == "the model's own top-2" and line.get_ydata()[0] == 2


def test_sixteen_layers_in_the_layout_of_the_hub(folder):
    """One matrix per expert in the checkpoint; figures that need no settings, since those take 369 passes."""
    names = ["count_distribution", "experts_per_layer", "expert_load", "token_layer_map"]
    out = folder / "olmoe figures"
    main(command(folder, "olmoe", out, *only(*names)))
    layers = read_table(out / "experts_per_layer.csv")["layer"]
    assert sorted(layers.unique()) == list(range(16))
    load = read_table(out / "expert_load.csv")
    assert load["rank"].max() == 64 and set(load["rule"]) == {"top-8", "BH 0.05"}
    assert load.loc[load["kind"] == "pair", "layer"].eq(8).all()
    page = (out / "index.html").read_text(encoding="utf-8")
    computed = [spec for spec in FIGURES.values() if spec.of_model and spec.is_computed(named=False)]
    assert "16 MoE layers of 64 experts, top-8" in page
    assert page.count("not computed yet") == len(computed) - len(names)


def test_128_experts(folder):
    out = folder / "qwen figures"
    main(command(folder, "qwen3_moe", out, *only("softmax_theorem", "statistic_matters", "renormalization")))
    assert len(read_table(out / "softmax_theorem.csv")) == 128
    statistics = read_table(out / "statistic_matters.csv")
    assert set(statistics["wanted_k"]) <= {4, 5, 6} and "Dirichlet" in set(statistics["pvalues"])
    weights = read_table(out / "renormalization.csv")
    assert sorted(weights["k"].unique()) == [3, 4, 5, 6]
    # This model divides by the sum of its own top itself: static top-k has that sum with fewer experts, BH has not.
    change = weights[weights["weights"] == "sum 1"].set_index("rule")["difference"].abs()
    assert change["top"].max() < 1e-6 < change["BH"].min()


# -- folders -----------------------------------------------------------------------------------------------------------


def test_a_finished_study_is_not_computed_again(mixtral, capsys):
    before = {path: path.stat().st_mtime_ns for path in mixtral.glob("*.[cp]*")}
    main(["figures", "--folder", str(mixtral)])  # the folder knows the model, the text and the sizes
    assert {path: path.stat().st_mtime_ns for path in mixtral.glob("*.[cp]*")} == before
    assert capsys.readouterr().out.strip() == str(mixtral / "index.html")  # no figure is announced


def test_redraw_and_check_of_a_study(mixtral, capsys):
    for path in mixtral.glob("count_distribution.p*"):
        path.unlink()
    main(["figures", "--folder", str(mixtral), "--redraw", *only("count_distribution")])
    assert (mixtral / "count_distribution.png").exists()
    main(["figures", "--folder", str(mixtral), "--check", *only("count_distribution")])
    assert "every number is as it was" in capsys.readouterr().out


def test_settings_are_read_again_if_they_are_of_this_study(folder, mixtral, tmp_path):
    model, tokenizer = load_olmoe(str(folder / "mixtral"), device_map=None)
    options = {"model": model, "tokenizer": tokenizer, "text": read_text(folder / "novels.jsonl", tokenizer)}
    study = Study(**options, sequences=4, length=32, folder=tmp_path)
    stored = json.loads((mixtral / "settings.json").read_text(encoding="utf-8"))
    assert stored["of"] == study.identity and stored["settings"].keys() == {"layer_weights", "static_per_layer"}
    stored["settings"]["static_per_layer"] = {"1.5": [2, 1]}
    (tmp_path / "settings.json").write_text(json.dumps(stored), encoding="utf-8")
    assert study.settings["static_per_layer"] == {"1.5": [2, 1]}
    other = Study(**options, sequences=4, length=16, folder=tmp_path)
    assert other.settings["static_per_layer"].keys() == {"1.25", "1.5", "1.75"}
    assert json.loads((tmp_path / "settings.json").read_text(encoding="utf-8"))["of"] == other.identity


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "olmoe"], "another model: it holds mixtral .* top-2; .* this one would be olmoe .* Name another"),
        (["--length", "64"], "another length: it holds .* sequences of 32 .* 4 sequences of 64 tokens per domain"),
    ],
)
def test_two_studies_do_not_share_a_folder(folder, mixtral, options, message):
    options = [str(folder / word) if word in MODELS else word for word in options]
    before = (mixtral / "study.json").read_bytes()
    with pytest.raises(SystemExit, match=f"mixtral figures' is the folder of another study, with {message}"):
        main(["figures", "--folder", str(mixtral), *options])
    assert (mixtral / "study.json").read_bytes() == before


def test_the_embedded_models_figures_are_not_overwritten(folder, tmp_path):
    main(["figures", "--folder", str(tmp_path), *only("stepup_1995")])
    with pytest.raises(SystemExit, match=r"holds tables that no study has made \(stepup_1995.csv\).*another folder"):
        main(command(folder, "mixtral", tmp_path))
    with pytest.raises(SystemExit, match="stepup_1995: of no model"):
        main(command(folder, "mixtral", tmp_path / "out", *only("stepup_1995")))
    with pytest.raises(SystemExit, match="--length: name the model as well, --model demo for the embedded one"):
        main(["figures", "--folder", str(tmp_path), "--length", "64"])


def test_what_is_too_long_or_too_short_is_said_before_computing(folder, tmp_path):
    with pytest.raises(SystemExit, match="length must be at most 128, the longest text that this model reads; got 256"):
        main([*command(folder, "mixtral", tmp_path), "--length", "256"])
    (tmp_path / "short.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n{"text": "c"}\n', encoding="utf-8")
    with pytest.raises(SystemExit, match="fewer than one sequence"):
        main([*command(folder, "mixtral", tmp_path / "out"), "--text", str(tmp_path / "short.jsonl")])
    assert not (tmp_path / "out").exists()


def test_killed_and_resumed_by_two_processes(folder, mixtral, tmp_path):
    """SIGKILL while settings are chosen; the tables are those of the study that nothing disturbed."""
    out = tmp_path / "out"
    words = ["-m", "bhlib", *command(folder, "mixtral", out, *only("loss_vs_experts", "experts_vs_alpha"))]
    with subprocess.Popen([sys.executable, *words], env=ENVIRONMENT, stderr=subprocess.DEVNULL) as process:
        stop = time.monotonic() + 200
        while len(list(out.glob("cells/*.csv"))) < 5 and time.monotonic() < stop:
            time.sleep(0.01)
        process.kill()
    finished = {path: path.stat().st_mtime_ns for path in out.glob("cells/*.csv")}
    assert len(finished) >= 5 and not (out / "settings.json").exists()
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *words]
    ended = subprocess.run(launch, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("index.html") == 1  # one process speaks for all
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert (out / "settings.json").read_bytes() == (mixtral / "settings.json").read_bytes()
    for name in ("loss_vs_experts", "experts_vs_alpha"):
        tables = (read_table(place / f"{name}.csv") for place in (out, mixtral))
        pd.testing.assert_frame_equal(*(table.drop(columns="seconds", errors="ignore") for table in tables))


# -- the parts ---------------------------------------------------------------------------------------------------------


def test_the_embedded_models_sizes_are_as_pictures_say():
    study = Study()
    assert (study.num_layers, study.num_experts, study.top_k) == (DEMO.layers, DEMO.experts, DEMO.top_k)
    assert study.mean_ks == (3, 4, 5, 6, 7) and study.half == 4


@pytest.mark.parametrize(
    ("top_k", "mean_ks", "half"),
    [(2, (1.25, 1.5, 1.75), 1.5), (3, (1.5, 2, 2.5), 1.5), (4, (1.5, 2, 2.5, 3, 3.5), 2), (6, (2, 3, 4, 5), 3)],
)
def test_numbers_of_experts_follow_from_top_k(top_k, mean_ks, half):
    study = Study(model=tiny_olmoe(num_experts=16, num_experts_per_tok=top_k), length=32)
    assert study.mean_ks == mean_ks and study.half == half
    logits = 1.5 * torch.randn(3, 400, 16, generator=torch.Generator().manual_seed(0))
    rule = rivals(study)["min-p"](logits, mean_ks[0])
    assert rule.max_k == top_k and mean_experts(rule, logits) == pytest.approx(mean_ks[0], abs=0.02)


def test_a_model_with_one_expert_per_token_has_nothing_to_save():
    with pytest.raises(ValueError, match="gives a token one expert, so no rule can give it fewer"):
        Study(model=tiny_olmoe(num_experts_per_tok=1), length=32)


def test_logits_are_bounded_in_memory():
    study = Study(model=tiny_olmoe(num_hidden_layers=2), length=32)
    text = {"a": torch.zeros(6, 5000, dtype=torch.int64), "b": torch.ones(3, 5000, dtype=torch.int64)}
    assert {domain: len(ids) for domain, ids in study.bounded(text).items()} == {"a": 6, "b": 3}
    longer = {domain: ids.repeat(1, 100) for domain, ids in text.items()}  # 2.15 GiB of logits
    assert {domain: len(ids) for domain, ids in study.bounded(longer).items()} == {"a": 2, "b": 1}


def test_a_quantized_weight_is_told_by_what_it_has_inside():
    """As torchao keeps it: a tensor that consists of others."""
    keys = []
    for scale in (1.0, 2.0):
        model = tiny_olmoe()
        down = model.model.layers[0].mlp.experts.down_proj.detach()
        packed = TwoTensor(down, torch.full_like(down, scale))
        model.model.layers[0].mlp.experts.down_proj = torch.nn.Parameter(packed, requires_grad=False)
        keys.append(model_key(model))
    assert keys[0] != keys[1] != model_key(tiny_olmoe())


def test_tokens_that_break_lines_stay_in_their_cell(tmp_path):
    table = pd.DataFrame({"token": ["\r", "\n", "a,\r\n", '"'], "experts": [1, 2, 3, 4]})
    (tmp_path / "x.csv").write_text(to_csv(table), encoding="utf-8", newline="\n")
    pd.testing.assert_frame_equal(read_table(tmp_path / "x.csv"), table)


def test_the_predecessors_numbers_stand_beside_ours():
    assert predecessor.has_shape_of_olmoe(OlmoeConfig())
    assert not predecessor.has_shape_of_olmoe(OlmoeConfig(hidden_size=1024))
    table = predecessor.beside({8: 10.0, 16: 11.0, 32: 12.0, 64: 13.0}, "lambada (test)").set_index(["text", "k"])
    assert table.loc[("LAMBADA", 16), ["earlier", "ours"]].tolist() == [24.89, 11.0]
    assert table.loc[("WikiText", 64), "earlier"] == 52.48 and table.loc["WikiText"]["ours"].isna().all()
    study = Study(model=tiny_olmoe(vocab_size=4096), tokenizer=load_demo()[1], sequences=1, length=16)
    measured = predecessor.perplexities(study)
    assert list(measured) == [8, 16, 32, 64] and np.isfinite(list(measured.values())).all()
    assert predecessor.compare_with_predecessor(study) is None
