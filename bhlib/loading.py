"""Load a model to route: the embedded demo, or the real OLMoE; and the demo's held-out text."""

import json
from importlib.resources import files
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

DEMO = Path(str(files("bhlib") / "demo"))

#: Splits of the held-out text: fit a null on the first, choose settings on the second, report on the third.
SPLITS = ("calibration", "validation", "test")


def load_demo(dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The embedded OLMoE (`bhlib/demo`), in evaluation mode, with its tokenizer. Needs no network.

    Parameters
    ----------
    dtype : torch.dtype
        Of the weights, which are stored in bfloat16. float32 is the fastest on most CPUs.
    """
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # half a second needs none
    try:
        model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=dtype, local_files_only=True)
    finally:
        if shown:
            logging.enable_progress_bar()
    return model.eval(), AutoTokenizer.from_pretrained(DEMO, local_files_only=True)


def load_olmoe(
    name_or_path: str = "allenai/OLMoE-1B-7B-0924",
    dtype: str | torch.dtype = "auto",
    device_map: str | dict | None = "auto",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A pretrained OLMoE from the Hugging Face hub or a local folder, in evaluation mode, with its tokenizer.

    Parameters
    ----------
    name_or_path : str
        Hub id or folder. The default has 6.9 billion parameters: 13.8 GB in bfloat16.
    dtype : str or torch.dtype
        ``"auto"`` for the checkpoint's own, bfloat16.
    device_map : str or dict or None
        ``"auto"`` spreads the model over the GPUs and then the CPU, by accelerate; None keeps it on the CPU.

    Raises
    ------
    OSError
        If the checkpoint is neither on the hub nor in a folder, or the hub cannot be reached.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
        model = AutoModelForCausalLM.from_pretrained(name_or_path, dtype=dtype, device_map=device_map)
    except OSError as error:
        raise OSError(
            f"{name_or_path!r} could not be loaded, neither from the Hugging Face hub nor as a folder. Check the name "
            f"and the connection (HF_HUB_OFFLINE must not be set), or use the embedded model, which needs no network: "
            f"model, tokenizer = bhlib.load_demo(). The cause was: {error}"
        ) from error
    return model.eval(), tokenizer


def heldout_domains() -> dict:
    """What the held-out text is: per domain its sources, licences and sizes (`heldout.json`)."""
    return json.loads((DEMO / "heldout.json").read_text(encoding="utf-8"))


def load_heldout(split: str = "test", length: int = 512, max_sequences: int | None = None) -> dict[str, Tensor]:
    """Held-out text of the demo, never trained on, cut into sequences of equal length.

    Parameters
    ----------
    split : {"calibration", "validation", "test"}
        Fit nulls on the first, choose settings on the second, report on the third.
    length : int
        Tokens per sequence; what is left over at a domain's end is dropped.
    max_sequences : int, optional
        Take only so many sequences of each domain, spread evenly over it.

    Returns
    -------
    dict of str to Tensor [sequences, length], int64
        Token ids by domain. Documents are separated by the end-of-text token.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}.")
    if length < 2:
        raise ValueError(f"length must be 2 or more, since the first token has no loss; got {length}.")
    data = {}
    with safe_open(DEMO / "heldout.safetensors", framework="pt") as store:
        for key in sorted(store.keys()):
            key_split, _, domain = key.partition("/")
            if key_split != split:
                continue
            tokens = store.get_tensor(key).to(torch.int64)
            sequences = tokens[: len(tokens) // length * length].view(-1, length)
            if max_sequences is not None and max_sequences < len(sequences):
                sequences = sequences[torch.linspace(0, len(sequences) - 1, max_sequences).round().long()]
            data[domain] = sequences
    return data
