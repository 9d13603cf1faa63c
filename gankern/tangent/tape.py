"""Records what a critic does to its inputs, operator by operator, for the tangent form of a gradient penalty.

A :class:`Tape` is a dispatch mode: the critic really runs, whatever its Python looks like, and every ATen operator and
every primitive of this library that touches the inputs or a parameter leaves a node (see ``nodes``). Three things are
then known of the values that the nodes connect, and they are all that the penalty's gradient needs:

- the cotangent *delta*: the derivative of the sum of the critic's outputs, which at the inputs is the gradient g that
  the penalty P is a function of;
- the *tangent* t: the change along v = dP/dg. Since dP = <v, dg>, the derivative of P by the parameters is that of the
  sum of the outputs' tangents, with v held constant;
- the second cotangent *rho*: the derivative of that sum with respect to the value itself. Between the inputs and the
  output it exists only below an operator that has curvature; for a parameter it is the gradient that is wanted.

A tensor that is a value carries a mark, (tape, number); parameters are known by their identity.

While the critic runs, autograd makes its graph as for anybody: so ``requires_grad`` and all else that a critic may ask
of its tensors is what it is without a tape, and autograd's word on what depends on what is the tape's. A tensor that
requires no gradient is a constant; one that does and that the tape did not see being made, such as the result of an
``autograd.Function``, is refused (:meth:`Tape.find`). The graph is gone when the critic has run. What can change a
gradient without a trace in the operators, a hook foremost, is seen by :class:`_Watch`, and refused.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from gankern.core import autograd
from gankern.core.torch_internals import graph_nodes, memory_of
from gankern.ops.convolution_choice import KINDS
from gankern.tangent import reached, rules
from gankern.tangent.nodes import INPUT, WEIGHT, Bilinear, Gate, Kernel, LayoutMatters, Linear, Node, NotCovered
from gankern.tangent.state import State

_MARK = "_gankern_tape_mark"
_PLAIN = {Tensor, nn.Parameter}
# Whose hooks of saved tensors give back what they were given: checkpoint, save_on_cpu.
_EXACT_HOOKS = {"torch.utils.checkpoint", "torch.autograd.graph"}


def _is_plain(kind: Any) -> bool:
    """Whether the operators on a subclass of Tensor are torch's own."""
    return kind.__torch_dispatch__ is Tensor.__torch_dispatch__


def _of_function(node: Any) -> str:
    function = getattr(node, "_forward_cls", type(node)).__name__
    if function == "BackwardHookFunction":
        return "a backward hook of a module, which can change the gradient"
    return f"the autograd.Function {function} is not one that this form knows"


def _origin(x: Tensor) -> str:
    """Why a tensor that requires a gradient is none of the tape's."""
    if isinstance(x.grad_fn, BackwardCFunction):
        return _of_function(x.grad_fn)
    return f"a tensor of shape {tuple(x.shape)} that the critic did not make requires a gradient"


class _Watch(TorchFunctionMode):
    """Sees what leaves no trace in the operators that run: hooks and other uses of autograd's graph, and memory that is
    reached around it. All else passes through."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self.tape = tape

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func in _WATCHED and not self.tape.paused:
            tensors = [x for x in rules.tensors_of(args, kwargs or {}) if x.requires_grad or func in _OF_CONSTANTS_TOO]
            if tensors:
                try:
                    _WATCHED[func](self.tape, tensors)
                except NotCovered as error:
                    raise self.tape._located(error) from None
        return func(*args, **(kwargs or {}))


def _refuses(what: str) -> Any:
    def refuse(tape: Tape, tensors: list[Tensor]) -> None:
        raise NotCovered(what)

    return refuse


def _by_the_critic() -> bool:
    """Whether what is watched is called by the code of a critic, rather than by torch's or this library's own."""
    frame: FrameType | None = sys._getframe(3)  # of whoever called it, which may be of Python itself
    while frame is not None and frame.f_globals.get("__name__") in ("torch.overrides", "torch._tensor"):
        frame = frame.f_back
    caller = "" if frame is None else frame.f_globals.get("__name__", "")
    return caller.split(".")[0] not in ("torch", "gankern")


def _reads_layout(tape: Tape, tensors: list[Tensor]) -> None:
    """The code of a critic, which may go by it; others go by it for speed."""
    if tape.relaid and _by_the_critic():
        raise LayoutMatters("the critic reads how a tensor lies in memory")


def _exposes(tape: Tape, tensors: list[Tensor]) -> None:
    """Who has the memory of a tensor may write to it, and nobody counts that as a write."""
    if _by_the_critic():
        exposed = {memory_of(x) for x in tensors if x.layout is torch.strided}
        if exposed & tape.memory:
            raise NotCovered("the critic reads the memory of a tensor")
        tape.exposed |= exposed


def _freezes(tape: Tape, tensors: list[Tensor]) -> None:
    """What autograd saved of a parameter is differentiated or not by what it is then, not by what it was before."""
    if any(isinstance(x, nn.Parameter) or id(x) in tape.leaves for x in tensors):
        raise NotCovered("the critic freezes or unfreezes a parameter while it runs")


def _gives_away(tape: Tape, tensors: list[Tensor]) -> None:
    """``.data`` may be read; what it is used to write does not count as a write for anybody: rules.untracked."""
    tape.detached.update(x.untyped_storage().data_ptr() for x in tensors)


_tensor: Any = Tensor  # whose attributes, on the class, are descriptors: the stubs show what a tensor has there
_WATCHED = {
    Tensor.register_hook: _refuses("a hook of a tensor, which can change the gradient"),
    Tensor.register_post_accumulate_grad_hook: _refuses("a hook of a tensor, registered by the critic"),
    Tensor.retain_grad: _refuses("retain_grad(), whose gradient only autograd would leave"),
    _tensor.grad_fn.__get__: _refuses("the critic reads grad_fn, through which a gradient can be changed"),
    Tensor.backward: _refuses("the critic runs a backward of its own"),
    torch.autograd.backward: _refuses("the critic runs a backward of its own"),
    torch.autograd.grad: _refuses("the critic computes a gradient of its own"),
    _tensor.data.__get__: _gives_away,
    _tensor.data.__set__: _refuses("the critic writes .data of what depends on the input or a parameter"),
    Tensor.set_: _refuses("set_() of what depends on the input or a parameter"),
    Tensor.untyped_storage: _exposes,
    Tensor._typed_storage: _exposes,
    Tensor.requires_grad_: _freezes,
    _tensor.requires_grad.__set__: _freezes,
    **dict.fromkeys((Tensor.numpy, Tensor.__array__, Tensor.__dlpack__, Tensor.data_ptr, Tensor.storage), _exposes),
    **dict.fromkeys((Tensor.stride, Tensor.is_contiguous, Tensor.dim_order, Tensor.storage_offset), _reads_layout),
}
_OF_CONSTANTS_TOO = {func for func, watch in _WATCHED.items() if watch in (_exposes, _freezes)}


Values = dict[int | None, Tensor]  # tangents or cotangents by the number of their value; of None there is none
_DONE = Node()  # in place of one that the last pass has no use for


class Tape(TorchDispatchMode):
    """Within ``with tape:`` operators are recorded; then close(), delta(), push() and pull(), once each."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """torch would keep Dynamo from tracing __torch_dispatch__, and import it for that, which takes seconds. Dynamo
        does not come here: to it a tape is inside of one region of the graph."""
        return False

    def __init__(self, parameters: Iterable[Tensor], critic: Any = None, before: State | None = None) -> None:
        super().__init__()
        self.critic = critic
        self.before = before
        self.nodes: list[Node] = []
        self.kinds: list[int] = []  # of each value
        self.roots: list[int] = []  # of each value: the first value of the memory that it looks at
        self.families: dict[int, list[int]] = {}  # root -> all values of that memory, where there are several
        self.stale: set[int] = set()  # overwritten through another tensor
        self.leaves: dict[int, int] = {}  # id of a parameter -> value
        self.parameters: dict[int, Tensor] = {}  # value -> parameter
        self.scaled_weights: dict[int | None, tuple[Tensor, float]] = {}  # value -> parameter and number, its factors
        self.saved: list[tuple[Tensor, int]] = []  # what will be read after the forward, with its version
        self.unversioned: list[Tensor] = []  # saved by the present operator, which may be about to count up its version
        self.rho: Values = {}
        self.steps: list[reached.Step] = []  # for the parameters whose gradient is zeros
        self.paused = False
        self.functions: set[type] = set()  # autograd's nodes of what this library's primitives are
        self.detached: set[int] = set()  # addresses of memory that ``.data`` of a value has given away
        self.memory: set[int] = set()  # addresses of all values, as far as they are known
        self.exposed: set[int] = set()  # and of memory that the critic got at
        self.of_layout: set[int] = set()  # addresses of memory that only by its layout is shared, or is not
        self.relaid = False  # whether the inputs lie in memory otherwise than the caller's
        self.reached: list[Tensor] = []  # the parameters that autograd's graph of the output has
        self._outer: list[Any] = []
        self._watch: _Watch | None = None  # only while it records, since it refers to this tape
        for parameter in parameters:
            self._leaf(parameter)

    # ---- values ----------------------------------------------------------------------------------------------

    def _leaf(self, parameter: Tensor) -> int:
        number = self._value(WEIGHT)
        self.leaves[id(parameter)] = number
        self._note_memory(parameter)
        self.parameters[number] = parameter
        return number

    def _value(self, kind: int, root: int | None = None) -> int:
        number = len(self.kinds)
        self.kinds.append(kind)
        self.roots.append(number if root is None else root)
        if root is not None:
            self.families.setdefault(root, [root]).append(number)
        return number

    def known(self, x: Tensor) -> int | None:
        """The value that a tensor is; None for one that the tape has not seen."""
        number = self.leaves.get(id(x))
        if number is not None:
            return number
        mark = getattr(x, _MARK, None)
        return mark[1] if mark is not None and mark[0] is self else None

    def find(self, x: Tensor) -> int | None:
        """The value of a tensor that an operator reads; None for a constant. Autograd knows which it is."""
        if not x.requires_grad:
            return None
        number = self.known(x)
        if number is None:
            if x.is_leaf:
                return self._leaf(x)  # a parameter of a critic that is no module
            raise NotCovered(_origin(x))
        return number

    def input(self, x: Tensor) -> int:
        """Makes x, a tensor that nobody else holds, an input."""
        number = self._value(INPUT)
        self.mark(x, number)
        return number

    def mark(self, x: Tensor, number: int | None) -> None:
        setattr(x, _MARK, (self, number))
        self._note_memory(x)

    def _note_memory(self, x: Tensor) -> None:
        # On the meta device, and in a compiler's hands, a tensor has none.
        if x.layout is torch.strided and not (x.is_meta or torch.compiler.is_compiling()):
            address = memory_of(x)
            if address in self.exposed:
                raise NotCovered("the critic reads the memory of a tensor")
            self.memory.add(address)

    def kind(self, values: Iterable[int | None]) -> int:
        kind = 0
        for number in values:
            if number is not None:
                kind |= self.kinds[number]
        return kind

    def add(self, node: Node, ins: Sequence[int | None], outputs: Sequence[Tensor | None], view: bool = False) -> None:
        """Records the node that made the outputs; None stands for one that is not differentiable. A tensor that was
        written in place becomes a new value."""
        node.ins, node.second, node.dead = ins, False, False
        node.kinds = [0 if number is None else self.kinds[number] for number in ins]
        kind = 0
        for k in node.kinds:
            kind |= k
        node.outs = []
        for output in outputs:
            if output is None:
                node.outs.append(None)
                continue
            root = None
            before = self.known(output)
            if before is not None:
                if id(output) in self.leaves:
                    raise NotCovered("a parameter is written in place")
                self.stale.update(self.families.get(self.roots[before], ()))
            elif view:
                root = self.roots[next(i for i in ins if i is not None)]
            number = self._value(kind, root)
            self.mark(output, number)
            node.outs.append(number)
        self.nodes.append(node)

    def save(self, *tensors: Tensor | None) -> None:
        """These tensors will be read after the forward; close() checks that they are still what they are now. A node
        itself keeps them ``detach``-ed, or autograd's graph would live as long as it."""
        if not torch.compiler.is_compiling():
            self.unversioned += [x for x in tensors if x is not None]

    def _version(self) -> None:
        self.saved += [(x, x._version) for x in self.unversioned]
        self.unversioned.clear()

    # ---- recording -------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        if rules.gives_numbers(func):
            return rules.number(func, args, kwargs)
        if self.unversioned:
            self._version()
        try:
            makes = self.before is not None and rules.tell(self.before, func, args, kwargs)
            if not self.reads(rules.tensors_of(args, kwargs)):
                return self._made(rules.untracked(self, func, args, kwargs), makes)
            if any(x.layout is not torch.strided or x.is_nested for x in rules.tensors_of(args, kwargs)):
                raise NotCovered(f"{func} takes a tensor that is sparse or nested")
            step = self._asked(func, args, kwargs)
            result = rules.record(self, func, args, kwargs)
        except NotCovered as error:
            raise self._located(error) from None
        self.steps.append(step([self.known(x) for x in reached.flat(result) if isinstance(x, Tensor)]))
        return self._made(result, makes)

    def _made(self, result: Any, makes: bool) -> Any:
        """The result of an operator, of whose tensors it is said, where it made them, that they are new."""
        if makes and self.before is not None:
            for x in reached.flat(result):
                if isinstance(x, Tensor) and not x.requires_grad:
                    self.before.made(x)
        return result

    def _asked(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        ins = [self.find(x) for x in reached.flat(args, kwargs) if isinstance(x, Tensor)]
        return reached.asked(func, args, kwargs, [0 if i is None else self.kinds[i] for i in ins], ins)

    def reads(self, tensors: Iterable[Tensor]) -> bool:
        """Whether something that reads these tensors is to be recorded: the one entrance to the tape, for operators,
        primitives and convolutions alike."""
        tracked = False
        for x in tensors:
            if type(x) not in _PLAIN and not _is_plain(type(x)) and not torch.compiler.is_compiling():
                raise NotCovered(f"a tensor of type {type(x).__name__}, whose operators are its own")
            if x.requires_grad:
                number = self.find(x)
                tracked = True
                if self.stale and number in self.stale:
                    self.check([number])
        if not tracked or not torch.is_grad_enabled():
            return False
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        if hooks is not None and hooks[0].__module__ not in _EXACT_HOOKS:
            raise NotCovered("hooks of saved tensors, which can change what a gradient is computed from")
        return True

    def check(self, values: Iterable[int | None]) -> None:
        """Refuses values that were overwritten through another tensor."""
        if self.stale and any(number in self.stale for number in values):
            raise NotCovered("a tensor is read after it was written in place through a view of it, or its base")

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Within it nothing is recorded, and no primitive comes here."""
        before = self.paused, autograd.recording.recorder
        self.paused, autograd.recording.recorder = True, None
        try:
            yield
        finally:
            self.paused, autograd.recording.recorder = before

    def _apart(
        self,
        tensors: Sequence[Tensor | None],
        run: Callable[..., Any],
        add: Callable[[Any], None],
        pieces: bool = False,
    ) -> Any:
        """What run() returns, whose operators are not recorded; add(it) records the whole, where it is to be.
        ``pieces`` is core.autograd.Rule's."""
        if self.paused:
            return run()
        if self.unversioned:
            self._version()
        try:
            tracked = self.reads(x for x in tensors if x is not None)
            self.paused = True
            result = run()
            if tracked:
                outputs = (result,) if isinstance(result, Tensor) else result
                self.functions.update(type(y.grad_fn) for y in outputs if y.grad_fn is not None)
                ins = [None if x is None else self.find(x) for x in tensors]
                add(result)
                inputs = [i for i, number in enumerate(ins) if self.kind([number]) & INPUT]
                self.steps.append(reached.known(ins, [self.known(y) for y in outputs], inputs, pieces))
            return result
        except NotCovered as error:
            raise self._located(error) from None
        finally:
            self.paused = False

    def primitive(self, name: str, options: tuple, tensors: Sequence[Tensor | None]) -> Any:
        """A primitive of this library: core.autograd.differentiate calls this in its own place."""
        rule = autograd.RULES[name]
        if not self.paused:
            rules.check_primitive(name, options, tensors[0])

        def add(outputs: Any) -> Any:
            values = [None if x is None else self.find(x) for x in tensors]
            node = Kernel(rule, options, tensors, outputs, rules.curved_primitive(self, name, options, values))
            self.add(node, values, [y if y.requires_grad else None for y in outputs])
            self.save(*rule.saved(options, tensors, outputs))

        return self._apart(tensors, lambda: autograd.run(name, options, *tensors), add, rule.pieces(options))

    def linear(
        self,
        x: Tensor,
        run: Callable[..., Any],
        forward: Callable[[Tensor], Tensor],
        transpose: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """A linear map of this library, which calls this in its own place: run() is forward(x), with autograd."""
        return self._apart((x,), run, lambda y: self.add(Linear(forward, transpose), (self.find(x),), (y,)))

    def convolution(
        self,
        run: Callable[..., Any],
        options: tuple,
        height: int,
        width: int,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        """A convolution of this library: ops.convolution calls this in its own place."""
        arguments = options, height, width, x, weight, bias
        return self._apart(
            (x, weight, bias),
            lambda: run(*arguments),
            lambda y: rules.engine_convolution(self, *arguments, y),
            KINDS[options[0]].zeros,
        )

    def __enter__(self) -> Any:
        self._outer.append(autograd.recording.recorder)
        autograd.recording.recorder = self
        if not torch.compiler.is_compiling():
            self._watch = _Watch(self)
            self._watch.__enter__()
        return super().__enter__()

    def __exit__(self, *exception: Any) -> Any:
        result = super().__exit__(*exception)
        if self._watch is not None:
            self._watch.__exit__(*exception)
            self._watch = None
        autograd.recording.recorder = self._outer.pop()
        return result

    def _located(self, error: NotCovered) -> NotCovered:
        """The error with the name of the module that was running."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            module = frame.f_locals.get("self") if frame.f_code.co_name == "forward" else None
            if isinstance(module, nn.Module):
                names = {m: n for n, m in self.critic.named_modules()} if isinstance(self.critic, nn.Module) else {}
                name = names.get(module)
                return NotCovered(f"{error} (in {type(module).__name__}{f' {name!r}' if name else ''})")
            frame = frame.f_back
        return error

    def survey(self, output: Tensor) -> None:
        """Looks through autograd's graph of the critic's output: for its parameters, and for what has a gradient of its
        own making."""
        for node in graph_nodes(output):
            if isinstance(node, BackwardCFunction) and type(node) not in self.functions:
                raise NotCovered(_of_function(node))
            if hasattr(node, "variable") and id(node.variable) in self.leaves:
                self.reached.append(node.variable)

    # ---- the passes ------------------------------------------------------------------------------------------

    def close(self, outputs: Iterable[int] = ()) -> None:
        """The forward is over, and autograd's graph no longer needed. Decides through which nodes second cotangents
        will flow: below operators that have curvature, and from ``outputs``."""
        self._version()
        for x, version in self.saved:
            if x._version != version:
                shape = tuple(x.shape)
                raise NotCovered(
                    f"a tensor of shape {shape} that the gradient needs was written in place after its use"
                )
        self.saved.clear()
        flows: set[int | None] = set(outputs)
        for node in reversed(self.nodes):
            node.second = any(number in flows for number in node.outs)
            if node.second or node.curved:
                flows.update(i for i, kind in zip(node.ins, node.kinds) if kind == INPUT | WEIGHT)
        if not torch.compiler.is_compiling():
            self._find_fresh(set(outputs))

    def _find_fresh(self, outputs: set[int | None]) -> None:
        """Tells gates whose neighbour is a convolution or matrix product, and nothing else, that the tangents or
        cotangents that it makes are theirs."""
        readers: dict[int | None, list[Node]] = {}
        makers: dict[int | None, Node] = {}
        for node in self.nodes:
            for number in node.ins:
                readers.setdefault(number, []).append(node)
            for number in node.outs:
                makers[number] = node
        for node in self.nodes:
            if isinstance(node, Gate):
                (source,), (result,) = node.ins, node.outs
                after = readers.get(result, ())
                node.fresh_tangent = isinstance(makers.get(source), Bilinear) and len(readers[source]) == 1
                node.fresh_grad = len(after) == 1 and isinstance(after[0], Bilinear) and result not in outputs

    def delta(self, seeds: Values) -> Values:
        """The inputs' cotangents from the outputs'."""
        grads = dict(seeds)
        for node in reversed(self.nodes):
            needed = [bool(kind & INPUT) for kind in node.kinds]
            if any(needed):
                incoming = [grads.pop(number, None) for number in node.outs]
                if all(g is None for g in incoming):
                    node.dead = True
                else:
                    _accumulate(grads, node.ins, needed, node.delta(incoming, needed))
        return grads

    def push(self, tangents: Values) -> None:  # type: ignore[override]  # torch's is not for tapes
        """The tangents, from the inputs to the output; second cotangents arise."""
        tangents = dict(tangents)
        last = {number: i for i, node in enumerate(self.nodes) for number in node.ins}
        for i, node in enumerate(self.nodes):
            if not any(kind & INPUT for kind in node.kinds):
                continue
            incoming = [tangents.get(number) for number in node.ins]
            for number in node.ins:
                if last[number] == i:
                    tangents.pop(number, None)
            if not node.dead and any(t is not None for t in incoming):
                needed = [bool(kind & WEIGHT) for kind in node.kinds]
                outgoing, second = node.push(incoming, needed)
                for number, t in zip(node.outs, outgoing):
                    if t is not None and number in last:
                        tangents[number] = t
                _accumulate(self.rho, node.ins, needed, second)
                del outgoing, second
            del incoming
            if not node.second:
                self.nodes[i] = _DONE

    def pull(self) -> None:
        """The second cotangents, back to the parameters."""
        while self.nodes:
            node = self.nodes.pop()
            if node is _DONE:
                continue
            incoming = [self.rho.pop(number, None) for number in node.outs]
            needed = [bool(kind & WEIGHT) for kind in node.kinds]
            if any(needed) and any(g is not None for g in incoming):
                _accumulate(self.rho, node.ins, needed, node.pull(incoming, needed))

    def gradients(self, end: int) -> dict[Tensor, Tensor]:
        """For each parameter that has a gradient, what pull() found; zeros where torch's double backward from the
        output ``end`` has zeros."""
        zeros = reached.parameters(self.steps, end)
        found = {}
        for number, x in self.parameters.items():
            if number in self.rho:
                found[x] = self.rho[number]
            elif number in zeros:
                found[x] = torch.zeros_like(x, requires_grad=False)
        return found


def _accumulate(
    into: Values, ins: Iterable[int | None], needed: Iterable[bool], grads: Iterable[Tensor | None]
) -> None:
    for number, need, grad in zip(ins, needed, grads):
        if need and grad is not None:
            before = into.get(number)
            into[number] = grad if before is None else before + grad
