"""The embedded model and its held-out text; the way to the real model."""

import json
import time

import pytest
import torch
from transformers import OlmoeForCausalLM

from bhlib import BHRoutingIntegration, RoutingPatch, find_moe_layers, load_demo, load_heldout, load_olmoe
from bhlib.evaluation import evaluate
from bhlib.loading import DEMO, SPLITS, TUNED_ROUTER, heldout_documents, heldout_domains, heldout_sequence_documents
from bhlib.rules import BH, TopK
from bhlib.training import load_tuned


def test_demo_is_an_olmoe_with_olmoes_routing():
    model, tokenizer = load_demo()
    assert isinstance(model, OlmoeForCausalLM) and not model.training
    config = model.config
    assert (config.num_experts, config.num_experts_per_tok, config.norm_topk_prob) == (64, 8, False)
    assert len(find_moe_layers(model)) == config.num_hidden_layers
    text = "def main():\n    return 'é' # naïve"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tuned_routers_are_better_at_what_they_were_tuned_for():
    """And they alone differ. The same file, as a patch of the plain demo, gives the same logits."""
    (plain, _), (tuned, _) = load_demo(), load_demo(tuned_router=True)
    own = dict(plain.named_parameters())
    changed = [name for name, value in tuned.named_parameters() if not torch.equal(value, own[name])]
    assert changed == [f"model.layers.{layer}.mlp.gate.weight" for layer in range(plain.config.num_hidden_layers)]
    text, shipped = load_heldout("validation", 128, 2), load_tuned(TUNED_ROUTER)
    ids = text["python"][:1]
    with shipped.routing(plain, 4.0), torch.no_grad():
        logits = plain(ids).logits
    with RoutingPatch(tuned, shipped.rule_at(4.0)), torch.no_grad():
        assert torch.equal(tuned(ids).logits, logits)
    before, after = evaluate(plain, text, BH(0.01)), evaluate(tuned, text, shipped.rule_at(4.0))
    assert after["mean_k"].mean() == pytest.approx(4.0, abs=0.1) and before["mean_k"].mean() >= 3.9
    assert (before["loss"] - after["loss"]).mean() > 0.01


@pytest.mark.timing
def test_demo_loads_in_three_seconds():
    load_demo()  # the first call imports the model's code
    start = time.perf_counter()
    load_demo()
    assert time.perf_counter() - start < 3


def test_demo_files_are_small():
    sizes = {path.name: path.stat().st_size for path in DEMO.rglob("*") if path.is_file()}
    assert max(sizes.values()) < 20e6
    assert sum(size for name, size in sizes.items() if name.startswith("model")) <= 45e6
    assert sizes["heldout.safetensors"] < 2e6


def test_heldout_is_described_and_cut():
    described = heldout_domains()
    for split in SPLITS:
        data = load_heldout(split, length=512)
        assert len(data) >= 5
        for domain, sequences in data.items():
            assert sequences.dtype == torch.int64 and sequences.shape[1] == 512 and len(sequences) >= 16
            assert 0 <= sequences.min() and sequences.max() < 4096
            assert domain in json.dumps(described)
    few = load_heldout("test", length=128, max_sequences=3)
    assert all(len(sequences) == 3 for sequences in few.values())
    flat = {split: torch.cat([x.flatten() for x in load_heldout(split, length=64).values()]) for split in SPLITS}
    blocks = {split: {tuple(row) for row in tokens.view(-1, 64).tolist()} for split, tokens in flat.items()}
    assert not blocks["calibration"] & blocks["test"] and not blocks["validation"] & blocks["test"]


def test_documents_are_the_text_of_the_tokens():
    _, tokenizer = load_demo()
    tokens = torch.cat(list(load_heldout("validation", length=2)["novels"]))
    documents = heldout_documents("validation")
    assert documents.keys() == load_heldout("validation").keys()
    assert tokenizer.decode(tokens) == "".join(text + tokenizer.eos_token for text in documents["novels"])
    assert len(documents["novels"]) == heldout_domains()["domains"]["novels"]["splits"]["validation"]["documents"]


def test_each_sequence_has_the_document_that_most_of_it_is_of():
    """Against a walk over the tokens, one by one."""
    found, end = heldout_sequence_documents("validation", 512), heldout_domains()["end_token"]
    assert found.keys() == load_heldout("validation").keys()
    for domain, sequences in load_heldout("validation", 512).items():
        document, wanted = 0, []
        for sequence in sequences.tolist():
            times = {}
            for token in sequence:
                times[document] = times.get(document, 0) + 1
                document += token == end
            wanted.append(max(times, key=times.get))  # the first of those that are alike
        assert found[domain].tolist() == wanted
        few = heldout_sequence_documents("validation", 512, 16)[domain]
        assert set(few) <= set(wanted) and len(few) == len(load_heldout("validation", 512, 16)[domain])
    test = heldout_sequence_documents()
    assert sum(len(set(numbers)) for numbers in test.values()) == 154  # as the docstring says
    assert sum(domain["splits"]["test"]["documents"] for domain in heldout_domains()["domains"].values()) == 165


def test_another_tokenizer_reads_the_same_text():
    """Letters instead of the demo's tokens: nothing but the ids changes."""
    _, tokenizer = load_demo()
    letters = tokenizer.train_new_from_iterator([""], vocab_size=257)
    assert len(letters) == 257
    ours, theirs = (load_heldout("validation", 64, tokenizer=one)["verse"].flatten() for one in (None, letters))
    texts = tokenizer.decode(ours), letters.decode(theirs)
    size = min(map(len, texts)) - 1  # what does not fill a sequence is dropped, and a letter may be cut
    assert size > 60_000 and texts[0][:size] == texts[1][:size] and len(theirs) > 2 * len(ours)
    assert torch.equal(load_heldout("test", 64, 3, tokenizer)["novels"], load_heldout("test", 64, 3)["novels"])


def test_heldout_bad_arguments():
    with pytest.raises(ValueError, match="split must be one of .*got 'train'"):
        load_heldout("train")
    with pytest.raises(ValueError, match="length must be 2 or more.*got 1"):
        load_heldout(length=1)


def test_the_gate_has_learned():
    """Fewer experts cost what they should: top-1 at least 0.3 nats against top-8, monotonically."""
    model, _ = load_demo()
    data = load_heldout("validation", length=256, max_sequences=4)
    losses = [evaluate(model, data, TopK(k))["loss"].mean() for k in (1, 2, 4, 8)]
    assert losses[0] - losses[3] >= 0.3
    assert losses == sorted(losses, reverse=True)


def test_an_unreachable_hub_names_the_demo():
    with pytest.raises(OSError, match=r"'no/such-model' could not be loaded.*bhlib.load_demo\(\)"):
        load_olmoe("no/such-model")


def test_load_olmoe_from_a_folder():
    model, tokenizer = load_olmoe(str(DEMO), device_map=None)
    assert model.dtype == torch.bfloat16 and not model.training
    assert len(find_moe_layers(model)) == model.config.num_hidden_layers
    assert len(tokenizer) == model.config.vocab_size


def test_what_has_no_room_is_offloaded_and_routed_as_ever(tmp_path):
    """Most layers of the embedded model on disk, as accelerate puts them there: the same bits, patched and not."""
    whole, _ = load_olmoe(str(DEMO), device_map=None)
    spread, _ = load_olmoe(str(DEMO), max_memory={"cpu": "16MiB"}, offload_folder=str(tmp_path))
    assert {"cpu", "disk"} <= set(spread.hf_device_map.values())
    data = {"novels": load_heldout("validation", length=64, max_sequences=1)["novels"]}
    for rule in (None, BH(0.05)):
        got, expected = (evaluate(model, data, rule).drop(columns="seconds") for model in (spread, whole))
        assert got.equals(expected)
    ids = data["novels"][:, :5]
    with BHRoutingIntegration(whole), BHRoutingIntegration(spread):
        generated = [model.generate(ids, max_new_tokens=4, do_sample=False) for model in (whole, spread)]
    assert torch.equal(*generated)
