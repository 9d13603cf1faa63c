"""What torch is doing around a call, asked of its internals: the one place that decides when the plain form runs.

torch's own operators have rules for every transformation of programs: tracing, export, torch.func, forward mode.
Kernels have none of them, and a kernel that is called under forward mode gives zero tangents without a word. So
wherever a transformation is at work, every primitive is its plain-PyTorch form.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import types
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils._device import DeviceContext

from gankern.core.native import nodes

M = TypeVar("M", bound=nn.Module)


def exporting() -> bool:
    """Whether torch.export traces. The flag itself, for torch.compiler.is_exporting() is True in all that torch.compile
    of torch 2.11 traces."""
    return torch.compiler._is_exporting_flag


def transformed() -> bool:
    """Whether the running call is traced (torch.jit.trace, the ONNX exporter that builds on it), exported
    (torch.export), under a torch.func transform or in forward mode. Asked at every call, so it
    reads flags alone; torch.compile can trace it."""
    if torch.compiler.is_compiling():  # also while exporting
        return exporting() or torch._C._are_functorch_transforms_active()
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or in_forward_mode()
    )


def in_forward_mode() -> bool:
    """Whether a level of forward-mode differentiation is open: tensors may have tangents."""
    return torch.autograd.forward_ad._current_level >= 0


def keep_in_thread(key: str, value: int | None) -> None:
    """Keeps None, a truth value or a small number in torch's state of the running thread, beside the grad mode and its
    like: the engine's threads have it too, while they run the backward of whoever called it on a GPU."""
    if nodes.keep_in_thread(key, value) is NotImplemented:
        torch._C._stash_obj_in_tls(key, value)


def kept_in_thread(key: str) -> Any:
    """That; None where nothing was."""
    return torch._C._get_obj_in_tls(key) if torch._C._is_key_in_tls(key) else None


def functional() -> bool:
    """Whether a torch.func transform is at work outside of torch.compile, under which a function may not write to what
    was made outside of it."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def overwrite(x: torch.Tensor, new: torch.Tensor) -> None:
    """Writes a state of a network's, without gradient. Under a torch.func transform as torch's own spectral and
    instance norm do it where the state was made outside: by out=, which is let pass, and for which vmap has no rule."""
    with torch.no_grad():
        batched = torch._C._functorch.is_batchedtensor
        if functional() and not (batched(x) or batched(new)):
            torch.mul(new, 1, out=x)
        else:
            x.copy_(new)


def sequence_number() -> int:
    """The number that autograd gives to the next node of this thread."""
    return torch._C._autograd._get_sequence_nr()


def graph_nodes(*outputs: torch.Tensor) -> Iterator[Any]:
    """The nodes of the graph that autograd recorded of the outputs, each once."""
    seen: set[Any] = set()
    stack = [out.grad_fn for out in outputs]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        stack.extend(next_node for next_node, _ in node.next_functions)


_ERRORS = ("Error", "NotImplemented", "DelayedError")  # of autograd's nodes; those of a Function end in Backward


class Graph(NamedTuple):
    """What autograd recorded."""

    leaves: Sequence[torch.Tensor]  # that require a gradient
    errors: Sequence[Any]  # the nodes that only raise an error
    first: int  # the least of the nodes' numbers
    kept_back: Any = None  # for :func:`with_zeros`


def recorded_backwards() -> int | None:
    """The number of the next backward that is recorded, for :func:`graph_of`; None where nobody counts."""
    count = nodes.recorded_backwards()
    return None if count is NotImplemented else count


def graph_of(outputs: Sequence[torch.Tensor], since: int | None = None) -> Graph:
    """The graph that autograd recorded of the outputs.

    ``since``: a backward through the graph gives no zeros to the leaves that gankern.core.zeros has some for in a
    backward that was recorded with this number or later; then :func:`with_zeros` is to be called, which gives them to
    those that nothing else came to. The others would have them added to what they have. The caller alone runs what he
    has recorded since.
    """
    known = nodes.graph(tuple(outputs), since)
    if known is not NotImplemented:
        return Graph(*known)
    found = list(graph_nodes(*outputs))
    leaves = [node.variable for node in found if hasattr(node, "variable")]
    errors = [node for node in found if type(node).__name__ in _ERRORS]
    return Graph(leaves, errors, min((node._sequence_nr() for node in found), default=2**64 - 1))


def with_zeros(
    graph: Graph, leaves: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor | None]
) -> Sequence[torch.Tensor | None]:
    """The gradients of leaves after the one backward through a graph that keeps zeros back, with those zeros."""
    return gradients if graph.kept_back is None else nodes.with_zeros(graph.kept_back, tuple(leaves), tuple(gradients))


def modules_of(network: nn.Module, *kinds: type[M]) -> Sequence[M]:
    """Those of ``network.modules()`` that are of one of these types, in any order. A walk over a network's modules is
    what a penalty spends most of the host's time on, where Python makes it."""
    found = NotImplemented if torch.compiler.is_compiling() else nodes.modules_of(network, kinds)
    return [m for m in network.modules() if isinstance(m, kinds)] if found is NotImplemented else found


def recomputed() -> bool:
    """Whether somebody else keeps what autograd saves: activation checkpointing without re-entry runs a forward again
    and counts on the same tensors in the same order; torch.autograd.graph.save_on_cpu moves them."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def ends_recomputation(error: BaseException) -> bool:
    """Whether it is no error, but what activation checkpointing raises where a forward that runs again has saved all
    that is needed."""
    checkpointing = sys.modules.get("torch.utils.checkpoint")  # where it is not loaded, nothing runs again
    return checkpointing is not None and isinstance(error, checkpointing._StopRecomputationError)


# Function modes that change nothing of what a function computes, and have no interest in this library's own calls.
OWN_MODES: set[type] = {DeviceContext}


def seen_by_others() -> bool:
    """Whether somebody else's mode sees torch's functions, and may change what they compute: then they are called."""
    count = torch._C._len_torch_function_stack()
    return count > 0 and any(type(torch._C._get_function_stack_at(i)) not in OWN_MODES for i in range(count))


def seen_by_own_modes() -> bool:
    """Whether modes of this library alone see torch's functions."""
    return torch._C._len_torch_function_stack() > 0 and not seen_by_others()


_IN_C = (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType)
# Where a function is looked up, its name, and what is there, or NotImplemented.
_watched: list[tuple[Any, str, Any]] = []


def _is_torchs(function: Any) -> bool:
    """Whether it is torch's own, and not somebody's wrapper of it."""
    if isinstance(function, types.FunctionType):
        return Path(function.__code__.co_filename).is_relative_to(Path(torch.__file__).parent)
    return isinstance(function, _IN_C)


def watch_functions(place: Any, names: Iterable[str]) -> None:
    """From now on :func:`functions_replaced` tells whether one of these names in a module or class of torch's means
    something else than now, or than torch's own."""
    for name in names:
        known = vars(place).get(name, NotImplemented)  # a class may inherit it
        if known is not NotImplemented and not _is_torchs(known):
            known = None  # replaced already
        _watched.append((place, name, known))
        nodes.watch_function(place, name, known)


# What torch's layers and spectral norms look up at each call, and what those functions look up in turn.
_OF_LAYERS = {
    F: "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d interpolate pad batch_norm group_norm "
    "instance_norm relu leaky_relu prelu avg_pool2d adaptive_avg_pool2d max_pool2d normalize",
    torch: "batch_norm group_norm instance_norm relu relu_ max_pool2d mv dot vdot",
}
for _place, _names in _OF_LAYERS.items():
    watch_functions(_place, _names.split())


def functions_replaced() -> bool:
    """Whether somebody put a function of his own in the place of one of torch's that this library may run in place of:
    then that is called. False where torch.compile traces, which has torch's layers before it."""
    if torch.compiler.is_compiling():
        return False
    replaced = nodes.functions_replaced()
    if replaced is NotImplemented:
        return any(vars(place).get(name, NotImplemented) is not known for place, name, known in _watched)
    return replaced


@contextlib.contextmanager
def torchs_own_functions() -> Iterator[None]:
    """Within the block, what was there first stands in the places of :func:`watch_functions`, whoever has put something
    else there since: for what was called before he did."""
    replaced = [
        (place, name, vars(place).get(name, NotImplemented), known)
        for place, name, known in _watched
        if known is not None and vars(place).get(name, NotImplemented) is not known
    ]

    def put(place: Any, name: str, value: Any) -> None:
        if value is not NotImplemented:
            setattr(place, name, value)
        elif name in vars(place):
            delattr(place, name)

    try:
        for place, name, _, known in replaced:
            put(place, name, known)
        yield
    finally:
        for place, name, present, _ in replaced:
            put(place, name, present)


_in_python: dict[Any, dict[str, Any]] = {
    place: {name: value for name, value in vars(place).items() if isinstance(value, types.FunctionType)}
    for place in (F, torch, torch.functional, torch.Tensor)
}
_all_in_python = {function for functions in _in_python.values() for function in functions.values()}


def as_called(function: Any) -> Any:
    """The function that was called, of what a function mode is given: torch's functions in Python give it what stands
    under their own name. A function that somebody put there has had its turn, or it would not have come to this."""
    if isinstance(function, _IN_C) or function in _all_in_python:
        return function
    for place, functions in _in_python.items():
        for name, own in functions.items():
            if vars(place).get(name) is function:
                return own
    return function


def dispatch_mode() -> bool:
    """Whether a TorchDispatchMode sees what is called: FakeTensorMode is one."""
    return torch._C._len_torch_dispatch_stack() > 0


def dispatched() -> bool:
    """Whether an operator has to go through torch's dispatcher to be right, or to be seen: while torch.compile traces,
    under a torch.func transform, in a TorchDispatchMode (FakeTensorMode is one), and under the profiler."""
    return (
        torch.compiler.is_compiling()
        or dispatch_mode()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
    )


def share_memory(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether two tensors look at one storage, also where torch.compile traces and there is none."""
    return torch._C._is_alias_of(x, y)  # type: ignore[attr-defined]  # which the stubs lack


def memory_of(x: torch.Tensor) -> int:
    """The address of the storage that a dense tensor looks at, asked unseen by modes that watch what is called."""
    with torch._C.DisableTorchFunction():
        return x.untyped_storage().data_ptr()


@contextlib.contextmanager
def above_autograd() -> Iterator[None]:
    """Within it, autograd records again where torch has passed it already: in a ``__torch_dispatch__``."""
    key, keys = torch._C.DispatchKey, torch._C.DispatchKeySet
    passed = keys(key.AutogradFunctionality) | keys(key.ADInplaceOrView)
    include, exclude = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    with torch._C._ForceDispatchKeyGuard(include, exclude - passed):
        yield


def autocasting(device: str) -> bool:
    """Whether autocast is on for a type of device. "meta" has none, and torch raises for it."""
    return device != "meta" and torch.is_autocast_enabled(device)


def without_kernels() -> str | None:
    """The transformation at work under which kernels cannot run even if they are asked for by name; None for none.
    Under torch.func.grad alone they can: they have their gradients."""
    if exporting():
        return "torch.export"
    if torch.compiler.is_compiling():
        return None
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace"
    names = {torch._C._functorch.TransformType.Vmap: "vmap", torch._C._functorch.TransformType.Jvp: "jvp"}
    for level in torch._C._functorch.get_interpreter_stack() or ():
        if level.key() in names:
            return f"torch.func.{names[level.key()]}"
    return "forward-mode differentiation" if in_forward_mode() else None


def refuse_scripting(found: Any, name: str | None = None, way_out: str = "put torch's own in its place") -> None:
    """Makes torch.jit.script refuse a function, a class of modules or a module: it asks for ``__prepare_scriptable__``
    before it compiles."""
    name = name or found.__name__
    found.__prepare_scriptable__ = functools.partial(_refuse_scripting, name, way_out)


def _refuse_scripting(name: str, way_out: str) -> NoReturn:
    raise TypeError(
        f"torch.jit.script cannot compile gankern's {name}: use torch.jit.trace or torch.export, under which it is "
        f"plain PyTorch, or {way_out}"
    )


def is_hooked(module: nn.Module) -> bool:
    """Whether a call of the module does more than its forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def is_compiled(module: nn.Module) -> bool:
    """Whether a call of the module runs what torch.compile made of it."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")  # where it is not loaded, nothing is compiled
    return dynamo is not None and (module._compiled_call_impl is not None or isinstance(module, dynamo.OptimizedModule))


def unwrapped(network: Any) -> Any:
    """The network itself, out of torch's wrappers whose call is a call of it and nothing else:
    DistributedDataParallel, and what torch.compile makes of a module. Not out of a wrapper of a class that is derived
    from theirs, with hooks, or with a forward that somebody gave it: these may do more."""
    while (inner := _inside(network)) is not None:
        network = inner
    return network


def _inside(wrapper: Any) -> nn.Module | None:
    dynamo = sys.modules.get("torch._dynamo.eval_frame")  # where it is not loaded, nothing is compiled
    if type(wrapper) is nn.parallel.DistributedDataParallel:
        inner, its_own = wrapper.module, "forward" not in vars(wrapper)
    elif dynamo is not None and type(wrapper) is dynamo.OptimizedModule:
        inner = wrapper._modules["_orig_mod"]
        made = vars(wrapper).get("forward")
        if made == wrapper._call_lazy_check:  # of a network with lazy layers
            made = vars(wrapper).get("_forward")
        of = getattr(made, "_torchdynamo_orig_callable", None)
        its_own = of is not None and (of == inner.__call__ or getattr(of, "__wrapped__", None) is inner)
    else:
        return None
    return inner if its_own and not is_hooked(wrapper) else None
