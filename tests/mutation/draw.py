"""Small changes of a module's code: which there are, and the code with one of them made."""

from __future__ import annotations

import ast
import copy
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]

_OTHER_COMPARISONS = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
}
_OTHER_OPERATORS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitOr,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}
# Fields of a tree that change no result, or that are evaluated when a module is imported.
_NOT_RUN = ("annotation", "returns", "decorator_list", "type_params", "defaults", "kw_defaults")


@dataclass(frozen=True)
class Mutant:
    """One change of one module.

    Attributes:
        path: The module, below the root of the repository.
        number: Which of the module's changes this is.
        line: First line of the changed statement, and `end` its last.
        function: The function that it stands in, dotted.
        before: The expression or statement as it is written, and `after` as it is changed.
    """

    path: str
    number: int
    line: int
    end: int
    function: str
    before: str
    after: str

    def __str__(self) -> str:
        before, after = _short(self.before, self.after), _short(self.after, self.before)
        return f"{self.path}:{self.line} {self.function}\n    {before}\n -> {after}"


def _short(text: str, other: str) -> str:
    """A line of `text` around the place where it differs from the other."""
    same = next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))
    return " ".join(text[max(0, same - 90) : same + 90].split())


@dataclass(frozen=True)
class _Place:
    """Where a node hangs in its tree."""

    parent: ast.AST
    field: str
    index: int | None

    def put(self, node: ast.AST) -> None:
        if self.index is None:
            setattr(self.parent, self.field, node)
        else:
            getattr(self.parent, self.field)[self.index] = node


def mutants(path: str) -> list[Mutant]:
    """Every change of the module at `path`."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    found = []
    for number, (walker, node, changed) in enumerate(_changes(tree)):
        host = walker.host(node)
        before = ast.unparse(host)
        walker.places[node].put(changed)
        after = ast.unparse(changed if host is node else host)
        walker.places[node].put(node)
        line, end = host.lineno, host.end_lineno or host.lineno  # type: ignore[attr-defined]
        found.append(Mutant(path, number, line, end, walker.functions[node], before, after))
    return found


def compiled(mutant: Mutant) -> types.CodeType:
    """The code of the mutant's module, with its change."""
    file = ROOT / mutant.path
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for number, (walker, node, changed) in enumerate(_changes(tree)):
        if number == mutant.number:
            walker.places[node].put(ast.fix_missing_locations(ast.copy_location(changed, node)))
            return compile(tree, str(file), "exec")
    raise IndexError(f"{mutant.path} has no change {mutant.number}")


class _Walker:
    """The nodes of a tree that compute something, each with its place and its function."""

    def __init__(self, tree: ast.Module):
        self.places: dict[ast.AST, _Place] = {}
        self.functions: dict[ast.AST, str] = {}
        self._visit(tree, "", inside=False)

    def _visit(self, node: ast.AST, function: str, *, inside: bool) -> None:
        for field, value in ast.iter_fields(node):
            if field in _NOT_RUN:
                continue
            children = enumerate(value) if isinstance(value, list) else [(None, value)]
            for index, child in children:
                if not isinstance(child, ast.AST) or _is_beside_the_point(child):
                    continue
                if inside:
                    self.places[child] = _Place(node, field, index)
                    self.functions[child] = function
                if isinstance(child, ast.FunctionDef | ast.ClassDef):
                    name = f"{function}.{child.name}" if function else child.name
                    self._visit(child, name, inside=isinstance(child, ast.FunctionDef))
                else:
                    self._visit(child, function, inside=inside)

    def host(self, node: ast.AST) -> ast.AST:
        """The simple statement around a node, or the expression in the head of a compound one."""
        while not isinstance(node, ast.stmt):
            parent = self.places[node].parent
            if isinstance(parent, ast.stmt | ast.match_case | ast.withitem) and not _is_simple(parent):
                return node
            node = parent
        return node


def _is_simple(node: ast.AST) -> bool:
    return isinstance(node, ast.stmt) and not hasattr(node, "body")


def _is_beside_the_point(node: ast.AST) -> bool:
    """Docstrings, words of messages, imports, assertions (which inform the type checker) and types."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return True
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        return True
    return isinstance(node, ast.JoinedStr | ast.Import | ast.ImportFrom | ast.Assert) or _is_asserted(node)


def _is_asserted(node: ast.AST) -> bool:
    """`strict=True` of a zip, which is an assertion as well."""
    return isinstance(node, ast.keyword) and node.arg == "strict" and ast.unparse(node.value) == "True"


def _is_nothing(value: ast.expr) -> bool:
    """None, and False, in whose place None says the same to a condition; True in its place is another change."""
    return isinstance(value, ast.Constant) and (value.value is None or value.value is False)


def _changes(tree: ast.Module) -> Iterator[tuple[_Walker, ast.AST, ast.AST]]:
    """Each node with what stands in its place once it is changed."""
    walker = _Walker(tree)
    for node in list(walker.places):
        for changed in _instead(node, walker.places[node]):
            yield walker, node, changed


def _instead(node: ast.AST, place: _Place) -> Iterator[ast.AST]:
    if isinstance(node, ast.stmt):
        yield from _instead_of_statement(node)
    elif isinstance(node, ast.Constant):
        yield from _instead_of_constant(node.value)
    else:
        yield from _instead_of_expression(node, place)


def _instead_of_constant(value: object) -> Iterator[ast.AST]:
    if isinstance(value, bool):
        yield ast.Constant(not value)
    elif isinstance(value, int):
        yield ast.Constant(value + 1)
        yield ast.Constant(value - 1)
    elif isinstance(value, float):
        yield ast.Constant(value * 2 + 1)


def _instead_of_expression(node: ast.AST, place: _Place) -> Iterator[ast.AST]:
    match node:
        case ast.Compare(ops=[operator]):
            for other in _OTHER_COMPARISONS[type(operator)]:
                yield _with(node, ops=[other()])
        case ast.BoolOp(op=operator, values=values):
            yield _with(node, op=ast.Or() if isinstance(operator, ast.And) else ast.And())
            for index in range(len(values)):
                rest = values[:index] + values[index + 1 :]
                yield rest[0] if len(rest) == 1 else _with(node, values=rest)
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            yield node.operand
        case ast.BinOp(op=operator) if type(operator) in _OTHER_OPERATORS:
            yield _with(node, op=_OTHER_OPERATORS[type(operator)]())
        case ast.IfExp(test=test):
            yield _with(node, test=ast.UnaryOp(ast.Not(), test))
        case ast.comprehension(ifs=conditions):
            for index in range(len(conditions)):
                yield _with(node, ifs=conditions[:index] + conditions[index + 1 :])
        case ast.Call(keywords=keywords) if not isinstance(place.parent, ast.Raise):
            for index, keyword in enumerate(keywords):
                if not _is_asserted(keyword):
                    yield _with(node, keywords=keywords[:index] + keywords[index + 1 :])


def _instead_of_statement(node: ast.stmt) -> Iterator[ast.AST]:
    match node:
        case ast.If(test=test) | ast.While(test=test):
            yield _with(node, test=ast.UnaryOp(ast.Not(), test))
        case ast.Return(value=ast.expr() as value) if not _is_nothing(value):
            yield ast.Return(ast.Constant(None))
        case ast.Continue():
            yield ast.Break()
        case ast.Break():
            yield ast.Continue()
        case ast.Expr() | ast.AugAssign() | ast.Raise():
            yield ast.Pass()
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield ast.Pass()


def _with(node: ast.AST, **fields: object) -> ast.AST:
    """A copy of a node with other fields."""
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed
