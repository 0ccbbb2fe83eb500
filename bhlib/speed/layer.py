"""One layer: the router from logits to indices, and the experts."""

from collections.abc import Callable
from functools import partial
from itertools import product

import numpy as np
import torch
from torch import Tensor, nn
from transformers import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

from bhlib.compensation import LayerCompensation
from bhlib.discovery import set_implementation
from bhlib.norms import LayerGuess, LayerNorms
from bhlib.rules import BH
from bhlib.speed.results import Candidate, Results
from bhlib.speed.timing import captured, in_turn, measure

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
MEAN_K = (8, 6, 4, 3, 2)
ROUTER_STD = 1.8  # of a token's logits, as in a trained router: OLMoE's hidden size times a weight of 0.04

#: Up to this many tokens a pass is replayed from a CUDA graph too: beyond, launching costs next to nothing.
GRAPH_TOKENS = 512
#: Up to this many tokens batched_mm is measured: it copies the weights of every slot.
BATCHED_TOKENS = 32
RIVALS_K = (8, 4)

NEAR = 16  # logits that norms are guessed from: the default of `fit_norms`

#: Ranks of the map of what stands in for dropped experts (0 for means alone), measured at this mean number of experts.
STAND_INS = {"kernels, means": 0, "kernels, means and map": 16}
STAND_INS_K = 4


def exact_counts(num_tokens: int, mean_k: float, max_k: int, seed: int = 0) -> Tensor:
    """Random numbers of experts [tokens], 1 to max_k, with a sum of exactly ``round(mean_k * num_tokens)``."""
    generator = np.random.default_rng(seed)
    counts = np.clip(np.rint(generator.normal(mean_k, 1.5, num_tokens)), 1, max_k).astype(np.int64)
    excess = int(counts.sum()) - round(mean_k * num_tokens)
    while excess:
        movable = np.flatnonzero(counts > 1) if excess > 0 else np.flatnonzero(counts < max_k)
        if not len(movable):
            raise ValueError(f"mean_k must lie between 1 and max_k={max_k}, got {mean_k}.")
        moved = generator.permutation(movable)[: abs(excess)]
        counts[moved] -= np.sign(excess)
        excess = int(counts.sum()) - round(mean_k * num_tokens)
    return torch.from_numpy(counts)


def random_routing(
    num_tokens: int, mean_k: float, slots: int = 8, num_experts: int = 64, seed: int = 0, device: str = "cuda"
) -> tuple[Tensor, Tensor]:
    """Indices [tokens, slots] (`num_experts` if empty) and bfloat16 weights, from logits spread as a router's."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(num_tokens, num_experts, generator=generator, device="cpu")
    probabilities = torch.softmax(ROUTER_STD * noise, dim=-1)
    weights, index = probabilities.topk(slots, dim=-1)
    empty = torch.arange(slots, device="cpu") >= exact_counts(num_tokens, mean_k, slots, seed)[:, None]
    return index.masked_fill(empty, num_experts).to(device), weights.masked_fill(empty, 0.0).to(device, torch.bfloat16)


def full_size_experts(seed: int = 0) -> OlmoeExperts:
    """The experts of one layer of OLMoE-1B-7B, bfloat16, random."""
    config = OlmoeConfig(hidden_size=2048, intermediate_size=1024, num_experts=64, num_experts_per_tok=8)
    torch.manual_seed(seed)
    with torch.device("cuda"):
        module = OlmoeExperts(config).to(torch.bfloat16).requires_grad_(False)
    for matrices in module.parameters():
        nn.init.normal_(matrices, std=0.02)
    return module.eval()


def random_norms(num_experts: int, seed: int = 0) -> LayerGuess:
    """A guess at the norms of a layer's experts from the `NEAR` largest logits, as large as fitted ones."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (num_experts,), (num_experts,), (num_experts, num_experts)
    parts = (0.1 * torch.randn(shape, generator=generator, device="cpu") for shape in shapes)
    return LayerGuess(LayerNorms(*(part.cuda() for part in parts)), NEAR)


def random_stand_ins(hidden: int, num_experts: int, rank: int, seed: int = 0) -> LayerCompensation:
    """What stands in for dropped experts, bfloat16, random."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (1 + num_experts, hidden), (rank, hidden), (rank, hidden)
    means, down, up = (0.02 * torch.randn(shape, generator=generator, device="cpu") for shape in shapes)
    means[0] = 0
    return LayerCompensation(*(part.to("cuda", torch.bfloat16) for part in (means, down, up)))


def marked_routing(num_tokens: int, mean_k: float, num_experts: int = 64, **options: int) -> tuple[Tensor, Tensor]:
    """`random_routing`, with what is dropped of the slots marked (`bhlib.rules.routing.mark_dropped`)."""
    index, _ = random_routing(num_tokens, mean_k, num_experts=num_experts, **options)
    own, weights = random_routing(num_tokens, index.shape[1], num_experts=num_experts, **options)
    return torch.where(index < num_experts, own, own + num_experts + 1), weights


def block_floor(index: Tensor, num_experts: int, hidden: int, intermediate: int, limits: dict[str, float]) -> float:
    """Seconds below which the experts of one layer cannot go: weights of the experts in use, hidden in and out."""
    filled = index[index < num_experts]
    moved = 2 * (3 * hidden * intermediate * len(filled.unique()) + 2 * hidden * len(index))
    operations = 6 * hidden * intermediate * len(filled)
    return max(moved / limits["bytes_per_second"], operations / limits["operations_per_second"])


def bench_router(
    results: Results, limits: dict[str, float], quick: bool = False, name: str | None = None, max_k: int = 8
) -> None:
    """Softmax and top-k of torch, the rule in plain torch, and the kernel, both with norms too; and an empty kernel."""
    from bhlib.kernels.routing import bh_route  # imports Triton, which not everybody has

    num_experts, repeats = 64, 20  # a graph holds several calls: one alone takes less than starting a graph
    rule = BH(alpha=0.05, max_k=max_k)
    statistic, exclude_top, cuts = rule.kernel_cuts(num_experts, None, torch.device("cuda"))
    guess = random_norms(num_experts)
    one = torch.zeros(1, device="cuda")
    for tokens in (1, 512, 16_384):
        logits = (ROUTER_STD * torch.randn(tokens, num_experts, device="cuda")).to(torch.bfloat16)

        def own(logits=logits):
            weights, index = torch.topk(torch.softmax(logits, dim=-1, dtype=torch.float32), max_k, dim=-1)
            return weights.to(logits.dtype), index

        def kernel(logits=logits, norms=None):
            return bh_route(logits, cuts, statistic=statistic, exclude_top=exclude_top, max_k=max_k,
                            weights_dtype=logits.dtype, norms=norms, near=NEAR if norms else 0)  # fmt: skip

        mean_k = float(kernel()[2].float().mean())
        calls = {
            Candidate("softmax + topk", "transformers", max_k): own,
            Candidate("BH, torch", "bhlib", None): lambda logits=logits: rule(logits),
            Candidate("BH, kernel", "bhlib", None): kernel,
            Candidate("BH, norms, kernel", "bhlib", None): partial(kernel, norms=guess.norms),
            Candidate("BH, norms, torch", "bhlib", None): lambda logits=logits: rule(
                logits, log_norms=guess.log_norms(logits)
            ),
            Candidate("an empty kernel", "neither", None): one.zero_,
        }
        ready = {("eager", candidate): in_turn([call] * repeats) for candidate, call in calls.items()}
        for candidate, call in calls.items():
            with results.attempt("router", "graph", tokens, candidate):
                ready["graph", candidate] = captured(*[call] * repeats)
        floor = tokens * (2 * num_experts + 10 * max_k + 8) / limits["bytes_per_second"]
        for (mode, candidate), times in measure(ready, rounds=7 if quick else 25).items():
            used = {"softmax + topk": max_k, "an empty kernel": 0}.get(candidate.name, mean_k)
            results.add("router", mode, tokens, candidate, used, times / repeats, floor)


def bench_block(results: Results, limits: dict[str, float], quick: bool = False, name: str | None = None) -> None:
    """The experts of one layer: transformers' own implementations at top-8, the kernels at every mean k, and rivals.

    With what stands in for dropped experts too, at one mean k, on the same experts.

    Rivals are libraries that skip empty slots too, measured where they are installed: see `find_rivals`.
    """
    from bhlib.kernels.forward import experts_forward  # imports Triton, which not everybody has

    module = full_size_experts()
    sizes = module.num_experts, module.hidden_dim, module.intermediate_dim
    rivals = find_rivals(results, module)
    candidates = [Candidate(implementation, "transformers", 8) for implementation in IMPLEMENTATIONS]
    candidates += [Candidate("kernels", "bhlib", k) for k in MEAN_K]
    candidates += [Candidate(name, "bhlib", STAND_INS_K) for name in STAND_INS]
    parts = {name: random_stand_ins(sizes[1], sizes[0], rank) for name, rank in STAND_INS.items()}
    candidates += [Candidate(rival, "others", k) for rival in rivals for k in RIVALS_K]
    for tokens in (1, 8, 32, 512, 4096, 16_384):
        hidden = torch.randn(tokens, module.hidden_dim, device="cuda", dtype=torch.bfloat16)
        # Few tokens use few experts, which the cache would hold from one call to the next: take turns.
        draws = 16 if tokens == 1 else 4 if tokens <= BATCHED_TOKENS else 1
        routings = {k: [random_routing(tokens, k, seed=seed) for seed in range(draws)] for k in MEAN_K}
        marked = [marked_routing(tokens, STAND_INS_K, seed=seed) for seed in range(draws)]
        torch.compiler.reset()
        ready = {}
        for mode, candidate in product(("eager", "graph", "compiled"), candidates):
            if not _worth_measuring(mode, candidate, tokens, quick):
                continue
            if candidate.by == "transformers":
                forward = _own_forward(module, candidate.name, mode == "compiled")
            else:
                ours = partial(experts_forward, module, missing=parts.get(candidate.name))
                forward = ours if candidate.by == "bhlib" else rivals[candidate.name]
            drawn = marked if candidate.name in parts else routings[candidate.k]
            calls = [partial(forward, hidden, *routing) for routing in drawn]
            with results.attempt("block", mode, tokens, candidate):
                in_turn(calls)()
                from_host = mode == "eager" or tokens > GRAPH_TOKENS
                ready[mode, candidate] = in_turn(calls) if from_host else captured(*calls)
        for (mode, candidate), times in measure(ready, rounds=5 if quick else 15).items():
            floor = np.mean([block_floor(index, *sizes, limits) for index, _ in routings[candidate.k]])
            results.add("block", mode, tokens, candidate, candidate.k, times / draws, floor)
        del ready
        torch.cuda.empty_cache()


def find_rivals(results: Results, module: nn.Module) -> dict[str, Callable]:
    """By name, the forwards of `module` by libraries that run here; of each that does not, a row says why.

    ``scattermoe`` (github.com/shawntan/scattermoe, installed from its source) and ``sonicmoe``, an implementation of
    transformers that needs the packages `kernels` and `nvidia-cutlass-dsl`, and fetches its kernels when first used.
    Both leave out slots whose index is ``num_experts``.
    """
    forwards = {"scattermoe": partial(_scattermoe_forward, module), "sonicmoe": _own_forward(module, "sonicmoe", False)}
    hidden = module.down_proj.new_zeros(1, module.hidden_dim)
    index = torch.tensor([[0, module.num_experts]], device=hidden.device)
    weights = hidden.new_tensor([[1.0, 0.0]])
    found = {}
    for name, forward in forwards.items():
        with results.attempt("block", "eager", 1, Candidate(name, "others", None)):
            forward(hidden, index, weights)
            found[name] = forward
    return found


def _scattermoe_forward(module: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    from scattermoe.parallel_experts import flatten_sort_count, parallel_linear

    # Empty slots are one expert more in its counts, which only the backward pass reads.
    experts, slots, ends = flatten_sort_count(index, num_experts=module.num_experts + 1)
    linear = partial(parallel_linear, sorted_expert_idxs=experts, sorted_scattered_idxs=slots, expert_offsets=ends)
    gate, up = linear(hidden, module.gate_up_proj.mT, index.shape[1], grouped_out=True).chunk(2, dim=-1)
    return linear(module.act_fn(gate) * up, module.down_proj.mT, 1, gates=weights, grouped_in=True)


def _own_forward(module: nn.Module, implementation: str, compiled: bool) -> Callable:
    run = torch.compile(module, dynamic=False) if compiled else module

    def forward(hidden, index, weights):
        set_implementation(module, implementation)
        return run(hidden, index, weights)

    return forward


def _worth_measuring(mode: str, candidate: Candidate, tokens: int, quick: bool) -> bool:
    if candidate.name == "batched_mm" and tokens > BATCHED_TOKENS:
        return False
    if candidate.name == "eager" and (mode != "eager" or quick):
        return False  # it waits for the device
    if mode == "graph":
        return tokens <= GRAPH_TOKENS and candidate.name != "scattermoe"  # it waits too
    return mode == "eager" or (candidate.by == "transformers" and not quick)
