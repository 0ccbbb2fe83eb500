"""Load a model to route: the embedded demo, or the real OLMoE; and the demo's held-out text."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from bhlib.sequences import cut, encode, owners

DEMO = Path(str(files("bhlib") / "demo"))

#: The demo's routers, trained for four experts under BH on 18 million tokens by `bhlib/demo/tuning_runs.py` (notebook
#: 10). The file is one that `bhlib.training.load_tuned` reads, too, with the levels that belong to them.
TUNED_ROUTER = DEMO / "tuned_router.safetensors"

#: Splits of the held-out text: fit a null on the first, choose settings on the second, report on the third.
SPLITS = ("calibration", "validation", "test")


def load_settings() -> dict:
    """Settings of rules by layer, chosen for the embedded model on its calibration text (`bhlib/demo/settings.py`).

    Returns
    -------
    dict
        ``layer_weights``: by method of `BH` ("bh", "fixed"), a weight per layer. ``static_per_layer``: by mean number
        of experts ("3" to "7"), the experts of each layer.
    """
    return json.loads((DEMO / "settings.json").read_text(encoding="utf-8"))


def load_demo(
    dtype: torch.dtype = torch.float32, *, tuned_router: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The embedded OLMoE (`bhlib/demo`), in evaluation mode, on the CPU, with its tokenizer. Needs no network.

    It stays on the CPU where there is a GPU, too: it is small, and its numbers then do not depend on the machine's GPU.
    ``model.to("cuda")`` moves it, as `bhlib.figures.Study` does, which runs it over far more text.

    Parameters
    ----------
    dtype : torch.dtype
        Of the weights, which are stored in bfloat16. float32 is the fastest on most CPUs.
    tuned_router : bool
        Whether to have the routers of `TUNED_ROUTER` instead of its own: better where experts are dropped, and a little
        worse where none is.
    """
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # half a second needs none
    try:
        model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=dtype, local_files_only=True)
    finally:
        if shown:
            logging.enable_progress_bar()
    if tuned_router:
        for name, weight in load_file(TUNED_ROUTER).items():
            model.get_parameter(name).data.copy_(weight)
    return model.eval(), AutoTokenizer.from_pretrained(DEMO, local_files_only=True)


def load_olmoe(
    name_or_path: str = "allenai/OLMoE-1B-7B-0924",
    dtype: str | torch.dtype = "auto",
    device_map: str | dict | None = "auto",
    **options: Any,
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
    **options
        What else `from_pretrained` takes. ``max_memory={0: "10GiB", "cpu": "20GiB"}, offload_folder="offload"`` leaves
        room on a card for long texts: layers beyond wait in the memory of the CPU, and then on disk, until a forward
        pass comes to them. ``quantization_config`` saves memory; `bhlib/large_models.md` says which can be patched.

    Raises
    ------
    OSError
        If the checkpoint is neither on the hub nor in a folder, or the hub cannot be reached.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
        model = AutoModelForCausalLM.from_pretrained(name_or_path, dtype=dtype, device_map=device_map, **options)
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


def heldout_documents(split: str = "test") -> dict[str, list[str]]:
    """The held-out text as text: a list of documents by domain. A domain's last document may break off."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO, local_files_only=True)
    documents = {}
    for domain, parts in heldout_tokens(split).items():
        texts = (tokenizer.decode(part, skip_special_tokens=True) for part in parts)
        documents[domain] = [text for text in texts if text]
    return documents


def load_heldout(
    split: str = "test",
    length: int = 512,
    max_sequences: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> dict[str, Tensor]:
    """Held-out text of the demo, never trained on, cut into sequences of equal length.

    Parameters
    ----------
    split : {"calibration", "validation", "test"}
        Fit nulls on the first, choose settings on the second, report on the third.
    length : int
        Tokens per sequence; what is left over at a domain's end is dropped.
    max_sequences : int, optional
        Take only this many sequences of each domain, spread evenly over it.
    tokenizer : PreTrainedTokenizerBase, optional
        Of another model, which then reads the same text in its own tokens. By default the demo's.

    Returns
    -------
    dict of str to Tensor [sequences, length], int64
        Token ids by domain. Documents are separated by the end-of-text token.
    """
    data = heldout_tokens(split, tokenizer)
    return {domain: cut(documents, length, max_sequences) for domain, documents in data.items()}


def heldout_sequence_documents(
    split: str = "test", length: int = 512, max_sequences: int | None = None
) -> dict[str, np.ndarray]:
    """The document that each sequence of `load_heldout` belongs to: the unit that intervals are made over.

    A sequence goes on across the end of a document, so it may hold pieces of several. It counts as part of the one
    that most of its tokens are of, the earlier one of two that are alike. (Joining all that share a sequence would
    make one unit of nearly a whole domain, since most documents end within a sequence.) So neighbouring documents are
    not quite independent, and a document that has most of no sequence is in no unit: 154 of the 165 of the test split
    have one, 6.5 sequences of 512 tokens each on average.

    Parameters
    ----------
    split, length, max_sequences
        As for `load_heldout`, with the demo's own tokens.

    Returns
    -------
    dict of str to ndarray [sequences], int64
        Number of the document in its domain, from 0.
    """
    return {domain: owners(documents, length, max_sequences) for domain, documents in heldout_tokens(split).items()}


def heldout_tokens(split: str = "test", tokenizer: PreTrainedTokenizerBase | None = None) -> dict[str, list[Tensor]]:
    """The documents of a split by domain, each as its token ids, int64 [tokens], the end-of-text token among them.

    Without a tokenizer they are the demo's own tokens, and a domain's last document may break off without an end.
    """
    if tokenizer is not None:
        texts = heldout_documents(split)
        return {domain: [encode(text, tokenizer) for text in documents] for domain, documents in texts.items()}
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}.")
    end = heldout_domains()["end_token"]
    with safe_open(DEMO / "heldout.safetensors", framework="pt") as store:
        keys = sorted(key for key in store.keys() if key.startswith(f"{split}/"))
        stored = {key.partition("/")[2]: store.get_tensor(key).to(torch.int64) for key in keys}
    return {domain: _at_ends(tokens, end) for domain, tokens in stored.items()}


def _at_ends(tokens: Tensor, end: int) -> list[Tensor]:
    """Tokens [tokens] as documents: a document's end is its last token."""
    ends = (tokens == end).nonzero().flatten() + 1
    return [part for part in tokens.tensor_split(ends.tolist()) if len(part)]
