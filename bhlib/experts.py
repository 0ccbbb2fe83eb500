"""The experts' forward pass over the selected (token, expert) pairs only.

transformers gives every token the same number of slots, so an expert that a rule drops still costs a row of every
matrix product, whatever weight it has. Here the filled slots are gathered into a list of pairs, each pair is
handed to the model's own experts implementation as a token with a single slot, and the results are summed back
per token. The model's code computes; this module only decides which rows it sees. Hence dropped experts cost
nothing in *every* implementation. Where no slot is empty there is nothing to gather, and the model's own forward
runs on its own arguments: the result has the same bits as without the patch.

Each implementation ``name`` gets a twin ``bh_name`` in transformers' `ExpertsInterface`, and a second one,
``bh_kernels_name``, which leaves inputs that they can compute to the kernels of `bhlib.kernels`, to the sorted pairs
of `bhlib.sorted_pairs` or to the loop of `bhlib.expert_loop`. As `generate()` looks for the literal name ``grouped_mm``
to swap it in decoding, a twin is never swapped.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, SupportsIndex

import torch
from packaging.version import Version
from torch import Tensor

from bhlib import kernels, sorted_pairs
from bhlib.expert_loop import is_plain, loop_forward, token_forward

if TYPE_CHECKING:
    from bhlib.expert_loop import ExpertsModule

PREFIX = "bh_"
KERNELS = "kernels_"

#: Implementations of transformers that compute what the kernels compute, by name; any other was chosen for a reason.
REPLACEABLE = (None, "eager", "grouped_mm", "batched_mm")

#: Implementations of transformers that leave out slots with the index ``num_experts`` by themselves.
SKIPPING = ("sonicmoe",)

#: From here on torch.compile traces a subclass of str. Before, a configuration that is copied while its model is
#: patched keeps the twin's name; the twin of a model that is not patched computes the model's own bits.
TWIN_NAMES_COMPILE = "2.13"


class TwinName(str):
    """Name of a twin, as it stands in a patched model's configuration.

    Whoever copies or pickles the configuration gets the name that it replaces: a copy of a patched model is plain.
    """

    original: str | None

    def __new__(cls, original: str | None, by_kernels: bool = False) -> "TwinName":
        name = super().__new__(cls, PREFIX + (KERNELS if by_kernels else "") + (original or "eager"))
        name.original = original
        return name

    def __deepcopy__(self, memo: dict) -> str | None:
        return self.original

    def __copy__(self) -> str | None:
        return self.original

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple:
        return (type(None), ()) if self.original is None else (str, (self.original,))


def twin(implementation: str | None, by_kernels: bool = False) -> str:
    """Name of the pair-wise twin of an experts implementation, registered on first use.

    Parameters
    ----------
    implementation : str or None
        A name known to transformers' `ExpertsInterface`, ``"eager"``, or None, which transformers reads as eager.
    by_kernels : bool
        Whether the twin may use the kernels; it does where they compute the inputs, and is pair-wise elsewhere.
    """
    if is_twin(implementation):
        raise ValueError(f"{str(implementation)!r} is a twin already: the model is patched.")
    name = TwinName(implementation, by_kernels)
    if name not in _interface():
        forward = kernel_forward if by_kernels else whole_forward if implementation in SKIPPING else pairwise_forward
        _interface().register(str(name), partial(forward, implementation or "eager"))
    return name if Version(torch.__version__) >= Version(TWIN_NAMES_COMPILE) else str(name)


def twin_by_kernels(implementation: str | None) -> str:
    """The second twin of an implementation, which may use what is faster, by the name of its first."""
    plain = (implementation or "").removeprefix(PREFIX)
    return twin(implementation.original if isinstance(implementation, TwinName) else plain, by_kernels=True)


def is_twin(implementation: str | None) -> bool:
    """Whether an experts implementation is one of ours, that of a patched model."""
    return (implementation or "").startswith(PREFIX)


def can_be_faster(experts: Iterable["ExpertsModule"]) -> bool:
    """Whether this machine has something faster for experts modules: kernels and sorted pairs, or a CPU's loop."""
    if kernels.interpreted():
        return False
    if torch.cuda.is_available():
        return kernels.available() and all(map(kernels.module_fits, experts))
    return all(map(is_plain, experts))


def _interface():
    # Imported late: the module does not exist in a transformers too old to be patched, which gets an error of its own.
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    return ALL_EXPERTS_FUNCTIONS


def original_forward(module: "ExpertsModule", implementation: str) -> Callable[..., Tensor]:
    """The model's own forward of an experts module under an implementation's name."""
    # `use_experts_implementation` wraps the class's eager forward with functools.wraps.
    eager = type(module).forward.__wrapped__  # type: ignore[attr-defined]
    return _interface().get_interface(implementation, eager)


def whole_forward(implementation: str, module: "ExpertsModule", hidden_states: Tensor, *routing: Tensor) -> Tensor:
    """Forward of an experts module by an implementation in `SKIPPING`: nothing is gathered."""
    return original_forward(module, implementation)(module, hidden_states, *routing)


@torch.compiler.disable  # how many pairs there are is known at run time only
def pairwise_forward(
    implementation: str,
    module: "ExpertsModule",
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """Forward of an experts module over its filled slots.

    Parameters
    ----------
    implementation : str
        Which of the model's own implementations multiplies the matrices.
    module : nn.Module
        Any experts module that `ExpertsInterface` dispatches.
    hidden_states, top_k_index, top_k_weights
        As for `bhlib.expert_loop.loop_forward`.

    Returns
    -------
    Tensor [tokens, hidden], in the dtype of `hidden_states`. A token's experts are added up in float32 or wider, in
    the order of their slots: the result does not vary from run to run, on a GPU either. Where no slot is filled, it is
    zero, and so are the gradients of all that would have had a part in it.
    """
    forward = original_forward(module, implementation)
    filled = top_k_index < module.num_experts
    slot, token = torch.nonzero(filled.T, as_tuple=True)
    if len(token) == filled.numel():
        return forward(module, hidden_states, top_k_index, top_k_weights)
    if not len(token):
        return sorted_pairs.no_pairs(module, hidden_states, top_k_weights)
    pairs = forward(
        module,
        hidden_states.index_select(0, token),
        top_k_index[token, slot, None],
        top_k_weights[token, slot, None],
    )
    wide = torch.promote_types(hidden_states.dtype, torch.float32)
    total = torch.zeros(hidden_states.shape, dtype=wide, device=hidden_states.device)
    # Slot by slot, since within a slot no token occurs twice: one index_add over all would add in any order.
    per_slot = filled.sum(dim=0).tolist()
    for tokens, outputs in zip(token.split(per_slot), pairs.split(per_slot), strict=True):
        total.index_add_(0, tokens, outputs.to(wide))
    return total.to(hidden_states.dtype)


def kernel_forward(
    implementation: str, module: "ExpertsModule", hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """`pairwise_forward`, by what is faster where it computes these inputs.

    That is, on a CUDA device, the kernels (`bhlib.kernels`), or sorted pairs where a gradient is wanted
    (`bhlib.sorted_pairs`); on a CPU the loop over experts. Results differ from the model's own in rounding; on a CPU
    only where a slot is empty.
    """
    if kernels.inputs_fit(module, hidden_states, top_k_weights):
        from bhlib.kernels.forward import experts_forward  # imports Triton, which not everybody has

        return experts_forward(module, hidden_states, top_k_index, top_k_weights)
    if sorted_pairs.inputs_fit(implementation, module, hidden_states, top_k_weights):
        return sorted_pairs.sorted_forward(module, hidden_states, top_k_index, top_k_weights)
    if hidden_states.device.type == "cpu":
        forward = _cpu_forward_uncompiled if torch.compiler.is_compiling() else _cpu_forward
        return forward(implementation, module, hidden_states, top_k_index, top_k_weights)
    return pairwise_forward(implementation, module, hidden_states, top_k_index, top_k_weights)


def _cpu_forward(
    implementation: str, module: "ExpertsModule", hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    # Autocast means float32 or half precision according to the implementation: there, only the model's own will do.
    if top_k_index.numel() and not torch.is_autocast_enabled("cpu"):
        lowest, highest = _extremes(top_k_index)
        if highest < module.num_experts:
            return original_forward(module, implementation)(module, hidden_states, top_k_index, top_k_weights)
        if lowest < module.num_experts:
            forward = token_forward if len(hidden_states) == 1 else loop_forward
            return forward(module, hidden_states, top_k_index, top_k_weights)
    return pairwise_forward(implementation, module, hidden_states, top_k_index, top_k_weights)


# As for `pairwise_forward`; to be called through the compiler's wrapper takes time that one token can feel.
_cpu_forward_uncompiled = torch.compiler.disable(_cpu_forward)


def _extremes(top_k_index: Tensor) -> tuple[int, int]:
    """The smallest and the largest index; of one token in plain Python, which is quicker."""
    if len(top_k_index) == 1:
        slots = top_k_index[0].tolist()
        return min(slots), max(slots)
    lowest, highest = top_k_index.aminmax()
    return int(lowest), int(highest)
