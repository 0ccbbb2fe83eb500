"""`generate()` of transformers with a static cache, which transformers compiles itself: the time of a step."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from transformers import StoppingCriteria, StoppingCriteriaList

from bhlib.discovery import implementation_of
from bhlib.speed.results import Candidate, Results
from bhlib.speed.whole_model import (
    KEPT,
    NO_EXPERTS,
    load_model,
    mean_filled,
    model_floor,
    random_ids,
    rules_by_mean_k,
    selected_experts,
    variants,
)

#: Steps at the start of a generation that are not counted.
WARM_UP = 8


class StepClock(StoppingCriteria):
    """Notes the time of every step of `generate()`, and the experts implementation that it runs by; stops nothing."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.events, self.ran = model, [], set()

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        self.events.append(torch.cuda.Event(enable_timing=True))
        self.events[-1].record()
        self.ran.add(implementation_of(self.model))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def seconds(self) -> np.ndarray:
        """Seconds of each step, but for the first ones."""
        self.events[-1].synchronize()
        marks = self.events[WARM_UP:]
        return np.array([start.elapsed_time(end) / 1e3 for start, end in zip(marks, marks[1:], strict=False)])


def generate(model: nn.Module, ids: Tensor, new_tokens: int, clock: StepClock, static: bool = True) -> Tensor:
    """Greedy generation, on a static cache or as it comes; the sequences [batch, prompt + new_tokens]."""
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        cache_implementation="static" if static else None,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        stopping_criteria=StoppingCriteriaList([clock]),
    )


def decoding(model: nn.Module, sequences: Tensor, prompt: int, limits: dict[str, float]) -> tuple[float, float]:
    """Experts per token and layer in the steps that count, and the floor of such a step in seconds.

    Parameters
    ----------
    model : nn.Module
        In the state in which it generated the sequences.
    sequences : Tensor [batch, length]
    prompt : int
        How many tokens of each were given.
    limits : dict
        See `bhlib.speed.timing.ceilings`.
    """
    batch = len(sequences)
    # The routers see what they saw, if all that was generated goes through the model at once.
    selected = selected_experts(model, lambda: model(input_ids=sequences, use_cache=False, logits_to_keep=1))
    steps = [index.view(batch, -1, index.shape[-1])[:, prompt + WARM_UP : -1] for index in selected]
    floors = [
        model_floor(model, [index[:, step] for index in steps], batch, 1, prompt + WARM_UP + step, limits)
        for step in range(0, steps[0].shape[1], 8)
    ]
    return mean_filled(model, [index.flatten(0, 1) for index in steps]), float(np.mean(floors))


def bench_generate(
    results: Results, limits: dict[str, float], quick: bool = False, name: str | None = None, prompt: int = 128
) -> None:
    """Time a step of `generate()` for 1, 8 and 32 sequences, what the goals are about first: compiling takes long.

    transformers is measured as it comes (it is named by what decoding really ran), and with grouped_mm kept.
    """
    model = load_model(name)
    rules = rules_by_mean_k(model, random_ids(model, 1, 4096))
    contexts = variants(model, {k: rules[k] for k in ((4,) if quick else (4, 8, 2))}, ("grouped_mm", KEPT))
    first = [candidate for candidate in contexts if candidate.name in ("grouped_mm", NO_EXPERTS) or candidate.k == 4]
    for candidate in first + [candidate for candidate in contexts if candidate not in first]:
        for batch in (1, 8) if quick else (1, 8, 32):
            ids = random_ids(model, batch, prompt)
            with results.attempt("generate", "compiled", batch, candidate):
                _time_steps(results, limits, model, contexts[candidate], candidate, ids, 48 if quick else 128)


def _time_steps(
    results: Results,
    limits: dict[str, float],
    model: nn.Module,
    context: Callable,
    candidate: Candidate,
    ids: Tensor,
    new_tokens: int,
) -> None:
    from torch._dynamo.utils import counters

    batch, prompt = ids.shape
    torch.compiler.reset()
    vars(model).pop("_compiled_call", None)
    torch.cuda.empty_cache()
    counters.clear()
    with context():
        generate(model, ids, new_tokens, StepClock(model))  # compiles: the same length, hence the same cache
        graphs = counters["stats"]["unique_graphs"]
        torch.cuda.reset_peak_memory_stats()
        clock = StepClock(model)
        sequences = generate(model, ids, new_tokens, clock)
        peak = torch.cuda.max_memory_allocated() / 2**30
        recompiled = counters["stats"]["unique_graphs"] - graphs
        mean_k, floor = decoding(model, sequences, prompt, limits)
    names = {"grouped_mm": "/".join(sorted(map(str, clock.ran))), KEPT: "grouped_mm"}
    results.add(
        "generate",
        "compiled",
        batch,
        candidate._replace(name=names.get(candidate.name, candidate.name)),
        mean_k,
        clock.seconds(),
        floor,
        peak_gib=peak,
        graphs=graphs,
        recompiled=recompiled,
    )
