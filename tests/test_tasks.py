"""The tasks for lm-evaluation-harness: their items, and the harness on a patched model, without a network."""

import importlib.util
import json
import math
import socket
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from bhlib import load_demo
from bhlib.loading import heldout_documents
from bhlib.patching import RoutingPatch
from bhlib.rules import BH, TopK
from bhlib.tasks import FOLDER
from bhlib.tasks.make_items import CONTEXT_WORDS, make_items

TASKS = ("bh_cloze", "bh_continuation")


def items_of(task):
    with open(Path(FOLDER, f"{task}.jsonl"), encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


# -- items -----------------------------------------------------------------------------------------------------


def test_the_script_makes_the_committed_files(tmp_path):
    make_items(tmp_path)
    for task in TASKS:
        made, committed = (Path(folder, f"{task}.jsonl").read_bytes() for folder in (tmp_path, FOLDER))
        assert made == committed, "run python -m bhlib.tasks.make_items"


@pytest.mark.parametrize("task", TASKS)
def test_the_answer_is_what_the_text_says(task):
    documents = heldout_documents("test")
    for item in items_of(task):
        answer = item["word"] if task == "bh_cloze" else item["choices"][item["label"]]
        whole = f"{item['context']} {answer}"
        assert any(whole in document for document in documents[item["domain"]])
        assert len(item["context"].split()) >= CONTEXT_WORDS and item["context"] == item["context"].strip()


@pytest.mark.parametrize("task", TASKS)
def test_items_are_as_many_as_the_readme_says(task):
    items = items_of(task)
    assert len(items) == 360 and set(Counter(item["domain"] for item in items).values()) == {40}
    assert len({item["context"] for item in items}) == 360
    assert len({item["domain"] for item in items[:9]}) == 9  # domains take turns


def test_choices_are_four_different_ones_in_any_order():
    items = items_of("bh_continuation")
    own = Counter(item["choices"][item["label"]] for item in items)
    assert all(len(set(item["choices"])) == 4 and set(item["choices"]) <= own.keys() for item in items)
    labels = Counter(item["label"] for item in items)
    assert len(labels) == 4 and all(abs(count - 90) < 4 * math.sqrt(360 * 3 / 16) for count in labels.values())


def test_items_fit_into_the_model():
    model, tokenizer = load_demo()
    longest = 0
    for task in TASKS:
        for item in items_of(task):
            for answer in item.get("choices", [item.get("word")]):
                longest = max(longest, len(tokenizer(f"{item['context']} {answer}")["input_ids"]))
    assert longest < model.config.max_position_embeddings
    assert f"The longest item has {longest} tokens" in Path(FOLDER, "README.md").read_text(encoding="utf-8")


# -- in the harness --------------------------------------------------------------------------------------------

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="lm-evaluation-harness is not installed: pip install --editable '.[tasks]'",
)
NUM_ITEMS = 18  # two of each domain
RULES = {"own": None, "static top-4": TopK(4), "BH 0.01": BH(0.01)}


@pytest.fixture(scope="module")
def demo():
    return load_demo()


@pytest.fixture(scope="module")
def results(demo, tmp_path_factory):
    """What the harness finds under each rule, started in a folder of its own and cut off from all networks."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    def refuse(*_):
        raise OSError("a test without a network tried to use it")

    model, tokenizer = demo
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("elsewhere"))
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        lm, manager = HFLM(pretrained=model, tokenizer=tokenizer), TaskManager(include_path=FOLDER)
        for name, rule in RULES.items():
            with nullcontext() if rule is None else RoutingPatch(model, rule) as routed:
                outcome = simple_evaluate(
                    lm, tasks=list(TASKS), task_manager=manager, limit=NUM_ITEMS, bootstrap_iters=100
                )
            found[name] = outcome, routed
    return found


@needs_harness
@pytest.mark.parametrize("name", RULES)
def test_both_tasks_run_patched_and_not(results, name):
    outcome, routed = results[name]
    for task in TASKS:
        accuracy, error = (outcome["results"][task][f"{key},none"] for key in ("acc", "acc_stderr"))
        print(f"{task} under {name}: accuracy {accuracy:.3f} ± {error:.3f} ({NUM_ITEMS} items)")
        assert outcome["n-samples"][task] == {"original": 360, "effective": NUM_ITEMS}
        assert error == pytest.approx(math.sqrt(accuracy * (1 - accuracy) / (NUM_ITEMS - 1)))
        assert accuracy > {"bh_cloze": 0.1, "bh_continuation": 0.25 + error}[task]
    if routed:
        mean = routed.records.stats()["mean_experts_per_token"]
        assert mean == 4 if name == "static top-4" else 3.5 < mean < 4.5


def loglikelihood(model, tokenizer, context, answer):
    """Of an answer behind a context, and whether it is greedy: token by token, from the whole text's logits."""
    whole = tokenizer(context + answer, return_tensors="pt")["input_ids"]
    start = len(tokenizer(context)["input_ids"])
    with torch.no_grad():
        logits = model(whole).logits[0, start - 1 : -1].log_softmax(dim=-1)
    answer_ids = whole[0, start:]
    return logits.gather(1, answer_ids[:, None]).sum().item(), torch.equal(logits.argmax(dim=-1), answer_ids)


@needs_harness
@pytest.mark.parametrize("name", RULES)
def test_the_harness_measures_the_routed_model(demo, results, name):
    """Log-likelihoods by hand under the same rule; the rules differ."""
    model, tokenizer = demo
    samples = results[name][0]["samples"]
    with nullcontext() if RULES[name] is None else RoutingPatch(model, RULES[name]):
        for item, sample in zip(items_of("bh_cloze")[:9], samples["bh_cloze"], strict=False):
            value, greedy = loglikelihood(model, tokenizer, item["context"], " " + item["word"])
            ((found, found_greedy),) = sample["filtered_resps"]
            assert found == pytest.approx(value, rel=1e-3) and bool(found_greedy) == greedy == bool(sample["acc"])
        for item, sample in zip(items_of("bh_continuation")[:3], samples["bh_continuation"], strict=False):
            values = [loglikelihood(model, tokenizer, item["context"], " " + one)[0] for one in item["choices"]]
            assert [found for found, _ in sample["filtered_resps"]] == pytest.approx(values, rel=1e-3)
            assert bool(sample["acc"]) == (values.index(max(values)) == item["label"])
    if name != "own":
        own, here = (
            [sample["filtered_resps"][0][0] for sample in results[one][0]["samples"]["bh_cloze"]]
            for one in ("own", name)
        )
        assert sum(abs(x - y) > 0.01 for x, y in zip(own, here, strict=True)) > NUM_ITEMS / 2
