# What mypy is told of Triton, which has no types. A kernel's arguments have the types of a launch, and of its branches
# one is compiled: it is not checked, and needs no annotations. Everything else in gankern/triton does.
from typing import Any
from typing import no_type_check as jit

__all__ = ["jit"]

def __getattr__(name: str) -> Any: ...
