"""One safetensors file of what was fitted to each layer of a model: the same tensors for every layer, and a header."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

#: Version of the file format.
FORMAT = 1


def save_layers(
    path: str | Path, kind: str, fields: Sequence[str], layers: Sequence[Sequence[Tensor]], **header: Any
) -> None:
    """Write the tensors of each layer, named ``field.layer``.

    Parameters
    ----------
    path : path
    kind : str
        What it is, in a word that files are told apart by and messages use, such as ``"norms"``.
    fields : sequence of str
        Names of the tensors of a layer.
    layers : sequence over layers of sequences of Tensor
        In the order of `fields`.
    **header
        What else belongs to it, as JSON.
    """
    tensors = {
        f"{name}.{index}": part.contiguous()
        for index, layer in enumerate(layers)
        for name, part in zip(fields, layer, strict=True)
    }
    facts = {"format": FORMAT, "kind": kind, "layers": len(layers)} | header
    save_file(tensors, path, metadata={"bhlib": json.dumps(facts, sort_keys=True)})


def load_layers(
    path: str | Path, kind: str, fields: Sequence[str], mend: str
) -> tuple[list[list[Tensor]], dict[str, Any]]:
    """What `save_layers` wrote: the tensors of each layer in the order of `fields`, on the CPU, and the header.

    Parameters
    ----------
    path, kind, fields
        As for `save_layers`.
    mend : str
        How such a file is written, for a message, such as "write them with OutputNorms.save(path)".

    Raises
    ------
    OSError
        If there is no such file.
    ValueError
        If the file holds nothing of this kind, or is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("bhlib", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}): save the {kind} again.") from error
    if header.get("kind") != kind or header.get("format") != FORMAT:
        raise ValueError(f"{path} holds no {kind} of format {FORMAT}: {mend}.")
    wanted = {f"{name}.{index}" for index in range(header["layers"]) for name in fields}
    if wanted != tensors.keys():
        raise ValueError(f"{path} is damaged: {sorted(wanted ^ tensors.keys())} do not fit its header.")
    return [[tensors[f"{name}.{index}"] for name in fields] for index in range(header["layers"])], header
