"""Which tokens of a pass are real and where they stand: by brute force, for whatever transformers makes of a batch."""

import warnings

import pytest
import torch
from families import Family, tiny
from models import tiny_olmoe, tokens
from transformers import StaticCache

from bhlib import BHRoutingIntegration

END, OTHER_PADDING = 7, 9


def texts_of(bh, layer=0):
    """Token ids by sequence, in the order of their positions, which must be 0, 1, 2, …"""
    frame = bh.records.to_frame().query(f"layer == {layer}").sort_values(["sequence", "position"])
    for _, positions in frame.groupby("sequence")["position"]:
        assert positions.tolist() == list(range(len(positions)))
    return frame.groupby("sequence")["token_id"].apply(list).tolist()


# -- sliding windows -------------------------------------------------------------------------------------------

WINDOWED = [
    Family("mixtral", changes=(("sliding_window", 5),)),
    Family("gpt_oss", changes=(("sliding_window", 5),)),
    Family("cohere2_moe", changes=(("sliding_window", 5),)),
    Family("qwen3_moe", changes=(("sliding_window", 5), ("use_sliding_window", True), ("max_window_layers", 0))),
]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", WINDOWED, ids=str)
def test_a_sliding_window_does_not_hide_a_token_from_itself(family, cache):
    """Prompts shorter and longer than the window, padded on the left, and decoding beyond it."""
    model = tiny(family)
    for length in (4, 9):
        ids = tokens(2, length) % 127 + 1
        mask = torch.ones_like(ids)
        ids[1, :2], mask[1, :2] = 0, 0
        with BHRoutingIntegration(model, max_k=4) as bh:
            out = model.generate(
                ids, attention_mask=mask, max_new_tokens=8, do_sample=False, cache_implementation=cache, eos_token_id=None
            )
        assert out.shape == (2, length + 8)
        assert texts_of(bh) == [out[0, :-1].tolist(), out[1, 2:-1].tolist()]


def test_the_kind_of_mask_is_chosen_by_name():
    """Masks come in a dict whose order is an accident; the one of full attention knows most."""
    model = tiny(WINDOWED[1])
    ids = tokens(1, 9) % 127 + 1
    counts = []
    for kinds in (("full_attention", "sliding_attention"), ("sliding_attention", "full_attention")):
        # A window of its own for sliding attention: no token may attend to itself there.
        allowed = {"full_attention": torch.ones(9, 9).tril().bool(), "sliding_attention": torch.ones(9, 9).tril(-1).bool()}
        with BHRoutingIntegration(model, max_k=4) as bh, torch.no_grad():
            model(ids, attention_mask={kind: allowed[kind][None, None] for kind in kinds})
        counts.append(bh.get_routing_stats()["total_tokens"])
    assert counts == [9, 9]


# -- continuous batching ---------------------------------------------------------------------------------------


def test_continuous_batching_counts_every_token():
    model = tiny_olmoe(eos_token_id=255)
    prompts = [tokens(length, seed=length).tolist() for length in (3, 11, 6, 20, 1)]
    settings = copy_of(model.generation_config, max_new_tokens=10, do_sample=False, eos_token_id=-1)
    with BHRoutingIntegration(model, alpha=0.2) as bh:
        outputs = model.generate_batch(prompts, generation_config=settings, progress_bar=False)
        frame = bh.records.to_frame().query("layer == 0")
    texts = [list(one.prompt_ids) + list(one.generated_tokens)[:-1] for one in outputs.values()]
    assert len(texts) == 5 and bh.get_routing_stats()["total_tokens"] == sum(map(len, texts)) == 41 + 5 * 9
    expected = sorted((position, token) for text in texts for position, token in enumerate(text))
    assert sorted(zip(frame["position"], frame["token_id"], strict=True)) == expected
    # Requests share a row, and nothing in a pass says which they are.
    assert set(frame["sequence"]) == {-1}
    assert frame["generated"].sum() > 0


def copy_of(config, **changes):
    from copy import deepcopy

    config = deepcopy(config)
    config.update(**changes)
    return config


# -- caches that are cropped -------------------------------------------------------------------------------------


def test_positions_go_on_from_a_cropped_cache():
    model = tiny_olmoe()
    ids = tokens(1, 4).repeat(1, 3)
    with BHRoutingIntegration(model, alpha=0.2) as bh:
        out = model.generate(ids, max_new_tokens=15, do_sample=False, prompt_lookup_num_tokens=3)
    frame = bh.records.to_frame().query("layer == 0")
    # Drafts that were rejected are in the records too; each accepted token is there at its place.
    found = set(zip(frame["position"], frame["token_id"], strict=True))
    assert set(enumerate(out[0, :-1].tolist())) <= found and frame["sequence"].nunique() == 1


@pytest.mark.parametrize("masked", [True, False])
def test_positions_after_a_crop_with_padding(masked):
    model = tiny_olmoe()
    ids, mask = tokens(2, 6), torch.ones(2, 6, dtype=torch.long)
    mask[1, :2] = 0
    with BHRoutingIntegration(model, alpha=0.2) as bh, torch.no_grad():
        cache = model(ids, attention_mask=mask, use_cache=True)[1]
        cache.crop(-2)
        mask = torch.cat([mask[:, :4], torch.ones(2, 3, dtype=torch.long)], dim=1) if masked else None
        model(tokens(2, 3, seed=1), mask, None, cache)
    frame = bh.records.to_frame().query("layer == 0")
    assert frame.groupby("sequence")["position"].apply(list).tolist() == [[0, 1, 2, 3, 4, 5, 4, 5, 6], [0, 1, 2, 3, 2, 3, 4]]


# -- sequences that have ended -----------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [0, END, OTHER_PADDING])
def test_a_padding_token_given_to_generate_alone(padding):
    model = tiny_olmoe()
    ids = tokens(6, 5)
    # Where the model ends a text: a token that some sequences are soon given.
    end = model.generate(ids, max_new_tokens=6, do_sample=False)[0, 7].item()
    model.generation_config.eos_token_id = [end, 256 + END]
    with BHRoutingIntegration(model, alpha=0.2) as bh:
        out = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=end if padding == END else padding)
    expected = []
    for row in out:
        new = row[5:].tolist()
        stop = new.index(end) + 1 if end in new else len(new)
        expected.append((row[:5].tolist() + new[:stop])[: out.shape[1] - 1])
    assert texts_of(bh) == expected and len({len(text) for text in expected}) > 1


def test_a_text_that_goes_on_after_its_end_is_counted():
    """What varies is no filler; the first token after the end may be one, and is taken for it."""
    model = tiny_olmoe()
    model.generation_config.eos_token_id = END
    with BHRoutingIntegration(model, alpha=0.2) as bh, torch.no_grad():
        cache = model(tokens(2, 3), use_cache=True)[1]
        for step in ([END, 11], [12, 13], [14, 15], [16, 17]):
            model(torch.tensor(step)[:, None], None, None, cache)
    assert bh.get_routing_stats()["total_tokens"] == 2 * 3 + 2 * 4 - 1
    with BHRoutingIntegration(model, alpha=0.2) as bh, torch.no_grad():
        cache = model(tokens(1, 3), use_cache=True)[1]
        for step in (END, 0, 0):  # alone there is nothing to wait for
            model(torch.tensor([[step]]), None, None, cache)
    assert bh.get_routing_stats()["total_tokens"] == 6


# -- batches without a mask ----------------------------------------------------------------------------------------


def test_rows_padded_on_the_right_without_a_mask():
    """As lm-evaluation-harness calls a model: rows filled up with 0, and no mask."""
    model = tiny_olmoe()
    rows = [tokens(length, seed=length) for length in (9, 4, 8)]
    batch = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    with BHRoutingIntegration(model, alpha=0.2) as bh, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        model(batch)
    assert texts_of(bh) == [row.tolist() for row in rows]


def test_rows_that_may_be_padded_are_counted_with_a_warning():
    model = tiny_olmoe(pad_token_id=1)
    rows = [tokens(length, seed=length) + 1 for length in (9, 4, 8)]
    batch = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True) % 256
    with BHRoutingIntegration(model, alpha=0.2) as bh, torch.no_grad():
        with pytest.warns(UserWarning, match="rows that end in token 0 several times .*pass attention_mask, or"):
            model(batch)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(batch)  # said once
            model(batch, attention_mask=torch.ones_like(batch))
    assert bh.get_routing_stats()["total_tokens"] == 3 * 27
