"""What one MoE layer makes of the tokens of a pass, and what each of its experts makes of them alone.

with watch_layers(layers, lambda layer, seen: print(layer.name, seen.output.norm(dim=-1))):
    model(**inputs)
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from bhlib.discovery import MoELayer, as_scored, find_moe_layers, watch
from bhlib.text_pass import Piece, batches, check_plain, run_batch
from bhlib.weighting import find_weighting


class LayerPass(NamedTuple):
    """What one layer made of rows of tokens.

    Attributes
    ----------
    hidden : Tensor [rows, hidden]
        What the experts were given.
    logits : Tensor [rows, experts]
    experts, weights : Tensor [rows, top_k]
        Those selected, and their weights.
    output : Tensor [rows, hidden]
        The weighted sum of these.
    """

    hidden: Tensor
    logits: Tensor
    experts: Tensor
    weights: Tensor
    output: Tensor

    def at(self, rows: Tensor) -> "LayerPass":
        """Some of the rows."""
        return LayerPass(*(part[rows.to(part.device)] for part in self))


def whole_layers(model: nn.Module) -> list[MoELayer]:
    """The layers of a model that is not patched and holds all its experts.

    Raises
    ------
    ValueError, RuntimeError
        For a model in training mode, patched, or spread over processes by its experts.
    """
    layers = find_moe_layers(model)
    check_plain(model, layers)
    for layer in layers:
        if layer.experts.num_experts != layer.num_experts:
            raise ValueError(
                f"{layer.name!r} routes to {layer.num_experts} experts, but this process holds "
                f"{layer.experts.num_experts} of them: load the model without expert parallelism to measure them all"
            )
    return layers


@contextmanager
def watch_layers(layers: Sequence[MoELayer], take: Callable[[MoELayer, LayerPass], Tensor | None]) -> Iterator[None]:
    """Within the block, ``take(layer, seen)`` is called whenever the experts of a layer have run.

    If it returns a tensor, [rows, hidden] like ``seen.output``, the layer goes on with that.
    """
    logits: dict[int, Tensor] = {}

    def keep(layer: MoELayer, output: tuple) -> None:
        logits[layer.index] = output[0]

    def leave(layer: MoELayer, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        flat = [part.reshape(-1, part.shape[-1]) for part in (args[0], logits.pop(layer.index), *args[1:3], output)]
        changed = take(layer, LayerPass(*flat))
        return None if changed is None else changed.view_as(output)

    with watch(layers, keep), ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.experts.register_forward_hook(partial(leave, layer)).remove)
        yield


@torch.no_grad()
def watch_text(
    model: nn.Module,
    layers: Sequence[MoELayer],
    texts: Sequence[Piece],
    batch_size: int,
    take: Callable[[MoELayer, LayerPass, int], None],
    progress: bool = False,
) -> int:
    """Run a model over texts, and call ``take(layer, seen, number)`` for each layer and batch.

    Parameters
    ----------
    model, layers
        The model, not patched, and its layers to watch.
    texts : sequence of Piece
        Checked (`bhlib.text_pass.check_texts`).
    batch_size : int
        Sequences of a forward pass.
    take : callable
        `seen` has a row for each token that is no padding, `number` counts batches from 0.
    progress : bool
        Whether to show a bar.

    Returns
    -------
    int
        How many batches there were.
    """
    number, valid = 0, None

    def take_real(layer: MoELayer, seen: LayerPass) -> None:
        take(layer, seen if valid is None else seen.at(valid.flatten().nonzero().flatten()), number)

    total = sum(len(text.ids) for text in texts)
    with tqdm(total=total, unit="seq", desc="experts", disable=not progress) as bar, watch_layers(layers, take_real):
        for batch in batches(texts, batch_size):
            valid = None if batch.mask is None else batch.mask.bool()
            run_batch(model, batch)
            number += 1
            bar.update(len(batch.ids))
    return number


def expert_output(layer: MoELayer, hidden: Tensor, expert: int | Tensor) -> Tensor:
    """What an expert makes of hidden states [rows, hidden]: float32 [rows, hidden], not weighted.

    One expert for all rows, or one for each [rows].
    """
    index = torch.as_tensor(expert, device=hidden.device).expand(len(hidden))[:, None]
    # The module's own forward: hooks on it, ours among them, see nothing of this.
    return layer.experts.forward(hidden, index, torch.ones_like(index, dtype=hidden.dtype)).float()


def scores_of(layer: MoELayer, seen: LayerPass) -> Tensor:
    """What the model ranks its experts by, float32 or wider [rows, experts]."""
    return find_weighting(layer.weighting).scores(as_scored(seen.logits, layer.narrows))


def weights_of_all(layer: MoELayer, seen: LayerPass) -> Tensor:
    """The weight of each expert, float32 [rows, experts].

    Those selected have their own; any other one has the weight that it would get if it were added to them.
    """
    scores = scores_of(layer, seen)
    own = scores.gather(-1, seen.experts)[:, None].expand(-1, layer.num_experts, -1)
    beside = torch.cat([own, scores[..., None]], dim=-1).flatten(0, 1)  # an expert as one more of those selected
    weights = find_weighting(layer.weighting).weights(beside, torch.ones_like(beside, dtype=torch.bool))[:, -1]
    return weights.view_as(scores).float().scatter(-1, seen.experts, seen.weights.float())
