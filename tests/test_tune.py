"""Training for a rule: what is held, what is changed, what is kept, and how it is taken back."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from models import state_of, tiny_olmoe, tokens
from safetensors.torch import save_file

from bhlib import RoutingPatch, load_demo, load_heldout, sorted_pairs
from bhlib.__main__ import main
from bhlib.evaluation import evaluate
from bhlib.pvalues import TokenGaussian
from bhlib.rules import BH, StaticPerLayer, Threshold, TopK, TopP
from bhlib.training import LevelController, Tuned, load_tuned, settle, tune
from bhlib.training.loop import LEVEL_TOKENS, Plan, Training, losses
from bhlib.training.tuned import facts_of, rule_of
from bhlib.training.weights import training_of

ROOT = Path(__file__).resolve().parent.parent
TEXT = tokens(24, 16)
SMALL = {"tokens": 6 * 4 * 16, "batch_size": 4, "learning_rate": 3e-3, "progress": False}


def weights_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# -- the number of experts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rule", "mean_k"), [(BH(), 4.0), (Threshold(), 3.0), (TopP(), 5.0)])
def test_the_controller_finds_its_way_back(rule, mean_k):
    """From a level for twice as many logits it comes back by what it sees, whichever way the level counts."""
    model = tiny_olmoe()
    text = {"text": TEXT}
    controller = LevelController.on(model, rule, [mean_k], text)
    controller.log_odds += np.sign(controller.slopes) * 1.0
    with RoutingPatch(model, rule) as patch:
        for _ in range(12):
            patch.rule = rule.at(controller.levels[0])
            patch.reset_stats()
            with torch.no_grad():
                model(input_ids=TEXT)
            seen = patch.get_routing_stats()["mean_experts_per_token"]
            controller.update([seen], rate=0.5)
    assert seen == pytest.approx(mean_k, abs=0.05)


def test_a_level_that_was_not_used_stays():
    controller = LevelController.on(tiny_olmoe(), BH(), [3.0, 5.0], {"text": TEXT})
    before = controller.levels
    controller.update([math.nan, 4.0])
    assert controller.levels[0] == before[0]
    assert controller.levels[1] > before[1]


def test_settled_levels_are_those_of_the_patched_model():
    model, text = tiny_olmoe(), {"text": TEXT}
    controller = LevelController.on(model, Threshold(), [3.0, 5.0], text)
    with RoutingPatch(model, Threshold(), collect_stats=False) as patch:
        settle(patch, controller, text, passes=4)
        assert patch.level == controller.levels[0]
    for mean_k, level in zip((3.0, 5.0), controller.levels, strict=True):
        assert evaluate(model, text, Threshold(level))["mean_k"].mean() == pytest.approx(mean_k, rel=0.01)


@pytest.mark.parametrize("mean_k", [0.5, 9.0])
def test_a_mean_out_of_reach(mean_k):
    model = tiny_olmoe()
    state, before = state_of(model), weights_of(model)
    with pytest.raises(ValueError, match=rf"no level gives {mean_k} experts on average: these rules give from 1\."):
        tune(model, TEXT, mean_k=mean_k, **SMALL)
    assert state_of(model) == state
    assert same(weights_of(model), before)


# -- a training ------------------------------------------------------------------------------------------------


def test_routers_alone():
    model = tiny_olmoe()
    state, before = state_of(model), weights_of(model)
    tuned = tune(model, TEXT, mean_k=4.0, train="router", **SMALL)
    assert tuned.weights.keys() == {f"model.layers.{i}.mlp.gate.weight" for i in range(3)}
    assert not any(torch.equal(value, before[name]) for name, value in tuned.weights.items())
    assert state_of(model) == state
    assert same(weights_of(model), before)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    with tuned.in_place(model):
        changed = {name for name, value in weights_of(model).items() if not torch.equal(value, before[name])}
    assert changed == tuned.weights.keys()


def test_the_mean_is_held_while_weights_change():
    tuned = tune(tiny_olmoe(), TEXT, mean_k=4.0, train="all", distillation=0.0, **SMALL | {"tokens": 30 * 64})
    history = tuned.history
    assert list(history["step"]) == list(range(1, 31))
    assert history["mean_k"].tail(10).mean() == pytest.approx(4.0, abs=0.1)
    assert history["cross_entropy"].iloc[-1] < history["cross_entropy"].iloc[0] - 0.1


def test_training_helps_on_the_text_that_it_reads():
    """The model's own weights lose more under the rule than the trained ones, at the same number of experts."""
    model, text = tiny_olmoe(), {"text": TEXT}
    tuned = tune(model, TEXT, mean_k=3.0, train="router", distillation=1.0, **SMALL | {"tokens": 40 * 64})
    controller = LevelController.on(model, BH(), [3.0], text)
    with RoutingPatch(model, BH(), collect_stats=False) as patch:
        settle(patch, controller, text)
    before = evaluate(model, text, BH(controller.levels[0]), agreement=True)
    with tuned.routing(model, max_recorded_tokens=None) as patch:
        logits = model(input_ids=TEXT).logits
        seen = patch.get_routing_stats()["mean_experts_per_token"]
    own = model(input_ids=TEXT).logits
    assert seen == pytest.approx(3.0, abs=0.1)
    assert losses(logits, own, TEXT)[1].item() < before["kl"].mean()


@pytest.mark.parametrize("distillation", [0.0, 0.5, 1.0])
def test_the_loss_is_what_it_says(distillation):
    tuned = tune(tiny_olmoe(), TEXT, distillation=distillation, **SMALL)
    first = tuned.history.iloc[0]
    if distillation:
        mixed = (1 - distillation) * first["cross_entropy"] + distillation * first["divergence"]
        assert first["loss"] == pytest.approx(mixed, rel=1e-5)
    else:
        assert first["loss"] == first["cross_entropy"]
        assert math.isnan(first["divergence"])


def test_the_teacher_is_the_model_itself():
    """Under its own routing and before any step, the divergence is nothing at all."""
    tuned = tune(tiny_olmoe(), TEXT, TopK(8), distillation=1.0, **SMALL)
    assert tuned.history["divergence"].iloc[0] == 0
    assert tuned.levels == {}
    assert tuned.rule == TopK(8)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("train", ["router", "all"])
def test_on_a_gpu_steps_go_by_sorted_pairs(train, training, monkeypatch):
    """Once in each layer at each step: what the teacher says, and what levels are settled on, is the model's own."""
    model, calls = tiny_olmoe().train(training), []
    expected = tune(model, TEXT, train=train, distillation=0.5, **SMALL)
    forward = sorted_pairs.sorted_forward
    monkeypatch.setattr(sorted_pairs, "sorted_forward", lambda *inputs: calls.append(0) or forward(*inputs))
    monkeypatch.setattr(sorted_pairs, "DEVICES", ("cpu",))
    got = tune(model, TEXT, train=train, distillation=0.5, **SMALL)
    assert len(calls) == 3 * len(got.history)
    calls.clear()
    own_k = tune(model, TEXT, TopK(8), train=train, distillation=1.0, **SMALL)
    assert own_k.history["divergence"].iloc[0] == 0 and calls == []
    np.testing.assert_allclose(got.history, expected.history, rtol=1e-3, atol=1e-6)


def test_an_elastic_model_has_a_level_for_each_mean():
    tuned = tune(tiny_olmoe(), TEXT, mean_k=(2.0, 5.0), **SMALL)
    assert list(tuned.levels) == [2.0, 3.0, 4.0, 5.0]
    assert sorted(tuned.levels.values()) == list(tuned.levels.values())
    between = tuned.rule_at(3.5).level
    assert tuned.levels[3.0] < between < tuned.levels[4.0]
    with pytest.raises(ValueError, match="mean_k is 7, but these weights were trained for 2 to 5"):
        tuned.rule_at(7.0)


def test_an_elastic_model_draws_few_experts_more_often(monkeypatch):
    """With chances as one over the mean. A script has the even draws, which that was chosen over."""
    from bhlib.loading import DEMO

    monkeypatch.syspath_prepend(str(DEMO))
    from tuning_runs import drawn

    state = SimpleNamespace(plan=Plan(mean_k=(2.0, 7.5)), state=SimpleNamespace(process_index=0))
    for how, chances in (("low", 1 / np.array(state.plan.mean_ks)), ("even", np.ones(7))):
        with drawn(how):
            seen = np.bincount(Training.targets(state, 3, 20_000), minlength=7) / 20_000
        np.testing.assert_allclose(seen, chances / chances.sum(), atol=4 * np.sqrt(0.25 / 20_000))


def test_half_precision_is_trained_in_float32():
    """Steps too small for bfloat16 add up."""
    model = tiny_olmoe().to(torch.bfloat16)
    tuned = tune(model, TEXT, **SMALL | {"learning_rate": 1e-4, "tokens": 20 * 64})
    own = dict(model.named_parameters())
    assert all(value.dtype == torch.bfloat16 for value in tuned.weights.values())
    assert all(not torch.equal(value, own[name]) for name, value in tuned.weights.items())


def test_adapters_on_the_attention():
    pytest.importorskip("peft")
    model = tiny_olmoe()
    names, before = [name for name, _ in model.named_modules()], weights_of(model)
    tuned = tune(model, TEXT, train="lora", **SMALL)
    assert names == [name for name, _ in model.named_modules()]
    assert same(weights_of(model), before)
    kinds = {name.partition("layers.0.")[2] for name in tuned.weights if "layers.0." in name}
    adapted = {f"self_attn.{p}_proj.weight:{f}" for p in "qkvo" for f in ("down", "up")}
    assert kinds == {"mlp.gate.weight"} | adapted
    with tuned.in_place(model):
        changed = {name for name, value in weights_of(model).items() if not torch.equal(value, before[name])}
    assert changed == {name.partition(":")[0] for name in tuned.weights}


def test_adapters_mean_the_same_once_they_are_written():
    """The logits that a step sees are those of the file's factors."""
    pytest.importorskip("peft")
    from bhlib.training.weights import changes_of

    model, ids = tiny_olmoe(), TEXT[:2]
    with training_of(model, "lora") as trained, torch.no_grad():
        for master in trained.masters:
            master.add_(torch.randn(master.shape) * 0.01)
        trained.follow()
        trained.put()
        wanted = model(input_ids=ids).logits
        changes = changes_of(trained.values())
    plain = model(input_ids=ids).logits
    fresh = tune(model, TEXT, **SMALL)
    tuned = Tuned(changes, BH(), {}, fresh.model_name, fresh.fingerprint)
    with tuned.in_place(model):
        torch.testing.assert_close(model(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain, wanted, atol=1e-3)


# -- a stop in the middle --------------------------------------------------------------------------------------


class Stop(Exception):
    """Somebody pulls the plug."""


@pytest.mark.parametrize("mean_k", [4.0, (2.0, 5.0)])
def test_a_stopped_training_goes_on_to_the_same_weights(tmp_path, mean_k):
    plan = SMALL | {"mean_k": mean_k, "train": "all"}
    model = tiny_olmoe()
    whole = tune(model, TEXT, **plan)
    before, calls = weights_of(model), []

    def pull(module, args, kwargs):
        calls.append(None)
        if len(calls) == 8:  # in the fourth step, between the model's own pass and the trained one
            raise Stop

    hook = model.model.layers[-1].register_forward_pre_hook(pull, with_kwargs=True)
    state = tmp_path / "state.pt"
    with pytest.raises(Stop):
        tune(model, TEXT, checkpoint=state, save_every=1, **plan)
    hook.remove()
    assert same(weights_of(model), before)
    assert state.exists()
    parts = tune(model, TEXT, checkpoint=state, save_every=1, **plan)
    assert same(parts.weights, whole.weights)
    assert parts.levels == whole.levels
    assert parts.history.equals(whole.history)
    again = tune(model, TEXT, checkpoint=state, **plan)  # it is finished: nothing is left to do
    assert same(again.weights, whole.weights)


def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    model, state = tiny_olmoe(), tmp_path / "state.pt"
    tune(model, TEXT, checkpoint=state, **SMALL)
    with pytest.raises(ValueError, match=r"state.pt is of another training: its seed is 0, not 1\. Go on with"):
        tune(model, TEXT, checkpoint=state, seed=1, **SMALL)
    with pytest.raises(ValueError, match="is of another training: its model is"):
        tune(tiny_olmoe(1), TEXT, checkpoint=state, **SMALL)
    with pytest.raises(ValueError, match="is of another training: its text is"):
        tune(model, TEXT[:-4], checkpoint=state, **SMALL)


def test_what_is_drawn_depends_on_the_seed_and_the_step_alone():
    first, second = (tune(tiny_olmoe(), TEXT, seed=3, **SMALL) for _ in range(2))
    other = tune(tiny_olmoe(), TEXT, seed=4, **SMALL)
    assert same(first.weights, second.weights)
    assert not same(first.weights, other.weights)


# -- the file --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned():
    return tune(tiny_olmoe(), TEXT, mean_k=(3.0, 5.0), **SMALL)


def test_what_is_written_is_read(tuned, tmp_path):
    path = tmp_path / "tuned.safetensors"
    tuned.save(path)
    assert path.stat().st_size < 1.2 * 3 * 64 * 64 * 4 + 2000
    read = load_tuned(path)
    assert same(read.weights, tuned.weights)
    assert (read.levels, read.model_name, read.fingerprint) == (tuned.levels, tuned.model_name, tuned.fingerprint)
    assert repr(read) == repr(tuned)
    model = tiny_olmoe()
    with torch.no_grad():
        with tuned.routing(model):
            wanted = model(input_ids=TEXT[:2]).logits
        with read.routing(model):
            assert torch.equal(model(input_ids=TEXT[:2]).logits, wanted)


def test_the_patch_brings_the_weights_and_takes_them_along(tuned):
    model = tiny_olmoe()
    state, before = state_of(model), weights_of(model)
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    with tuned.routing(model, 4.0) as patch:
        assert patch.rule.level == tuned.levels[4.0]
        assert not same(weights_of(model), before)
        with pytest.raises(RuntimeError, match="is patched already"):
            patch.patch_model()
        assert not same(weights_of(model), before)
    assert same(weights_of(model), before)
    assert [parameter.data_ptr() for parameter in model.parameters()] == pointers
    assert state_of(model) == state
    with RoutingPatch(model, BH()):
        with pytest.raises(RuntimeError, match="is patched already"):
            tuned.routing(model).patch_model()
        assert same(weights_of(model), before)
    with pytest.raises(Stop), tuned.in_place(model):
        raise Stop
    assert same(weights_of(model), before)


def test_another_model_is_refused(tuned):
    other = tiny_olmoe(1)
    with pytest.raises(ValueError, match=r"were trained on 'OlmoeForCausalLM' \(3 routers, .* but the model is 'Olmoe"):
        tuned.routing(other)
    demo = load_demo()[0]
    with pytest.raises(ValueError, match="but the model is 'demo'"), tuned.in_place(demo):
        pass
    model = tiny_olmoe()
    with tuned.in_place(model), pytest.raises(ValueError, match="take a tuned model's weights out of it first"):
        tuned.routing(model)


def test_the_same_model_in_half_precision_is_not_refused(tuned):
    with tuned.routing(tiny_olmoe().to(torch.bfloat16)) as patch, torch.no_grad():
        assert patch.model(input_ids=TEXT[:1]).logits.isfinite().all()


def test_files_that_hold_nothing_of_the_kind(tuned, tmp_path):
    path = tmp_path / "file"
    with pytest.raises(OSError, match="file"):
        load_tuned(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        load_tuned(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="holds no tuned weights of format 1"):
        load_tuned(path)
    broken = Tuned(
        {name: value / 0 for name, value in tuned.weights.items()}, tuned.rule, tuned.levels, tuned.model_name,
        tuned.fingerprint,
    )  # fmt: skip
    broken.save(path)
    with pytest.raises(ValueError, match="is damaged: model.layers.0.mlp.gate.weight is not finite"):
        load_tuned(path)


@pytest.mark.parametrize(
    "rule",
    [BH(0.02, TokenGaussian(exclude_top=8), "by", (1.0, 2.0, 0.5)), Threshold(0.06, min_k=2), TopK(4),
     StaticPerLayer((3, 4, 5))],
)  # fmt: skip
def test_a_rule_in_words(rule):
    assert repr(rule_of(json.loads(json.dumps(facts_of(rule))))) == repr(rule)


def test_a_null_that_was_fitted_cannot_be_written(tmp_path):
    from bhlib import calibrate

    null = calibrate(tiny_olmoe(), TEXT, null="conformal", max_values=200, progress=False)
    with pytest.raises(ValueError, match=r"ConformalNull has a file of its own .* pvalues='dirichlet'"):
        tune(tiny_olmoe(), TEXT, BH(0.05, null), **SMALL)


# -- bad input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": "head"}, r"train must be one of \('router', 'lora', 'all'\), got 'head'"),
        ({"distillation": 1.5}, r"distillation must lie in \[0, 1\], got 1.5"),
        ({"tokens": 0}, "tokens must be 1 or more, got 0"),
        ({"batch_size": 0}, "batch_size must be 1 or more, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0, got 0.0"),
        ({"mean_k": (5.0, 2.0)}, r"mean_k must rise from the first number to the second, got \(5.0, 2.0\)"),
    ],
)
def test_plans_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tune(tiny_olmoe(), TEXT, **SMALL | options)


def test_texts_that_are_refused():
    model = tiny_olmoe()
    with pytest.raises(ValueError, match="token_ids holds no token"):
        tune(model, TEXT[:0], **SMALL)
    with pytest.raises(ValueError, match="sequences of one token, which have no next one"):
        tune(model, TEXT[:, :1], **SMALL)
    with RoutingPatch(model, BH()), pytest.raises(RuntimeError, match="patched"):
        tune(model, TEXT, **SMALL)


def test_a_text_smaller_than_a_batch_is_read_again():
    tuned = tune(tiny_olmoe(), TEXT[:3], **SMALL)
    assert len(tuned.history) == 8  # 384 tokens, 48 at a time
    assert LEVEL_TOKENS > TEXT[:3].numel()


# -- the command -----------------------------------------------------------------------------------------------


def test_the_command_trains_the_demo(tmp_path, capsys):
    out = tmp_path / "tuned.safetensors"
    small = ["--tokens", "512", "--length", "64", "--batch-size", "4"]
    main(["tune", "--model", "demo", "--mean-k", "4", "--train", "router", "--out", str(out), *small])
    said = capsys.readouterr().out
    assert "the model itself" in said and "4 experts, before" in said and "4 experts, after" in said
    model, _ = load_demo()
    read = load_tuned(out)
    with read.routing(model) as patch, torch.no_grad():
        model(input_ids=torch.cat([part[:1] for part in load_heldout("validation", 64, 1).values()]))
        assert patch.get_routing_stats()["mean_experts_per_token"] == pytest.approx(4.0, abs=0.3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mean-k", "9"], "no level gives 9.0 experts on average: these rules give from"),
        (["--distillation", "2"], r"distillation must lie in \[0, 1\], got 2.0"),
        (["--out", "/nowhere/at/all/x"], "cannot be written"),
    ],
)
def test_the_command_says_what_is_wrong(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    if "/nowhere" in options[-1]:  # root could make the folder
        (tmp_path / "file").touch()
        options = ["--out", str(tmp_path / "file" / "x")]
    with pytest.raises(SystemExit, match=message):
        main(["tune", "--tokens", "512", "--length", "64", *options])


def test_a_text_of_ten_tokens(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text("a b c " + str(number))
    with pytest.raises(SystemExit, match=r"has \d+ tokens of .* in its calibration split, \d+ fewer than one sequence"):
        main(["tune", "--text", str(tmp_path), "--out", str(tmp_path / "out")])


@pytest.mark.parametrize("text", ["four", "2-", "-3", "2-7-8"])
def test_means_that_cannot_be_read(text, capsys):
    with pytest.raises(SystemExit):
        main(["tune", f"--mean-k={text}"])
    assert "is neither a number such as 4 nor a range such as 2-7" in capsys.readouterr().err


def test_two_processes_train_what_one_does(tmp_path):
    """A step of two halves of a batch is a step of the batch, but for the order in which gradients are added up."""
    found = {}
    for name, launcher in (("one", ["-m"]), ("two", ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m"])):
        out = tmp_path / name
        options = ["--tokens", "256", "--length", "32", "--batch-size", "4", "--out", str(out)]
        command = [sys.executable, *launcher, "bhlib", "tune", *options]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        run = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
        assert run.returncode == 0, run.stderr
        assert run.stdout.count("the model itself") == 1
        found[name] = load_tuned(out)
    assert found["two"].levels == pytest.approx(found["one"].levels, rel=1e-2)
    for name, value in found["one"].weights.items():
        torch.testing.assert_close(found["two"].weights[name], value, rtol=0, atol=5e-4)
