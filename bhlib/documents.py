"""Texts of one's own, document by document: files, folders, and data sets of the Hugging Face hub.

What is a document decides what intervals are made over. In a file ``.jsonl`` it is the field of a line, in a data set
that of a row, and a file ``.txt`` is one document, unless a separator is given that it is split at. In some data sets
a row is a line or a paragraph (WikiText): these are not independent of their neighbours, and intervals over them are
too short.
"""

import json
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

#: Files that can be read, by their endings.
ENDINGS = (".txt", ".jsonl")


def open_documents(
    source: str | Path, field: str = "text", separator: str | None = None
) -> tuple[str, dict[str, Iterator[str]]]:
    """The name of a source, and its documents by domain, read when they are asked for.

    Parameters
    ----------
    source : str or path
        A file, ``.txt`` or ``.jsonl``; a folder of such files, whose subfolders are its domains, and whose files
        beside them are one more; or a data set of the Hugging Face hub, ``"hf:NAME"``, ``"hf:NAME:CONFIG"`` or
        ``"hf:NAME:CONFIG:SPLIT"`` (CONFIG may be empty). The ``hf:`` may be left out where no file has the name.
    field : str
        What the text is called in a line of ``.jsonl`` or a row of a data set.
    separator : str, optional
        Regular expression at whose matches texts are split into documents; ``r"\\n\\s*\\n"`` is an empty line. The
        matches are no part of the text. Pieces of one text are not independent, and intervals over them too short.

    Raises
    ------
    OSError, ValueError, ImportError
        If there is nothing to read, or no way to read it. What is wrong inside a file is raised when the reading comes
        to it, with the file and the place.
    """
    split_at = _compiled(separator)
    path = Path(source).expanduser()
    if path.exists() and not str(source).startswith("hf:"):
        files = _files_by_domain(path)
        name, texts = path.resolve().name, {domain: _texts_of_files(files[domain], field) for domain in files}
    elif isinstance(source, Path) or re.match(r"[./~]", source) or source.endswith(("/", *ENDINGS)):
        raise FileNotFoundError(f"there is no file or folder {str(source)!r} to read text from: check the path.")
    else:
        name, rows = _rows_of_hub(source.removeprefix("hf:"))
        texts = {name: _texts_of_rows(rows, field, name)}
    return name, {domain: _pieces(texts[domain], split_at) for domain in texts}


def _compiled(separator: str | None) -> re.Pattern | None:
    try:
        pattern = re.compile(separator) if separator is not None else None
    except re.error as error:
        raise ValueError(f"the separator {separator!r} is not a regular expression: {error}.") from error
    if pattern and pattern.pattern == "":
        raise ValueError(r"the separator is empty: write for example '\n\s*\n' for an empty line, or give none.")
    if pattern and pattern.groups:  # which would be pieces of the text
        raise ValueError(f"the separator {separator!r} has a group that it keeps: write (?:…) instead of (…).")
    return pattern


def _pieces(texts: Iterator[str], split_at: re.Pattern | None) -> Iterator[str]:
    """Texts, split if there is something to split at; without those that are empty."""
    for text in texts:
        yield from (piece for piece in (split_at.split(text) if split_at else [text]) if piece.strip())


# -- files -----------------------------------------------------------------------------------------------------


def _files_by_domain(path: Path) -> dict[str, list[Path]]:
    """The files to read by domain, in the order of their names; hidden ones are left out."""
    if path.is_file():
        return {path.stem: [_readable(path)]}
    found: dict[str, list[Path]] = {}
    for file in sorted(path.rglob("*")):
        inside = file.relative_to(path).parts
        if file.is_file() and not any(part.startswith(".") for part in inside):
            found.setdefault(inside[0] if len(inside) > 1 else path.resolve().name, []).append(_readable(file))
    if not found:
        raise ValueError(f"the folder {str(path)!r} holds no text: put files into it that end in {_allowed()}.")
    return found


def _readable(path: Path) -> Path:
    if path.suffix.lower() not in ENDINGS:
        raise ValueError(f"{path}: text is read from files that end in {_allowed()}; convert it, or take it away.")
    return path


def _allowed() -> str:
    return " or ".join(ENDINGS)


def _texts_of_files(paths: list[Path], field: str) -> Iterator[str]:
    for path in paths:
        if not path.stat().st_size:
            raise ValueError(f"{path} is empty: take it away, or put text into it.")
        if path.suffix.lower() == ".txt":
            yield _decoded(path.read_bytes(), path, 0).removeprefix("\ufeff").replace("\r\n", "\n")
        else:
            yield from _texts_of_lines(path, field)


def _texts_of_lines(path: Path, field: str) -> Iterator[str]:
    """The texts of a file with a JSON object per line."""
    start = 0
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            line = _decoded(raw, path, start).removeprefix("\ufeff")
            start += len(raw)
            if line.strip():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path}, line {number}: not JSON ({error}); each line is one object.") from error
                yield _text_in(row, field, f"{path}, line {number}")


def _decoded(raw: bytes, path: Path, start: int) -> str:
    """Bytes as text; `start` is where they begin in the file."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        place = start + error.start
        raise ValueError(
            f"{path} is not UTF-8: byte {place} is 0x{raw[error.start]:02x} ({error.reason}). Convert it, for example "
            f"with iconv -f LATIN1 -t UTF-8."
        ) from error


def _text_in(row: Any, field: str, place: str) -> str:
    """The text of a line or a row."""
    if not isinstance(row, dict):
        raise ValueError(f"{place}: an object with fields is wanted, got {type(row).__name__}.")
    if field not in row:
        fields = ", ".join(map(repr, row)) or "none"
        raise ValueError(f"{place}: there is no field {field!r}; its fields are {fields}. Name the one with the text.")
    text = row[field]
    if not isinstance(text, str):
        raise ValueError(f"{place}: the field {field!r} holds no text but {type(text).__name__}.")
    if re.search("[\ud800-\udfff]", text):  # which JSON can write, and no tokenizer reads
        raise ValueError(f"{place}: the field {field!r} holds half a character, a lone surrogate: mend that line.")
    return text


# -- data sets -------------------------------------------------------------------------------------------------


def _rows_of_hub(source: str) -> tuple[str, Iterator[dict]]:
    """The name and the rows of a data set: ``NAME``, ``NAME:CONFIG`` or ``NAME:CONFIG:SPLIT``. Nothing is stored."""
    name, config, split = (*source.split(":"), "", "")[:3]
    try:
        datasets = import_module("datasets")  # no requirement of the package: only who names a data set needs it
    except ImportError as error:
        raise ImportError(
            f"there is no file or folder {source!r} here, and to read a data set of that name from the Hugging Face "
            f"hub, the library datasets is needed: pip install datasets."
        ) from error
    try:
        parts = datasets.load_dataset(name, config or None, streaming=True)
    except Exception as error:  # of many kinds, some of which only datasets knows
        raise OSError(
            f"{name!r} could not be opened as a data set of the Hugging Face hub: {error}. Check the name "
            f"(hf:NAME:CONFIG:SPLIT) and the connection, or the path if a file or folder is meant."
        ) from error
    if not split and len(parts) == 1:
        (split,) = parts
    if split not in parts:
        wanted = f"no part {split!r}" if split else "several parts"
        example = f"hf:{name}:{config}:{next(iter(parts))}"
        raise ValueError(f"the data set {name!r} has {wanted}: name one of {', '.join(parts)}, for example {example}.")
    return f"{name} ({', '.join(filter(None, [config, split]))})", iter(parts[split])


def _texts_of_rows(rows: Iterator[dict], field: str, name: str) -> Iterator[str]:
    for number, row in enumerate(rows, start=1):
        yield _text_in(row, field, f"{name}, row {number}")
