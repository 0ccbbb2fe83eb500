"""The mixture-of-experts layers of a model: find them, watch them, choose the implementation of their experts.

    for layer in find_moe_layers(model):
        print(layer.name, layer.num_experts, layer.top_k, layer.weighting)

    with watch(layers, lambda layer, output: print(layer.name, output[0].shape)):
        model(**inputs)

This is the only module that reads or writes the attribute ``_experts_implementation`` of a configuration: transformers
has a public way to set it, for a whole model and for names that it knows, and none to ask for it.
"""

import copy
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn

from bhlib.hooks import own_forward
from bhlib.rules import TopK
from bhlib.weighting import WEIGHTINGS

if TYPE_CHECKING:
    from bhlib.expert_loop import ExpertsModule

    class RouterModule(nn.Module):
        """For type checkers: what a router has."""

        weight: Tensor


#: From here on routers return (raw logits, weights, indices) and experts dispatch through `ExpertsInterface`.
OLDEST_TRANSFORMERS = "5.6"


@dataclass(frozen=True)
class MoELayer:
    """A mixture-of-experts layer that can be patched.

    Attributes
    ----------
    index : int
        Number of the layer among the model's MoE layers, from 0.
    name : str
        Dotted name of its router in the model.
    router, experts : nn.Module
    num_experts, top_k : int
        Experts in the layer, those that other processes hold with them, and how many the model itself gives to a token.
    weighting : str
        How the router makes weights of its logits, one of `bhlib.weighting.WEIGHTINGS`.
    narrows : bool
        Whether the router takes float64 logits, those of a float64 model, to float32 first, as most do.
    linear : bool
        Whether the logits are the hidden states times the router's weight, plus its bias if it has one, and nothing
        else, so that they can be had without all that the router goes on to do.
    casts : bool
        Whether a `linear` router gives its weights in the dtype of its logits, not in that of its scores.
    """

    index: int
    name: str
    router: "RouterModule"
    experts: "ExpertsModule"
    num_experts: int
    top_k: int
    weighting: str
    narrows: bool
    linear: bool = False
    casts: bool = False

    @property
    def intermediate_size(self) -> int:
        """Numbers between the two matrices of an expert."""
        down_proj = self.experts.down_proj
        return down_proj.numel() // (len(down_proj) * self.router.weight.shape[-1])


def find_moe_layers(model: nn.Module) -> list[MoELayer]:
    """Every MoE layer of a transformers model, in order of depth.

    Layers are recognized by what they do, not by the names of their classes: an experts module that dispatches
    through transformers' `ExpertsInterface`, beside it a router with one row of weights per expert, which returns
    (logits, weights, indices) with weights that one of `bhlib.weighting.WEIGHTINGS` gives bit for bit on a probe of
    random inputs.

    Raises
    ------
    TypeError
        If `model` is no ``nn.Module``.
    ImportError
        If the installed transformers is older than `OLDEST_TRANSFORMERS`.
    ValueError
        If the model has no MoE layer, or one that cannot be patched; the message says which and why.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module such as OlmoeForCausalLM, got {type(model).__name__}: "
            f"load one with bhlib.load_demo() or bhlib.load_olmoe()."
        )
    if Version(transformers.__version__) < Version(OLDEST_TRANSFORMERS):
        raise ImportError(
            f"bhlib needs transformers {OLDEST_TRANSFORMERS} or newer, found {transformers.__version__}: "
            f"earlier routers do not return their logits. "
            f"Upgrade with: pip install -U 'transformers>={OLDEST_TRANSFORMERS}'"
        )
    layers: list[MoELayer] = []
    for name, module in model.named_modules():
        if not _dispatches_experts(module):
            continue
        _refuse_other_implementations(model, name, module)
        num_experts = _count_experts(model, name, module)
        router_name, router = _find_router(model, name, module, num_experts)
        probed = _probe(router, router_name, num_experts)
        layers.append(MoELayer(len(layers), router_name, router, module, num_experts, *probed))
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no mixture-of-experts layer that bhlib can patch: no module of it dispatches "
            f"through transformers' ExpertsInterface. "
            + (_mend_quantization(model) or "BH routing needs a model such as OLMoE: bhlib.load_demo().")
        )
    shapes = {(layer.num_experts, layer.top_k) for layer in layers}
    if len(shapes) > 1:
        raise ValueError(
            f"{type(model).__name__} cannot be patched: its MoE layers differ in (experts, top-k): {sorted(shapes)}."
        )
    return layers


def input_device(model: nn.Module) -> torch.device:
    """Where a model takes its inputs: weights that accelerate has offloaded lie on the meta device until they are used.

    The first of its hooks that names a device is that of the first module which computes.
    """
    for module in model.modules():
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next(model.parameters()).device


def name_of(model: nn.Module) -> str:
    """The name that a calibration is filed under: where the model was loaded from, or else the name of its class.

    Of a local folder only the last part counts, so that a calibration is good on other machines too.
    """
    source = str(getattr(getattr(model, "config", None), "name_or_path", "") or "")
    if Path(source).is_absolute() or Path(source).is_dir():
        source = Path(source).name
    return source or type(model).__name__


def _find_router(model: nn.Module, name: str, experts: "ExpertsModule", num_experts: int) -> tuple[str, "RouterModule"]:
    """The router that goes with an experts module, and its dotted name.

    It stands beside it, or beside the adapters that are wrapped around it, of which each of its two matrices may have
    one.
    """
    prefix = name
    for _ in range(3):
        prefix = prefix.rpartition(".")[0]
        beside = {
            child_name: child
            for child_name, child in model.get_submodule(prefix).named_children()
            if not any(module is experts for module in child.modules())
        }
        found = [child_name for child_name, child in beside.items() if _num_rows(child) == num_experts]
        if found:
            break
    if len(found) != 1:
        seen = ", ".join(f"{child_name} ({type(child).__name__})" for child_name, child in beside.items())
        raise ValueError(
            f"{type(model).__name__} cannot be patched: beside {name!r} ({type(experts).__name__}) there should be "
            f"one router with a weight of {num_experts} rows, found {len(found)} among: {seen or 'nothing'}."
        )
    return f"{prefix}.{found[0]}".lstrip("."), cast("RouterModule", beside[found[0]])


def _count_experts(model: nn.Module, name: str, experts: "ExpertsModule") -> int:
    """How many experts a layer has, on all processes that they are spread over.

    Under expert parallelism an experts module holds those of its own process. Of the ways to bring tokens to the
    others, a patch works with the one that hands every process all slots and empties those of other processes' experts:
    a slot that the rule has left empty is then empty everywhere. The others look up whose each slot is.
    """
    distributed: Any = getattr(getattr(model, "config", None), "distributed_config", None)
    asked = getattr(distributed, "enable_expert_parallel", False)
    if not getattr(experts, "_is_expert_parallel", asked):  # older versions do not mark the module
        return experts.num_experts
    way = getattr(distributed, "ep_implementation", None)
    if way != "all_reduce":
        raise ValueError(
            f"{type(model).__name__} cannot be patched under this expert parallelism (EP): {name!r} holds the "
            f"{experts.num_experts} experts of one process, the gate beside it chooses among those of all, and "
            f"ep_implementation={way!r} may look up whose each slot is, where an empty slot is nobody's. Load the "
            f"model with DistributedConfig(tp_size=N, ep_size=N, ep_implementation='all_reduce'), which transformers "
            f"5.24 has, or with tp_size=N alone."
        )
    return experts.num_experts * distributed.ep_size


def _refuse_other_implementations(model: nn.Module, name: str, experts: "ExpertsModule") -> None:
    """Raise if an experts module looks for its implementation elsewhere than where `bhlib.experts` puts its own."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS  # which a transformers too old does not have

    decorated = inspect.getclosurevars(type(experts).forward).nonlocals
    interface = decorated.get("experts_interface", ALL_EXPERTS_FUNCTIONS)
    if interface is not ALL_EXPERTS_FUNCTIONS:
        raise ValueError(
            f"{type(model).__name__} cannot be patched: {name!r} ({type(experts).__name__}) dispatches through "
            f"{type(interface).__name__}, whose implementations bhlib has no twins of. {_mend_quantization(model)}"
        )


def _mend_quantization(model: nn.Module) -> str:
    """What to do about a model whose quantization replaces the experts' modules; empty if it is not quantized."""
    method = getattr(model, "quantization_method", None)
    if method is None:
        return ""
    return (
        f"Its quantization ({getattr(method, 'value', method)}) replaces the experts' modules by its own. Load it with "
        f"dequantize=True in its quantization config, or quantize the plain checkpoint in a way that keeps them: "
        f"bhlib/large_models.md lists those."
    )


def _dispatches_experts(module: nn.Module) -> TypeGuard["ExpertsModule"]:
    """Whether transformers' `use_experts_implementation` decorated the module's class."""
    return (
        hasattr(module, "num_experts")
        and hasattr(module, "has_gate")
        and hasattr(module, "is_transposed")
        and hasattr(type(module).forward, "__wrapped__")
    )


def _num_rows(module: nn.Module) -> int | None:
    weight = getattr(module, "weight", None)
    return weight.shape[0] if isinstance(weight, torch.Tensor) and weight.dim() == 2 else None


@torch.no_grad()
def _probe(router: "RouterModule", name: str, num_experts: int) -> tuple[int, str, bool, bool, bool]:
    """Run a router on random inputs: its top-k, which weighting gives its weights to the last bit, and the rest.

    All as in `MoELayer`, in its order.
    """
    refusal = f"The router {name!r} ({type(router).__name__}) cannot be patched: "
    noise, (logits, weights, index) = _run_alone(router, refusal)
    if logits.shape[-1] != num_experts or weights.shape != index.shape or index.is_floating_point():
        raise ValueError(
            f"{refusal}it returns shapes {tuple(logits.shape)}, {tuple(weights.shape)}, {tuple(index.shape)}, "
            f"not [tokens, {num_experts}] logits with weights and indices [tokens, top_k]."
        )
    if not torch.isfinite(logits).all():
        raise ValueError(f"{refusal}its logits are not finite on finite inputs; look at its weights.")
    top_k = index.shape[-1]
    for narrows, weighting in itertools.product((True, False), WEIGHTINGS):
        routing = TopK(top_k)(as_scored(logits, narrows), weighting=weighting)
        if torch.equal(routing.experts, index) and torch.equal(routing.weights.to(weights.dtype), weights):
            _refuse_corrections(router, refusal, num_experts)
            return top_k, weighting, narrows, *_find_product(router, noise, logits)
    raise ValueError(
        f"{refusal}its weights follow from its logits in none of the ways that are known: {', '.join(WEIGHTINGS)} "
        f"(correction biases, groups and scaling factors are not supported). Another way is one more "
        f"bhlib.weighting.Weighting."
    )


def _find_product(router: "RouterModule", noise: Tensor, logits: Tensor) -> tuple[bool, bool]:
    """`MoELayer.linear` and `MoELayer.casts`, from the logits that a router gave to noise."""
    wrapped = own_forward(router) is vars(router).get("forward")
    if wrapped or next(router.children(), None) or not torch.equal(linear_logits(router, noise), logits):
        return False, False
    # In bfloat16 too: some routers compute in float32 whatever they are given, which shows there only.
    low = copy.copy(router)
    for name in ("_parameters", "_buffers"):
        tensors: dict[str, Tensor | None] = vars(router)[name]
        vars(low)[name] = {key: None if tensor is None else tensor.bfloat16() for key, tensor in tensors.items()}
    low.training = False
    low_logits, low_weights, _ = low.forward(noise.bfloat16())
    linear = torch.equal(linear_logits(low, noise.bfloat16()), low_logits)
    return linear, low_weights.dtype == low_logits.dtype


def linear_logits(router: "RouterModule", hidden_states: Tensor) -> Tensor:
    """Logits [tokens, experts] of a router that is `MoELayer.linear`, of hidden states [..., hidden]."""
    rows = hidden_states.reshape(-1, hidden_states.shape[-1])
    return nn.functional.linear(rows, router.weight, getattr(router, "bias", None))


def _run_alone(router: "RouterModule", refusal: str) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Random hidden states, and the three tensors a router makes of them, or an error that begins with `refusal`."""
    if hasattr(router.weight, "device_mesh"):
        raise ValueError(
            f"{refusal}its weight is sharded over processes (a DTensor, as fully_shard or a tensor-parallel plan makes "
            f"it). Load the model whole and patch it first, then call fully_shard inside the patch."
        )
    device = router.weight.device if router.weight.device.type != "meta" else "cpu"
    if router.weight.device.type == "meta" and "forward" not in vars(router):  # where accelerate brings them in
        raise ValueError(f"{refusal}its weights are on the meta device, without values. Load the model first.")
    generator = torch.Generator("cpu").manual_seed(0)
    noise = torch.randn(256, router.weight.shape[1], generator=generator, device="cpu")
    noise = noise.to(device, router.weight.dtype)
    training = router.training
    try:
        # Noise that a router adds in training would hide its rule. `forward` leaves other people's hooks alone.
        router.training = False
        output = own_forward(router)(noise)
    except TypeError as error:
        raise ValueError(f"{refusal}it needs more than the hidden states ({error}).") from error
    finally:
        router.training = training
    if not (isinstance(output, tuple) and len(output) == 3 and all(isinstance(x, Tensor) for x in output)):
        raise ValueError(f"{refusal}it does not return (router_logits, top_k_weights, top_k_index).")
    return noise, output


def as_scored(router_logits: Tensor, narrows: bool) -> Tensor:
    """Logits [tokens, experts] in the precision in which the router scores them (`MoELayer.narrows`)."""
    return router_logits.float() if narrows and router_logits.dtype == torch.float64 else router_logits


def _refuse_corrections(router: "RouterModule", refusal: str, num_experts: int) -> None:
    """Raise if the router holds one more number per expert: too small to show in the probe, it would show in use."""
    for name, tensor in [*router.named_parameters(), *router.named_buffers()]:
        if name not in ("weight", "bias") and tensor.numel() == num_experts and tensor.any():
            raise ValueError(f"{refusal}it corrects the scores of its experts ({name}).")


def find_body(model: nn.Module, layers: list[MoELayer]) -> nn.Module:
    """The innermost module that holds all routers and takes token ids: it sees the attention mask of every pass."""
    routers = {id(layer.router) for layer in layers}
    body = model
    for module in model.modules():  # parents come before their children
        takes_ids = "input_ids" in inspect.signature(module.forward).parameters
        if takes_ids and routers <= {id(child) for child in module.modules()}:
            body = module
    return body


# -- watching --------------------------------------------------------------------------------------------------


@contextmanager
def watch(
    layers: Iterable[MoELayer],
    call: Callable[[MoELayer, Any], object],
    *,
    module: str = "router",
    before: Callable[[MoELayer], object] | None = None,
) -> Iterator[None]:
    """Within the block, look at what modules of MoE layers return; outputs and other people's hooks stay as they are.

    Parameters
    ----------
    layers : iterable of MoELayer
    call : function of (layer, output)
        Called whenever the module of a layer has run. A router's output is (logits, weights, indices).
    module : {"router", "experts"}
        Which module of each layer.
    before : function of a layer, optional
        Called whenever the module is about to run.
    """

    def enter(layer: MoELayer, *_) -> None:
        assert before is not None
        before(layer)

    def leave(layer: MoELayer, module: nn.Module, args: tuple, output: object) -> None:
        call(layer, output)

    with ExitStack() as hooks:
        for layer in layers:
            watched = getattr(layer, module)
            if before is not None:
                hooks.callback(watched.register_forward_pre_hook(partial(enter, layer)).remove)
            hooks.callback(watched.register_forward_hook(partial(leave, layer)).remove)
        yield


# -- the implementation of the experts ---------------------------------------------------------------------------


def implementation_of(module: nn.Module) -> str | None:
    """Name of the experts implementation that a model or an experts module runs by; None, like ``"eager"``, is eager.

    What the names stand for is in transformers' `ExpertsInterface`.
    """
    config: Any = module.config
    return config._experts_implementation


def set_implementation(experts: "ExpertsModule", name: str | None) -> None:
    """Let an experts module, and all that share its configuration, run by an implementation, known or not."""
    experts.config._experts_implementation = name


@contextmanager
def implementations_changed(layers: Iterable[MoELayer], change: Callable[[str | None], str | None]) -> Iterator[None]:
    """Within the block, the experts of layers run by other implementations: by ``change(name)`` instead of ``name``."""
    one_per_config = {id(layer.experts.config): layer.experts for layer in layers}.values()
    with ExitStack() as restore:
        for experts in one_per_config:
            name = implementation_of(experts)
            changed = change(name)
            restore.callback(set_implementation, experts, name)
            set_implementation(experts, changed)
        yield
