"""What is drawn changes the code, one thing at a time."""

import ast
import textwrap

import pytest

from . import draw as drawing
from .draw import compiled, mutants
from .equivalent import EQUIVALENT, is_equivalent
from .run import draw, own_tests, population


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module, and gives its path below the root."""
    monkeypatch.setattr(drawing, "ROOT", tmp_path)

    def write(source):
        (tmp_path / "m.py").write_text(textwrap.dedent(source), encoding="utf-8")
        return "m.py"

    return write


def results(path, name, *arguments):
    """What a function gives under each mutant; the class of what it raises."""
    found = []
    for mutant in mutants(path):
        namespace = {}
        exec(compiled(mutant), namespace)
        try:
            found.append(namespace[name](*arguments))
        except (TypeError, ValueError, NameError, ZeroDivisionError) as error:
            found.append(type(error).__name__)
    return found


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("return x < 5", [None, True, False, True, True]),
        ("return x == 3", [None, False, False, False]),
        ("return x is None", [None, True]),
        ("return x + 2", [None, 1, 6, 4]),
        ("return not x", [None, 3]),
        ("return x and 0", [None, 3, 0, 3, 1, -1]),
        ("return 1 if x else 2", [None, 2, 2, 0, 1, 1]),
        ("return [i for i in (x,) if not x]", [None, [3], [3]]),
        ("return sorted([1, x], reverse=True)", [None, [1, 3], [3, 2], [3, 0], [1, 3]]),
        ("if x:\n  return True\nreturn False", [False, None, False, True]),
        ("x += 1\nreturn x", [3, None, 5, 3]),
        ("raise ValueError", [None]),
        ("return [*zip([x], [x, x], strict=False)]", [None, "ValueError", [(3, 3)]]),
        ("return [*zip([x], [x], strict=True)]", [None]),
    ],
)
def test_changes(body, expected, module):
    """Comparisons, boundaries, numbers, conditions, arguments, statements and returns."""
    path = module("def f(x):\n" + textwrap.indent(body, "  "))
    assert sorted(map(repr, results(path, "f", 3))) == sorted(map(repr, expected))


def test_what_is_not_changed(module):
    """Docstrings, messages, types, assertions, defaults, and the top of a module."""
    path = module('''
        """Module."""
        LIMIT = 3 < 4

        def f(x: "int | None" = 3) -> "list[1]":
            """Function."""
            assert x == 3
            y: int = x
            print(f"{x + 1}")
    ''')
    assert [(mutant.before, mutant.after) for mutant in mutants(path)] == [("print(f'{x + 1}')", "pass")]


def test_a_mutant_knows_its_place(module):
    path = module("""
        class C:
            def f(self, x):
                if (x
                    > 1):
                    return x
    """)
    found = mutants(path)
    assert {mutant.function for mutant in found} == {"C.f"}
    comparison = next(mutant for mutant in found if mutant.after == "x >= 1")
    assert (comparison.path, comparison.line, comparison.end) == (path, 4, 5)
    assert "x > 1" in str(comparison)


def test_every_mutant_is_another_program():
    """Of a module of the package, and each compiles."""
    found = mutants("passes/graph/columns.py")
    source = ast.unparse(ast.parse((drawing.ROOT / "passes/graph/columns.py").read_text(encoding="utf-8")))
    assert len(found) > 100
    assert all(mutant.before != mutant.after for mutant in found)
    assert all(mutant.before.splitlines()[0] in source for mutant in found)
    assert len({compiled(mutant).co_filename for mutant in found}) == 1


def test_a_seed_draws_the_same_mutants():
    modules = ["passes/graph/columns.py", "passes/graph/kinds.py"]
    first = draw(modules, 20, 3)
    assert first == draw(list(reversed(modules)), 20, 3)
    assert first[:7] == draw(modules, 7, 3)
    assert first != draw(modules, 20, 4)


def test_every_module_has_tests():
    """Of its own name, or those that test_mirror.py names."""
    assert len(population()) > 60
    assert own_tests("passes/fuse_router.py") == ("tests/passes/test_fuse_router.py",)
    assert own_tests("ops/reroute/reference.py") == ("tests/ops/test_reroute.py",)
    assert own_tests("ops/launching.py") == ("tests/ops/test_reroute.py", "tests/ops/test_expert_mlp.py")
    for module in population():
        assert own_tests(module)
        assert all((drawing.ROOT / file).exists() for file in own_tests(module)), module


def test_what_is_equivalent_is_still_written_so():
    """Each entry names a change of the code as it is now: one of code that is gone goes as well."""
    modules = sorted({path for path, *_ in EQUIVALENT})
    found = {(m.path, m.function, m.after) for path in modules for m in mutants(path) if is_equivalent(m)}
    assert {entry[:3] for entry in EQUIVALENT} - found == set()
