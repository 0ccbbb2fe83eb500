"""Records against counts by hand."""

import numpy as np
import pytest
import torch
from models import tiny_olmoe, tokens

from bhlib import BHRoutingIntegration


def run(model, **inputs):
    with torch.no_grad():
        return model(**inputs)


def by_hand(model, bh, input_ids, mask):
    """Counts [layers][real tokens] from hidden states hooked out of the patched model, one token at a time."""
    counts = []

    def hook(router, args, output):
        logits = args[0].reshape(-1, args[0].shape[-1]) @ router.weight.T
        counts.append([int(bh.rule(row[None]).counts) for row in logits[mask.flatten().bool()]])

    handles = [layer.router.register_forward_hook(hook) for layer in bh.layers]
    run(model, input_ids=input_ids, attention_mask=mask)
    for handle in handles:
        handle.remove()
    return np.array(counts)


@pytest.mark.parametrize("side", ["left", "right"])
def test_stats_equal_a_count_by_hand_and_skip_padding(side):
    model = tiny_olmoe()
    ids, mask = tokens(3, 12), torch.ones(3, 12, dtype=torch.long)
    for row, padding in enumerate((0, 5, 9)):
        where = slice(0, padding) if side == "left" else slice(12 - padding, 12)
        mask[row, where] = 0
        ids[row, where] = 0
    with BHRoutingIntegration(model, alpha=0.2) as bh:
        counts = by_hand(model, bh, ids, mask)
    stats = bh.get_routing_stats()
    assert stats["total_tokens"] == mask.sum() == 22
    assert stats["mean_experts_per_token"] == pytest.approx(counts.mean())
    assert stats["std_experts_per_token"] == pytest.approx(counts.std())
    assert stats["sparsity_gain"] == pytest.approx(1 - counts.mean() / 8)
    assert stats["mean_experts_per_layer"] == pytest.approx(counts.mean(axis=1).tolist())
    assert stats["histogram"] == np.bincount(counts.flatten(), minlength=65).tolist()
    assert np.array_equal(bh.records.counts(), counts.T)
    assert bh.records.expert_load().sum() == counts.sum()
    frame = bh.records.to_frame()
    assert len(frame) == 22 * 3
    assert frame.query("layer == 0").groupby("sequence")["position"].apply(list).tolist() == [
        list(range(12)), list(range(7)), list(range(3))
    ]  # fmt: skip
    real = ids[mask.bool()].tolist()
    assert frame.query("layer == 1")["token_id"].tolist() == real


def test_frame_through_prefill_and_decoding():
    model = tiny_olmoe()
    prompt = tokens(2, 5)
    mask = torch.ones_like(prompt)
    mask[1, :2] = 0  # left padding
    with BHRoutingIntegration(model, alpha=0.2) as bh:
        out = model.generate(prompt, attention_mask=mask, max_new_tokens=4, do_sample=False)
    frame = bh.records.to_frame().query("layer == 2").sort_values(["sequence", "position"])
    first, second = (frame[frame["sequence"] == row] for row in (0, 1))
    assert first["token_id"].tolist() == out[0, :-1].tolist()  # the last token is not fed back
    assert second["token_id"].tolist() == out[1, 2:-1].tolist()
    assert second["position"].tolist() == list(range(6))
    assert first["generated"].tolist() == [False] * 5 + [True] * 3
    assert all(len(e) == len(w) == c for e, w, c in zip(frame.experts, frame.weights, frame["count"], strict=True))


def test_decoding_decides_as_one_pass_does():
    """Token for token: what was recorded step by step is what one pass over the whole text records."""
    model = tiny_olmoe()
    with BHRoutingIntegration(model, alpha=0.2) as bh:
        out = model.generate(tokens(1, 5), max_new_tokens=10, do_sample=False)
        stepwise = bh.records.counts()
        bh.reset_stats()
        run(model, input_ids=out[:, :-1])
        assert np.array_equal(bh.records.counts(), stepwise)


def test_sequences_are_numbered_through_and_reset():
    model = tiny_olmoe()
    with BHRoutingIntegration(model) as bh:
        run(model, input_ids=tokens(2, 4))
        run(model, input_ids=tokens(3, 4))
        assert sorted(bh.records.to_frame()["sequence"].unique()) == [0, 1, 2, 3, 4]
        bh.reset_stats()
        assert bh.get_routing_stats()["total_tokens"] == 0 and bh.records.to_frame().empty
        run(model, input_ids=tokens(1, 4))
        assert bh.records.to_frame()["sequence"].unique().tolist() == [0]


def test_the_inner_model_is_recorded_too():
    model = tiny_olmoe()
    with BHRoutingIntegration(model) as bh:
        run(model.model, input_ids=tokens(2, 4))
    assert bh.get_routing_stats()["total_tokens"] == 8


def test_rows_are_bounded_and_totals_are_not():
    model = tiny_olmoe()
    with BHRoutingIntegration(model, max_recorded_tokens=8) as bh:
        for _ in range(5):
            run(model, input_ids=tokens(1, 4))
    assert len(bh.records.counts()) == 8 and bh.get_routing_stats()["total_tokens"] == 20


def test_stats_are_a_mapping_with_a_story():
    model = tiny_olmoe()
    with BHRoutingIntegration(model) as bh:
        run(model, input_ids=tokens(1, 4))
    stats = bh.get_routing_stats()
    assert dict(stats)["top_k"] == 8 and "4 tokens used" in repr(stats)
    with pytest.raises(KeyError, match="'mean' is not among the statistics: mean_experts_per_token"):
        stats["mean"]
