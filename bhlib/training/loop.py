"""Train a model for a rule: `tune`."""

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from tqdm.auto import tqdm

from bhlib import sorted_pairs
from bhlib.discovery import find_moe_layers, implementations_changed, input_device, name_of
from bhlib.experts import twin_by_kernels
from bhlib.patching import RoutingPatch
from bhlib.rules import BH, Rule, TopK
from bhlib.text_pass import check_texts
from bhlib.training.controller import LevelController, selected, settle
from bhlib.training.tuned import Tuned, facts_of, fingerprint_of
from bhlib.training.weights import Trained, changes_of, training_of

#: Peak of the learning rate by what is trained: of routers and of every weight chosen on the demo's validation split
#: (figure `training`), of adapters not tried.
LEARNING_RATES = {"router": 1e-3, "lora": 1e-3, "all": 3e-4}

#: Share of the steps over which the learning rate rises; it falls from there to 0 along a line.
WARMUP = 0.1

#: Tokens of the training text on which levels are found, before and after.
LEVEL_TOKENS = 4096

#: Norm that gradients are cut to.
LARGEST_GRADIENT = 1.0

COLUMNS = ["step", "tokens", "loss", "cross_entropy", "divergence", "mean_k"]


@dataclass(frozen=True)
class Plan:
    """What a training is, apart from its model, its rule and its text.

    Parameters
    ----------
    train : {"router", "lora", "all"}
        What is trained (`bhlib.training.weights`).
    mean_k : float or (float, float)
        The mean number of experts that is held, by moving the rule's level. Two numbers make an elastic model: every
        sequence of a batch has a mean of its own, drawn from the whole numbers from the first to the second with
        chances as one over the number, since few experts have more to learn. For a rule without a level it has no
        meaning.
    tokens : int
        To train on; where the text has fewer, it is read again in another order.
    batch_size : int
        Sequences of a step, those of all processes together.
    learning_rate : float, optional
        Its peak, of AdamW; by default `LEARNING_RATES`.
    distillation : float
        Weight of the divergence from the model's own next-token distribution, under its own routing and weights; what
        is left of 1 weighs the cross-entropy of the text.
    seed : int
        Of the order of the text and of the means drawn. What is drawn at a step depends on it and the step alone.
    """

    train: str = "router"
    mean_k: float | tuple[float, float] = 4.0
    tokens: int = 400_000
    batch_size: int = 8
    learning_rate: float | None = None
    distillation: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.distillation <= 1:
            raise ValueError(f"distillation must lie in [0, 1], got {self.distillation}.")
        for name in ("tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}.")
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}.")

    @property
    def mean_ks(self) -> tuple[float, ...]:
        """The means that levels are held for."""
        if not isinstance(self.mean_k, tuple):
            return (float(self.mean_k),)
        low, high = self.mean_k
        if not low < high:
            raise ValueError(f"mean_k must rise from the first number to the second, got {self.mean_k}.")
        return (*map(float, np.arange(low, high)), float(high))


def tune(
    model: nn.Module,
    token_ids: Tensor | Mapping[str, Tensor],
    rule: Rule | None = None,
    *,
    checkpoint: str | Path | None = None,
    save_every: int = 100,
    progress: bool = True,
    **plan: Any,
) -> Tuned:
    """Train a model for a rule, and give back what has changed; the model itself is afterwards what it was.

    The mean number of experts is held by a controller (`LevelController`), the loss is the text's cross-entropy mixed
    with the divergence from the unpatched model, and gradients reach a router through the weights of the experts that
    the rule kept.

    Parameters
    ----------
    model : nn.Module
        A transformers MoE model (`find_moe_layers`), not patched, on any device. It is trained in the mode it is in:
        in evaluation mode there is no dropout, in training mode gradient checkpointing works.
    token_ids : Tensor [sequences, length], int64, or a mapping of names to such tensors
        The text to train on, for instance ``load_heldout("calibration", length=128)``: never what is reported on.
    rule : Rule, optional
        By default ``BH()``. One without a level (`TopK`) is trained as it is.
    checkpoint : path, optional
        A file that the state is kept in, and that a stopped training goes on from, to the same weights.
    save_every : int
        Steps between two writes of it.
    progress : bool
        Whether to show a bar.
    **plan
        What `Plan` takes: ``train``, ``mean_k``, ``tokens``, ``batch_size``, ``learning_rate``, ``distillation``,
        ``seed``.

    Returns
    -------
    Tuned
        With a `history`: a row per step.

    Raises
    ------
    ValueError
        If the text is empty or too short, no level gives the wanted mean, something of the plan is out of range, or
        the checkpoint is of another training.
    RuntimeError
        If the model is patched.

    Notes
    -----
    Started by ``accelerate launch``, every process has a whole model and a share of each batch, and gradients are
    averaged. Weights are trained in float32 copies (`Trained`); the passes run in the model's own dtype. On a CUDA
    device `bhlib.sorted_pairs` computes the experts of those with gradients, where `RoutingPatch` would let it; all
    others, and what the distillation compares with, are the model's own implementation's, without `bhlib.kernels`.

    Examples
    --------
    >>> from bhlib import load_demo, load_heldout
    >>> from bhlib.training import tune
    >>> model, tokenizer = load_demo()
    >>> text = load_heldout("calibration", length=64, max_sequences=1)
    >>> tuned = tune(model, text, mean_k=4.0, tokens=512, batch_size=4, progress=False)
    >>> with tuned.routing(model) as patch:
    ...     _ = model(**tokenizer("def main():", return_tensors="pt"))
    """
    settings, rule = Plan(**plan), BH() if rule is None else rule
    texts = check_texts(token_ids, None)
    sequences = torch.cat([text.ids for text in texts])
    if sequences.shape[1] < 2:
        raise ValueError("token_ids holds sequences of one token, which have no next one: make them longer.")
    state = PartialState(cpu=not torch.cuda.is_available())
    if settings.batch_size % state.num_processes:
        raise ValueError(
            f"batch_size must be a multiple of the {state.num_processes} processes, got {settings.batch_size}."
        )
    facts = asdict(settings) | {
        "rule": facts_of(rule),
        "model": [name_of(model), fingerprint_of(model)],
        "text": [*sequences.shape, int(sequences.sum())],
    }
    with training_of(model, settings.train) as trained:
        training = Training(model, sequences, rule, settings, trained)
        path = None if checkpoint is None else Path(checkpoint)
        if path is not None and path.exists():
            training.load(path, facts)
        training.run(path, facts, save_every, progress and state.is_main_process)
        return training.result()


class Training:
    """A training that is going on."""

    def __init__(self, model: nn.Module, sequences: Tensor, rule: Rule, plan: Plan, trained: Trained) -> None:
        self.model, self.sequences, self.rule, self.plan, self.trained = model, sequences, rule, plan, trained
        self.device, self.state = input_device(model), PartialState(cpu=not torch.cuda.is_available())
        self.by_pairs = self.device.type in sorted_pairs.DEVICES and RoutingPatch(model, rule).kernels
        self.own = TopK(find_moe_layers(model)[0].top_k)
        self.batch_size = min(plan.batch_size, len(sequences) // self.state.num_processes * self.state.num_processes)
        self.steps = -(-plan.tokens // (self.batch_size * sequences.shape[1]))
        self.peak = LEARNING_RATES[plan.train] if plan.learning_rate is None else plan.learning_rate
        self.optimizer = torch.optim.AdamW(trained.masters, lr=self.peak, betas=(0.9, 0.95), weight_decay=0.0)
        self.controller = None
        if rule.level_name is not None:
            self.controller = LevelController.on(model, rule, plan.mean_ks, self._some_text())
        self.history: list[list[float]] = []

    def _some_text(self) -> dict[str, Tensor]:
        """Sequences spread over the text, on which levels are found."""
        most = max(LEVEL_TOKENS // self.sequences.shape[1], 1)
        picked = torch.linspace(0, len(self.sequences) - 1, min(most, len(self.sequences)), device="cpu")
        return {"text": self.sequences[picked.round().long()]}

    # -- what a step reads -------------------------------------------------------------------------------------

    def batch(self, step: int) -> Tensor:
        """The sequences of a step, for this process: every one once before any comes again."""
        each = len(self.sequences) // self.batch_size
        order = np.random.default_rng([self.plan.seed, step // each]).permutation(len(self.sequences))
        first = step % each * self.batch_size
        rows = order[first : first + self.batch_size][self.state.process_index :: self.state.num_processes]
        return self.sequences[torch.from_numpy(rows)].to(self.device)

    def targets(self, step: int, rows: int) -> np.ndarray:
        """Which of the wanted means each sequence of a batch is routed for, int [rows]."""
        generator = np.random.default_rng([self.plan.seed, step, self.state.process_index, 1])
        chances = 1 / np.array(self.plan.mean_ks)
        return generator.choice(len(chances), size=rows, p=chances / chances.sum())

    def learning_rate(self, step: int) -> float:
        """Of a step: it rises, and falls to 0."""
        warm = max(WARMUP * self.steps, 1)
        return self.peak * min((step + 1) / warm, (self.steps - step) / max(self.steps - warm, 1), 1.0)

    # -- a step ------------------------------------------------------------------------------------------------

    def run(self, path: Path | None, facts: dict[str, Any], save_every: int, progress: bool) -> None:
        """Run all steps that are left."""
        first = len(self.history)
        kernels = False if self.by_pairs else "auto"  # what the model itself says is to be its own, to the bit
        with (
            RoutingPatch(self.model, self.rule, collect_stats=False, kernels=kernels) as patch,
            tqdm(total=self.steps, initial=first, unit="step", desc="tune", disable=not progress) as bar,
        ):
            self.trained.put()
            for step in range(first, self.steps):
                numbers = self.step(patch, step)
                self.history.append([step + 1, (step + 1) * self.batch_size * self.sequences.shape[1], *numbers])
                if path is not None and ((step + 1) % save_every == 0 or step + 1 == self.steps):
                    self.save(path, facts)
                bar.set_postfix_str(f"loss {numbers[0]:.3f}, {numbers[-1]:.2f} experts", refresh=False)
                bar.update()
            if self.controller is not None:
                settle(patch, self.controller, self._some_text(), batch_size=self.batch_size)

    def step(self, patch: RoutingPatch, step: int) -> list[float]:
        """One step: loss, cross-entropy, divergence (NaN without distillation) and mean number of experts."""
        batch = self.batch(step)
        own = self._own_logits(patch, batch) if self.plan.distillation else None
        drawn = self.targets(step, len(batch))
        patch.rule = self._rule_for(drawn)
        with self._with_gradients(patch):
            with selected(patch) as counts:
                logits = self.model(input_ids=batch, use_cache=False).logits
            parts = losses(logits, own, batch)
            share = self.plan.distillation
            loss = parts[0] if own is None else (1 - share) * parts[0] + share * parts[1]
            loss.backward()
        self._update(step)
        means = counts.means(len(batch))
        self._steer(drawn, means)
        numbers = reduce(torch.stack([loss.detach(), *parts.detach(), means.mean()]), "mean")
        return numbers.tolist()

    def _with_gradients(self, patch: RoutingPatch) -> AbstractContextManager:
        """Within the block sorted pairs may compute the experts. The gradients keep kernels away."""
        return implementations_changed(patch.layers, twin_by_kernels) if self.by_pairs else nullcontext()

    def _own_logits(self, patch: RoutingPatch, batch: Tensor) -> Tensor:
        """What the model itself says, with its own weights and routing."""
        self.trained.take_back()
        patch.rule = self.own
        with torch.no_grad():
            logits = self.model(input_ids=batch, use_cache=False).logits
        self.trained.put()
        return logits

    def _rule_for(self, drawn: np.ndarray) -> Rule:
        if self.controller is None:
            return self.rule
        levels = self.controller.levels
        return self.rule.at(levels[0] if len(levels) == 1 else [levels[index] for index in drawn])

    def _update(self, step: int) -> None:
        """Move the weights by the gradients of all processes."""
        masters = self.trained.take_gradients()
        for master in masters if self.state.num_processes > 1 else []:
            master.grad = reduce(master.grad, "mean")
        nn.utils.clip_grad_norm_(masters, LARGEST_GRADIENT)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        self.optimizer.step()
        self.trained.follow()

    def _steer(self, drawn: np.ndarray, means: Tensor) -> None:
        """Let the controller see the mean number of experts of each target in a batch."""
        if self.controller is None:
            return
        shape = len(self.plan.mean_ks)
        index = torch.from_numpy(drawn).to(means.device)
        sums = torch.stack([torch.ones_like(means), means])
        sums = reduce(means.new_zeros(2, shape).index_add_(1, index, sums), "sum")
        seen = sums.tolist()
        self.controller.update([total / count if count else np.nan for count, total in zip(*seen, strict=True)])

    # -- its end, and its state on the way ---------------------------------------------------------------------

    def result(self) -> Tuned:
        """What has changed."""
        levels, rule = {}, self.rule
        if self.controller is not None:
            levels = dict(zip(self.plan.mean_ks, self.controller.levels, strict=True))
            rule = rule.at(self.controller.levels[0])
        return Tuned(
            changes_of(self.trained.values()), rule, levels, name_of(self.model), self._fingerprint(),
            pd.DataFrame(self.history, columns=COLUMNS).astype({"step": int, "tokens": int}),
        )  # fmt: skip

    def _fingerprint(self) -> list[float]:
        self.trained.take_back()
        return fingerprint_of(self.model)

    def save(self, path: Path, facts: dict[str, Any]) -> None:
        """Write the state after a step: all of the file or none of it."""
        if not self.state.is_main_process:
            return
        unfinished = path.with_suffix(".part")
        torch.save(
            {
                "facts": json.dumps(facts, sort_keys=True),
                "masters": self.trained.masters,
                "optimizer": self.optimizer.state_dict(),
                "log_odds": [] if self.controller is None else self.controller.log_odds.tolist(),
                "history": self.history,
            },
            unfinished,
        )
        unfinished.replace(path)

    def load(self, path: Path, facts: dict[str, Any]) -> None:
        """Go on from a state that `save` wrote; raises ValueError if it is of another training."""
        saved = torch.load(path, map_location=self.device, weights_only=True)
        before = json.loads(saved["facts"])
        now = json.loads(json.dumps(facts))
        other = [name for name in now if before.get(name) != now[name]]
        if other:
            name = other[0]
            raise ValueError(
                f"the checkpoint {path} is of another training: its {name} is {before.get(name)!r}, not {now[name]!r}. "
                f"Go on with what it was begun with, or take another file."
            )
        with torch.no_grad():
            for master, value in zip(self.trained.masters, saved["masters"], strict=True):
                master.copy_(value)
        self.trained.follow()
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.controller is not None:
            self.controller.log_odds = np.asarray(saved["log_odds"])
        self.history = saved["history"]


def losses(logits: Tensor, own: Tensor | None, batch: Tensor) -> Tensor:
    """Cross-entropy of the next token, and divergence from the model itself, in nats per token: float32 [2].

    Parameters
    ----------
    logits : Tensor [sequences, length, vocabulary]
    own : Tensor of that shape, or None
        The model's own; without, the divergence is NaN.
    batch : Tensor [sequences, length], int64
    """
    guesses = log_softmax(logits[:, :-1].flatten(0, 1).float(), dim=-1)
    text = cross_entropy(guesses, batch[:, 1:].flatten())
    if own is None:
        return torch.stack([text, torch.full_like(text, torch.nan)])
    wanted = log_softmax(own[:, :-1].flatten(0, 1).float(), dim=-1)
    return torch.stack([text, kl_div(guesses, wanted, reduction="batchmean", log_target=True)])
