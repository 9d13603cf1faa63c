"""The syntax tree of a function, made sure to be that of the code which runs: its source is compiled again."""

from __future__ import annotations
import __future__

import ast
import functools
import inspect
import operator
import types

from gankern.acceleration._expressions import PLAIN, same_values

_FUTURE = functools.reduce(operator.or_, (getattr(__future__, n).compiler_flag for n in __future__.all_feature_names))
_PARTS = ("co_code", "co_names", "co_varnames", "co_freevars", "co_cellvars", "co_exceptiontable")
_COUNTS = ("co_argcount", "co_posonlyargcount", "co_kwonlyargcount", "co_flags")


def _same_code(a: types.CodeType, b: types.CodeType) -> bool:
    if any(getattr(a, part) != getattr(b, part) for part in (*_PARTS, *_COUNTS)):
        return False
    if len(a.co_consts) != len(b.co_consts):
        return False
    for x, y in zip(a.co_consts, b.co_consts):
        codes = isinstance(x, types.CodeType) and isinstance(y, types.CodeType)
        same = _same_code(x, y) if codes else same_values(x, y)
        if not same and not (type(x) is type(y) and type(x) not in (types.CodeType, *PLAIN) and x == y):
            return False
    return True


@functools.lru_cache(maxsize=64)
def _file(filename: str, source: str, flags: int) -> tuple[dict, dict] | None:
    """The function definitions of a file by (name, line), and what they compile to by (qualified name, line)."""
    try:
        tree = ast.parse(source)
        compiled = compile(source, filename, "exec", flags, dont_inherit=True)
    except (SyntaxError, ValueError):
        return None
    trees = {
        (each.name, min([each.lineno, *(d.lineno for d in each.decorator_list)])): each
        for each in ast.walk(tree)
        if isinstance(each, ast.FunctionDef)
    }
    codes: dict[tuple[str, int], types.CodeType] = {}
    pending = [compiled]
    while pending:
        code = pending.pop()
        codes[code.co_qualname, code.co_firstlineno] = code
        pending += [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return trees, codes


@functools.lru_cache(maxsize=1024)
def tree_of(code: types.CodeType) -> ast.FunctionDef | str:
    """The syntax tree of a function, made sure to be that of its code; or why there is none."""
    try:
        source = "".join(inspect.findsource(code)[0])
    except (OSError, TypeError):
        return "its source cannot be had"
    file = _file(code.co_filename, source, code.co_flags & _FUTURE)
    if file is None:
        return "its source cannot be read"
    trees, codes = file
    tree = trees.get((code.co_name, code.co_firstlineno))
    again = codes.get((code.co_qualname, code.co_firstlineno))
    if tree is None or again is None or not _same_code(again, code):
        return "its source is not that of the code which runs"
    return tree
