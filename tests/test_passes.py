"""Which tokens of a pass are real and where they stand: by brute force, for whatever transformers makes of a batch."""

import copy
import functools
import random
import warnings

import pytest
import torch
from families import Family, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from models import tiny_olmoe, tokens
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.masking_utils import create_masks_for_generate

from bhlib import BHRoutingIntegration, RoutingPatch
from bhlib.passes import find_cache
from bhlib.rules import TopK

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
                ids, attention_mask=mask, max_new_tokens=8, do_sample=False, cache_implementation=cache
            )
        assert out.shape == (2, length + 8)
        assert texts_of(bh) == [out[0, :-1].tolist(), out[1, 2:-1].tolist()]


def test_the_kind_of_mask_is_chosen_by_name():
    """Masks come in a dict whose order is an accident; the one of full attention knows most."""
    model = tiny(WINDOWED[1])
    ids = tokens(1, 9) % 127 + 1
    full = torch.ones(1, 1, 9, 9).tril().bool()
    none = torch.zeros_like(full)
    for masks in (
        {"full_attention": full, "sliding_attention": none},
        {"sliding_attention": none, "full_attention": full},
    ):
        with BHRoutingIntegration(model, max_k=4) as bh, torch.no_grad():
            model(ids, attention_mask=masks)
        assert bh.get_routing_stats()["total_tokens"] == 9


# -- continuous batching ---------------------------------------------------------------------------------------


def test_continuous_batching_counts_every_token():
    model = tiny_olmoe(eos_token_id=255)
    prompts = [tokens(length, seed=length).tolist() for length in (3, 11, 6, 20, 1)]
    choices = copy.deepcopy(model.generation_config)
    choices.update(max_new_tokens=10, do_sample=False, eos_token_id=-1)
    with BHRoutingIntegration(model, alpha=0.2) as bh:
        outputs = model.generate_batch(prompts, generation_config=choices, progress_bar=False)
        frame = bh.records.to_frame().query("layer == 0")
    texts = [list(one.prompt_ids) + list(one.generated_tokens)[:-1] for one in outputs.values()]
    assert len(texts) == 5 and bh.get_routing_stats()["total_tokens"] == sum(map(len, texts)) == 41 + 5 * 9
    expected = sorted((position, token) for text in texts for position, token in enumerate(text))
    assert sorted(zip(frame["position"], frame["token_id"], strict=True)) == expected
    # Requests share a row, and nothing in a pass says which they are.
    assert set(frame["sequence"]) == {-1}
    assert frame["generated"].sum() > 0


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
    positions = frame.groupby("sequence")["position"].apply(list).tolist()
    assert positions == [[0, 1, 2, 3, 4, 5, 4, 5, 6], [0, 1, 2, 3, 2, 3, 4]]


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


# -- any history -----------------------------------------------------------------------------------------------------

ROOM = 28  # tokens in a static cache
SMALL = {
    "hidden_size": 8, "intermediate_size": 4, "moe_intermediate_size": 4, "num_attention_heads": 2, "head_dim": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
    "pad_token_id": 0, "bos_token_id": None, "eos_token_id": END,
}  # fmt: skip
KINDS = {
    "full": ("olmoe", {"num_hidden_layers": 1}),
    "window": ("mixtral", {"num_hidden_layers": 1, "sliding_window": 4}),
    "both": ("gpt_oss", {"num_hidden_layers": 2, "sliding_window": 4}),
}


@functools.cache
def patched(kind):
    model_type, changes = KINDS[kind]
    known = AutoConfig.for_model(model_type)
    sizes = {name: value for name, value in SMALL.items() if hasattr(known, name)} | changes
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes)).eval()
    return RoutingPatch(model, TopK(2)).patch_model()


class Conversation:
    """The slow twin: sequences as lists of (token, is it real), one entry for each column that is in the cache."""

    def __init__(self, batch, cache, mask, filler):
        self.batch, self.kind, self.mask, self.filler = batch, cache, mask, filler
        self.cache, self.columns, self.ended, self.first = None, [[] for _ in range(batch)], [False] * batch, None

    @property
    def past(self):
        return len(self.columns[0])

    def run(self, patch, new, numbers, masked=None):
        """Feed the rows with lists of (token, is it real); the mask says `masked` where it says something else."""
        model, past = patch.model, 0 if self.kind == "none" else self.past
        self.columns = [row + more for row, more in zip(self.columns, new, strict=True)]
        ids = torch.tensor([[token for token, _ in row[past:]] for row in self.columns])
        mask = None
        if self.mask != "none":
            mask = torch.tensor([[real for _, real in row] for row in self.columns]).long()
            if masked is not None:
                mask[:, past:] = masked
        if past == 0:
            self.first = numbers[0]
            numbers[0] += self.batch
            if self.kind in ("dynamic", "static"):
                cache = DynamicCache if self.kind == "dynamic" else functools.partial(StaticCache, max_cache_len=ROOM)
                self.cache = cache(config=model.config)
        if self.mask == "made":
            mask = create_masks_for_generate(model.config, model.get_input_embeddings()(ids), mask, self.cache)
        with torch.no_grad():
            out = model.model(ids, mask, None, self.cache, use_cache=self.kind != "none")
        if self.kind == "own":
            self.cache = find_cache(out.values())
        rows = []
        for number, row in enumerate(self.columns):
            for column in range(past, len(row)):
                token, real = row[column]
                position = sum(was_real for _, was_real in row[:column])
                rows += [(self.first + number, position, past > 0 and ids.shape[1] == 1, token)] if real else []
        return rows

    def read(self, patch, rng, numbers):
        """Several tokens a row; padding is told by a mask, or stands at the right end of a batch's first pass."""
        sides = ["", "left", "right"] if self.mask != "none" else [""]
        if self.mask == "none" and self.batch > 1 and self.past == 0 and self.kind != "none":
            sides = ["", "right"]
        side, length, rows = rng.choice(sides), rng.randrange(2, 6), []
        for _ in range(self.batch):
            padding = [(0, False)] * (rng.randrange(length) if side else 0)
            text = [(rng.randrange(10, 64), True) for _ in range(length - len(padding))]
            rows.append(padding + text if side == "left" else text + padding)
        self.ended = [False] * self.batch
        return self.run(patch, rows, numbers)

    def step(self, patch, rng, numbers):
        """A step of generate(): rows that have ended are fed with a filler, which the mask takes for text."""
        ids = [self.filler if end else rng.choice([END, END, *range(10, 14)]) for end in self.ended]
        fed = [[(token, not end)] for token, end in zip(ids, self.ended, strict=True)]
        rows = self.run(patch, fed, numbers, masked=1)
        self.ended = [end or token == END for token, end in zip(ids, self.ended, strict=True)]
        return rows

    def crop(self, rng):
        """Take the last tokens back, as assisted generation does with drafts that it rejects."""
        removed = rng.randrange(1, self.past)
        self.cache.crop(-removed)
        self.columns = [row[:-removed] for row in self.columns]
        self.ended = [False] * self.batch


def packed(patch, rng):
    """Pieces of sequences in one row, as a pass of continuous batching has them, and padding after them."""
    pieces = [(rng.choice([0, 0, 3, 8]), rng.choice([1, 1, 4])) for _ in range(rng.randrange(1, 4))]
    padding = [0] * rng.randrange(3)
    positions = [past + step for past, length in pieces for step in range(length)]
    ids = [rng.randrange(10, 64) for _ in positions]
    lengths = [length for _, length in pieces]
    with torch.no_grad():
        patch.model.model(
            torch.tensor([ids + padding]), None, torch.tensor([positions + padding]),
            cu_seq_lens_q=torch.tensor([0, *lengths]).cumsum(0), max_length_q=max(lengths), use_cache=False,
        )  # fmt: skip
    steps = all(past and length == 1 for past, length in pieces)
    return [(-1, position, steps, token) for position, token in zip(positions, ids, strict=True)]


CONVERSATIONS = st.tuples(
    st.integers(1, 3),
    st.sampled_from(["dynamic", "static", "own", "none"]),
    st.sampled_from(["flat", "made", "none"]),
    st.sampled_from([0, END, OTHER_PADDING]),
)
EVENTS = st.tuples(
    st.sampled_from(["step", "read", "step", "crop", "step", "packed"]), st.integers(0, 1), st.integers(0, 2**16)
)


@settings(max_examples=2000)
@given(
    st.sampled_from(sorted(KINDS)),
    st.lists(CONVERSATIONS, min_size=1, max_size=2),
    st.lists(EVENTS, min_size=5, max_size=9),
)
def test_any_history_of_passes_is_counted_as_by_hand(kind, conversations, events):
    patch = patched(kind)
    patch.reset_stats()
    running, expected, numbers = [Conversation(*one) for one in conversations], [], [0]
    for event, which, seed in events:
        one, rng = running[which % len(running)], random.Random(seed)
        if event == "packed":
            expected += packed(patch, rng)
        elif event == "crop":
            if one.kind in ("own", "dynamic") and kind == "full" and one.past > 1:
                one.crop(rng)
        elif one.past > ROOM - 6:
            continue
        elif event == "read" or one.past == 0:
            expected += one.read(patch, rng, numbers)
        elif one.kind != "none" and not all(one.ended):
            expected += one.step(patch, rng, numbers)
    frame = patch.records.to_frame().query("layer == 0")
    found = list(zip(frame["sequence"], frame["position"], frame["generated"], frame["token_id"], strict=True))
    assert found == expected
    assert patch.get_routing_stats()["total_tokens"] == len(expected)
