"""A controller that holds the mean number of experts: the level of a rule moves by what was selected."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from scipy.special import expit, logit
from torch import Tensor, nn

from bhlib.calibration import collect_router_logits
from bhlib.discovery import MoELayer, input_device, watch
from bhlib.levels import level_for_mean_experts, mean_experts
from bhlib.patching import RoutingPatch
from bhlib.rules import Rule

#: Half the distance, in log-odds of the level, over which the slope of the number of experts is measured.
STEP = 0.2

#: The largest move of a level at once, in log-odds; and where it stops, 1e-13 from 0 and from 1.
LARGEST_MOVE, FARTHEST = 0.5, 30.0


class LevelController:
    """Levels at which a rule gives wanted mean numbers of experts, while the model under it changes.

    Training changes the router, and with it how many experts a level gives. After every step each level is moved, in
    log-odds, by a share of the distance from the wanted mean, divided by the slope that was measured at the start.

    Parameters
    ----------
    rule : Rule
        Any rule with a level in (0, 1) (`Rule.at`) whose number of experts rises with it everywhere, or falls.
    mean_ks : sequence of float
        Wanted means, for each a level.
    router_logits : Tensor [layers, tokens, experts]
        On which levels and slopes are found to start with.

    Raises
    ------
    ValueError
        If no level gives a wanted mean.
    """

    @classmethod
    def on(
        cls, model: nn.Module, rule: Rule, mean_ks: Sequence[float], text: Mapping[str, Tensor]
    ) -> "LevelController":
        """The controller for a model, with what it shows on a text [sequences, length] without a patch."""
        mode = model.training
        model.eval()
        try:
            logits = collect_router_logits(model, text, progress=False)
        finally:
            model.train(mode)
        return cls(rule, mean_ks, logits.to(input_device(model)))

    def __init__(self, rule: Rule, mean_ks: Sequence[float], router_logits: Tensor) -> None:
        self.rule, self.mean_ks = rule, np.asarray(mean_ks, dtype=float)
        levels = [level_for_mean_experts(rule.at, router_logits, mean_k) for mean_k in self.mean_ks]
        self.log_odds = logit(levels)
        self.slopes = np.array([self._slope(place, router_logits) for place in self.log_odds])

    def _slope(self, place: float, router_logits: Tensor) -> float:
        few, many = (mean_experts(self.rule.at(float(expit(place + step))), router_logits) for step in (-STEP, STEP))
        slope = (many - few) / (2 * STEP)
        return float(np.copysign(max(abs(slope), 0.1), slope))  # near a bound hardly anything moves

    @property
    def levels(self) -> list[float]:
        """The level of each wanted mean."""
        return expit(self.log_odds).tolist()

    def update(self, seen: Sequence[float], rate: float = 0.3) -> None:
        """Move each level by what was seen.

        Parameters
        ----------
        seen : sequence of float
            Mean number of experts under each level; NaN where a level was not used.
        rate : float
            The share of the distance that is made good: 1 all at once, less where `seen` is of few tokens.
        """
        moves = np.nan_to_num(rate * (self.mean_ks - np.asarray(seen, dtype=float)) / self.slopes)
        moved = self.log_odds + np.clip(moves, -LARGEST_MOVE, LARGEST_MOVE)
        self.log_odds = np.clip(moved, -FARTHEST, FARTHEST)


class Selected:
    """How many experts the sequences of one forward pass were given, layer by layer."""

    def __init__(self) -> None:
        self.counts: list[Tensor] = []

    def add(self, layer: MoELayer, output: tuple[Tensor, Tensor, Tensor]) -> None:
        """Take in what a router of a patched model returned."""
        self.counts.append((output[2] < layer.num_experts).sum(dim=-1))

    def means(self, sequences: int) -> Tensor:
        """Mean over tokens and layers of each sequence, float32 [sequences]."""
        return torch.stack(self.counts).view(len(self.counts), sequences, -1).float().mean(dim=(0, 2))


@contextmanager
def selected(patch: RoutingPatch) -> Iterator[Selected]:
    """Within the block, count what the routers of a patched model select."""
    seen = Selected()
    with watch(patch.layers, seen.add):
        yield seen


@torch.no_grad()
def settle(
    patch: RoutingPatch,
    controller: LevelController,
    text: Mapping[str, Tensor],
    *,
    batch_size: int = 8,
    passes: int = 2,
) -> None:
    """Move the levels of a controller until the patched model itself gives the wanted means on a text.

    Logits of an unpatched model do not tell them exactly: a layer sees what the layers below it have dropped.

    Parameters
    ----------
    patch : RoutingPatch
        In place; afterwards it has the level of the first wanted mean.
    controller : LevelController
    text : mapping of str to Tensor [sequences, length], int64
        Not what results are reported on.
    batch_size : int
        Sequences per forward pass.
    passes : int
        Over the text, for each wanted mean.
    """
    mode = patch.model.training
    patch.model.eval()
    device = input_device(patch.model)
    batches = [batch.to(device) for sequences in text.values() for batch in sequences.split(batch_size)]
    sizes = [len(batch) for batch in batches]
    for _ in range(passes):
        seen = []
        for level in controller.levels:
            patch.rule = controller.rule.at(level)
            means = []
            for batch in batches:
                with selected(patch) as counts:
                    patch.model(input_ids=batch, use_cache=False)
                means.append(counts.means(len(batch)).mean().item())
            seen.append(np.average(means, weights=sizes))
        controller.update(seen, rate=1.0)
    patch.rule = controller.rule.at(controller.levels[0])
    patch.model.train(mode)
