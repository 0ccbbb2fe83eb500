"""The finished cells of a sweep on disk: a CSV per rule, named after what its numbers depend on, with a checksum."""

import hashlib
import os
import re
import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd

from bhlib.fingerprints import Fingerprint
from bhlib.rules import Replay, Rule

#: Version of the stored cells: part of their names, to be raised when what a cell means changes.
CELL_FORMAT = 3

#: Columns of whole numbers.
_COUNTS = ("sequence", "tokens", "rows")


def cell_path(folder: str | Path, name: str, rule: Rule | None, key: str) -> Path:
    """The file of one cell of a sweep: the rule's name, and a hash of what its numbers depend on.

    Parameters
    ----------
    folder : path
    name : str
        What the rule is called; only for people who look into the folder.
    rule : Rule or None
        Told apart by its parameters and by its code, own functions and tables included
        (`bhlib.fingerprints.Fingerprint`).
    key : str
        The rest: data, model and options.

    Raises
    ------
    ValueError
        If the rule depends on something that cannot be told, or on a recording, as `Replay` does.
    """
    advice = "evaluate it without a cache, sweep(..., cache=None)."
    if isinstance(rule, Replay):
        raise ValueError(f"the rule {name!r} cannot be stored, since it imposes what one run recorded: {advice}")
    digest = Fingerprint()
    digest.add((CELL_FORMAT, key))
    try:
        digest.add(rule)
    except TypeError as reason:
        raise ValueError(
            f"the rule {name!r} cannot be stored, since it depends on what a file's name cannot tell ({reason}): "
            f"{advice}"
        ) from reason
    readable = re.sub(r"[^A-Za-z0-9.]+", "-", name)[:80].strip("-")
    return Path(folder) / f"{readable}-{digest.hexdigest()[:16]}.csv"


def open_folder(folder: str | Path) -> None:
    """Make the folder of the cells if there is none, and check that it can be written to.

    Raises
    ------
    OSError
        If not, with the folder's name, before anything is computed.
    """
    folder = Path(folder)
    attempt = folder / f"{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        attempt.touch()
        attempt.unlink(missing_ok=True)
    except OSError as error:
        raise type(error)(
            error.errno, f"finished rules cannot be kept in {str(folder)!r} ({error.strerror}): name another cache"
        ) from error


def write_cell(part: pd.DataFrame, path: Path) -> None:
    """Store the table of one rule: all of the file or none of it, whenever the process is stopped."""
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    unfinished.write_bytes(_seal(part.to_csv(index=False, na_rep="nan", lineterminator="\n").encode(), path))
    unfinished.replace(path)


def read_cell(path: Path) -> pd.DataFrame | None:
    """What was written, to the bit; None, with a warning that names the file, if a byte of it is missing or changed."""
    sealed = path.read_bytes()
    header, _, rows = sealed.partition(b"\n")
    text = header.removesuffix(b",checksum") + b"\n" + rows.replace(b"," + sealed[-17:-1] + b"\n", b"\n")
    if not rows.endswith(b"\n") or _seal(text, path) != sealed:  # without a whole row there is no checksum
        warnings.warn(f"{path} is not as it was written, so its rule is computed again.", stacklevel=3)
        return None
    # numpy reads back exactly what pandas prints, `read_csv` not in all versions.
    part = pd.read_csv(BytesIO(text), dtype=str, keep_default_na=False)
    for column in part.columns.drop("domain"):
        part[column] = np.array(part[column], dtype="int64" if column in _COUNTS else "float64")
    return part


def _seal(text: bytes, path: Path) -> bytes:
    """A CSV with one column more, in each row the hash of all rows and of the file's name."""
    checksum = hashlib.sha256(path.name.encode() + b"\n" + text).hexdigest()[:16].encode()
    header, _, rows = text.partition(b"\n")
    return header + b",checksum\n" + rows.replace(b"\n", b"," + checksum + b"\n")
