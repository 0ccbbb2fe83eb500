"""The whole model: prompts, and single steps of decoding, each against every implementation of transformers."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache, partial

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, OlmoeConfig, OlmoeForCausalLM, StaticCache
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from bhlib.discovery import MoELayer, find_moe_layers, implementation_of, implementations_changed, watch
from bhlib.levels import alpha_for_mean_experts
from bhlib.patching import RoutingPatch
from bhlib.pvalues import DirichletNull
from bhlib.rules import BH
from bhlib.speed.layer import MEAN_K, ROUTER_STD
from bhlib.speed.results import Candidate, Results
from bhlib.speed.timing import captured, measure

#: An experts implementation that computes nothing: what is left of a pass is the most that skipping experts can save.
NO_EXPERTS = "no experts"

#: grouped_mm under a name of its own: where it finds the literal name, `generate()` decodes by batched_mm.
KEPT = "kept_grouped_mm"

Contexts = dict[Candidate, Callable[[], AbstractContextManager]]


@lru_cache(maxsize=1)
def load_model(name: str | None = None) -> nn.Module:
    """A model on the GPU in bfloat16: a checkpoint by name, else OLMoE-1B-7B's shapes with random weights.

    The random routers are drawn so that the logits of a token spread like those of a trained model.
    """
    if name is not None:
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16).cuda().eval()
    config = OlmoeConfig(intermediate_size=1024, bos_token_id=None, eos_token_id=None, pad_token_id=1)
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = OlmoeForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    for layer in find_moe_layers(model):
        nn.init.normal_(layer.router.weight, std=ROUTER_STD / config.hidden_size**0.5)
    return model


def random_ids(model: nn.Module, batch: int, length: int) -> Tensor:
    """Token ids [batch, length], none of them special."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, model.config.vocab_size - 300, (batch, length), generator=generator, device="cpu")
    return ids.to(model.device)


@contextmanager
def run_by(layers: list[MoELayer], name: str) -> Iterator[None]:
    """Within the block, the experts of layers run by an implementation: of transformers, `NO_EXPERTS` or `KEPT`."""
    if name == NO_EXPERTS:
        ALL_EXPERTS_FUNCTIONS.register(name, lambda module, hidden_states, *routing: torch.zeros_like(hidden_states))
    elif name == KEPT:
        ALL_EXPERTS_FUNCTIONS.register(name, ALL_EXPERTS_FUNCTIONS["grouped_mm"])
    with implementations_changed(layers, lambda _: name):
        yield


def router_outputs(model: nn.Module, call: Callable, index: int) -> list[Tensor]:
    """Output number `index` (0 logits, 1 weights, 2 experts) of every router during a call, other hooks applied."""
    seen = []
    with watch(find_moe_layers(model), lambda layer, output: seen.append(output[index])):
        call()
    return seen


def selected_experts(model: nn.Module, call: Callable) -> list[Tensor]:
    """Indices [tokens, slots] by which every layer's experts work during a call; `num_experts` is an empty slot."""
    selected = router_outputs(model, call, 2)
    if implementation_of(model) == NO_EXPERTS:
        return [torch.full_like(index, model.config.num_experts) for index in selected]
    return selected


def mean_filled(model: nn.Module, selected: list[Tensor]) -> float:
    """Experts per token and layer, from the indices [tokens, slots] of each layer."""
    return float(torch.cat(selected).lt(model.config.num_experts).sum(-1).float().mean())


def rules_by_mean_k(model: nn.Module, ids: Tensor) -> dict[int, BH]:
    """BH rules at the levels that give `MEAN_K` experts per token and layer, on the unpatched model's logits."""
    logits = torch.stack(
        router_outputs(model, lambda: model(input_ids=ids, use_cache=False, logits_to_keep=1), 0)
    ).float()
    max_k = find_moe_layers(model)[0].top_k

    def rule_of(k: int) -> BH:
        if k == max_k:  # every slot filled: what the kernels gain by themselves
            return BH(alpha=0.5, min_k=k, max_k=k)
        return BH(alpha_for_mean_experts(DirichletNull(), logits, k, max_k=max_k), max_k=max_k)

    return {k: rule_of(k) for k in MEAN_K}


def variants(model: nn.Module, rules: dict[int, BH], implementations: tuple[str, ...]) -> Contexts:
    """What is compared, and functions that make the context in which the model is run for it."""
    layers = find_moe_layers(model)
    top_k = layers[0].top_k
    contexts = {Candidate(name, "transformers", top_k): partial(run_by, layers, name) for name in implementations}
    for k, rule in rules.items():
        patch = RoutingPatch(model, rule, collect_stats=False, kernels=True)
        contexts[Candidate("patched", "bhlib", k)] = lambda patch=patch: patch
    return contexts | {Candidate(NO_EXPERTS, "neither", 0): partial(run_by, layers, NO_EXPERTS)}


def model_floor(
    model: nn.Module, selected: list[Tensor], batch: int, length: int, past: int, limits: dict[str, float]
) -> float:
    """Seconds below which a pass cannot go: weights in use and cache read once, or all operations done.

    Parameters
    ----------
    model : nn.Module
    selected : list of Tensor [tokens, slots]
        Experts of each layer; anything outside ``0..num_experts - 1`` is an empty slot.
    batch, length, past : int
        Sequences, new tokens of each, and tokens in the cache.
    limits : dict
        See `bhlib.speed.timing.ceilings`.
    """
    config = model.config
    expert = 3 * config.hidden_size * config.intermediate_size
    head = config.vocab_size * config.hidden_size
    embedding = 0 if config.tie_word_embeddings else head
    dense = model.num_parameters() - embedding - head - config.num_hidden_layers * config.num_experts * expert
    filled = [index[(index >= 0) & (index < config.num_experts)] for index in selected]
    cache = 2 * config.num_hidden_layers * batch * past * config.num_key_value_heads
    cache *= config.hidden_size // config.num_attention_heads
    moved = 2 * (dense + head + cache + sum(expert * len(index.unique()) for index in filled))
    attended = batch * length * (past + (length + 1) / 2)  # (query, key) pairs
    operations = 2 * batch * length * dense + 2 * batch * head + 2 * expert * sum(len(index) for index in filled)
    operations += 4 * config.num_hidden_layers * config.hidden_size * attended
    return max(moved / limits["bytes_per_second"], operations / limits["operations_per_second"])


def compare_passes(
    results: Results,
    stage: str,
    model: nn.Module,
    contexts: Contexts,
    forward: Callable,
    tokens: int,
    shape: tuple[int, int, int],
    limits: dict[str, float],
    rounds: int,
) -> dict[Candidate, dict[str, float]]:
    """Rows for one forward pass under every candidate, eagerly and from CUDA graphs.

    Parameters
    ----------
    forward : function of a model
        One pass.
    shape : (batch, length, past)
        See `model_floor`.

    Returns
    -------
    dict by candidate
        What a row says beside the times: ``mean_k``, ``floor`` (seconds) and ``peak_gib``.
    """
    facts, graphs = {}, {}
    for candidate, context in contexts.items():
        with results.attempt(stage, "eager", tokens, candidate), context():
            selected = selected_experts(model, lambda: forward(model))
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            forward(model)
            peak = torch.cuda.max_memory_allocated() / 2**30
            floor = model_floor(model, selected, *shape, limits)
            facts[candidate] = {"mean_k": mean_filled(model, selected), "floor": floor, "peak_gib": peak}
    times = {"eager": measure(dict.fromkeys(facts, partial(forward, model)), rounds, contexts=contexts)}
    for candidate in facts:
        if candidate.name == "eager":
            continue  # waits for the device
        with results.attempt(stage, "graph", tokens, candidate), contexts[candidate]():
            graphs[candidate] = captured(partial(forward, model))
    times["graph"] = measure(graphs, rounds)
    for mode, measured in times.items():
        for candidate, seconds in measured.items():
            results.add(stage, mode, tokens, candidate, times=seconds, **facts[candidate])
    return facts


def bench_prefill(results: Results, limits: dict[str, float], quick: bool = False, name: str | None = None) -> None:
    """One forward pass over prompts of 512 and 4,096 tokens, and over four of 4,096."""
    model = load_model(name)
    rules = rules_by_mean_k(model, random_ids(model, 1, 4096))
    contexts = variants(model, rules, ("grouped_mm",) if quick else ("eager", "grouped_mm"))
    rounds, passes = 5 if quick else 15, []
    for batch, length in ((1, 512), (1, 4096), (4, 4096)):
        ids = random_ids(model, batch, length)

        def forward(model, ids=ids):
            return model(input_ids=ids, use_cache=False, logits_to_keep=1).logits

        shape, tokens = (batch, length, 0), batch * length
        facts = compare_passes(results, "prefill", model, contexts, forward, tokens, shape, limits, rounds)
        passes.append((tokens, forward, facts))
        torch.cuda.empty_cache()
    compiled = [one for one in contexts if one.name == "grouped_mm" or (one.name, one.k) == ("patched", 4)]
    for tokens, forward, facts in [] if quick else passes:  # last, since to compile takes longer than all else
        for candidate in compiled:
            torch.compiler.reset()
            torch.cuda.empty_cache()
            with results.attempt("prefill", "compiled", tokens, candidate), contexts[candidate]():
                call = captured(partial(forward, torch.compile(model, dynamic=False)))
                times = measure({candidate: call}, rounds)[candidate]
                results.add("prefill", "compiled", tokens, candidate, times=times, **facts[candidate])


def bench_decode(
    results: Results, limits: dict[str, float], quick: bool = False, name: str | None = None, prompt: int = 128
) -> None:
    """One decoding step on a static cache, for 1, 8 and 32 sequences."""
    model = load_model(name)
    rules = rules_by_mean_k(model, random_ids(model, 1, 4096))
    for batch in (1, 8, 32):
        ids = random_ids(model, batch, prompt)
        # With room to spare: a cache that counts on the host grows by a token with every call, and room costs little.
        cache = StaticCache(config=model.config, max_cache_len=prompt + 128)
        with_cache = {cache_argument(model): cache, "use_cache": True}
        model(input_ids=ids, logits_to_keep=1, **with_cache)
        token = ids[:, -1:].contiguous()
        position = torch.full((batch, 1), prompt, device=ids.device)

        def forward(model, cache=cache, with_cache=with_cache, token=token, position=position, ids=ids):
            logits = model(input_ids=token, position_ids=position, **with_cache).logits
            _rewind(cache, ids.shape[1])
            return logits

        contexts = variants(model, rules, ("grouped_mm", "batched_mm"))
        compare_passes(
            results, "decode", model, contexts, forward, batch, (batch, 1, prompt), limits, 5 if quick else 15
        )
        torch.cuda.empty_cache()


def cache_argument(model: nn.Module) -> str:
    """What a model's forward calls its cache: ``cache`` since transformers 5.24, ``past_key_values`` before."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _rewind(cache: StaticCache, length: int) -> None:
    """Let a cache go on after `length` tokens again, where it counts them."""
    for layer in cache.layers:
        count = getattr(layer, "cumulative_length", None)
        if isinstance(count, Tensor):
            count.fill_(length)
        elif count is not None:
            layer.cumulative_length = length
