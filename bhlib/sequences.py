"""Documents as token ids, cut into sequences of equal length that remember which document they are of."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase


def encode(document: str, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """A document's token ids, int64 [tokens], with the end-of-text token behind them if the tokenizer has one."""
    ids = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]  # longer than a model may read
    if tokenizer.eos_token_id is not None:
        ids = [*ids, tokenizer.eos_token_id]
    return torch.tensor(ids, dtype=torch.int64, device="cpu")


def cut(documents: Iterable[Tensor], length: int, max_sequences: int | None = None) -> Tensor:
    """Documents one behind the other, cut into sequences; what is left over at the end is dropped.

    Parameters
    ----------
    documents : iterable of Tensor [tokens], int64
    length : int
        Tokens per sequence, 2 or more.
    max_sequences : int, optional
        Take only this many, spread evenly.

    Returns
    -------
    Tensor [sequences, length], int64
    """
    return _rows(torch.cat([*documents]), length, max_sequences)


def owners(documents: Iterable[Tensor], length: int, max_sequences: int | None = None) -> np.ndarray:
    """The document that each sequence of `cut` belongs to: the one that most of its tokens are of.

    Of two that are alike the earlier one.

    Returns
    -------
    ndarray [sequences], int64
        Numbers of documents, from 0.
    """
    sizes = torch.tensor([len(document) for document in documents], device="cpu")
    numbers = torch.arange(len(sizes), device="cpu").repeat_interleave(sizes)
    return np.array([row.bincount().argmax().item() for row in _rows(numbers, length, max_sequences)], dtype=np.int64)


def _rows(tokens: Tensor, length: int, max_sequences: int | None) -> Tensor:
    """Rows of equal length, all or some that are spread evenly."""
    if length < 2:
        raise ValueError(f"length must be 2 or more, since the first token has no loss; got {length}.")
    sequences = tokens[: len(tokens) // length * length].view(-1, length)
    if max_sequences is not None and max_sequences < len(sequences):
        picked = torch.linspace(0, len(sequences) - 1, max_sequences, device=sequences.device)
        sequences = sequences[picked.round().long()]
    return sequences
