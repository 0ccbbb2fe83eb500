"""The text that a model is studied on: the repository's held-out text, or one's own, in three splits by document."""

import argparse
import hashlib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from bhlib.documents import open_documents
from bhlib.loading import DEMO, SPLITS, heldout_tokens
from bhlib.sequences import cut, encode, owners

#: What part of the tokens of a text of one's own each split gets, the largest first.
SHARES = {"test": 0.5, "calibration": 0.25, "validation": 0.25}

#: Documents of a split below which its intervals over documents are called too few.
ENOUGH_DOCUMENTS = 12


@dataclass(frozen=True, eq=False)
class Text:
    """Documents as token ids, in three splits; every document is in one of them, and in no other.

    Attributes
    ----------
    name : str
        For titles and pages.
    tokens : mapping of str to mapping of str to sequence of Tensor [tokens], int64
        By split and domain, a tensor for each document, the end-of-text token behind it.
    """

    name: str
    tokens: Mapping[str, Mapping[str, Sequence[Tensor]]] = dataclass_field(repr=False)

    def sequences(self, split: str, length: int = 512, max_sequences: int | None = None) -> dict[str, Tensor]:
        """The text of a split, cut into sequences of equal length.

        Parameters
        ----------
        split : {"calibration", "validation", "test"}
        length : int
            Tokens per sequence; what is left over at a domain's end is dropped.
        max_sequences : int, optional
            Take only this many of each domain, spread evenly over it.

        Returns
        -------
        dict of str to Tensor [sequences, length], int64
            By domain.

        Raises
        ------
        ValueError
            If a domain has less text than one sequence.
        """
        for domain, documents in self._of(split).items():
            tokens = sum(map(len, documents))
            if tokens < length:
                raise ValueError(
                    f"{self.name} has {tokens} tokens of {domain!r} in its {split} split, {length - tokens} fewer than "
                    f"one sequence: give more text, or a length of at most {tokens}."
                )
        return {domain: cut(documents, length, max_sequences) for domain, documents in self._of(split).items()}

    def documents(self, split: str, length: int = 512, max_sequences: int | None = None) -> dict[str, np.ndarray]:
        """The document of each of `sequences`, int64 [sequences] by domain: what intervals are made over.

        A sequence that holds pieces of several documents counts as part of the one that most of its tokens are of.
        """
        return {domain: owners(documents, length, max_sequences) for domain, documents in self._of(split).items()}

    def table(self, length: int = 512, max_sequences: int | None = None) -> pd.DataFrame:
        """How much text there is.

        Returns
        -------
        pandas.DataFrame
            A row per split and domain: ``split``, ``domain``, ``documents``, ``tokens``, the ``sequences`` that are
            cut of it, and the ``units`` of intervals: documents that a sequence counts as part of.
        """
        rows = []
        for split in self.tokens:
            found = self.documents(split, length, max_sequences)
            for domain, documents in self._of(split).items():
                counts = (len(documents), sum(map(len, documents)), len(found[domain]), len({*found[domain]}))
                rows.append((split, domain, *counts))
        return pd.DataFrame(rows, columns=["split", "domain", "documents", "tokens", "sequences", "units"])

    def check(self, length: int = 512, max_sequences: int | None = None, splits: Iterable[str] = SPLITS) -> None:
        """Refuse a text of which a split has no sequence, and warn if one has few documents for intervals.

        Parameters
        ----------
        length, max_sequences
            As for `sequences`.
        splits : iterable of str
            Those that will be used.

        Raises
        ------
        ValueError
            With the tokens that are there, and how many are missing.

        Warns
        -----
        UserWarning
            For each split that has sequences of fewer documents than `ENOUGH_DOCUMENTS`, in all its domains together:
            how many are missing, and how much longer intervals are.
        """
        table = self.table(length, max_sequences)
        for split in splits:
            self.sequences(split, length, max_sequences)
            found = table[table["split"] == split]
            missing = ENOUGH_DOCUMENTS - found["units"].sum()
            if missing > 0:
                more = f"more sequences than {max_sequences} of each domain, or "
                limited = more if (found["sequences"] == max_sequences).any() else ""
                warnings.warn(
                    f"the {found['sequences'].sum()} sequences of {self.name} in its {split} split are of "
                    f"{found['units'].sum()} documents, {missing} fewer than intervals over documents should have: "
                    f"{_cost_of_few(found['units'])}. Take {limited}more documents.",
                    stacklevel=2,
                )

    @cached_property
    def key(self) -> str:
        """Hash of the tokens and of the split that each document is in, for names of files and folders."""
        told = hashlib.sha256()
        for split, domains in self.tokens.items():
            for domain, documents in domains.items():
                told.update(repr((split, domain, [len(document) for document in documents])).encode())
                for document in documents:
                    told.update(document.numpy().tobytes())
        return told.hexdigest()[:16]

    def _of(self, split: str) -> Mapping[str, Sequence[Tensor]]:
        if split not in self.tokens:
            raise ValueError(f"split must be one of {SPLITS}, got {split!r}.")
        return self.tokens[split]


def read_text(
    source: str | Path | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    field: str = "text",
    separator: str | None = None,
    seed: int = 0,
    max_tokens: int = 4_000_000,
) -> Text:
    """The text to study a model on, in the model's tokens, split by document.

    Parameters
    ----------
    source : str or path or None
        None for the repository's held-out text, with the splits that it has. Otherwise what `open_documents` reads: a
        file ``.txt`` or ``.jsonl``, a folder of them, or ``"hf:NAME:CONFIG:SPLIT"``. Of each domain half the tokens
        go into the test split and a quarter into each of the others, as nearly as whole documents can. Copies of a
        document are left out.
    tokenizer : PreTrainedTokenizerBase
        Of the model. It needs an end-of-text token, which is put behind each document.
    field, separator
        As for `open_documents`.
    seed : int
        Another one splits otherwise.
    max_tokens : int
        Reading a domain ends here, with a warning, so that any source fits into memory: 32 MB by default. The last
        document then breaks off.

    Raises
    ------
    ValueError
        If a domain has fewer documents than there are splits, if the tokenizer has no end-of-text token, or for what
        `open_documents` cannot read.
    OSError, ImportError
        If there is no such source, or the library that reads it is missing.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has no end-of-text token, which is put behind each document: set tokenizer.eos_token."
        )
    if source is None:
        if separator is not None:
            raise ValueError("the repository's held-out text has its documents already: a separator is for another.")
        return _heldout(tokenizer)
    name, domains = open_documents(source, field, separator)
    seen: set[bytes] = set()
    tokens: dict[str, dict[str, list[Tensor]]] = {split: {} for split in SPLITS}
    for domain, texts in domains.items():
        documents = _encode_up_to(max_tokens, _without_copies(texts, seen), tokenizer, domain)
        if len(documents) < len(SHARES):
            raise ValueError(
                f"{name}: {domain!r} has {len(documents)} documents, and each of the {len(SHARES)} splits "
                f"({', '.join(SPLITS)}) needs one. A file .txt is one document: give more of them, a separator "
                f"at which it is split, or a file .jsonl with a document in each line."
            )
        for split, part in split_documents(documents, seed).items():
            tokens[split][domain] = part
    return Text(name, tokens)


def split_documents(documents: Sequence[Tensor], seed: int = 0) -> dict[str, list[Tensor]]:
    """Three documents or more into the splits of `SHARES`, none of which is left empty.

    In random order, each document goes to the split that has least of its share so far.
    """
    chosen: dict[str, list[int]] = {split: [] for split in SHARES}
    filled = dict.fromkeys(SHARES, 0.0)
    for number in np.random.default_rng(seed).permutation(len(documents)):
        split = min(SHARES, key=lambda name: filled[name])
        chosen[split].append(number)
        filled[split] += len(documents[number]) / SHARES[split]
    return {split: [documents[number] for number in sorted(chosen[split])] for split in SPLITS}


def _cost_of_few(units: pd.Series) -> str:
    """What few documents, by domain, do to intervals, which `bhlib.comparisons.resample` makes of them."""
    freedom = units.sum() - (len(units) if units.min() > 1 else 1)
    if not freedom:
        return "there are none at all"
    factor = stats.t.ppf(0.975, freedom) / stats.norm.ppf(0.975)
    return f"for that alone they are {factor:.1f} times as long as with many"


def _heldout(tokenizer: PreTrainedTokenizerBase) -> Text:
    own = AutoTokenizer.from_pretrained(DEMO, local_files_only=True)
    same = tokenizer.get_vocab() == own.get_vocab() and tokenizer.added_tokens_decoder == own.added_tokens_decoder
    other = None if same else tokenizer
    return Text("the repository's held-out text", {split: heldout_tokens(split, other) for split in SPLITS})


def _without_copies(texts: Iterable[str], seen: set[bytes]) -> Iterable[str]:
    for text in texts:
        told = hashlib.sha256(text.strip().encode()).digest()
        if told not in seen:
            seen.add(told)
            yield text


def _encode_up_to(most: int, texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, domain: str) -> list[Tensor]:
    """Documents as tokens, `most` of them in all; the last one breaks off there."""
    documents: list[Tensor] = []
    room = most
    for text in texts:
        document = encode(text, tokenizer)
        documents.append(document[:room])
        room -= len(document)
        if room <= 0:
            warnings.warn(f"reading {domain!r} has ended at max_tokens={most}: what follows is left out.", stacklevel=3)
            break
    return documents


# -- the command line ------------------------------------------------------------------------------------------


def add_text_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of commands that read a text, for `text_of`."""
    parser.add_argument(
        "--text", metavar="SOURCE",
        help="your own: a file .txt or .jsonl, a folder of them, or a data set of the Hugging Face hub, "
        "hf:NAME:CONFIG:SPLIT (default: the repository's held-out text)",
    )  # fmt: skip
    parser.add_argument(
        "--text-field", default="text", metavar="NAME",
        help="of a line of .jsonl or a row of a data set (default: text)",
    )  # fmt: skip
    parser.add_argument(
        "--text-separator", metavar="REGEX",
        help=r"splits texts into documents: '\n\s*\n' at empty lines (default: a file .txt is one document)",
    )  # fmt: skip


def check_source(arguments: argparse.Namespace) -> None:
    """Say at once, before a model is loaded, that what `--text` names is not there or is no text.

    Raises
    ------
    SystemExit
        With the reason.
    """
    if arguments.text is not None:
        with _as_exit():
            open_documents(arguments.text, arguments.text_field, arguments.text_separator)


def text_of(arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> Text:
    """The text that the options of `add_text_arguments` name.

    Raises
    ------
    SystemExit
        With the reason, if it cannot be read.
    """
    with _as_exit():
        return read_text(arguments.text, tokenizer, field=arguments.text_field, separator=arguments.text_separator)


@contextmanager
def _as_exit() -> Iterator[None]:
    try:
        yield
    except (ImportError, OSError, ValueError) as error:
        raise SystemExit(str(error)) from error
