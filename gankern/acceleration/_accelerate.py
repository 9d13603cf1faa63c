"""gankern.accelerate and gankern.restore."""

from __future__ import annotations

import copy
import fnmatch
import functools
import types
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_map_only

from gankern.acceleration import _attention, _convolutions, _known, _layers, _log, _norms, _spectral
from gankern.acceleration._chains import Chains
from gankern.acceleration._code import functions_held, names_used
from gankern.acceleration._compiled import inside_compiled_parts, is_compiled
from gankern.acceleration._convolutions import Left
from gankern.acceleration._layers import Replaced
from gankern.acceleration._report import Call, Report, Row
from gankern.acceleration._root import CHANGES, Gains, Leaves, Plan, RootForward, root_forward
from gankern.acceleration._scope import HANDLERS, STEPS, Followed, Kept
from gankern.acceleration._verify import copy_of, fresh
from gankern.acceleration._verify import verify as _verify
from gankern.core.torch_internals import functions_replaced, refuse_scripting, watch_functions
from gankern.nn.utils._group import OURS, is_taken, normalizers
from gankern.nn.utils._requests import Prepared
from gankern.nn.utils.parametrizations import lengthen, shorten


@dataclass(frozen=True)
class Method:
    """A method of an instance was replaced."""

    name: str
    previous: Any  # of the instance; None where it had the class's

    def undo(self, module: nn.Module) -> None:
        if not isinstance(module.__dict__.get(self.name), Replaced):
            return  # somebody replaced it since
        if self.previous is None:
            module.__dict__.pop(self.name, None)
        else:
            module.__dict__[self.name] = self.previous


@dataclass(frozen=True)
class Kernels:
    """Torch's spectral norm runs on our kernels, where a device is known to gain: same state, another class."""

    normalizer: Any
    previous: type
    parameter: str | None  # whose parametrization it is, read by a shorter way than torch's; None for a hook

    def undo(self, module: nn.Module) -> None:
        if self.parameter is not None:
            lengthen(type(module), self.parameter)
        if type(self.normalizer) is OURS.get(self.previous):
            self.normalizer.__class__ = self.previous
        for name in ("where_known", "_prepared"):  # the latter a group's, if one was made since
            self.normalizer.__dict__.pop(name, None)


@dataclass(frozen=True)
class Scriptable:
    """torch.jit.script is refused."""

    def undo(self, module: nn.Module) -> None:
        module.__dict__.pop("__prepare_scriptable__", None)


_COPYING = "__getstate__", "_replicate_for_data_parallel"  # what torch and Python ask an instance for its copies


class Copying(functools.partial):
    keeps_results = True  # for gankern.nn.coupling, as Replaced has it


@dataclass(frozen=True)
class Copies:
    """Copies that share the module's attributes (``copy.copy``, nn.DataParallel's replicas) are the original's: what
    stands in place of a method is of the module that it was made for, and would compute with that one's."""

    def undo(self, module: Any) -> None:
        for name in _COPYING:
            module.__dict__.pop(name, None)


class _State(dict):
    """Of what a module is made, for its copies. A shallow one takes the values that are here; deep ones and pickles,
    in which all is made anew, take the whole."""

    def __init__(self, whole: dict[str, Any]) -> None:
        self.whole = whole
        twin = types.SimpleNamespace(**whole)
        _undo_methods(twin)
        super().__init__(twin.__dict__)

    def __deepcopy__(self, memo: Any) -> dict[str, Any]:
        return copy.deepcopy(self.whole, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return dict, (self.whole,)


def _undo_methods(twin: Any) -> None:
    """Undoes what was changed in the attributes of a module, of something that shares them."""
    for change in reversed(twin.__dict__.pop(CHANGES, [])):
        if not isinstance(change, Kernels):
            change.undo(twin)


def _state(module: nn.Module) -> Any:
    state = type(module).__getstate__(module)
    return _State(state) if isinstance(state, dict) else state


def _replica(module: nn.Module) -> nn.Module:
    replica = type(module)._replicate_for_data_parallel(module)
    _undo_methods(replica)
    return replica


def _change(module: nn.Module, change: Method | Kernels | Scriptable | Copies) -> None:
    module.__dict__.setdefault(CHANGES, []).append(change)


def _replace(
    module: nn.Module, name: str, function: Callable[..., Any], *constants: Any, by: type[Replaced] = Replaced
) -> None:
    if not any(isinstance(change, Copies) for change in module.__dict__.get(CHANGES, ())):
        _change(module, Copies())
        module.__dict__["__getstate__"] = Copying(_state, module)
        module.__dict__["_replicate_for_data_parallel"] = Copying(_replica, module)
    _change(module, Method(name, module.__dict__.get(name)))
    replaced = by(function, module, *constants)
    if name != "forward":
        replaced.name = name
    replaced.whole = function in (_known.known_forward,)
    module.__dict__[name] = replaced


_untouched: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # in which accelerate found nothing to replace


def is_accelerated(module: nn.Module) -> bool:
    return CHANGES in module.__dict__


# ---- the layers -----------------------------------------------------------------------------------------------

Leaf = tuple[Callable[..., Any], str]

_CONVOLUTION = "torch's kernels; double backward without what it does not need"
_ENGINE = "gankern's convolution where it is faster for the shape"
_PAD = "one with the 3x3 convolution behind it where that is ours"
_MEAN = "gankern's convolution, with a 2x2 mean where one follows"
_BATCH_NORM = "gankern's batch norm where it is faster, with a ReLU, LeakyReLU or PReLU where one follows"
_GROUP_NORM = "gankern's group norm where it is faster, with a ReLU, LeakyReLU or PReLU where one follows"
_INSTANCE_NORM = "gankern's instance norm where it is faster, with a ReLU, LeakyReLU or PReLU where one follows"
_PRELU = "gankern's PReLU where it is faster, in one with a norm before it"
_PIECEWISE = "double backward without zeros"

# By the function that torch's module has as forward.
LEAVES: dict[Any, Leaf] = {
    nn.Conv2d.forward: (_convolutions.conv2d_forward, _ENGINE),
    nn.ConvTranspose2d.forward: (_convolutions.conv_transpose2d_forward, _ENGINE),
    **{
        cls.forward: (_convolutions.convolution_forward, _CONVOLUTION)
        for cls in (nn.Conv1d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose3d)
    },
    nn.ReflectionPad2d.forward: (_convolutions.pad_forward, _PAD),  # that of all dimensions
    nn.ReplicationPad2d.forward: (_convolutions.pad_forward, _PAD),
    nn.BatchNorm2d.forward: (_norms.batch_norm_forward, _BATCH_NORM),  # that of all dimensions
    nn.GroupNorm.forward: (_norms.group_norm_forward, _GROUP_NORM),
    nn.InstanceNorm2d.forward: (_norms.instance_norm_forward, _INSTANCE_NORM),  # likewise
    nn.ReLU.forward: (_norms.relu_forward, _PIECEWISE),
    nn.LeakyReLU.forward: (_norms.leaky_relu_forward, _PIECEWISE),
    nn.PReLU.forward: (_norms.prelu_forward, _PRELU),
    nn.AvgPool2d.forward: (_convolutions.avg_pool2d_forward, _PIECEWISE),
    nn.MaxPool2d.forward: (_convolutions.max_pool2d_forward, _PIECEWISE),
    nn.AdaptiveAvgPool2d.forward: (_convolutions.adaptive_avg_pool2d_forward, _PIECEWISE),
}
ONLY_SECOND_ORDER = (_CONVOLUTION, _PIECEWISE)


def _describe(module: nn.Module) -> str:
    name = type(module).__name__
    if isinstance(module, nn.modules.conv._ConvNd):
        kernel = "x".join(map(str, module.kernel_size))
        name += f" {kernel}"
        if max(module.stride) > 1:
            name += f", stride {module.stride[0]}"
    return name


def _is_engine_shape(module: Any) -> bool:
    if module.groups != 1 or max(module.dilation) > 1:
        return False
    three = module.kernel_size == (3, 3) and module.stride == (1, 1) and not module.transposed
    return three or (module.kernel_size in ((3, 3), (4, 4)) and module.stride == (2, 2))


def _is_first_half(module: Any) -> bool:
    """Whether a mean can be fused with this convolution."""
    return (
        type(module).forward is nn.Conv2d.forward
        and module.kernel_size == (3, 3)
        and module.stride == (1, 1)
        and module.dilation == (1, 1)
        and module.groups == 1
        and module.padding_mode == "zeros"
        and module.padding in ((1, 1), "same")
    )


def _doubles(module: nn.Module) -> bool:
    if not isinstance(module, nn.Upsample) or type(module).forward is not nn.Upsample.forward:
        return False
    factor = module.scale_factor
    return module.mode in ("nearest", "nearest-exact") and factor is not None and _convolutions._is(factor, 2)


_NORMS = {"batch_norm", "group_norm", "instance_norm"}
_FIRST_ORDER = _NORMS | {
    *("conv2d", "conv_transpose2d", "interpolate", "upsample", "upsample_nearest", "prelu", "softmax"),
}
_FUNCTIONS = _FIRST_ORDER | {
    *("avg_pool2d", "adaptive_avg_pool2d", "max_pool2d", "relu", "relu_", "leaky_relu", "leaky_relu_"),
}


_TELLING = {"rsqrt", "var", "std", "mean"}  # what a layer calls that may look like one of ours
_UNCHANGED = "runs as it is: nothing of ours for it"


class _Work:
    """One call of accelerate."""

    def __init__(self, root: nn.Module, report: Report, chosen: set[str] | None, fast: bool) -> None:
        self.root, self.report, self.fast = root, report, fast
        self.replaced: list[nn.Module] = []  # whose forward is another one for what it may gain
        self.names = {id(m): n for n, m in root.named_modules()}
        compiled = inside_compiled_parts(root)
        self.compiled = [(n, m) for n, m in root.named_modules() if is_compiled(m)]
        self.modules = [
            (n, m) for n, m in root.named_modules() if (chosen is None or n in chosen) and id(m) not in compiled
        ]
        self.left: list[nn.Module] = []  # of which nothing was chosen, the outermost
        if chosen is not None:
            inside, others = set(), {id(m) for _, m in self.modules} | compiled
            for m in root.modules():
                whole = set(map(id, m.modules()))
                if id(m) not in inside and whole.isdisjoint(others):
                    self.left.append(m)
                    inside |= whole

    def row(self, name: str, before: str, after: str | None, note: str = "") -> None:
        self.report.rows.append(Row(name, before, after, note))

    def run(self) -> None:
        for name, module in self.compiled:
            self.row(name, _describe(module), None, "compiled by torch.compile already")
        self._spectral()
        for name, module in self.modules:
            if any(
                isinstance(change, Method) and change.name == "forward" for change in module.__dict__.get(CHANGES, ())
            ):
                continue
            if "forward" in module.__dict__:
                self.row(name, _describe(module), None, "its forward was replaced on the instance")
                continue
            leaf = LEAVES.get(type(module).forward)
            if leaf is not None:
                self._leaf(name, module, leaf)
            elif _doubles(module):
                self._upsample(name, module)
            else:
                self._own_code(name, module)
        self._others()
        self.report.rows = self._one_each()
        if self.report.replaced:
            for module in self.left:
                _replace(module, "forward", _layers.left_forward, module.__dict__.get("forward"))
            self._root()

    def _one_each(self) -> list[Row]:
        """In the order of the module: one row for what was replaced in a layer, and one for what was left in it."""
        rows: dict[tuple[str, bool], Row] = {}
        for row in self.report.rows:
            key = row.layer, row.after is None
            first = rows.get(key)
            if first is None:
                rows[key] = row
            else:
                after = row.after if first.after is None else f"{first.after}; {row.after}"
                notes = "; ".join(dict.fromkeys(note for note in (first.note, row.note) if note))
                rows[key] = Row(row.layer, first.before, after, notes)
        order = {name: i for i, name in enumerate(self.names.values())}
        return sorted(rows.values(), key=lambda row: order[row.layer])

    def _others(self) -> None:
        """The layers with parameters that nothing was said of."""
        listed = {row.layer for row in self.report.rows}
        for name, module in self.modules:
            has_parameters = any(True for _ in module.parameters(recurse=False)) or parametrize.is_parametrized(module)
            if name not in listed and has_parameters:
                self.row(name, _describe(module), None, _UNCHANGED)

    # ---- spectral norm ---------------------------------------------------------------------------------------

    def _spectral(self) -> None:
        chosen = {id(module) for _, module in self.modules}
        for owner, normalizer in normalizers(self.root):
            is_hook = isinstance(normalizer, nn.utils.spectral_norm.__globals__["SpectralNorm"])
            layer, parameter = (owner, None) if is_hook else self._owner_of(owner)
            if layer is None or id(layer) not in chosen:
                continue
            name, form = self.names[id(layer)], "hook" if is_hook else "parametrization"
            ours = OURS.get(type(normalizer))
            before = f"{_describe(layer)}, spectral norm ({form})"
            if not is_taken(owner, normalizer):
                self.row(name, before, None, "its parameter is of a type that only torch's kernels take")
                continue
            if ours is not None:
                _change(layer, Kernels(normalizer, type(normalizer), parameter))
                normalizer.__class__ = ours
                normalizer.where_known = True
                if parameter is not None:
                    shorten(type(layer), parameter)
            elif not isinstance(normalizer, Prepared):
                self.row(name, before, None, f"its spectral norm is a {type(normalizer).__name__}")
                continue
            self.row(name, before, "gankern's spectral norm")
        own: list[tuple[str, nn.Module, str]] = []
        for name, module in self.modules:
            family, refusal = _spectral.recognise(module)
            if refusal is not None:
                self.row(name, type(module).__name__, None, f"spectral norm of its own: {refusal}")
            for hook, reason in _spectral.hooked(module):
                self.row(name, f"{_describe(module)}, its weight is made by {hook}", None, f"{hook}: {reason}")
            if family is not None:
                own.append((name, module, family))
        large = sum(_spectral.values(m, family) for _, m, family in own) >= _spectral.FROM * len(own)
        for name, module, family in own:
            before = f"{type(module).__name__}: {_spectral.FAMILIES[family].name}"
            if not large:
                self.row(
                    name, before, None, f"spectral norm of its own: below {_spectral.FROM} values a layer it is faster"
                )
                continue
            _replace(module, _spectral.FAMILIES[family].method, _spectral.method, _spectral.Normalizer(family))
            self.row(name, before, "gankern's spectral norm")

    def _owner_of(self, members: nn.Module) -> tuple[nn.Module | None, str | None]:
        """The module and its parameter that these parametrizations make."""
        for module in self.root.modules():
            parametrizations: Any = module.parametrizations if parametrize.is_parametrized(module) else {}
            for parameter, of_it in parametrizations.items():
                if of_it is members:
                    return module, parameter
        return None, None

    # ---- layers ----------------------------------------------------------------------------------------------

    def _leaf(self, name: str, module: nn.Module, leaf: Leaf) -> None:
        function, what = leaf
        before = _describe(module)
        own = _layers.changed_part(module)
        if own is not None:
            return self.row(name, before, None, f"its {own} is its own")
        if what == _ENGINE and not _is_engine_shape(module):
            what = _CONVOLUTION
        if what in ONLY_SECOND_ORDER and not self.fast:
            return self.row(name, before, None, "fast_double_backward=False")
        constants: tuple[Any, ...] = ()
        if function is _convolutions.conv2d_forward:
            followed = Followed() if _is_first_half(module) else None
            constants = followed, Left()
            what = what if followed is None else _MEAN
        elif function in (_norms.batch_norm_forward, _norms.group_norm_forward, _norms.instance_norm_forward):
            constants = (Followed(),)
        self._forward(module, function, *constants)
        self.row(name, before, what)

    def _forward(self, module: nn.Module, function: Callable[..., Any], *constants: Any) -> None:
        _replace(module, "forward", function, *constants)
        self.replaced.append(module)

    def _upsample(self, name: str, module: nn.Module) -> None:
        self._forward(module, _convolutions.upsample_forward)
        self.row(name, "nearest upsampling by 2", "one with the 3x3 convolution behind it where there is one")

    def _own_code(self, name: str, module: nn.Module) -> None:
        if not type(module).__module__.startswith(("torch.", "gankern.nn.")):
            found, reason = _known.recognise(module)
            if found is not None:
                _replace(module, "forward", _known.known_forward, _known.Known())
                return self.row(name, type(module).__name__, f"gankern's {found}", "its code computes the same")
            if "virtualbatchnorm" in type(module).__name__.lower():
                self.row(
                    name, type(module).__name__, None, "virtual batch norm of its own, which keeps state between calls"
                )
            elif (
                next(module.children(), None) is None
                and (names_used(module) & _TELLING or module._parameters)
                and not names_used(module) & _FUNCTIONS
                and not any(row.layer == name for row in self.report.rows)
            ):
                self.row(name, type(module).__name__, None, f"code of its own: {reason}")
        names = names_used(module) | functions_held(module)
        used = (names & _FUNCTIONS) | _attention.called(module, names)
        if isinstance(module, nn.Conv2d):
            used = used | {"conv2d"}
        elif isinstance(module, nn.ConvTranspose2d):
            used = used | {"conv_transpose2d"}
        if not used:
            return None
        calls = ", ".join(sorted(used))
        if not (used & _FIRST_ORDER or self.fast):
            return self.row(name, f"{type(module).__name__} calls {calls}", None, "fast_double_backward=False")
        if used & ({"conv2d"} | _NORMS):
            self._forward(module, _layers.own_forward, Followed(), Followed())
        self.row(name, f"{type(module).__name__} calls {calls}", "gankern's where they are faster", "met while it runs")

    def _root(self) -> None:
        refuse_scripting(self.root, "accelerated model", "call gankern.restore first")
        _change(self.root, Scriptable())
        leaves = [(m, m.__dict__["forward"]) for m in self.replaced if m is not self.root]
        plan = Plan(self.fast, Leaves(leaves), Gains(), Chains(), Kept())
        _replace(self.root, "forward", root_forward, plan, self.root.__dict__.get("forward"), by=RootForward)


# What is met while a model runs: torch's functions by all names that a model may call them by.
_TAKEN = {*HANDLERS, *STEPS}
for _place in (F, torch, Tensor):
    _values = ((name, getattr(_place, name)) for name in dir(_place))
    watch_functions(_place, [name for name, value in _values if callable(value) and value in _TAKEN])


# ---- the two functions ------------------------------------------------------------------------------------------


def accelerate(
    module: nn.Module,
    *,
    inplace: bool = True,
    only: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    fast_double_backward: bool = True,
    verify: Sequence[Any] | Tensor | None = None,
    example_inputs: Sequence[Any] | Tensor | None = None,
) -> Report:
    """Makes a model that somebody else wrote faster, and changes nothing else.

    Replaces, on the instances of the layers and never in their classes, what gankern computes faster: spectral norm in
    all its forms, convolutions with what resamples before or behind them, batch and instance norm with their
    activation, layers that compute what one of gankern's does, and the second derivatives that a gradient penalty
    needs. Results, gradients and buffers are those of before within rounding. Parameters, buffers, hooks, types,
    state_dict keys and the optimisers that hold the parameters are not touched; the module can be copied, pickled,
    moved, wrapped and compiled as before. docs/accelerate.md lists what is replaced, and what is left and why.

    Args:
        module: a module, or one wrapped in DistributedDataParallel or DataParallel.
        inplace: False works on a copy, which is the report's ``module``.
        only: names of submodules ("block1.conv"; patterns such as "block*" hold for all that is inside): no other
            layer is replaced. Of a module around them, the functions that its own code calls still are.
        exclude: names of submodules that are left as they are, with all functions that their forwards call.
        fast_double_backward: whether layers get a second derivative that computes only what exists. Parameters on
            which a penalty does not depend (such as a bias before a ReLU) have a gradient of zeros, or none, as before.
        verify: inputs to try it with, as the module is called: results, gradients and the gradient of a gradient
            penalty are compared with those of before, and all are timed. Nothing of that is left in the module.
        example_inputs: inputs of one forward, as the module is called, which a copy of it runs: the report then lists
            every layer and every call of a function that it met, how often, what ran for it and why not one of ours.
            With ``verify`` its inputs are taken.

    Returns:
        A :class:`Report`; print it.

    Raises:
        TypeError, ValueError: for what is not a plain module on a device, before anything is changed.
        RuntimeError: where ``verify`` finds other results. The module is then as it was, as after any other failure.

    >>> net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 1, 3, padding=1))
    >>> len(accelerate(net).replaced)
    3
    >>> restore(net)
    """
    root = _checked(module, "accelerate")
    chosen = _chosen(root, only, exclude)
    for argument, inputs in (("verify", verify), ("example_inputs", example_inputs)):
        if isinstance(inputs, bool):
            raise TypeError(
                f"accelerate: {argument} is {inputs}; it takes the inputs of a forward: {argument}=(images,)"
            )
    if not inplace:
        module = copy_of(module)
        root = _unwrapped(module)
    report = Report(type(root).__name__, module)
    if is_accelerated(root):
        report.notes.append("It is accelerated already: nothing was done. gankern.restore(module) undoes it.")
        return report
    if functions_replaced():
        report.notes.append("A function of torch's is replaced by another one: while it is, the originals run.")
    pristine = None if verify is None else copy_of(root)
    inside = [m for m in root.modules() if is_accelerated(m)]
    try:
        _Work(root, report, chosen, fast_double_backward).run()
        if example_inputs is None:
            example_inputs = verify
        if example_inputs is not None:
            _list_calls(root, example_inputs, report)
        if not report.replaced:
            report.notes.append("Nothing in it can be made faster: it was left alone.")
            _untouched.add(root)
        elif verify is None and report.calls and not report.gains:
            _restore(root, inside)
            report.notes.append("Nothing is gained for these inputs: it was left alone.")
            _untouched.add(root)
            report.rows = [Row(r.layer, r.before, None, _also(_kept(r), "nothing gained")) for r in report.rows]
        elif verify is not None and pristine is not None:
            gained = _verify(pristine, root, verify, report)
            if not gained:
                _restore(root, inside)
                report.notes.append("Nothing is gained for these inputs: it was left alone.")
                _untouched.add(root)
                report.rows = [Row(r.layer, r.before, None, _also(_kept(r), "nothing gained")) for r in report.rows]
    except BaseException:
        _restore(root, inside)
        raise
    return report


NOT_RUN = "did not run for these inputs"


def _kept(row: Row) -> str:
    """Of the note of a row, what holds for a layer that is left."""
    return row.note if row.after is None else NOT_RUN if NOT_RUN in row.note else ""


def _list_calls(root: nn.Module, inputs: Any, report: Report) -> None:
    """Enters what a forward meets, with data as inputs and as a gradient penalty calls it."""
    inputs = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    with torch.random.fork_rng():
        log = _log.met(copy_of(root), tree_map_only(Tensor, Tensor.detach, inputs), _describe)
        penalised = _log.met(copy_of(root), fresh(inputs), _describe)
    others: dict[tuple[str, str], list[Call]] = {}
    for call in penalised.calls():
        others.setdefault((call.layer, call.operation), []).append(call)
    for call in log.calls():
        again = dict.fromkeys(c.now for c in others.get((call.layer, call.operation), ()) if c.now != call.now)
        report.calls.append(replace(call, in_penalty="; ".join(again)))
    names = {name for name, _ in root.named_modules()} - log.ran
    report.rows = [replace(r, note=_also(r.note, NOT_RUN)) if r.layer in names else r for r in report.rows]


def _also(note: str, more: str) -> str:
    return f"{note}; {more}" if note else more


def restore(module: nn.Module) -> None:
    """Undoes :func:`accelerate`, for the module or for a part of it: every layer is what it was.

    A method that was replaced on the instance since stays what it is. Of a module in which nothing was replaced
    there is nothing to undo.

    Raises: ValueError where neither it nor anything inside it was accelerated; TypeError for what is no module.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.LeakyReLU(0.2))
    >>> _ = accelerate(model)
    >>> restore(model)
    """
    if isinstance(module, torch._dynamo.eval_frame.OptimizedModule):
        module = module._orig_mod
    if not isinstance(module, nn.Module):
        raise TypeError(f"restore: module is {_kind(module)}; it must be a torch.nn.Module")
    root = _unwrapped(module)
    if not any(is_accelerated(m) for m in root.modules()):
        if root in _untouched:
            return _untouched.remove(root)
        raise ValueError(f"restore: this {type(root).__name__} was never accelerated (or is restored already)")
    _restore(root)


def _restore(root: nn.Module, but: Sequence[nn.Module] = ()) -> None:
    kept = {id(m) for m in but}
    for module in list(root.modules()):
        if id(module) in kept:
            continue
        for change in reversed(module.__dict__.pop(CHANGES, [])):
            change.undo(module)


def _unwrapped(module: nn.Module) -> nn.Module:
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    return module.module if isinstance(module, wrappers) else module


def _kind(x: Any) -> str:
    return f"the class {x.__name__}, not an instance of it" if isinstance(x, type) else f"a {type(x).__name__}"


def _checked(module: Any, name: str) -> nn.Module:
    """The module inside its wrapper; raises for what cannot be accelerated."""
    if isinstance(module, torch._dynamo.eval_frame.OptimizedModule) or (
        isinstance(module, nn.Module) and getattr(module, "_compiled_call_impl", None) is not None
    ):
        raise ValueError(
            f"{name}: the module is compiled already, and what it was compiled to would not change; call "
            f"gankern.accelerate(model) first and torch.compile(model) after it"
        )
    if isinstance(module, torch.export.ExportedProgram) or _is_exported(module):
        raise TypeError(
            f"{name}: the module is exported: its operators are fixed; accelerate the model that it was exported from"
        )
    if isinstance(module, torch.jit.ScriptModule | torch.jit.ScriptFunction):
        raise TypeError(
            f"{name}: the module is scripted or traced by torch.jit: its code is fixed; accelerate the model that it "
            f"was made from"
        )
    if not isinstance(module, nn.Module):
        raise TypeError(f"{name}: module is {_kind(module)}; it must be a torch.nn.Module")
    root = _unwrapped(module)
    scripted = [n for n, m in root.named_modules() if isinstance(m, torch.jit.ScriptModule)]
    if scripted:
        raise TypeError(f"{name}: {scripted[0]!r} inside the module is scripted or traced by torch.jit")
    for key, tensor in (*root.named_parameters(), *root.named_buffers()):
        if is_lazy(tensor):
            raise ValueError(f"{name}: {key} is not initialized yet; run one forward first")
        if tensor.device.type == "meta":
            raise ValueError(
                f"{name}: {key} is on the meta device, without values; accelerate the module after to_empty() and "
                f"loading"
            )
    return root


def _is_exported(module: Any) -> bool:
    return isinstance(module, torch.fx.GraphModule) and any(
        node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload) for node in module.graph.nodes
    )


def _chosen(root: nn.Module, only: Any, exclude: Any) -> set[str] | None:
    """The names of the modules to look at; None for all."""
    if only is None and exclude is None:
        return None
    names = [name for name, _ in root.named_modules()]
    chosen = set(names) if only is None else _matching(names, only, "only")
    return chosen - (set() if exclude is None else _matching(names, exclude, "exclude"))


def _matching(names: Sequence[str], patterns: Any, argument: str) -> set[str]:
    if not isinstance(patterns, Iterable):
        raise TypeError(f"accelerate: {argument} is {_kind(patterns)}; it takes names of submodules")
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    found: set[str] = set()
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"accelerate: {argument} has a {type(pattern).__name__}; it takes names of submodules")
        hits = {n for n in names if fnmatch.fnmatchcase(n, pattern) or fnmatch.fnmatchcase(n, f"{pattern}.*")}
        if not hits:
            listed = ", ".join(n for n in names if n) or "none"
            raise ValueError(
                f"accelerate: {argument} has {pattern!r}, which no submodule is called; there are: {listed}"
            )
        found |= hits
    return found
