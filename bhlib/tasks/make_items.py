"""Make the items of both tasks from the held-out test text: always the same ones.

python -m bhlib.tasks.make_items            # writes the two .jsonl files beside this one
"""

import argparse
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

from bhlib.loading import heldout_documents
from bhlib.tasks import FOLDER

SEED = 1995
ITEMS_PER_DOMAIN = 40
CONTEXT_WORDS = 40
CONTINUATION_WORDS = 10
NUM_CHOICES = 4

#: What counts as a last word: letters, after which punctuation may follow.
_LAST_WORD = re.compile(r"([A-Za-z]{3,})[.,;:!?]*")


def _passages(document: str, num_words: int) -> Iterator[tuple[str, str]]:
    """Cut a document into passages of 40 words or more, each with `num_words` words that follow it.

    A passage is lengthened until a single space and a word (`_LAST_WORD`) follow, and the next one starts after what
    follows. Passages with broken characters, where the text was cut between the tokens of one, are left out.
    """
    words = list(re.finditer(r"\S+", document))
    start = 0
    for cut in range(1, len(words) - num_words + 1):
        end, follows = words[cut - 1].end(), words[cut].start()
        if cut - start < CONTEXT_WORDS or document[end:follows] != " " or not _LAST_WORD.fullmatch(words[cut][0]):
            continue
        context = document[words[start].start() : end]
        rest = document[follows : words[cut + num_words - 1].end()]
        start = cut + num_words
        if "\ufffd" not in context + rest:
            yield context, rest


def cloze_items(documents: list[str], domain: str) -> list[dict]:
    """Passages and the word that follows: ``domain``, ``context``, ``word``."""
    passages = [passage for document in documents for passage in _passages(document, 1)]
    chosen = random.Random(f"{SEED} cloze {domain}").sample(passages, ITEMS_PER_DOMAIN)
    return [{"domain": domain, "context": context, "word": _LAST_WORD.match(word)[1]} for context, word in chosen]


def continuation_items(documents: list[str], domain: str) -> list[dict]:
    """Passages and the ten words that follow, among others: ``domain``, ``context``, ``choices``, ``label``.

    The label is the place of the passage's own words among the choices.
    """
    draw = random.Random(f"{SEED} continuation {domain}")
    passages = [passage for document in documents for passage in _passages(document, CONTINUATION_WORDS)]
    chosen = draw.sample(passages, ITEMS_PER_DOMAIN)
    items = []
    for context, own in chosen:
        choices = draw.sample([other for _, other in chosen if other != own], NUM_CHOICES - 1)
        label = draw.randrange(NUM_CHOICES)
        choices.insert(label, own)
        items.append({"domain": domain, "context": context, "choices": choices, "label": label})
    return items


def make_items(folder: str | Path = FOLDER) -> None:
    """Write both files of items; the domains take turns, so that any first n items are a fair part of all."""
    documents = heldout_documents("test")
    for name, make in (("bh_cloze", cloze_items), ("bh_continuation", continuation_items)):
        by_domain = [make(texts, domain) for domain, texts in documents.items()]
        lines = [json.dumps(item, ensure_ascii=False) for turn in zip(*by_domain, strict=True) for item in turn]
        Path(folder, f"{name}.jsonl").write_text("\n".join([*lines, ""]), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bhlib.tasks.make_items", description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", default=FOLDER, help="where the files go (default: beside the script)")
    make_items(parser.parse_args().folder)
