"""The finished cells of a sweep on disk: a CSV per rule, that tells what its numbers depend on and that it is whole.

A cell's name ends in a hash of bhlib's source text, the rule, the text, the model and the options: if one of them
changes, another cell is meant. Only what bhlib defines is stored. The code of anybody else's rule or p-values can
change while all that could be written into a name stays the same, so they are refused, whatever they are.
"""

import hashlib
import json
import numbers
import os
import re
import warnings
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from bhlib.discovery import find_moe_layers
from bhlib.rules import Replay, Rule

#: Columns of whole numbers.
_COUNTS = ("sequence", "tokens", "rows")

#: Settings that say where a model comes from, not what it is.
_ORIGIN = ("_name_or_path", "transformers_version")

# -- names -----------------------------------------------------------------------------------------------------


def cell_path(folder: str | Path, name: str, rule: Rule | None, key: str) -> Path:
    """The file of one cell of a sweep: the rule's name, and a hash of what its numbers depend on.

    Parameters
    ----------
    folder : path
    name : str
        What the rule is called; only for people who look into the folder.
    rule : Rule or None
        Told apart by its class and its public attributes, the tensors of its p-values included.
    key : str
        The rest (`sweep_key`).

    Raises
    ------
    ValueError
        If the rule or its p-values are not of a class of bhlib, or impose a recording, as `Replay` does.
    """
    advice = "evaluate it without a cache, sweep(..., cache=None)."
    if isinstance(rule, Replay):
        raise ValueError(f"the rule {name!r} cannot be stored, since it imposes what one run recorded: {advice}")
    try:
        told = _tell(rule)
    except TypeError as reason:
        raise ValueError(
            f"the rule {name!r} cannot be stored, since it depends on what a file's name cannot tell ({reason}): "
            f"{advice}"
        ) from reason
    readable = re.sub(r"[^A-Za-z0-9.]+", "-", name)[:80].strip("-")
    return Path(folder) / f"{readable}-{_hash(f'{key} {told}'.encode())[:16]}.csv"


def sweep_key(model: nn.Module, data: Mapping[str, Tensor], options: Mapping[str, object]) -> str:
    """Hash of what the numbers of a sweep depend on, but for the rule.

    Of a model that is its configuration, what `find_moe_layers` sees, and up to 4,096 numbers of each parameter and
    buffer; weights that accelerate has offloaded are brought in one module at a time. Not seen: other settings of its
    modules, hooks, and classes or functions that are replaced while Python runs.

    Raises
    ------
    RuntimeError
        If bhlib's files are no longer those that were imported.
    """
    package = Path(__file__).parent
    if hash_source(package) != _SOURCE:
        raise RuntimeError(
            "cells cannot be named, since bhlib's files have changed after they were imported: restart Python, or "
            "sweep without a cache, sweep(..., cache=None)."
        )
    return _hash(_tell([_SOURCE, list(data.items()), dict(options), _parts(model)]).encode())


def model_key(model: nn.Module) -> str:
    """Hash of what tells a model from another, as in `sweep_key`."""
    return _hash(_tell(_parts(model)).encode())


def hash_source(package: Path, drawing: bool = False) -> str:
    """Hash of the source text below a folder; what only draws is left out, unless it is asked for."""
    texts = {path.relative_to(package).as_posix(): path.read_text("utf-8") for path in package.rglob("*.py")}
    kept = (name for name in texts if drawing or not name.startswith(("figures/", "widgets")))
    return _hash(_tell({name: texts[name] for name in kept}).encode())


def _tell(value: object) -> str:
    """A text that is the same for equal values, in every process, and another one for other values."""
    if isinstance(value, str | numbers.Number | None):
        return repr(value)
    if isinstance(value, Tensor):
        values = value.detach().cpu().contiguous().view(-1).view(torch.uint8)
        return f"{value.dtype} {tuple(value.shape)} {_hash(values.numpy().tobytes())}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_tell, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(sorted(f'{_tell(key)}: {_tell(item)}' for key, item in value.items()))}}}"
    cls = type(value)
    if cls.__module__.partition(".")[0] != "bhlib":
        raise TypeError(f"{cls.__module__}.{cls.__qualname__}, which bhlib does not define")
    public = {name: item for name, item in vars(value).items() if not name.startswith("_")}  # the rest is derived
    return f"{cls.__qualname__} {_tell(public)}"


def _parts(model: nn.Module) -> list:
    """What tells a model, for `_tell`."""
    own: Any = model.config
    config = {key: value for key, value in own.to_dict().items() if key not in _ORIGIN}
    layers = [(layer.name, layer.num_experts, layer.top_k, layer.weighting) for layer in find_moe_layers(model)]
    parts = [json.dumps(config, sort_keys=True, default=str), layers]
    for name, module in model.named_modules():
        with align_module_device(module):
            for key, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                parts.append((name, key, tensor.shape, [_tell(_some(part)) for part in _plain(tensor.detach())]))
    return parts


def _plain(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that one consists of: itself, or what a quantized one, such as torchao's, has inside."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in _plain(getattr(tensor, name))]


def _some(tensor: Tensor) -> Tensor:
    """Up to 4,096 numbers of a tensor."""
    step = -(-tensor.numel() // 4096) | 1  # odd, so that it meets every column of a matrix
    return tensor.flatten()[::step]


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


#: Of the files as they were imported.
_SOURCE = hash_source(Path(__file__).parent)

# -- files -----------------------------------------------------------------------------------------------------


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
