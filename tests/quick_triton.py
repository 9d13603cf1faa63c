"""Half of the time of Triton's interpreter, and of the first step of its compiler, from Python to its own IR.

Both make the type and the shape of each value anew, of several objects each, where few of them differ: here they are
made once. Nothing of what is computed or compiled changes.
"""

from collections.abc import Callable
from typing import Any

from triton.compiler import code_generator
from triton.language import core
from triton.language.semantic import TritonSemantic


class NoWarnings:
    """In place of the module, which the compiler has change its filters twice for each node of a kernel's text."""

    catch_warnings = staticmethod(lambda: NoWarnings())
    simplefilter = warn = staticmethod(lambda *given: None)

    def __enter__(self) -> None: ...
    def __exit__(self, *raised: object) -> None: ...


def quicken(put: Callable[[Any, str, Any], object] = setattr) -> None:
    """In this process; ``put`` is given the object, the attribute's name, and what is put there."""
    unwrap, equal, broadcast = core._unwrap_if_constexpr, core.dtype.__eq__, TritonSemantic.broadcast_impl_value
    make_block_type, block_types = core.block_type.__init__, {}
    make_tensor, shapes = core.tensor.__init__, {}

    def unwrapped(value: Any) -> Any:
        if type(value) is core.constexpr:
            return value.value
        return unwrap(value) if isinstance(value, list | tuple | core.tuple) else value

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        key = element_ty.name, *[size.value if type(size) is core.constexpr else size for size in shape]
        if key not in block_types:
            make_block_type(self, element_ty, shape)
            block_types[key] = self.__dict__
        self.__dict__.update(block_types[key])

    def tensor(self: Any, handle: Any, type: Any) -> None:
        shape = tuple(type.shape.values) if type.is_block() else ()
        if shape not in shapes:
            make_tensor(self, handle, type)
            shapes[shape] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shapes[shape]

    def broadcast_where_shapes_differ(self: Any, lhs: Any, rhs: Any) -> Any:
        return (lhs, rhs) if lhs.shape is rhs.shape else broadcast(self, lhs, rhs)

    put(core, "_unwrap_if_constexpr", unwrapped)
    put(core.dtype, "__eq__", lambda self, other: self is other or equal(self, other))
    put(core.block_type, "__init__", block_type)
    put(core.tensor, "__init__", tensor)
    put(TritonSemantic, "broadcast_impl_value", broadcast_where_shapes_differ)
    put(code_generator, "warnings", NoWarnings())
