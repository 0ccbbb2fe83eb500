"""What training has changed of a model: one file, put into the model it is of, and taken back to the bit.

tuned = tune(model, text, mean_k=4.0)
tuned.save("tuned.safetensors")

tuned = load_tuned("tuned.safetensors")
with tuned.routing(model) as patch: ...              # the rule and the level that it was trained with
with tuned.in_place(model): ...                      # the weights alone, for sweeps
"""

import dataclasses
import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from scipy.special import expit, logit
from torch import Tensor, nn

from bhlib import rules
from bhlib.discovery import find_moe_layers, name_of
from bhlib.patching import RoutingPatch
from bhlib.pvalues import NULLS, PValueMaker
from bhlib.rules import Rule

#: Version of the file format.
FORMAT = 1

#: How many numbers of each router a file keeps, to tell the model by; and how far they may be off, relative to their
#: size, for a model in another precision.
SAMPLED, TOLERANCE = 8, 1e-2


class Tuned:
    """Weights that were trained for a rule, and the levels at which it gives the wanted numbers of experts.

    Made by `bhlib.training.tune`, or loaded.

    Parameters
    ----------
    weights : mapping of str to Tensor
        By the name of a parameter its new value; or, under ``name:down`` [rank, in] and ``name:up`` [out, rank], the
        factors of what is added to it.
    rule : Rule
        What it was trained for, at the level of the first of `levels`.
    levels : mapping of float to float
        By the mean number of experts, the level that gives it; empty for a rule without a level.
    model_name : str
        Whose weights these are (`bhlib.discovery.name_of`).
    fingerprint : sequence of float
        Some numbers of the model's own routers, by which it is told (`fingerprint_of`).
    history : pandas.DataFrame, optional
        A row per step of the training; not in the file.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        rule: Rule,
        levels: Mapping[float, float],
        model_name: str,
        fingerprint: list[float],
        history: pd.DataFrame | None = None,
    ) -> None:
        self.weights, self.rule, self.levels = dict(weights), rule, dict(levels)
        self.model_name, self.fingerprint, self.history = model_name, list(fingerprint), history

    # -- in the model ------------------------------------------------------------------------------------------

    def routing(self, model: nn.Module, mean_k: float | None = None, **options: Any) -> "TunedRouting":
        """A patch with these weights and this rule: `TunedRouting`.

        Parameters
        ----------
        model : nn.Module
        mean_k : float, optional
            Wanted mean number of experts, for `rule_at`.
        **options
            For `RoutingPatch`.
        """
        return TunedRouting(model, self, mean_k, **options)

    def rule_at(self, mean_k: float | None = None) -> Rule:
        """The rule at the level that gives this mean: one of `levels`, or between two of them.

        Raises
        ------
        ValueError
            If the mean lies outside those that the weights were trained for.
        """
        if mean_k is None:
            return self.rule
        known = sorted(self.levels)
        if not known or not known[0] <= mean_k <= known[-1]:
            trained = f"{known[0]:g} to {known[-1]:g}" if known else "no mean, but a rule without a level"
            raise ValueError(f"mean_k is {mean_k:g}, but these weights were trained for {trained}.")
        log_odds = logit([self.levels[k] for k in known])
        return self.rule.at(float(expit(np.interp(mean_k, known, log_odds))))

    @contextmanager
    def in_place(self, model: nn.Module) -> Iterator[None]:
        """Within the block the model has these weights; afterwards its own, to the bit.

        Copies and checkpoints that are made within the block have these weights, too.

        Raises
        ------
        ValueError
            If they are another model's.
        """
        own = self._put(model)
        try:
            yield
        finally:
            _take_back(own)

    def _put(self, model: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
        """Put the weights into a model; what was there before."""
        self.check_model(model)
        own, new = [], []
        for name in dict.fromkeys(name.partition(":")[0] for name in self.weights):
            parameter = model.get_parameter(name)
            own.append((parameter, parameter.data))
            if name in self.weights:
                new.append(self.weights[name].to(parameter.data))
            else:
                down, up = (self.weights[f"{name}:{factor}"].to(parameter.device).float() for factor in ("down", "up"))
                new.append((parameter.data.float() + up @ down).to(parameter.dtype))
        _take_back([(parameter, tensor) for (parameter, _), tensor in zip(own, new, strict=True)])
        return own

    def check_model(self, model: nn.Module) -> None:
        """Raise a ValueError unless the weights were trained on this model."""
        name, asked = name_of(model), np.array(fingerprint_of(model))
        own = np.array(self.fingerprint)
        size = np.sqrt(np.square(own).mean())
        if name != self.model_name or own.shape != asked.shape or np.abs(own - asked).max() > TOLERANCE * size:
            raise ValueError(
                f"these weights were trained on {self.model_name!r} ({_shown(own)}), but the model is {name!r} "
                f"({_shown(asked)}): train it with bhlib.training.tune(model, text), or take a tuned model's weights "
                f"out of it first."
            )
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        for name, value in self.weights.items():
            if ":" not in name and shapes.get(name) != tuple(value.shape):
                raise ValueError(
                    f"the tuned weight {name!r} is {list(value.shape)}, but the model's is {shapes.get(name)}: load "
                    f"the model as it was trained."
                )

    # -- in a file ---------------------------------------------------------------------------------------------

    @property
    def num_bytes(self) -> int:
        """Of the weights."""
        return sum(value.numel() * value.element_size() for value in self.weights.values())

    def save(self, path: str | Path) -> None:
        """Write one safetensors file.

        Raises
        ------
        ValueError
            If the null of the rule was fitted: it has a file of its own.
        """
        facts = {
            "format": FORMAT,
            "kind": "tuned",
            "model_name": self.model_name,
            "fingerprint": self.fingerprint,
            "rule": facts_of(self.rule),
            "levels": sorted(self.levels.items()),
        }
        tensors = {name: value.contiguous() for name, value in self.weights.items()}
        save_file(tensors, path, metadata={"bhlib": json.dumps(facts, sort_keys=True)})

    def __repr__(self) -> str:
        means = ", ".join(f"{k:g}" for k in self.levels) or "fixed"
        return f"Tuned({self.model_name!r}, {self.num_bytes / 1e3:,.0f} kB, {self.rule!r}, mean experts {means})"


def load_tuned(path: str | Path) -> Tuned:
    """Load what `Tuned.save` wrote.

    Raises
    ------
    OSError
        If there is no such file.
    ValueError
        If the file holds no tuned weights, or is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("bhlib", "{}"))
            weights = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}): save the weights again.") from error
    if header.get("kind") != "tuned" or header.get("format") != FORMAT:
        raise ValueError(f"{path} holds no tuned weights of format {FORMAT}: write them with Tuned.save(path).")
    damaged = [name for name, value in weights.items() if not value.isfinite().all()]
    if damaged:
        raise ValueError(f"{path} is damaged: {damaged[0]} is not finite.")
    levels = {float(mean_k): float(level) for mean_k, level in header["levels"]}
    return Tuned(weights, rule_of(header["rule"]), levels, header["model_name"], header["fingerprint"])


class TunedRouting(RoutingPatch):
    """A patch that brings tuned weights with it: both come when it is put in place, and both go when it is taken back.

    What `RoutingPatch` says of copies holds for the routing alone: one that is made while the patch is in place has the
    tuned weights.

    Parameters
    ----------
    model : nn.Module
        The model that they were trained on.
    tuned : Tuned
    mean_k : float, optional
        As for `Tuned.rule_at`.
    **options
        For `RoutingPatch`.
    """

    def __init__(self, model: nn.Module, tuned: Tuned, mean_k: float | None = None, **options: Any) -> None:
        self.tuned = tuned
        self._own: list[tuple[nn.Parameter, Tensor]] = []
        super().__init__(model, tuned.rule_at(mean_k), **options)
        tuned.check_model(model)

    def patch_model(self, *, rewind: bool = True) -> "TunedRouting":
        """Put the weights and the hooks in place; returns self."""
        if not self.is_patched:
            self._own = self.tuned._put(self.model)
        try:
            super().patch_model(rewind=rewind)
        except BaseException:
            if not self.is_patched:
                self.unpatch_model()
            raise
        return self

    def unpatch_model(self) -> None:
        """Take everything back, the weights to the bit."""
        super().unpatch_model()
        _take_back(self._own)
        self._own = []


def fingerprint_of(model: nn.Module) -> list[float]:
    """`SAMPLED` weights of each router, spread evenly over it, to five digits."""
    weights = [layer.router.weight.detach().flatten() for layer in find_moe_layers(model)]
    sampled = [weight[:: -(-weight.numel() // SAMPLED)].float().tolist() for weight in weights]
    return [float(f"{number:.5g}") for numbers in sampled for number in numbers]


def _take_back(own: list[tuple[nn.Parameter, Tensor]]) -> None:
    for parameter, tensor in own:
        parameter.data = tensor


def _shown(fingerprint: np.ndarray) -> str:
    return f"{len(fingerprint) // SAMPLED} routers, the first begins {fingerprint[0]:.4g}, {fingerprint[1]:.4g}"


# -- a rule as JSON --------------------------------------------------------------------------------------------


def facts_of(rule: Rule) -> dict[str, Any]:
    """A rule of bhlib in words and numbers: its class, and its fields by name.

    Raises
    ------
    ValueError
        If the null of the rule was fitted, or the rule is not bhlib's.
    """
    if getattr(rules, type(rule).__name__, None) is not type(rule):
        raise ValueError(f"{type(rule).__name__} is no rule of bhlib.rules, and cannot be written to a file.")
    values = {field.name: getattr(rule, field.name) for field in dataclasses.fields(rule) if field.init}
    return {"class": type(rule).__name__} | {
        name: _facts_of_null(value) if isinstance(value, PValueMaker) else value for name, value in values.items()
    }


def _facts_of_null(maker: PValueMaker) -> dict[str, Any]:
    name = next((name for name, entry in NULLS.items() if entry.maker is type(maker)), None)
    if name is None or NULLS[name].needs_calibration:
        raise ValueError(
            f"{type(maker).__name__} has a file of its own (its method save), and a rule with it cannot be written: "
            f"train with a null that needs no calibration, such as pvalues='dirichlet'."
        )
    return {"null": name} | {option: getattr(maker, option) for option in inspect.signature(type(maker)).parameters}


def rule_of(facts: Mapping[str, Any]) -> Rule:
    """The rule that `facts_of` told."""
    values = {name: _read(value) for name, value in facts.items() if name != "class"}
    return getattr(rules, facts["class"])(**values)


def _read(value: Any) -> Any:
    if isinstance(value, dict):
        return NULLS[value["null"]].maker(**{name: part for name, part in value.items() if name != "null"})
    return tuple(value) if isinstance(value, list) else value
