"""Uniform samples of the router logits that go by: of the values that a null is fitted on, and of whole tokens."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from bhlib.pvalues import null_values

#: Values that are kept of a layer, and of one expert of a layer where each has a null of its own.
VALUES_PER_LAYER = 50_000
VALUES_PER_EXPERT = 4_000

#: Tokens that are kept of a layer, to find the levels that a null brings.
TOKENS_FOR_LEVELS = 2_000


class LogitSampler:
    """Reservoirs of the null values of every layer, or of every layer and expert."""

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        statistic: str,
        exclude_top: int,
        per_expert: bool,
        max_values: int | None,
        seed: int,
    ) -> None:
        if max_values is None:
            max_values = VALUES_PER_EXPERT if per_expert else VALUES_PER_LAYER
        if max_values < 2:
            raise ValueError(f"max_values is {max_values}, but must be 2 or more; {VALUES_PER_LAYER:,} is the default")
        self.settings: dict[str, Any] = dict(
            statistic=statistic, exclude_top=exclude_top, num_experts=num_experts, per_expert=per_expert, seed=seed
        )
        # Raises for a statistic or a number that is impossible, before the pass.
        null_values(torch.zeros(0, num_experts, device="cpu"), statistic, exclude_top)
        # One stream of random numbers per layer: the draw does not depend on the order in which layers run.
        self._rngs = [np.random.default_rng([seed, layer]) for layer in range(num_layers)]
        columns = num_experts if per_expert else 1
        self._reservoirs = [[Reservoir(max_values, (2,)) for _ in range(columns)] for _ in range(num_layers)]
        self._token_rngs = [np.random.default_rng([seed, layer, 1]) for layer in range(num_layers)]
        self._tokens = [Reservoir(TOKENS_FOR_LEVELS, (num_experts,)) for _ in range(num_layers)]

    def add(self, layer: int, router_logits: Tensor) -> None:
        """Take in logits [tokens, experts] of a layer."""
        self._tokens[layer].add(router_logits.float().cpu().numpy(), self._token_rngs[layer].random(len(router_logits)))
        statistics, experts = null_values(router_logits, self.settings["statistic"], self.settings["exclude_top"])
        numbers = experts.flatten().cpu().numpy()
        values = np.stack([statistics.flatten().cpu().numpy(), numbers.astype(np.float32)], axis=-1)
        keys = self._rngs[layer].random(len(values))
        reservoirs = self._reservoirs[layer]
        if len(reservoirs) == 1:
            reservoirs[0].add(values, keys)
            return
        order = np.argsort(numbers, kind="stable")
        ends = np.bincount(numbers, minlength=len(reservoirs)).cumsum()[:-1]
        parts = np.split(values[order], ends), np.split(keys[order], ends)
        for reservoir, part, part_keys in zip(reservoirs, *parts, strict=True):
            reservoir.add(part, part_keys)

    def samples(self, log_norms: Tensor | None = None) -> list:
        """What ``FittedNull.fit`` takes: [layers] or [layers][experts] arrays.

        `log_norms` [layers, experts] are added to the values, to each that of its expert.
        """
        columns = [[reservoir.sample() for reservoir in layer] for layer in self._reservoirs]
        if self.settings["per_expert"]:
            return [[values for values, _ in map(np.transpose, layer)] for layer in columns]
        values, numbers = zip(*(layer[0].T for layer in columns), strict=True)
        if log_norms is None:
            return list(values)
        added = log_norms.float().cpu().numpy()
        return [v + row[n.astype(int)] for v, n, row in zip(values, numbers, added, strict=True)]

    def logits(self) -> list[Tensor]:
        """Logits [tokens, experts] of a sample of the tokens, for each layer."""
        return [torch.from_numpy(tokens.sample()) for tokens in self._tokens]


class Reservoir:
    """A uniform sample of fixed size, without replacement, of a stream of values.

    Every value comes with a random key, and the values with the `size` smallest keys are kept: each set of `size`
    values is equally likely, whatever the length of the stream and however it is cut into batches.

    Parameters
    ----------
    size : int
    shape : tuple of int
        Of one value; a number by default.
    """

    def __init__(self, size: int, shape: tuple[int, ...] = ()) -> None:
        self.size = size
        self._values = np.empty((0, *shape), np.float32)
        self._keys = np.empty(0)
        self._limit = np.inf  # no key above it can be among the smallest any more

    def add(self, values: np.ndarray, keys: np.ndarray) -> None:
        """Take in values [n, ...], float32, with their keys [n], independent and uniform."""
        candidates = keys < self._limit
        self._values = np.concatenate([self._values, values[candidates]])
        self._keys = np.concatenate([self._keys, keys[candidates]])
        if len(self._keys) > self.size:
            kept = np.argpartition(self._keys, self.size - 1)[: self.size]
            self._values, self._keys = self._values[kept], self._keys[kept]
            self._limit = self._keys.max()

    def sample(self) -> np.ndarray:
        """The values kept, in the order of their keys; all of them if there were no more than `size`."""
        return self._values[np.argsort(self._keys)]
