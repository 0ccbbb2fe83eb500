"""A text in batches, for one pass of a model that is not patched: what calibration and measurement read."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from bhlib.discovery import MoELayer, implementation_of, input_device
from bhlib.experts import is_twin


class Piece(NamedTuple):
    """Token ids [sequences, length] of a name, and their mask: 0 for padding; None if there is none."""

    name: str
    ids: Tensor
    mask: Tensor | None


class Batch(NamedTuple):
    """Sequences of one text, of which the first is number `first` there."""

    name: str
    first: int
    ids: Tensor
    mask: Tensor | None


def check_texts(
    token_ids: Tensor | Mapping[str, Tensor], attention_mask: Tensor | Mapping[str, Tensor] | None
) -> list[Piece]:
    """The texts, each with its mask, checked. A tensor without a name is called ``"token_ids"``."""
    texts = token_ids if isinstance(token_ids, Mapping) else {"token_ids": token_ids}
    masks: Mapping[str, Tensor | None]
    if attention_mask is None:
        masks = dict.fromkeys(texts)
    else:
        masks = attention_mask if isinstance(attention_mask, Mapping) else {"token_ids": attention_mask}
    if masks.keys() != texts.keys():
        raise ValueError(
            f"attention_mask is there for {sorted(masks)}, but token_ids for {sorted(texts)}; pass one mask per text"
        )
    for name, ids in texts.items():
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point():
            found = f"shape {tuple(ids.shape)}, {ids.dtype}" if isinstance(ids, Tensor) else type(ids).__name__
            raise ValueError(f"{name} must be an integer tensor [sequences, length], got {found}")
        mask = masks[name]
        if mask is not None and mask.shape != ids.shape:
            raise ValueError(
                f"the attention_mask of {name} has shape {tuple(mask.shape)}, its ids {tuple(ids.shape)}; "
                "they must agree"
            )
    if not sum(ids.numel() for ids in texts.values()):
        raise ValueError("token_ids holds no token; pass a text with tokens")
    return [Piece(name, ids, masks[name]) for name, ids in texts.items()]


def batches(texts: Sequence[Piece], batch_size: int) -> Iterator[Batch]:
    """The texts, in order, up to `batch_size` sequences at a time."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, but must be 1 or more")
    for name, ids, mask in texts:
        for start in range(0, len(ids), batch_size):
            rows = slice(start, start + batch_size)
            yield Batch(name, start, ids[rows], None if mask is None else mask[rows])


def check_plain(model: nn.Module, layers: Sequence[MoELayer]) -> None:
    """Raise if the routers would not see what they see in the model's own inference."""
    if model.training:
        raise ValueError(
            f"{type(model).__name__} is in training mode, where dropout and router noise change the logits: "
            "call model.eval() first"
        )
    if any(is_twin(implementation_of(layer.experts)) for layer in layers):
        raise RuntimeError(
            f"{type(model).__name__} is patched, so its layers do not see what the model's own routing makes of the "
            "text: leave the `with` block first, or call unpatch_model() first"
        )


def run_batch(model: nn.Module, batch: Batch) -> None:
    """Run the body of a model, without its head, on a batch: for what hooks see on the way."""
    body = getattr(model, "base_model", model)
    device = input_device(model)
    inputs = {} if batch.mask is None else {"attention_mask": batch.mask.to(device)}
    body(input_ids=batch.ids.to(device), use_cache=False, **inputs)
