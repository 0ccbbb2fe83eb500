"""The call of the README, as a user makes it: unpatched, patched as it stands, and patched without statistics.

`generate()` with the cache that it has by itself, launched from the host; `generate()` with a static cache, which
transformers compiles; and one forward pass over a long prompt. Unpatched means as it comes: transformers then
decodes by batched_mm.
"""

from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from bhlib.discovery import find_moe_layers
from bhlib.patching import BHRoutingIntegration
from bhlib.speed.generation import StepClock, decoding, generate
from bhlib.speed.results import Candidate, Results
from bhlib.speed.whole_model import (
    NO_EXPERTS,
    Contexts,
    load_model,
    mean_filled,
    model_floor,
    random_ids,
    rules_by_mean_k,
    run_by,
    selected_experts,
)

#: Experts per token and layer that the patched calls use on average.
MEAN_K = 4
#: The same after the level was moved while the patch was in place.
MOVED_K = 2
#: Tokens of a prompt that is generated from, and of a second one: shorter, so that the cache of the first holds it.
#: With what is generated, 32 sequences stay below the tokens that a patch records row by row.
PROMPTS = (64, 48)
#: Tokens of one generation: fewer where a step is launched from the host and takes long.
NEW_TOKENS = {"eager": 24, "compiled": 48}
#: Tokens of the prompt that is only read.
PREFILL = 4096

PATCHED = Candidate("patched", "bhlib", MEAN_K)
NO_STATISTICS = Candidate("no statistics", "bhlib", MEAN_K)
MOVED = Candidate("level moved", "bhlib", MOVED_K)


def callers(model: nn.Module, alpha: float) -> Contexts:
    """What is compared, and functions that make the context in which the model is called for it."""
    layers = find_moe_layers(model)
    return {
        Candidate("unpatched", "transformers", layers[0].top_k): nullcontext,
        PATCHED: partial(BHRoutingIntegration, model, alpha=alpha),
        NO_STATISTICS: partial(BHRoutingIntegration, model, alpha=alpha, collect_stats=False),
        Candidate(NO_EXPERTS, "neither", 0): partial(run_by, layers, NO_EXPERTS),
    }


def bench_call(results: Results, limits: dict[str, float], quick: bool = False, name: str | None = None) -> None:
    """Time a step of `generate()` for 1, 8 and 32 sequences, eager and compiled, and the prefill of a prompt."""
    model = load_model(name)
    rules = rules_by_mean_k(model, random_ids(model, 1, PREFILL))
    contexts = callers(model, rules[MEAN_K].alpha)
    batches, rounds = ((1, 8), 3) if quick else ((1, 8, 32), 5)
    _prefill(results, limits, model, contexts, rounds)
    for batch in batches:
        _eager(results, limits, model, contexts, random_ids(model, batch, PROMPTS[0]), rounds)
    for batch in batches:
        prompts = [random_ids(model, batch, length) for length in PROMPTS]
        _compiled(results, limits, model, contexts, rules[MOVED_K].alpha, prompts, turns=1 if quick else 2)


def _prefill(results: Results, limits: dict[str, float], model: nn.Module, contexts: Contexts, rounds: int) -> None:
    """One forward pass over a prompt, in turns; a round is the second pass of a patch, which records anew."""
    ids = random_ids(model, 1, PREFILL)

    def forward() -> Tensor:
        return model(input_ids=ids, use_cache=False, logits_to_keep=1).logits

    facts = {}
    for candidate, context in contexts.items():
        with results.attempt("call", "prefill", PREFILL, candidate), context():
            selected = selected_experts(model, forward)
            facts[candidate] = mean_filled(model, selected), model_floor(model, selected, 1, PREFILL, 0, limits)
    times: dict[Candidate, list[float]] = {candidate: [] for candidate in facts}
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(rounds):
        for candidate, seconds in times.items():
            with contexts[candidate]() as patch:
                forward()
                _record_anew(patch)
                start.record()
                forward()
                end.record()
                end.synchronize()
            seconds.append(start.elapsed_time(end) / 1e3)
    for candidate, (mean_k, floor) in facts.items():
        results.add("call", "prefill", PREFILL, candidate, mean_k, np.array(times[candidate]), floor)


def _record_anew(patch: BHRoutingIntegration | None) -> None:
    """Let a patch record what comes as it did what came first: it keeps so many rows and no more."""
    if patch is not None:
        patch.reset_stats()


def _eager(
    results: Results, limits: dict[str, float], model: nn.Module, contexts: Contexts, ids: Tensor, rounds: int
) -> None:
    """`generate()` as it comes, in turns: a round is one generation, its time the mean of its steps."""
    facts, new_tokens = {}, NEW_TOKENS["eager"]
    for candidate, context in contexts.items():
        with results.attempt("call", "eager", len(ids), candidate), context():
            sequences = generate(model, ids, new_tokens, StepClock(model), static=False)
            facts[candidate] = decoding(model, sequences, ids.shape[1], limits)
    times: dict[Candidate, list[float]] = {candidate: [] for candidate in facts}
    for _ in range(rounds):
        for candidate, seconds in times.items():
            clock = StepClock(model)
            with contexts[candidate]():
                generate(model, ids, new_tokens, clock, static=False)
            seconds.append(clock.seconds().mean())
    for candidate, (mean_k, floor) in facts.items():
        results.add("call", "eager", len(ids), candidate, mean_k, np.array(times[candidate]), floor)


class _Compiled(NamedTuple):
    """What one turn of a candidate gave."""

    seconds: list[float]
    mean_k: float
    floor: float
    graphs: int
    graph_breaks: int
    recompiled: int


def _compiled(
    results: Results,
    limits: dict[str, float],
    model: nn.Module,
    contexts: Contexts,
    moved: float,
    prompts: list[Tensor],
    turns: int,
) -> None:
    """`generate()` with a static cache; a turn compiles anew, since a patch that comes or goes resets compiled code.

    In its last turn, the level of the patch is moved to `moved` while its compiled code stays.
    """
    batch, found = len(prompts[0]), dict[Candidate, list[_Compiled]]()
    for turn in range(turns):
        for candidate, context in contexts.items():
            _forget(model)
            with results.attempt("call", "compiled", batch, candidate), context() as patch:
                done = _turn(model, patch, prompts, limits)
                found.setdefault(candidate, []).append(done)
                if candidate == PATCHED and turn == turns - 1:
                    with results.attempt("call", "compiled", batch, MOVED):
                        patch.alpha = moved
                        found[MOVED] = [_turn(model, patch, prompts, limits)]
    for candidate, those in found.items():
        seconds = np.concatenate([one.seconds for one in those])
        worst = {what: max(getattr(one, what) for one in those) for what in ("graphs", "graph_breaks", "recompiled")}
        results.add("call", "compiled", batch, candidate, those[0].mean_k, seconds, those[0].floor, **worst)


def _forget(model: nn.Module) -> None:
    """Let nothing be compiled yet."""
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    vars(model).pop("_compiled_call", None)
    torch.cuda.empty_cache()
    counters.clear()


def _turn(
    model: nn.Module, patch: BHRoutingIntegration | None, prompts: list[Tensor], limits: dict[str, float]
) -> _Compiled:
    """Generate once from the first prompt, to compile what is not compiled; then three times for the clock, and from
    the other prompts.
    """
    from torch._dynamo.utils import counters

    before = counters["stats"]["unique_graphs"]
    ids, new_tokens = prompts[0], NEW_TOKENS["compiled"]
    sequences = generate(model, ids, new_tokens, StepClock(model))
    graphs = counters["stats"]["unique_graphs"]
    clocks = [StepClock(model) for _ in range(3)]
    for clock in clocks:
        _record_anew(patch)
        generate(model, ids, new_tokens, clock)
    for other in prompts[1:]:
        generate(model, other, new_tokens, StepClock(model))
    recompiled = counters["stats"]["unique_graphs"] - (before or graphs)
    breaks = sum(counters["graph_break"].values())
    seconds = [clock.seconds().mean() for clock in clocks]
    return _Compiled(seconds, *decoding(model, sequences, ids.shape[1], limits), graphs, breaks, recompiled)
