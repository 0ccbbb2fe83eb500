"""What a number depends on, as a hash: values, the code of functions and classes with all that it refers to, a model.

    digest = Fingerprint()
    digest.add(rule)
    digest.hexdigest()

Equal hashes mean that nothing that was added has changed.
"""

import copyreg
import dataclasses
import dis
import functools
import hashlib
import importlib.util
import inspect
import json
import pickle
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import align_module_device, has_offloaded_params
from torch import Tensor, nn

from bhlib.discovery import find_moe_layers

#: Types whose ``repr`` says all.
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, type(Ellipsis), range, slice)

#: Types of what is written in C and known by its name.
_IN_C = (
    types.BuiltinFunctionType,
    types.MethodWrapperType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    types.ClassMethodDescriptorType,
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
)

#: What a class holds besides its behaviour.
_NOT_BEHAVIOUR = frozenset(
    "__dict__ __weakref__ __doc__ __module__ __annotations__ __firstlineno__ __static_attributes__ __slotnames__ "
    "__abstractmethods__ _abc_impl __orig_bases__ __parameters__ __dataclass_fields__ __dataclass_params__ "
    "__match_args__".split()
)

#: Methods that `dataclasses` writes, out of the fields.
_OUT_OF_FIELDS = frozenset(
    "__init__ __repr__ __eq__ __hash__ __setattr__ __delattr__ __lt__ __le__ __gt__ __ge__".split()
)


class Fingerprint:
    """A SHA-256 hash of values, and of the code that they run: the same in every process of one version of Python.

    A function is told by its bytecode, its defaults, what its closure holds, and the functions, classes and values
    that it refers to by name, these in the same way; a class by its bases and all that it defines; an object by its
    class and by what `pickle` would store of it (without the fields of a dataclass that are neither arguments nor
    compared, and without cached properties). Comments, docstrings and line numbers do not count. Code that came with
    Python or was installed is told by its name. What cannot be seen: names that are looked up as strings, files that a
    function reads, the state of a random generator.
    """

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._seen: dict[object, tuple[int, object]] = {}

    def hexdigest(self) -> str:
        """The hash of everything added so far."""
        return self._digest.hexdigest()

    def add(self, value: object) -> None:
        """Take in a value.

        Raises
        ------
        TypeError
            If part of it cannot be told, such as an open file, a generator or a lock.
        """
        try:
            self._add(value)
        except (pickle.PicklingError, AttributeError, RuntimeError) as error:  # also of recursion without end
            raise TypeError(str(error)) from error

    def _add(self, value: Any) -> None:
        kind = type(value)
        if kind in _PLAIN:
            self._write(kind.__name__, repr(value))
        elif isinstance(value, Tensor):
            if value.is_meta:
                raise TypeError("a tensor on the meta device has no values")
            self._write("tensor", contents(value))
        elif kind is np.ndarray and not value.dtype.hasobject:
            self._write("array", repr(value.dtype), repr(value.shape), np.ascontiguousarray(value).tobytes())
        elif kind in (list, tuple):
            self._write(kind.__name__, repr(len(value)))
            for item in value:
                self._add(item)
        elif kind in (dict, types.MappingProxyType):
            self._write("dict", repr(len(value)))
            for key, item in value.items():
                self._add(key)
                self._add(item)
        elif kind in (set, frozenset):
            self._write(kind.__name__, *sorted(_hash_of(item) for item in value))
        elif not self._is_new(value):
            self._write("again", repr(self._seen[id(value)][0]))
        else:
            self._add_new(value)

    # -- what can refer to itself --------------------------------------------------------------------------------

    def _is_new(self, value: object, key: object = None) -> bool:
        """Whether something is met for the first time. It is kept, so that its id stays its own."""
        key = id(value) if key is None else key
        if key in self._seen:
            return False
        self._seen[key] = len(self._seen), value
        return True

    def _add_new(self, value: Any) -> None:
        if isinstance(value, _IN_C):
            self._write("C", value.__qualname__)
            owner = getattr(value, "__self__", None)
            if not isinstance(owner, types.ModuleType):
                self._add(owner)
        elif isinstance(value, types.FunctionType):
            self._add_function(value)
        elif isinstance(value, types.MethodType):
            self._write("method")
            self._add(value.__func__)
            self._add(value.__self__)
        elif isinstance(value, type):
            self._add_class(value)
        elif isinstance(value, types.ModuleType):
            if not _is_installed(value.__name__):
                raise TypeError(f"a module as a value ({value.__name__})")
            self._write("module", value.__name__)
        elif isinstance(value, staticmethod | classmethod):
            self._write(type(value).__name__)
            self._add(value.__func__)
        elif isinstance(value, property):
            self._write("property")
            self._add((value.fget, value.fset, value.fdel))
        elif isinstance(value, functools.cached_property):
            self._write("cached_property")
            self._add(value.func)
        elif callable(value) and isinstance(getattr(value, "__wrapped__", None), types.FunctionType):
            self._write(type(value).__qualname__)  # functools.cache and its like
            self._add(value.__wrapped__)
        else:
            self._add_object(value)

    def _add_function(self, function: types.FunctionType) -> None:
        self._write("function", function.__qualname__)
        if _is_installed(function.__module__):
            self._write(function.__module__)
            return
        code = function.__code__
        self._add_code(code, function.__doc__)
        self._add((function.__defaults__, function.__kwdefaults__, vars(function)))
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            self._write("closure", name)
            try:
                self._add(cell.cell_contents)
            except ValueError:  # nothing was put into it yet
                self._write("empty")
        known = function.__globals__
        for name in sorted(set(_loaded_globals(code)) & known.keys()):
            self._write("global", name)
            if isinstance(known[name], types.ModuleType):
                self._add_module(known[name], frozenset(_attribute_names(code)))
            else:
                self._add(known[name])

    def _add_code(self, code: types.CodeType, doc: str | None = None) -> None:
        self._write("code", code.co_code, code.co_exceptiontable)
        self._add((code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags))
        self._add((code.co_names, code.co_freevars, code.co_cellvars))
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self._add_code(constant)
            elif doc is None or constant != doc:
                self._add(constant)
        for instruction in dis.get_instructions(code):
            if instruction.opname == "IMPORT_NAME" and not _is_known(instruction.argval):
                raise TypeError(f"a function that imports {instruction.argval!r} when it is called")

    def _add_module(self, module: types.ModuleType, names: frozenset[str]) -> None:
        """The attributes of a module that code refers to; of an installed one, its name."""
        self._write("module", module.__name__)
        if _is_installed(module.__name__) or not self._is_new(module, (id(module), names)):
            return
        for name in sorted(names & vars(module).keys()):
            self._write(name)
            value = vars(module)[name]
            if isinstance(value, types.ModuleType):
                self._add_module(value, names)
            else:
                self._add(value)

    def _add_class(self, cls: type) -> None:
        self._write("class", cls.__qualname__)
        if _is_installed(cls.__module__):
            self._write(cls.__module__)
            return
        self._add(cls.__bases__)
        for field in vars(cls).get("__dataclass_fields__", {}).values():
            given = [one for one in (field.default, field.default_factory) if one is not dataclasses.MISSING]
            self._write("field", field.name)
            self._add((*given, field.init))
        for name, member in vars(cls).items():
            if name not in _NOT_BEHAVIOUR and not _is_out_of_fields(cls, name, member):
                self._write("member", name)
                self._add(member)

    def _add_object(self, value: object) -> None:
        """Anything else: its class and its state."""
        cls = type(value)
        if dataclasses.is_dataclass(value):
            fields = {field.name: field for field in dataclasses.fields(value)}
            derived = {name for name, field in fields.items() if not (field.init or field.compare)}
            self._write("dataclass")
            self._add(cls)
            self._add_state({name: getattr(value, name) for name in fields} | vars(value), cls, derived)
            return
        name = _offered_name(value)
        if name is not None:
            self._write("offered", name)
            return
        reduce = copyreg.dispatch_table.get(cls)
        reduced = value.__reduce_ex__(4) if reduce is None else reduce(value)
        self._write("object")
        if isinstance(reduced, str):
            pickle.dumps(value)  # refused unless it is what its module has under this name
            self._add((cls, reduced))
            return
        make, arguments, state, items, entries = (*reduced, *(5 - len(reduced)) * (None,))[:5]
        self._add((make, arguments))
        if isinstance(state, dict):
            self._add_state(state, cls, set())
        else:
            self._add(state)
        self._add((list(items or ()), list(entries or ())))

    def _add_state(self, state: dict, cls: type, derived: set[str]) -> None:
        for name, value in state.items():
            cached = isinstance(inspect.getattr_static(cls, str(name), None), functools.cached_property)
            if name not in derived and not cached:
                self._add(name)
                self._add(value)

    def _write(self, *parts: str | bytes) -> None:
        """With their lengths, so that no two sequences of parts read alike."""
        for part in parts:
            part = part.encode(errors="surrogatepass") if isinstance(part, str) else part
            self._digest.update(f"{len(part)}:".encode() + part)


def _hash_of(value: object) -> str:
    digest = Fingerprint()
    digest.add(value)
    return digest.hexdigest()


def contents(tensor: Tensor) -> bytes:
    """Type, shape and values."""
    tensor = tensor.detach().cpu().contiguous()
    return f"{tensor.dtype}{tuple(tensor.shape)}".encode() + tensor.view(-1).view(torch.uint8).numpy().tobytes()


def _nested(code: types.CodeType) -> Iterator[types.CodeType]:
    """A function's code, and that of the functions written inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _nested(constant)


def _loaded_globals(code: types.CodeType) -> Iterator[str]:
    for part in _nested(code):
        for instruction in dis.get_instructions(part):
            if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                yield instruction.argval


def _attribute_names(code: types.CodeType) -> Iterator[str]:
    for part in _nested(code):
        yield from part.co_names


def _is_known(name: str) -> bool:
    """Whether a module may be imported by a function that is to be told: its code does not change by itself."""
    return name.partition(".")[0] == "bhlib" or _is_installed(name)


@functools.cache
def _is_installed(name: str | None) -> bool:
    """Whether a module came with Python or was installed, and is not this package or somebody's own code."""
    top = (name or "").partition(".")[0]
    if top in sys.stdlib_module_names or top == "builtins":
        return True
    if top in ("", "__main__", "bhlib"):
        return False
    try:
        spec = importlib.util.find_spec(top)
    except ValueError:
        return False
    places = [] if spec is None else [spec.origin, *(spec.submodule_search_locations or ())]
    return any({"site-packages", "dist-packages"} & set(Path(place).parts) for place in places if place)


def _offered_name(value: object) -> str | None:
    """The name under which an installed package offers an object of its own, such as scipy's distributions."""
    top = type(value).__module__.partition(".")[0]
    if not _is_installed(top):
        return None
    for module in [module for name, module in sys.modules.items() if name.partition(".")[0] == top]:
        for name, offered in list(vars(module).items()):
            if offered is value:
                return f"{top} {name}"
    return None


def _is_out_of_fields(cls: type, name: str, member: object) -> bool:
    """Whether `dataclasses` wrote a method."""
    code = getattr(inspect.unwrap(member) if callable(member) else member, "__code__", None)
    written = code is None or code.co_filename == "<string>"
    return "__dataclass_fields__" in vars(cls) and name in _OUT_OF_FIELDS and written


# -- models ------------------------------------------------------------------------------------------------------

#: Settings that say where a model comes from and what has happened to it, not what it is.
_NOT_THE_MODEL = frozenset(
    "_name_or_path name_or_path transformers_version _is_hf_initialized _output_capturing_hooks_installed".split()
)


def add_model(digest: Fingerprint, model: nn.Module, sample: int = 4096) -> None:
    """Add a model to a fingerprint: configuration, layers, the settings of its modules, parameters and buffers.

    Of each tensor up to `sample` evenly spaced numbers are hashed, and the sum of the bits of all, which takes seconds
    for 7 billion parameters, where a hash of all would take minutes. Weights that accelerate has offloaded are brought
    in one module at a time.

    Raises
    ------
    TypeError
        If part of the model cannot be told: a hook or a ``forward`` of somebody's own, a tensor without values.
    """
    settings_of_model: Any = model.config
    config = {key: value for key, value in settings_of_model.to_dict().items() if key not in _NOT_THE_MODEL}
    digest.add(json.dumps(config, sort_keys=True, default=str))
    for layer in find_moe_layers(model):
        digest.add((layer.name, layer.num_experts, layer.top_k, layer.weighting))
    for name, module in model.named_modules():
        _refuse_own_code(name, module)
        settings = {key: value for key, value in vars(module).items() if key not in _NOT_THE_MODEL}
        digest.add((name, type(module)))
        digest.add({key: settings[key] for key in sorted(settings) if type(settings[key]) in (bool, int, float, str)})
        with align_module_device(module, "cpu") if has_offloaded_params(module) else nullcontext():
            tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            for key, tensor in tensors:
                flat = tensor.detach().flatten()
                digest.add((key, tuple(tensor.shape), flat[:: max(1, len(flat) // sample)], _sum_of_bits(flat)))


def _sum_of_bits(flat: Tensor) -> int:
    """Of all numbers, eight bytes at a time: exact, so the same in any order, and another if any one number changes."""
    if flat.is_meta:
        raise TypeError("a tensor on the meta device has no values")
    if flat.storage_offset() * flat.element_size() % 8:
        flat = flat.clone()
    octets = flat.view(torch.uint8)
    whole = len(octets) // 8 * 8
    return int(octets[:whole].view(torch.int64).sum()) + int(octets[whole:].sum())


def _refuse_own_code(name: str, module: nn.Module) -> None:
    """Raise if a module runs code that its class does not tell."""
    if "forward" in vars(module) and not _is_installed(_home(vars(module)["forward"])):
        raise TypeError(f"the module {name!r} of the model has a forward of its own")
    for hook in [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]:
        if not _is_installed(_home(hook)):
            raise TypeError(f"the module {name!r} of the model carries the hook {hook!r}")


def _home(function: Callable) -> str:
    """The module in which a function, or the class of something callable, was written."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__module__", None) or type(function).__module__
