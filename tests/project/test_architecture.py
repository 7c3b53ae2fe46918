"""The structure of the code: allowed imports, no cycles, no private names of other modules, short functions and files.

Every rule is a function of a folder that returns the violations, so that a test can give it a small wrong tree.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "ov_phi3"
GROUND = ("errors", "_version", "checks", "files", "signatures")
ORDER = (
    "ground", "system", "model", "text", "generation", "kv", "backends", "engine", "exporting", "root", "bench",
    "serving", "public", "cli",
)  # fmt: skip
"""From the bottom. "public" is `ov_phi3/__init__.py`, which names all public objects."""
OPENVINO = ("openvino", "openvino_genai", "openvino_tokenizers")
MAY_IMPORT_OPENVINO = (
    "backends", "system", "text.tokenizer_files", "text.tokenizer_graph", "text.detokenizer_graph", "exporting.verify",
)  # fmt: skip
MOST_FUNCTION_LINES = 60
MOST_MODULE_LINES = 400
REASON = "Longer than 400 lines because"


@dataclass(frozen=True)
class Module:
    """One parsed file.

    Attributes:
        name: dotted name below the folder that was read, such as "ov_phi3.kv.entry".
        path: the file.
        tree: its syntax tree.
        lines: number of lines.
    """

    name: str
    path: Path
    tree: ast.Module
    lines: int

    @classmethod
    def read(cls, path: Path, folder: Path) -> Module:
        parts = path.relative_to(folder).with_suffix("").parts
        source = path.read_text(encoding="utf-8")
        name = ".".join(part for part in parts if part != "__init__")
        return cls(name, path, ast.parse(source), len(source.splitlines()))

    @property
    def is_package(self) -> bool:
        return self.path.stem == "__init__"

    def imports(self) -> Iterator[tuple[int, str, str | None]]:
        """Line, module and name of every import, also inside functions and under TYPE_CHECKING; no name: None."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from ((node.lineno, alias.name, None) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    parents = self.name.split(".")
                    up = node.level - self.is_package
                    base = ".".join([*parents[: len(parents) - up], *([node.module] if node.module else [])])
                yield from ((node.lineno, base, alias.name) for alias in node.names)


@functools.cache
def modules_in(folder: Path) -> dict[str, Module]:
    """All modules below a folder, by name."""
    found = (Module.read(path, folder) for path in sorted(folder.rglob("*.py")) if "__pycache__" not in path.parts)
    return {module.name: module for module in found}


def imported(module: Module, modules: dict[str, Module]) -> Iterator[tuple[int, str]]:
    """Line and name of every module of the same folder that a module imports.

    `from a import b` imports the module `a.b` if there is one, and else `a`.
    """
    for line, base, name in module.imports():
        if name is not None and f"{base}.{name}" in modules:
            yield line, f"{base}.{name}"
        elif base in modules:
            yield line, base


def layer(name: str) -> str:
    """The layer of a module of the package: an entry of `ORDER`."""
    parts = name.split(".")[1:]
    if not parts:
        return "public"
    if parts[0] == "__main__":
        return "cli"
    if len(parts) == 1 and parts[0] in GROUND:
        return "ground"
    return parts[0] if parts[0] in ORDER else "root"


def imports_from_above(folder: Path) -> list[str]:
    """Imports of a package above the importing one."""
    modules = modules_in(folder)
    return [
        f"{module.name}:{line} ({layer(module.name)}) imports {target} ({layer(target)})"
        for module in modules.values()
        for line, target in imported(module, modules)
        if ORDER.index(layer(target)) > ORDER.index(layer(module.name))
    ]


def cycles(folder: Path) -> list[str]:
    """Groups of modules that import each other, directly or over others (Tarjan's strongly connected components)."""
    modules = modules_in(folder)
    graph = {name: sorted({target for _, target in imported(m, modules)}) for name, m in modules.items()}
    index: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    groups: list[str] = []

    def visit(name: str) -> None:
        index[name] = lowest[name] = len(index)
        stack.append(name)
        for target in graph[name]:
            if target not in index:
                visit(target)
            if target in stack:
                lowest[name] = min(lowest[name], lowest[target])
        if lowest[name] == index[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1 or name in graph[name]:
                groups.append(" - ".join(sorted(group)))

    for name in graph:
        if name not in index:
            visit(name)
    return groups


def openvino_imports(folder: Path) -> list[str]:
    """Imports of OpenVINO outside the modules that may import it."""
    allowed = [f"{PACKAGE}.{name}" for name in MAY_IMPORT_OPENVINO]
    return [
        f"{module.name}:{line} imports {base}"
        for module in modules_in(folder).values()
        if not any(module.name == name or module.name.startswith(f"{name}.") for name in allowed)
        for line, base, _ in module.imports()
        if base.split(".")[0] in OPENVINO
    ]


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def defined_in(tree: ast.Module) -> set[str]:
    """Names of all functions, classes, variables and attributes that a module assigns or declares."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and owner(node) in ("self", "cls"):
            names.add(node.attr)
    return names


def owner(node: ast.Attribute) -> str | None:
    """`a` of the expression `a.b`; None for another expression in front of the dot."""
    return node.value.id if isinstance(node.value, ast.Name) else None


def private_names(folder: Path) -> list[str]:
    """Uses of another module's private names."""
    modules = modules_in(folder)
    problems = []
    for module in modules.values():
        for line, base, name in module.imports():
            if name is not None and is_private(name) and f"{base}.{name}" not in modules:
                problems.append(f"{module.name}:{line} imports {name} from {base}")
        own = defined_in(module.tree)
        problems += [
            f"{module.name}:{node.lineno} uses {ast.unparse(node)}"
            for node in ast.walk(module.tree)
            if isinstance(node, ast.Attribute)
            and is_private(node.attr)
            and owner(node) not in ("self", "cls")
            and node.attr not in own
        ]
    return problems


def long_functions(folder: Path) -> list[str]:
    """Functions of more than 60 lines, docstring and decorators included."""
    return [
        f"{module.name}:{node.lineno} {node.name} has {lines} lines"
        for module in modules_in(folder).values()
        for node in ast.walk(module.tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and (lines := (node.end_lineno or 0) - min([node.lineno, *(d.lineno for d in node.decorator_list)]) + 1)
        > MOST_FUNCTION_LINES
    ]


def long_modules(folder: Path) -> list[str]:
    """Modules of more than 400 lines without a reason in their docstring."""
    return [
        f"{module.name} has {module.lines} lines"
        for module in modules_in(folder).values()
        if module.lines > MOST_MODULE_LINES and REASON not in " ".join((ast.get_docstring(module.tree) or "").split())
    ]


def imports_of_tests(folder: Path) -> list[str]:
    """Imports of one test file by another one."""
    tests = modules_in(folder)
    names = {name.split(".")[-1] for name, module in tests.items() if module.path.name.startswith("test_")}
    return [
        f"{module.name}:{line} imports {base}{'' if name is None else f'.{name}'}"
        for module in tests.values()
        for line, base, name in module.imports()
        if base.split(".")[-1] in names or (name in names and (not base or base.split(".")[0] == "tests"))
    ]


SRC, BENCHMARKS, SCRIPTS, TESTS = ROOT / "src", ROOT / "benchmarks", ROOT / "scripts", ROOT / "tests"

RULES: tuple[tuple[Callable[[Path], list[str]], tuple[Path, ...]], ...] = (
    (imports_from_above, (SRC,)),
    (cycles, (SRC, BENCHMARKS, SCRIPTS)),
    (openvino_imports, (SRC,)),
    (private_names, (SRC, BENCHMARKS, SCRIPTS)),
    (long_functions, (SRC, BENCHMARKS, SCRIPTS)),
    (long_modules, (SRC, BENCHMARKS, SCRIPTS, TESTS)),
    (imports_of_tests, (TESTS,)),
)


@pytest.mark.parametrize(
    ("rule", "folder"),
    [pytest.param(rule, folder, id=f"{rule.__name__}-{folder.name}") for rule, folders in RULES for folder in folders],
)
def test_the_tree_obeys(rule: Callable[[Path], list[str]], folder: Path) -> None:
    assert rule(folder) == []


def test_every_package_is_in_the_order() -> None:
    packages = {path.parent.name for path in (SRC / PACKAGE).glob("*/__init__.py")}
    assert packages <= set(ORDER)


LONG = "\n".join(f"    x = {number}" for number in range(60))
WRONG: tuple[tuple[Callable[[Path], list[str]], dict[str, str], list[str]], ...] = (
    (
        imports_from_above,
        {"ov_phi3/kv/entry.py": "def f():\n    from ov_phi3.engine import runner\n", "ov_phi3/engine/runner.py": ""},
        ["ov_phi3.kv.entry:2 (kv) imports ov_phi3.engine.runner (engine)"],
    ),
    (
        imports_from_above,
        {"ov_phi3/files.py": "import ov_phi3.system.core\n", "ov_phi3/system/core.py": ""},
        ["ov_phi3.files:1 (ground) imports ov_phi3.system.core (system)"],
    ),
    (
        imports_from_above,
        {"ov_phi3/chat.py": "from .bench import table\n", "ov_phi3/bench/table.py": ""},
        ["ov_phi3.chat:1 (root) imports ov_phi3.bench.table (bench)"],
    ),
    (
        imports_from_above,
        {"ov_phi3/__init__.py": "load = None", "ov_phi3/chat.py": "from ov_phi3 import load\n"},
        ["ov_phi3.chat:1 (root) imports ov_phi3 (public)"],
    ),
    (
        cycles,
        {
            "ov_phi3/chat.py": "if TYPE_CHECKING:\n    from ov_phi3.prefix import Prefix\n",
            "ov_phi3/prefix.py": "from ov_phi3 import loading\n",
            "ov_phi3/loading.py": "def f():\n    import ov_phi3.chat\n",
            "ov_phi3/alone.py": "from ov_phi3.chat import Chat\n",
        },
        ["ov_phi3.chat - ov_phi3.loading - ov_phi3.prefix"],
    ),
    (cycles, {"_a.py": "import _b\n", "_b.py": "from _a import x\n", "c.py": "import _a\n"}, ["_a - _b"]),
    (
        openvino_imports,
        {
            "ov_phi3/kv/sizing.py": "def f():\n    import openvino.opset13 as ops\n",
            "ov_phi3/text/template.py": "from openvino_genai import Tokenizer\n",
            "ov_phi3/backends/paged/engine.py": "import openvino\n",
            "ov_phi3/backends_of_others.py": "import openvino_tokenizers\n",
        },
        [
            "ov_phi3.backends_of_others:1 imports openvino_tokenizers",
            "ov_phi3.kv.sizing:2 imports openvino.opset13",
            "ov_phi3.text.template:1 imports openvino_genai",
        ],
    ),
    (
        private_names,
        {
            "a.py": "from b import _hidden, __version__, shown\nimport b\nb._hidden\nb.f()._x\nshown._y = 1\n",
            "b.py": "class B:\n    def __init__(self, other):\n        self._x = other._x\n        self.__dict__\n",
        },
        ["a:1 imports _hidden from b", "a:3 uses b._hidden", "a:4 uses b.f()._x", "a:5 uses shown._y"],
    ),
    (
        long_functions,
        {"a.py": f"@property\ndef f():\n{LONG}\n\ndef g():\n{LONG[:-11]}\n"},
        ["a:2 f has 62 lines"],
    ),
    (
        long_modules,
        {"a.py": "x = 1\n" * 401, "b.py": "x = 1\n" * 400, "c.py": f'"""Text. {REASON}\nso."""\n' + "x = 1\n" * 401},
        ["a has 401 lines"],
    ),
    (
        imports_of_tests,
        {
            "kv/test_a.py": "import test_b\n",
            "kv/test_b.py": "from tests.kv import test_a\n",
            "kv/test_c.py": "def f():\n    from kv.test_a import x\n",
            "kv/test_d.py": "from support import helpers\n",
        },
        [
            "kv.test_a:1 imports test_b",
            "kv.test_b:1 imports tests.kv.test_a",
            "kv.test_c:2 imports kv.test_a.x",
        ],
    ),
)


@pytest.mark.parametrize(
    ("rule", "files", "problems"),
    [pytest.param(*case, id=f"{case[0].__name__}-{number}") for number, case in enumerate(WRONG)],
)
def test_a_wrong_tree_is_found(
    rule: Callable[[Path], list[str]], files: dict[str, str], problems: list[str], tmp_path: Path
) -> None:
    for name, source in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source, encoding="utf-8")
    assert rule(tmp_path) == problems
