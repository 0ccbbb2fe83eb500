"""Calibration files: load what ``FittedNull.save`` wrote, and refuse what is damaged or was made for another model."""

import json
import reprlib
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bhlib.procedures import is_whole
from bhlib.pvalues.contribution import ContributionNull
from bhlib.pvalues.fitted import FORMAT, FittedNull, kind_of
from bhlib.pvalues.names import fitted_nulls
from bhlib.pvalues.statistics import STATISTICS
from bhlib.pvalues.table import TableNull


def load_null(
    path: str | Path,
    model_name: str | None = None,
    num_layers: int | None = None,
    num_experts: int | None = None,
    statistic: str | None = None,
) -> FittedNull:
    """Load what ``FittedNull.save`` wrote, refusing a calibration made for something else.

    Parameters
    ----------
    path : str or Path
    model_name, num_layers, num_experts, statistic : optional
        What the calibration must have been made for. None accepts anything.

    Returns
    -------
    FittedNull
        With p-values equal to the bit to those of the null that was saved.

    Raises
    ------
    OSError
        If there is no such file, or it cannot be read.
    ValueError
        If the file is not a calibration, is damaged, is of another format version, or was made for another model,
        number of layers or experts, or statistic; the message says what was found and what was expected. Damage is
        noticed where no survival function is left; a changed digit that leaves one is not.
    """
    tensors, header = _read(path)
    expected = dict(model_name=model_name, num_layers=num_layers, num_experts=num_experts, statistic=statistic)
    for key, value in expected.items():
        if value is not None and header[key] != value:
            raise ValueError(
                f"{path} is a calibration with {key} {header[key]!r}, but {key} {value!r} is expected. P-values of "
                "another calibration mean nothing here: calibrate again, or load the file made for this model"
            )
    null = _saved_nulls()[header["null"]]
    _check_tables(null, tensors, header, path)
    return null(tensors, header)


def _saved_nulls() -> dict[str, type[FittedNull]]:
    """The nulls that files hold: those that are fitted to logits, and two that are not and have no entry by name."""
    return fitted_nulls() | {null.name: null for null in (TableNull, ContributionNull)}


def _read(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); save the calibration again") from error
    if "bhlib" not in metadata:
        raise ValueError(f"{path} is a safetensors file, but no calibration: write one with .save(path)")
    try:
        header = json.loads(metadata["bhlib"])
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise _damaged(path, "its header is no JSON object")
    _check_header(header, path)
    return tensors, header


def _damaged(path: str | Path, what: str) -> ValueError:
    return ValueError(f"{path} is damaged: {what}; save the calibration again, or calibrate again")


#: What a header must hold, and what it may be.
_HEADER_TYPES = {
    "statistic": lambda value: isinstance(value, str) and value in STATISTICS,
    "exclude_top": lambda value: is_whole(value) and value >= 0,
    "model_name": lambda value: isinstance(value, str) and value != "",
    "num_layers": lambda value: is_whole(value) and value >= 1,
    "num_experts": lambda value: is_whole(value) and value >= 2,
    "per_expert": lambda value: isinstance(value, bool),
    "sample_sizes": lambda value: isinstance(value, list),
    "seed": lambda value: value is None or is_whole(value),
}


def _are_levels(levels: object) -> bool:
    """Whether `alpha_for` can read them: as many numbers of experts as levels, both increasing, levels in (0, 1)."""
    if not isinstance(levels, dict) or levels.keys() != {"mean_experts", "alpha"}:
        return False
    means, alphas = levels["mean_experts"], levels["alpha"]
    for values in (means, alphas):
        if not isinstance(values, list) or not values or not all(isinstance(value, float) for value in values):
            return False
        if not np.isfinite(values).all() or not (np.diff(values) > 0).all():
            return False
    return len(means) == len(alphas) and 0 < alphas[0] and alphas[-1] < 1


def _check_header(header: dict, path: str | Path) -> None:
    """Every key is there, and of the right kind."""

    def value_of(key: str) -> object:
        if key not in header:
            raise _damaged(path, f"its header lacks {key}")
        return header[key]

    if value_of("format") != FORMAT:
        raise ValueError(f"{path} has format version {header['format']!r}, but {FORMAT} is read here; calibrate again")
    nulls = _saved_nulls()
    if not isinstance(value_of("null"), str) or header["null"] not in nulls:
        raise ValueError(f"{path} holds a null {header['null']!r}, but must be one of {', '.join(map(repr, nulls))}")
    for key, fits in (_HEADER_TYPES | nulls[header["null"]].header_types).items():
        if not fits(value_of(key)):
            raise _damaged(path, f"its header has the {key} {reprlib.repr(header[key])}")
    if "levels" in header and not _are_levels(header["levels"]):
        raise _damaged(path, f"its header has the levels {reprlib.repr(header['levels'])}")
    if header["exclude_top"] > header["num_experts"] - 2:
        raise _damaged(path, f"its exclude_top is {header['exclude_top']} of {header['num_experts']} experts")


def _check_tables(null: type[FittedNull], tensors: dict[str, Tensor], header: dict, path: str | Path) -> None:
    """The tensors must be those that the header announces, and tables of a survival function."""
    num_layers, columns = header["num_layers"], header["num_experts"] if header["per_expert"] else 1
    if num_layers > len(tensors):  # before anything of the announced size is made
        raise _damaged(path, f"its header announces {num_layers:,} layers, but it holds {len(tensors)} tables")
    wanted = {f"{part}.{layer}" for layer in range(num_layers) for part in null.parts}
    if wanted != tensors.keys():
        odd = ", ".join(sorted(wanted ^ tensors.keys()))
        raise _damaged(path, f"the header and the tables disagree on {odd}")
    for name, tensor in tensors.items():
        if tensor.ndim == 0 or len(tensor) != columns:
            raise _damaged(path, f"{name} is {kind_of(tensor)}, but {columns} rows are announced")
    if len(header["sample_sizes"]) != num_layers:
        raise _damaged(path, f"its header has sample_sizes of {len(header['sample_sizes'])} layers, not {num_layers}")
    for layer, announced in enumerate(header["sample_sizes"]):
        sizes = announced if header["per_expert"] else [announced]
        if not isinstance(sizes, list) or len(sizes) != columns or not all(is_whole(n) and n >= 1 for n in sizes):
            raise _damaged(path, f"its header has the sample_sizes {reprlib.repr(announced)} for layer {layer}")
        what = null.damage(sizes, **{part: tensors[f"{part}.{layer}"] for part in null.parts})
        if what is not None:
            raise _damaged(path, f"in layer {layer} {what}")
