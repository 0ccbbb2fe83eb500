"""Texts of one's own: what is read, how it is split, what is refused; and the held-out text through the same door."""

import json
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bhlib import load_demo, load_heldout
from bhlib.__main__ import main
from bhlib.documents import open_documents
from bhlib.loading import DEMO, SPLITS, heldout_sequence_documents
from bhlib.texts import SHARES, Text, read_text, split_documents


@pytest.fixture(scope="module")
def tokenizer():
    return load_demo()[1]


def write_jsonl(path, texts, field="text"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"id": n, field: text}) + "\n" for n, text in enumerate(texts)), "utf-8")
    return path


def sentences(number, words=40):
    """Texts that all differ."""
    return [f"Number {n}: " + " ".join(f"word{n * words + i}" for i in range(words)) for n in range(number)]


def read(source, **options):
    """All documents of a source by domain."""
    return {domain: [*texts] for domain, texts in open_documents(source, **options)[1].items()}


# -- sources ---------------------------------------------------------------------------------------------------


def test_a_folder_has_its_subfolders_as_domains(tmp_path):
    texts = tmp_path / "my_texts"
    write_jsonl(texts / "letters" / "early" / "a.jsonl", ["one", "", "  \n", "two"])
    (texts / "letters" / "b.txt").write_bytes("\ufeffthree\r\nand é\r\n\r\nfour\n".encode())
    (texts / "notes.TXT").write_text("five", "utf-8")
    (texts / ".hidden").write_bytes(b"\xff")
    assert open_documents(texts)[0] == "my_texts"
    assert read(texts) == {"letters": ["three\nand é\n\nfour\n", "one", "two"], "my_texts": ["five"]}
    split = read(str(texts), separator=r"\n\s*\n")
    assert split == {"letters": ["three\nand é", "four\n", "one", "two"], "my_texts": ["five"]}


def test_a_file_is_one_domain(tmp_path):
    lines = write_jsonl(tmp_path / "mails.jsonl", ["one", "two"], field="body")
    assert read(lines, field="body") == {"mails": ["one", "two"]}
    play = tmp_path / "play.txt"
    play.write_text("I\n\nII\n  \n\nIII", "utf-8")
    assert read(play) == {"play": ["I\n\nII\n  \n\nIII"]}
    assert read(play, separator=r"\n\s*\n") == {"play": ["I", "II", "III"]}


def test_the_heldout_text_is_that_of_load_heldout(tokenizer):
    text = read_text(None, tokenizer)
    for split in SPLITS:
        for size in ((512,), (15, 3)):
            found, wanted = text.sequences(split, *size), load_heldout(split, *size)
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[domain], wanted[domain]) for domain in wanted)
        found, wanted = text.documents(split, 512, 16), heldout_sequence_documents(split, 512, 16)
        assert all(np.array_equal(found[domain], wanted[domain]) for domain in wanted)
    text.check()  # its documents are enough


def test_another_tokenizer_reads_the_heldout_text():
    _, other = load_demo()
    other.add_tokens(["the"])
    found, wanted = read_text(None, other).sequences("validation", 64, 3), load_heldout("validation", 64, 3, other)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[domain], wanted[domain]) for domain in wanted)
    assert other.vocab["the"] in found["novels"]


def test_a_data_set_is_read_row_by_row(tmp_path, tokenizer):
    pytest.importorskip("datasets", reason="the library datasets is not installed")
    data = tmp_path / "data"
    for part in ("train", "test"):
        write_jsonl(data / f"{part}.jsonl", [f"{part} {text}" for text in sentences(9)], field="body")
    text = read_text(f"hf:{data}::test", tokenizer, field="body")
    assert text.name == f"{data} (test)"
    assert text.table(8)["documents"].sum() == 9
    with pytest.raises(ValueError, match="several parts: name one of train, test, for example hf:.*::train"):
        read_text(f"hf:{data}", tokenizer)
    with pytest.raises(ValueError, match="no part 'dev': name one of train, test"):
        read_text(f"hf:{data}::dev", tokenizer)
    with pytest.raises(ValueError, match="row 1: there is no field 'text'; its fields are 'id', 'body'"):
        read_text(f"hf:{data}::test", tokenizer)
    with pytest.raises(OSError, match="could not be opened as a data set of the Hugging Face hub: .*Check the name"):
        read_text(f"hf:{data}:other", tokenizer)


def test_without_the_library_a_data_set_is_refused(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # as where it is not installed
    for source in ("hf:somebody/texts:en:test", "somebody/texts"):
        with pytest.raises(ImportError, match="no file or folder 'somebody/texts.*pip install datasets"):
            read_text(source, tokenizer)


# -- what is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", r"a\.txt is empty: take it away"),
        ("a.txt", b"caf\xe9", r"a\.txt is not UTF-8: byte 3 is 0xe9 .*iconv"),
        ("a.jsonl", b'{"text": "one"}\n{"text": "\xff"}\n', r"a\.jsonl is not UTF-8: byte 26 is 0xff"),
        ("a.jsonl", b'{"text": "one"}\n\n{"text": \n', r"a\.jsonl, line 3: not JSON \(Expecting value"),
        ("a.jsonl", b'"one"\n', r"a\.jsonl, line 1: an object with fields is wanted, got str"),
        ("a.jsonl", b'{"text": "one"}\n{"body": "", "id": 1}', r"line 2: there is no field 'text'; .* 'body', 'id'\."),
        ("a.jsonl", b"{}", r"line 1: there is no field 'text'; its fields are none"),
        ("a.jsonl", b'{"text": ["one"]}', r"line 1: the field 'text' holds no text but list"),
        ("a.jsonl", b'{"text": "\\ud83d"}', r"line 1: the field 'text' holds half a character"),
        ("a.md", b"text", r"a\.md: text is read from files that end in \.txt or \.jsonl; convert it"),
        (".hidden.txt", b"text", r"the folder '.*' holds no text: put files into it that end in \.txt or \.jsonl"),
        ("a.txt", b" \n", r"'\S+' has 0 documents, and each of the 3 splits"),
        ("a.txt", b"text", r"'\S+' has 1 documents, and each of the 3 splits .*calibration, validation, test.*needs"),
        ("a.jsonl", 3 * b'{"text": "one"}\n', r"'\S+' has 1 documents"),  # copies are one
    ],
)
def test_files_that_cannot_be_read(name, content, message, tmp_path, tokenizer):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_text(tmp_path, tokenizer)


@pytest.mark.parametrize("source", ["no/such.txt", "./texts", "../texts", "/no/texts", "~/no-such-texts", "texts/"])
def test_a_path_to_nothing_is_no_data_set(source, tokenizer):
    for path in (source, Path(source)):
        with pytest.raises(FileNotFoundError, match="there is no file or folder '.*texts|such.txt' to read text from"):
            read_text(path, tokenizer)


@pytest.mark.parametrize(
    ("separator", "message"),
    [
        ("(", r"the separator '\(' is not a regular expression: missing \)"),
        ("", "the separator is empty: write for"),
        ("(a|b)", r"the separator '\(a\|b\)' has a group that it keeps: write \(\?:"),
    ],
)
def test_separators_that_are_none(separator, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        read_text(DEMO, tokenizer, separator=separator)


def test_a_tokenizer_without_an_end(tokenizer):
    endless = load_demo()[1]
    endless.eos_token = None
    for source in (None, DEMO):
        with pytest.raises(ValueError, match="no end-of-text token.*set tokenizer.eos_token"):
            read_text(source, endless)


# -- splits ----------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 1000), min_size=3, max_size=30), st.integers(0, 3))
def test_every_document_is_in_one_split_and_splits_have_their_shares(sizes, seed):
    documents = [torch.full((size,), number) for number, size in enumerate(sizes)]
    found = split_documents(documents, seed)
    numbers = {split: [int(document[0]) for document in found[split]] for split in found}
    assert [*found] == [*SPLITS]
    assert sorted(chain(*numbers.values())) == [*range(len(sizes))]
    for split in SPLITS:
        assert numbers[split] and numbers[split] == sorted(numbers[split])
        # A split takes a document only while it has least of its share, so it has at most one document too much.
        assert sum(map(len, found[split])) <= SHARES[split] * sum(sizes) + max(sizes)
    again = split_documents(documents, seed)
    assert all(torch.equal(a, b) for split in SPLITS for a, b in zip(found[split], again[split], strict=True))


def test_sequences_and_their_documents(tmp_path, tokenizer):
    """Beside a loop over tokens that anyone can read."""
    written = sentences(30)
    text = read_text(write_jsonl(tmp_path / "mails.jsonl", written), tokenizer)
    read_again = []
    for split in SPLITS:
        row, owner = [], []
        for number, document in enumerate(text.tokens[split]["mails"]):
            *ids, end = document.tolist()
            assert end == tokenizer.eos_token_id
            read_again.append(tokenizer.decode(ids))
            row += [*ids, end]
            owner += [number] * (len(ids) + 1)
        sequences, documents = (get(split, 50)["mails"] for get in (text.sequences, text.documents))
        assert len(sequences) == len(documents) == len(row) // 50 > 2
        for number, (sequence, document) in enumerate(zip(sequences, documents, strict=True)):
            assert sequence.tolist() == row[50 * number : 50 * number + 50]
            inside = owner[50 * number : 50 * number + 50]
            assert document == max(sorted(set(inside)), key=inside.count)
        assert torch.equal(text.sequences(split, 50, 2)["mails"], sequences[[0, -1]])
        assert text.documents(split, 50, 2)["mails"].tolist() == documents[[0, -1]].tolist()
    assert sorted(read_again) == sorted(written)


def test_the_key_is_of_the_content_and_the_split(tmp_path, tokenizer):
    write_jsonl(tmp_path / "one" / "a.jsonl", sentences(12))
    write_jsonl(tmp_path / "same" / "one" / "a.jsonl", sentences(12))
    write_jsonl(tmp_path / "other" / "one" / "a.jsonl", [*sentences(11), "another"])
    key = read_text(tmp_path / "one", tokenizer).key
    assert read_text(tmp_path / "same" / "one", tokenizer).key == key
    assert read_text(tmp_path / "other" / "one", tokenizer).key != key
    assert read_text(tmp_path / "one", tokenizer, seed=1).key != key


def test_reading_ends_at_a_number_of_tokens(tmp_path, tokenizer):
    """What follows is not even opened."""
    lines = write_jsonl(tmp_path / "mails.jsonl", sentences(30))
    with lines.open("ab") as file:
        file.write(b"\xff")
    with pytest.warns(UserWarning, match="reading 'mails' has ended at max_tokens=1000: what follows is left out"):
        text = read_text(lines, tokenizer, max_tokens=1000)
    assert text.table(50)["tokens"].sum() == 1000


# -- enough text -----------------------------------------------------------------------------------------------


def made_text(*documents):
    """A text whose splits all have documents of these lengths in one domain."""
    domain = {"mails": [torch.full((size,), 7) for size in documents]}
    return Text("my_texts", dict.fromkeys(SPLITS, domain))


def test_the_table_counts():
    table = made_text(30, 9, 61).table(20)
    assert table.to_dict("records")[2] == {
        "split": "test", "domain": "mails", "documents": 3, "tokens": 100, "sequences": 5, "units": 2,
    }  # fmt: skip


def test_too_little_for_a_sequence():
    text = made_text(100, 60)
    message = "my_texts has 160 tokens of 'mails' in its test split, 352 fewer than one .* a length of at most 160"
    with pytest.raises(ValueError, match=message):
        text.sequences("test")
    with pytest.raises(ValueError, match="160 tokens of 'mails' in its calibration split, 40 fewer"):
        text.check(200)
    with pytest.raises(ValueError, match="length must be 2 or more"):
        text.sequences("test", 1)
    for get in (text.sequences, text.documents):
        with pytest.raises(ValueError, match="split must be one of .*got 'train'"):
            get("train")


def test_few_documents_are_said_with_what_they_cost(recwarn):
    """The factors are those of a table of Student's t: 2.201 and 12.706 instead of 1.960."""
    made_text(*[40] * 12).check(20)
    assert not recwarn.list
    with pytest.warns(UserWarning) as warned:
        made_text(*[40] * 11).check(20, splits=["test"])
        made_text(*[40] * 12).check(20, max_sequences=2, splits=["test"])
        made_text(40).check(20, max_sequences=9, splits=["test"])
    eleven, two, one = (str(warning.message) for warning in warned)
    assert eleven.startswith("the 22 sequences of my_texts in its test split are of 11 documents, 1 fewer than")
    assert eleven.endswith("for that alone they are 1.1 times as long as with many. Take more documents.")
    assert "are of 2 documents, 10 fewer" in two and "6.5 times as long" in two
    assert two.endswith("Take more sequences than 2 of each domain, or more documents.")
    assert "are of 1 documents" in one and one.endswith("there are none at all. Take more documents.")


# -- the sweep -------------------------------------------------------------------------------------------------


def test_the_sweep_reads_a_text_of_ones_own(tmp_path, capsys):
    for domain in ("letters", "mails"):
        write_jsonl(tmp_path / "my_texts" / domain / "a.jsonl", [f"{domain} {text}" for text in sentences(30)], "body")
    out, options = (
        tmp_path / "table.csv",
        ["--text-field", "body", "--length", "48", "--sequences", "7", "--batch-size", "5"],
    )
    command = ["sweep", "--text", str(tmp_path / "my_texts"), *options, "--rules", "top-k:7,8 bh:0.05"]
    main([*command, "--out", str(out)])
    table = pd.read_csv(out)
    assert set(table["domain"]) == {"letters", "mails"} and len(table) == 3 * 2 * 7
    assert "95 % intervals over documents" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text", "no/such.txt"], "there is no file or folder 'no/such.txt' to read"),
        (["--text", str(DEMO / "config.json")], "text is read from files that end in .txt or .jsonl"),
        (["--text-separator", ";"], "the repository's held-out text has its documents already: a separator is for"),
    ],
)
def test_the_sweep_says_what_it_cannot_read(options, message):
    with pytest.raises(SystemExit, match=message):
        main(["sweep", *options])
