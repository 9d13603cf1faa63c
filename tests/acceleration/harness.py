"""What has to hold of an accelerated model, whoever wrote it: compares it with itself before.

How far apart two results may be is not chosen but measured: the control is the original once more, with each of its
parameters, buffers and inputs changed by one rounding. The accelerated model may differ from the original by FACTOR
times what the controls do. In double precision that is some 1e-14, where no mistake can hide behind rounding.
"""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

import gankern

FACTOR = 8.0
# How many controls are asked, where fewer do not suffice: each of them allows more. In single precision a ReLU's argument
# that is zero up to rounding falls on one side or the other, in a few elements and with a size that few controls meet.
CONTROLS = (1, 3, 12)
Batch = tuple[Any, ...]


def _sum_of_outputs(module: nn.Module, batch: Batch) -> Tensor:
    outputs = [y for y in tree_leaves(module(*batch)) if isinstance(y, Tensor) and y.is_floating_point()]
    return sum((y * torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view(y.shape)).mean() for y in outputs)


@dataclass(frozen=True)
class Case:
    """A model, what it is called with, and the loss that its own repository trains it with."""

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[], Batch]  # the arguments of its forward
    loss: Callable[[nn.Module, Batch], Tensor] = _sum_of_outputs
    penalty: Callable[[nn.Module, Batch], Tensor] | None = None  # a handwritten gradient penalty
    replaces: bool = True  # whether anything in it can be replaced
    doubles: bool = True  # whether its own code runs in double precision
    pickles: bool = True  # and whether it can be pickled

    def new(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The same model every time."""
        torch.default_generator.manual_seed(1)
        return self.build().to(dtype)

    def inputs(self, dtype: torch.dtype = torch.float32) -> Batch:
        torch.default_generator.manual_seed(2)
        return tree_map_only(Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, self.batch())


def accelerated(module: nn.Module, **options: Any) -> nn.Module:
    """The module, accelerated in place; nothing else may have changed by that."""
    before, random = Snapshot(module), torch.get_rng_state()
    report = gankern.accelerate(module, **options)
    assert torch.equal(torch.get_rng_state(), random), "accelerate drew random numbers"
    before.same_values(module)
    return report.module


# ---- results --------------------------------------------------------------------------------------------------


def leaves(batch: Batch) -> Batch:
    def leaf(x: Tensor) -> Tensor:
        return x.detach().clone().requires_grad_(x.is_floating_point())

    return tree_map_only(Tensor, leaf, batch)


def gradients(value: Tensor, parameters: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """A gradient that does not exist is zeros, in torch and here alike."""
    tensors = {n: p for n, p in parameters.items() if p.requires_grad}
    grads = torch.autograd.grad(value, list(tensors.values()), allow_unused=True)
    return {prefix + n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(tensors.items(), grads)}


def observe(case: Case, module: nn.Module, batch: Batch, optimizer: Any = None, steps: int = 2) -> dict[str, Tensor]:
    """Results, gradients, penalty's gradients, and what a few steps of the optimiser leave behind."""
    seen: dict[str, Tensor] = {}
    parameters = dict(module.named_parameters())
    inputs = leaves(batch)
    named = parameters | {f"input {i}": x for i, x in enumerate(tree_leaves(inputs)) if isinstance(x, Tensor)}
    module.train()
    torch.default_generator.manual_seed(3)
    for i, y in enumerate(tree_leaves(module(*inputs))):
        if isinstance(y, Tensor):
            seen[f"output {i}"] = y.detach().clone()
    torch.default_generator.manual_seed(4)
    seen |= gradients(case.loss(module, inputs), named, "gradient of ")
    if case.penalty is not None:
        torch.default_generator.manual_seed(5)
        penalty = case.penalty(module, batch)
        seen |= {"penalty": penalty.detach()} | gradients(penalty, parameters, "penalty's gradient of ")
    optimizer = optimizer or torch.optim.SGD(module.parameters(), 1e-3, momentum=0.9)
    for step in range(steps):
        torch.default_generator.manual_seed(6 + step)
        optimizer.zero_grad()
        loss = case.loss(module, batch)
        if case.penalty is not None:
            loss = loss + case.penalty(module, batch)
        loss.backward()
        optimizer.step()
    seen |= {f"after {steps} steps, {n}": x.detach().clone() for n, x in module.state_dict().items()}
    seen |= {f"after {steps} steps, attribute {n}": x for n, x in plain_tensors(module).items()}
    module.eval()
    torch.default_generator.manual_seed(9)
    with torch.no_grad():
        for i, y in enumerate(tree_leaves(module(*batch))):
            if isinstance(y, Tensor):
                seen[f"evaluated output {i}"] = y.clone()
    seen |= {f"after evaluation, {n}": x.detach().clone() for n, x in module.named_buffers()}
    module.train()
    return seen


def plain_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Tensors that modules keep as plain attributes (statistics that are no buffers)."""
    return {
        f"{name}.{key}": value.detach().clone()
        for name, inner in module.named_modules()
        for key, value in inner.__dict__.items()
        if isinstance(value, Tensor)
    }


@torch.no_grad()
def one_rounding(x: Tensor, seed: int) -> Tensor:
    """x with each element changed to a neighbour."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, x.shape, generator=generator) * 2.0 - 1
    return x * (1 + torch.finfo(x.dtype).eps * signs.to(x.dtype))


def control(case: Case, dtype: torch.dtype, seed: int, load: Callable[[nn.Module], Any], batch: Batch) -> dict:
    module = case.new(dtype)
    load(module)
    with torch.no_grad():
        for i, x in enumerate((*module.parameters(), *module.buffers())):
            if x.is_floating_point():
                x.copy_(one_rounding(x, 1000 * seed + i))
    batch = tree_map_only(Tensor, lambda x: one_rounding(x, seed) if x.is_floating_point() else x, batch)
    return observe(case, module, batch)


def distance(a: Tensor, b: Tensor) -> float:
    return (a.double() - b.double()).norm().item()


@dataclass
class Difference:
    name: str
    error: float
    allowed: float

    def __str__(self) -> str:
        return (
            f"{self.name}: differs by {self.error:.2e}, {self.error / max(self.allowed, 1e-300):.1f} times the allowed"
        )


def compare(found: dict[str, Tensor], expected: dict[str, Tensor], controls: list[dict]) -> list[Difference]:
    """What differs by more than is allowed, worst first. Three things are allowed: what the controls differ by in the
    same tensor, what they differ by in all tensors of its kind together (a single number may be lucky), and rounding of
    the tensor itself."""
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()

    def kind(name: str) -> str:
        return name.split(" ")[0]

    relative: dict[str, list[float]] = {}
    spread = {n: max((distance(c[n], expected[n]) for c in controls), default=0.0) for n in expected}
    for n, x in expected.items():
        relative.setdefault(kind(n), []).append(spread[n] / max(x.double().norm().item(), 1e-300))
    differences = []
    for n, x in expected.items():
        y = found[n]
        assert y.shape == x.shape and y.dtype == x.dtype, f"{n}: {y.shape} {y.dtype}, was {x.shape} {x.dtype}"
        if not x.is_floating_point():
            if not torch.equal(x, y):
                differences.append(Difference(n, float("inf"), 0.0))
            continue
        typical = sorted(relative[kind(n)])[len(relative[kind(n)]) // 2] * x.double().norm().item()
        rounding = torch.finfo(x.dtype).eps * x.double().norm().item()
        allowed = FACTOR * max(spread[n], typical, rounding)
        error = distance(y, x)
        if not error <= allowed:
            differences.append(Difference(n, error, allowed))
    return sorted(differences, key=lambda d: -d.error / max(d.allowed, 1e-300))


def check_numbers(case: Case, dtype: torch.dtype, channels_last: bool = False, **options: Any) -> None:
    """The same results, gradients, penalty's gradients and buffers; an optimiser made before goes on working."""
    batch = case.inputs(dtype)
    original, fast = case.new(dtype), case.new(dtype)
    if channels_last:
        original, fast = (m.to(memory_format=torch.channels_last) for m in (original, fast))
        batch = tree_map_only(Tensor, as_channels_last, batch)
    with its_own_errors(channels_last):
        expected = observe(case, original, batch)
    optimizer = torch.optim.SGD(fast.parameters(), 1e-3, momentum=0.9)
    fast = accelerated(fast, **options)
    found = observe(case, fast, batch, optimizer)
    controls: list[dict] = []
    differences: list[Difference] = []
    for count in CONTROLS:
        controls += [
            control(case, dtype, seed, lambda m: m.to(memory_format=torch.channels_last) if channels_last else m, batch)
            for seed in range(len(controls), count)
        ]
        differences = compare(found, expected, controls)
        if not differences:
            break
    assert not differences, f"{case.name}, {dtype}:\n" + "\n".join(map(str, differences[:8]))


@contextlib.contextmanager
def its_own_errors(channels_last: bool):
    """Around the original."""
    try:
        yield
    except RuntimeError as error:
        if channels_last and "view size is not compatible" in str(error):
            pytest.skip("the model itself does not take channels_last")
        raise


def as_channels_last(x: Tensor) -> Tensor:
    return x.to(memory_format=torch.channels_last) if x.ndim == 4 else x


# ---- everything else ------------------------------------------------------------------------------------------


def _callable(value: Any) -> Any:
    return getattr(value, "__func__", value)


class Snapshot:
    """All that can be seen of a module: its parts' identities, types, attributes, hooks and values."""

    def __init__(self, module: nn.Module) -> None:
        self.values = {n: x.detach().clone() for n, x in module.state_dict().items()}
        self.values |= plain_tensors(module)
        self.identities = {n: id(p) for n, p in (*module.named_parameters(), *module.named_buffers())}
        self.modules = {n: id(m) for n, m in module.named_modules(remove_duplicate=False)}
        self.training = [m.training for m in module.modules()]
        self.parts = {n: self.describe(m) for n, m in module.named_modules()}

    @staticmethod
    def describe(module: nn.Module) -> dict[str, Any]:
        described: dict[str, Any] = {"type": type(module)}
        for key, value in module.__dict__.items():
            if key.endswith("_hooks") and isinstance(value, dict):
                described[key] = [(type(_callable(h)), id(_callable(h))) for h in value.values()]
            elif isinstance(value, dict):
                described[key] = {k: type(v) for k, v in value.items()}
            elif isinstance(value, Tensor):
                described[key] = Tensor
            elif isinstance(value, int | float | str | bool | tuple | type(None)):
                described[key] = value
            else:
                described[key] = type(value)
        return described

    def same_values(self, module: nn.Module) -> None:
        """Nothing that training could notice is different: not a value, not an identity, not a name."""
        now = Snapshot(module)
        assert list(now.values) == list(self.values)
        for name, value in self.values.items():
            assert torch.equal(now.values[name], value), f"{name} has other values"
        assert now.identities == self.identities and list(now.identities) == list(self.identities)
        assert now.modules == self.modules
        assert now.training == self.training
        for name, part in self.parts.items():
            assert issubclass(now.parts[name]["type"], part["type"]), f"{name} is a {now.parts[name]['type']}"

    def same_in_all(self, module: nn.Module) -> None:
        """Bit for bit the module of before."""
        self.same_values(module)
        self.same_parts(module)

    def same_parts(self, module: nn.Module) -> None:
        now = Snapshot(module).parts
        for name, part in self.parts.items():
            assert now[name] == part, f"{name}: {differing(now[name], part)}"

    def same_parts_as(self, module: nn.Module) -> None:
        """Of two modules built alike: the same attributes of the same types, hooks of the same kinds."""
        now = Snapshot(module).parts
        for name, part in self.parts.items():
            for each in (part, now[name]):
                for key in [k for k in each if k.endswith("_hooks")]:
                    each[key] = [kind for kind, _ in each[key]]
                # parametrizations make a class for each module
                each["type"] = each["type"].__name__
                each["_modules"] = {k: kind.__name__ for k, kind in each["_modules"].items()}
            assert now[name] == part, f"{name}: {differing(now[name], part)}"


def differing(now: dict[str, Any], before: dict[str, Any]) -> str:
    keys = [k for k in {*now, *before} if now.get(k, "nothing") != before.get(k, "nothing")]
    return ", ".join(f"{k} is {now.get(k, 'nothing')}, was {before.get(k, 'nothing')}" for k in keys)


def run(case: Case, module: nn.Module, batch: Batch, seed: int = 3) -> list[Tensor]:
    """Results and gradients of one step."""
    torch.default_generator.manual_seed(seed)
    inputs = leaves(batch)
    value = case.loss(module, inputs)
    tensors = [x for x in (*tree_leaves(inputs), *module.parameters()) if isinstance(x, Tensor) and x.requires_grad]
    grads = torch.autograd.grad(value, tensors, allow_unused=True)
    return [value.detach(), *(torch.zeros_like(t) if g is None else g for t, g in zip(tensors, grads))]


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float, what: str) -> None:
    scale = max(x.abs().max().item() for x in expected if x.numel())
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        if not b.is_floating_point():
            assert torch.equal(a, b), f"{what}, tensor {i}"
            continue
        error = (a - b).abs().max().item() if b.numel() else 0.0
        size = max(b.abs().max().item() if b.numel() else 0.0, 1e-3 * scale)
        assert error <= tolerance * size, f"{what}, tensor {i}: differs by {error:.1e} of {size:.1e}"


def precision(case: Case) -> tuple[torch.dtype, float]:
    """Where a model runs in double precision, differences are looked for there."""
    return (torch.float64, 1e-9) if case.doubles else (torch.float32, 2e-3)


def check_checkpoints(case: Case) -> None:
    dtype, tolerance = precision(case)
    batch = case.inputs(dtype)
    original, fast = case.new(dtype), accelerated(case.new(dtype))
    run(case, original, batch)
    trained = copy.deepcopy(original.state_dict())
    assert list(trained) == list(fast.state_dict())
    assert [x.shape for x in trained.values()] == [x.shape for x in fast.state_dict().values()]
    fast.load_state_dict(trained)
    expected = run(case, original, batch)
    assert_close(run(case, fast, batch), expected, tolerance, "with the original's checkpoint")
    file = io.BytesIO()
    torch.save(fast.state_dict(), file)
    file.seek(0)
    fresh = case.new(dtype)
    if case.name not in STATE_OUTSIDE:
        fresh.load_state_dict(torch.load(file))
        assert_close(
            run(case, fresh, batch), run(case, fast, batch), tolerance, "with the accelerated one's checkpoint"
        )


STATE_OUTSIDE = {"torchgan virtual batch norm"}  # what is not in the state_dict, and runs on from call to call


def check_copies(case: Case) -> None:
    """Deep copies and pickles give the same numbers, and have a life of their own."""
    dtype, tolerance = precision(case)
    batch = case.inputs(dtype)
    fast = accelerated(case.new(dtype))
    ways = [copy.deepcopy]
    if case.pickles:
        pickle.dumps(case.new(dtype))  # the original can be pickled
        ways.append(lambda m: pickle.loads(pickle.dumps(m)))
    copies = [way(fast) for way in ways]
    expected = run(case, fast, batch)
    for other in copies:
        before = {n: x.clone() for n, x in fast.state_dict().items()}
        assert not {id(p) for p in other.parameters()} & {id(p) for p in fast.parameters()}
        found = run(case, other, batch)
        assert_close(found, expected, tolerance, "a copy")
        assert all(torch.equal(x, before[n]) for n, x in fast.state_dict().items()), "a copy changed the original"
        gankern.restore(other)
        case.loss(other, batch)
    case.loss(fast, batch)  # restoring the copies did not touch it


class Log:
    """What hooks on every submodule see, in the order in which they are called."""

    def __init__(self, module: nn.Module) -> None:
        self.calls: list[tuple[str, str]] = []
        self.tensors: list[Tensor] = []
        self.strides: list[tuple[str, tuple[int, ...]]] = []
        self.handles = []
        for name, inner in module.named_modules():
            self.handles.append(inner.register_forward_pre_hook(self._hook(name, "before")))
            self.handles.append(inner.register_forward_hook(self._hook(name, "after")))

    def _hook(self, name: str, when: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any = None) -> None:
            self.calls.append((name, when))
            for x in tree_leaves((args, output)):
                if isinstance(x, Tensor):
                    self.strides.append((f"{when} {name}", strides(x)))
                    self.tensors.append(x.detach().clone())

        return hook

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def strides(x: Tensor) -> tuple[int, ...]:
    """Strides as far as they mean anything."""
    return tuple(s for n, s in zip(x.shape, x.stride()) if n != 1) if x.numel() else ()


def check_hooks(case: Case, hooks_first: bool, channels_last: bool) -> None:
    """Hooks on all submodules fire as often, in the same order, and see the same tensors in the same memory format."""
    dtype, tolerance = precision(case)
    batch = case.inputs(dtype)
    logs = []
    for fast in (False, True):
        module = case.new(dtype)
        if channels_last:
            module = module.to(memory_format=torch.channels_last)
            batch = tree_map_only(Tensor, as_channels_last, batch)
        log = Log(module) if hooks_first else None
        if fast:
            module = gankern.accelerate(module).module
        log = log or Log(module)
        with its_own_errors(channels_last and not fast):
            run(case, module, batch)
        logs.append(log)
        log.remove()
        run(case, module, batch)
    theirs, ours = logs
    assert ours.calls == theirs.calls
    assert len(ours.tensors) == len(theirs.tensors)
    for a, b, (name, before), (_, after) in zip(ours.tensors, theirs.tensors, theirs.strides, ours.strides):
        assert a.shape == b.shape and a.dtype == b.dtype, name
        assert after == before, f"{name}: strides {after}, were {before}"
    assert_close(ours.tensors, theirs.tensors, tolerance, "what hooks see")


def check_modes(case: Case) -> None:
    """train() and eval() reach every part, evaluation leaves buffers as the original does, and moving works."""
    dtype, tolerance = precision(case)
    batch = case.inputs(dtype)
    modules = [case.new(dtype), accelerated(case.new(dtype))]
    results = []
    for module in modules:
        case.loss(module, batch)
        module.eval()
        assert not any(m.training for m in module.modules())
        seen = []
        for _ in range(2):
            torch.default_generator.manual_seed(0)
            with torch.no_grad():
                seen += [y.clone() for y in tree_leaves(module(*batch)) if isinstance(y, Tensor)]
        seen += [b.clone() for b in module.buffers()]
        module.train()
        assert all(m.training for m in module.modules())
        module.float()
        case.loss(module, case.inputs())
        module.to(dtype)
        results.append(seen + run(case, module, batch))
    expected, found = results
    assert_close(found[: len(expected)], expected, 2e-3, "modes")  # the float32 run in between left its rounding


def check_restore(case: Case) -> None:
    """restore() gives back what was there: at once, and after training."""
    module, batch = case.new(), case.inputs()
    before = Snapshot(module)
    gankern.accelerate(module)
    gankern.restore(module)
    before.same_in_all(module)
    untouched = case.new()
    for a, b in zip(run(case, module, batch), run(case, untouched, batch), strict=True):
        assert torch.equal(a, b), "a restored module computes something else"

    module, untouched = case.new(), case.new()
    gankern.accelerate(module)
    for each in (module, untouched):
        observe(case, each, batch, steps=1)
    gankern.restore(module)
    Snapshot(untouched).same_parts_as(module)
    untouched.load_state_dict(module.state_dict())
    for name, inner in untouched.named_modules():
        for key, value in module.get_submodule(name).__dict__.items():
            if isinstance(value, Tensor) and key in inner.__dict__:
                inner.__dict__[key] = value.detach().clone()
    for a, b in zip(run(case, module, batch), run(case, untouched, batch), strict=True):
        assert torch.equal(a, b), "a restored module computes something else after training"


def check_compile(case: Case, backend: str = "aot_eager") -> None:
    """torch.compile takes the accelerated model where it takes the original."""
    batch = case.inputs()
    torch._dynamo.reset()
    expected = run(case, torch.compile(case.new(), backend=backend), batch)
    torch._dynamo.reset()
    found = run(case, torch.compile(accelerated(case.new()), backend=backend), batch)
    torch._dynamo.reset()
    assert_close(found, expected, 2e-3, "compiled")


@contextlib.contextmanager
def one_process(folder: Any):
    """torch.distributed with this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def check_distributed(case: Case, folder: Any) -> None:
    """DistributedDataParallel around an accelerated model, and acceleration of what is wrapped already."""
    dtype, tolerance = precision(case)
    batch = case.inputs(dtype)
    expected = run(case, case.new(dtype), batch)
    with one_process(folder):
        for wrapped_first in (False, True):
            module = case.new(dtype)
            if not wrapped_first:
                gankern.accelerate(module)
            wrapped = nn.parallel.DistributedDataParallel(module)
            if wrapped_first:
                gankern.accelerate(wrapped)
            torch.default_generator.manual_seed(3)
            inputs = leaves(batch)
            outputs = tree_leaves(wrapped(*inputs))
            sum(y.sum() for y in outputs if isinstance(y, Tensor) and y.is_floating_point()).backward()
            module.zero_grad()
            module.load_state_dict(case.new(dtype).state_dict())
            assert_close(run(case, module, batch), expected, tolerance, "under DistributedDataParallel")
