"""A method of a model, compiled again with other rotary functions, and norms that are deferred.

A method calls its rotary function by a global name of its module, which all models of that module
share. `rewritten` compiles the method's own source once more with another name in its place, so
that one model's method calls what stands in for the function and all others are as they were. The
globals, the defaults and the line numbers of the new method are those of the old one.

The other name is a global one too, which nobody else has. As a free variable it would be the
method's own, but of a global a compiled graph asks once for all layers, of a free variable for
each.

The same source shows which norms come before the rotation: ``x = self.some_norm(...)``, with views
around it, where x is what the rotary function takes.
"""

from __future__ import annotations
import __future__

import ast
import copy
import inspect
from collections.abc import Callable, Set
from functools import lru_cache
from types import CellType, CodeType, FunctionType
from typing import Any, NamedTuple, cast

FACTORY, METHOD = "_rope_cupy_factory", "_rope_cupy_method"
DEFER, VALUE = "_rope_cupy_defer", "_rope_cupy_value"
MAX_METHODS = 4096  # that are remembered; a model of transformers has a few dozen
LOCALS = "<locals>."  # between the names of a function and of one within it
VIEWS = {"view", "reshape", "transpose"}  # that a deferred value has
SIZES = {"shape", "device", "size", "dim", "ndim"}  # that it tells without being computed


class Rewrite(NamedTuple):
    """A method that can be compiled again."""

    method: FunctionType  # with its decorators
    source: ast.FunctionDef
    norms: tuple[str, ...]  # names of modules of self whose values the rotation takes


def global_names(function: FunctionType) -> dict[str, Any]:
    """Return the globals that a function, without its decorators, and those within it name."""
    inner: Any = inspect.unwrap(function)
    if not isinstance(inner, FunctionType):
        return {}
    names = _names(inner.__code__)
    return {name: inner.__globals__[name] for name in names if name in inner.__globals__}


@lru_cache(MAX_METHODS)
def _names(code: CodeType) -> tuple[str, ...]:
    within = [each for each in code.co_consts if isinstance(each, CodeType)]
    return (*code.co_names, *(name for each in within for name in _names(each)))


@lru_cache(MAX_METHODS)
def read(function: FunctionType, rotary: frozenset[str]) -> Rewrite | str:
    """Return how a method that calls rotary functions is compiled again, or why it cannot be."""
    inner: Any = inspect.unwrap(function)
    try:
        source = _parsed(inspect.getsource(inner))
    except (OSError, TypeError, ValueError, SyntaxError):
        return "its source cannot be read"
    if not isinstance(source, ast.FunctionDef) or source.name != inner.__name__:
        return "its source is no plain function"
    if any(_is_private(node) for node in ast.walk(source)):
        return "it has names with two underscores, which belong to its class"
    if rotary & _bound_names(source):
        return "it has another use for the name of its rotary function"
    if _with_inner(function, inner, inner) is None:
        return "it is decorated in an unknown way"
    ast.increment_lineno(source, inner.__code__.co_firstlineno - 1)
    if not _is_same(_compiled(_bare(source), inner).__code__, inner.__code__):
        return "its source is not that which was imported"
    return Rewrite(function, source, _norms_before(source, rotary))


def rewritten(
    rewrite: Rewrite,
    stand_ins: dict[str, Callable[..., Any]],
    norms: tuple[str, ...],
    defer: Callable[..., Any],
    value: Callable[[Any], Any],
) -> Any:
    """Return a method that calls the stand-ins, and ``defer(self, name, ...)`` for these norms."""
    inner: Any = inspect.unwrap(rewrite.method)
    source = _bare(rewrite.source)
    if norms:
        assigned = [_assigned_norm(node) or ("", "") for node in ast.walk(source)]
        variables = {variable for variable, norm in assigned if norm in norms}
        source = _Deferring(norms, variables, stand_ins.keys()).visit(source)
        stand_ins = {**stand_ins, DEFER: defer, VALUE: value}
    names = {name: _named(each, inner.__globals__) for name, each in stand_ins.items()}
    source = _Renaming(names).visit(source)
    return _with_inner(rewrite.method, inner, _compiled(source, inner))


def _parsed(text: str) -> ast.stmt:
    """Parse one definition, which may be indented, without touching strings of several lines."""
    if not text[:1].isspace():
        (source,) = ast.parse(text).body
        return source
    block: Any = ast.parse("if True:\n" + text).body[0]
    (source,) = block.body
    ast.increment_lineno(source, -1)
    return cast(ast.stmt, source)


def _is_same(code: CodeType, other: CodeType) -> bool:
    """Whether two functions have the same names and constants, in the order of their use.

    Their instructions may differ: a compiler that sees a whole module knows what it has imported.
    """
    fields = "co_names", "co_varnames", "co_freevars", "co_cellvars"
    if any(getattr(code, field) != getattr(other, field) for field in fields):
        return False
    if len(code.co_consts) != len(other.co_consts):
        return False
    return all(map(_is_same_constant, code.co_consts, other.co_consts))


def _is_same_constant(a: Any, b: Any) -> bool:
    if isinstance(a, CodeType) and isinstance(b, CodeType):
        return _is_same(a, b)
    if isinstance(a, str) and isinstance(b, str):  # Python 3.10 has names with those around them
        return a.rpartition(LOCALS)[2] == b.rpartition(LOCALS)[2]
    return type(a) is type(b) and bool(a == b or repr(a) == repr(b))


def _named(function: Any, globals_: dict[str, Any]) -> str:
    """Give a function a global name that no other has as long as it lives, which this makes it."""
    name = f"_rope_cupy_{id(function):x}"
    globals_[name] = function
    return name


def _bound_names(source: ast.FunctionDef) -> set[str]:
    """Return the names that a function gives to anything but by assigning to a variable.

    A syntax tree has variables as nodes, and names of arguments, imports, definitions, errors,
    patterns and global variables as strings.
    """
    bound = set[str]()
    for node in [each for part in (source.args, *source.body) for each in ast.walk(part)]:
        if not isinstance(node, ast.Name | ast.Attribute | ast.keyword | ast.Constant):
            for _, field in ast.iter_fields(node):
                names = field if isinstance(field, list) else [field]
                bound.update(name for name in names if isinstance(name, str))
    return bound


class _Renaming(ast.NodeTransformer):
    """Uses other variables in place of these."""

    def __init__(self, names: dict[str, str]) -> None:
        self.names = names

    def visit_Name(self, node: ast.Name) -> ast.AST:
        name = self.names.get(node.id, node.id)
        return ast.copy_location(ast.Name(name, node.ctx), node)


def _compiled(source: ast.FunctionDef, like: FunctionType) -> FunctionType:
    """Compile a function, with all else that a function has from `like`, its cells among it."""
    cells = dict(zip(like.__code__.co_freevars, like.__closure__ or (), strict=True))
    parameters = [ast.arg(name) for name in cells]
    source.name = METHOD  # for the method may call a global function of its own name
    factory: Any = ast.parse(f"def {FACTORY}(): return {METHOD}").body[0]
    factory.args.args = parameters
    factory.body.insert(0, source)
    module = ast.fix_missing_locations(ast.Module([factory], []))
    flags = like.__code__.co_flags & __future__.annotations.compiler_flag
    factory_code = compile(module, like.__code__.co_filename, "exec", flags, dont_inherit=True)
    made: dict[str, Any] = {}
    exec(factory_code, like.__globals__, made)
    code = made[FACTORY](**dict.fromkeys(cells)).__code__.replace(co_name=like.__code__.co_name)
    closure = tuple(cells[name] for name in code.co_freevars)
    function = FunctionType(code, like.__globals__, like.__name__, closure=closure)
    function.__defaults__, function.__kwdefaults__ = like.__defaults__, like.__kwdefaults__
    function.__annotations__, function.__doc__ = like.__annotations__, like.__doc__
    function.__module__, function.__qualname__ = like.__module__, like.__qualname__
    function.__dict__.update(like.__dict__)
    return function


def _bare(source: ast.FunctionDef) -> ast.FunctionDef:
    """Copy a function without decorators, annotations and defaults, which it has from another."""
    source = copy.deepcopy(source)
    source.decorator_list, source.returns = [], None
    arguments = source.args
    arguments.defaults, arguments.kw_defaults = [], [None for _ in arguments.kwonlyargs]
    every = (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
    for each in (*every, arguments.vararg, arguments.kwarg):
        if each is not None:
            each.annotation = None
    return source


def _with_inner(function: Any, inner: Any, new: Any) -> Any:
    """Return a decorated function with another in place of its inner one, None where it hides."""
    if function is inner:
        return new
    before, own = function.__wrapped__, getattr(function, "__closure__", None) or ()
    wrapped = _with_inner(before, inner, new)
    holds_it = [_contents(cell) is before for cell in own]
    if wrapped is None or True not in holds_it:
        return None
    cells = (CellType(wrapped) if it else cell for it, cell in zip(holds_it, own, strict=True))
    globals_, defaults = function.__globals__, function.__defaults__
    made = FunctionType(function.__code__, globals_, function.__name__, defaults, tuple(cells))
    made.__kwdefaults__, made.__qualname__ = function.__kwdefaults__, function.__qualname__
    made.__doc__, made.__module__ = function.__doc__, function.__module__
    made.__dict__.update(function.__dict__, __wrapped__=wrapped)
    return made


def _contents(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # it is empty
        return None


def _is_private(node: ast.AST) -> bool:
    name = getattr(node, "attr", getattr(node, "id", ""))
    return isinstance(name, str) and name.startswith("__") and not name.endswith("__")


# Norms before the rotation.


def _norm_of(value: ast.expr) -> str | None:
    """Return the x of ``self.x(...)``, with any views of its result, or of another value None."""
    if not isinstance(value, ast.Call) or not isinstance(value.func, ast.Attribute):
        return None
    owner = value.func.value
    if isinstance(owner, ast.Name) and owner.id == "self":
        takes_one = len(value.args) == 1 and not value.keywords
        return value.func.attr if takes_one and not isinstance(value.args[0], ast.Starred) else None
    return _norm_of(owner) if value.func.attr in VIEWS else None


def _assigned_norm(node: ast.AST) -> tuple[str, str] | None:
    """Return the variable and the norm of ``variable = self.norm(...)``, None of all else."""
    if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Name):
        return None
    norm = _norm_of(node.value) if len(node.targets) == 1 else None
    return (node.targets[0].id, norm) if norm else None


def _rotary_calls(source: ast.AST, rotary: Set[str]) -> list[ast.Call]:
    return [
        node
        for node in ast.walk(source)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in rotary
    ]


def _norms_before(source: ast.FunctionDef, rotary: Set[str]) -> tuple[str, ...]:
    """Return the names of modules of self whose values go to the rotation, by a variable each."""
    taken = [
        (argument.id, call.lineno)
        for call in _rotary_calls(source, rotary)
        for argument in (*call.args, *(keyword.value for keyword in call.keywords))
        if isinstance(argument, ast.Name)
    ]
    written = _written(source)
    blocks = [node for node in ast.walk(source) if isinstance(node, ast.With)]
    in_context = {node for block in blocks for node in ast.walk(block)}  # without gradients, say
    norms, unfit = {}, set()  # in their order
    for node in ast.walk(source):
        variable, norm = _assigned_norm(node) or ("", "")
        if norm and (node in in_context or not written.isdisjoint(_variables(node))):
            unfit.add(norm)
        elif any(name == variable and line > getattr(node, "lineno", 0) for name, line in taken):
            norms[norm] = True
    return tuple(norm for norm in norms if norm not in unfit)


def _variables(tree: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def _written(source: ast.AST) -> set[str]:
    """Return the variables into which a function may write: ``x[0] = 1``, ``x.add_(1)``."""
    places: list[ast.AST] = []
    for node in ast.walk(source):
        if isinstance(node, ast.AugAssign):
            places.append(node.target)
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
            places.append(node.value)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr.endswith("_"):
                places.append(node.func.value)
    return {name for place in places for name in _variables(place)} - {"self"}


class _Deferring(ast.NodeTransformer):
    """Replaces ``self.norm(x)`` by ``defer(self, "norm", x)``, and asks for values where it must.

    A variable that may hold a deferred value goes on as such to the rotation, to a view that is
    assigned to such a variable, and to its shape. Everywhere else it is replaced by ``value(x)``.
    """

    def __init__(self, norms: tuple[str, ...], variables: Set[str], rotary: Set[str]) -> None:
        self.norms, self.variables, self.rotary = norms, variables, rotary

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        _, norm = _assigned_norm(node) or ("", "")
        to_variable = len(node.targets) == 1 and self._is_variable(node.targets[0])
        if norm in self.norms or (to_variable and self._is_view(node.value)):
            node.value = self._passed_on(node.value)
            return node
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if not _rotary_calls(node, self.rotary) or not isinstance(node.func, ast.Name):
            return self.generic_visit(node)
        if node.func.id in self.rotary:
            node.args = [
                each if self._is_variable(each) else self.visit(each) for each in node.args
            ]
            for each in node.keywords:
                each.value = each.value if self._is_variable(each.value) else self.visit(each.value)
            return node
        return self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        if node.attr in SIZES and self._is_variable(node.value):
            return node
        return self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if not self._is_variable(node) or not isinstance(node.ctx, ast.Load):
            return node
        return ast.copy_location(ast.Call(ast.Name(VALUE, ast.Load()), [node], []), node)

    def _is_variable(self, node: ast.AST) -> bool:
        return isinstance(node, ast.Name) and node.id in self.variables

    def _is_view(self, value: ast.expr) -> bool:
        """Whether a value is that of views of a variable, one behind the other."""
        if self._is_variable(value):
            return True
        if not isinstance(value, ast.Call) or not isinstance(value.func, ast.Attribute):
            return False
        return value.func.attr in VIEWS and self._is_view(value.func.value)

    def _passed_on(self, value: Any) -> Any:
        """Return views of a variable or of a norm's value, where the norm is deferred."""
        if self._is_variable(value):
            return value
        value.args = [self.visit(each) for each in value.args]
        for each in value.keywords:
            each.value = self.visit(each.value)
        owner = value.func.value
        if isinstance(owner, ast.Name) and owner.id == "self":
            function, norm = ast.Name(DEFER, ast.Load()), ast.Constant(value.func.attr)
            return ast.copy_location(ast.Call(function, [owner, norm, *value.args], []), value)
        value.func.value = self._passed_on(owner)
        return value
