"""What type checkers and completion see: wrong programs are found and right ones are not; no name is missing."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from checkers import Finding, mypy, pyright
from pages import PAGES, name_of, python_blocks

import ov_phi3
from ov_phi3.exporting import flags
from ov_phi3.generation.config import GenerationConfig
from ov_phi3.generation.options import GenerationOptions
from ov_phi3.many import REQUEST_OPTIONS, RequestOptions

PROGRAMS = sorted((Path(__file__).parents[1] / "data" / "programs").glob("*.py"))
PACKAGE = Path(ov_phi3.__file__).parent

# Types that public signatures name for the library's own use: no caller makes one.
INTERNAL = {
    "Channel", "ChatMessage", "Conversation", "Engine", "KVTensors", "LoadedModel", "Sources", "Start", "StopMatcher",
    "Tools",
}  # fmt: skip


# -- programs ---------------------------------------------------------------------------------------------------------


def marked() -> set[tuple[str, int]]:
    """File and line of each mistake in the programs."""
    return {
        (path.name, number)
        for path in PROGRAMS
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if line.endswith("# wrong")
    }


def lines_of(findings: list[Finding]) -> set[tuple[str, int]]:
    return {(finding.file, finding.line) for finding in findings}


def test_mypy_finds_every_mistake_and_nothing_else() -> None:
    assert len(marked()) >= 25
    assert lines_of(mypy(PROGRAMS, "--strict")) == marked()


def test_pyright_finds_every_mistake_and_nothing_else(tmp_path: Path) -> None:
    assert lines_of(pyright(PROGRAMS, tmp_path)) == marked()


def test_the_right_program_can_be_imported() -> None:
    spec = importlib.util.spec_from_file_location("right", PROGRAMS[0])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for function in (module.last_word, module.export, module.chat, module.ask):
        assert get_type_hints(function)  # every name in the annotations exists at run time too


# -- pages ------------------------------------------------------------------------------------------------------------


def test_every_example_of_the_pages_passes_mypy(tmp_path: Path) -> None:
    """Each page is one module, whose lines are the page's."""
    modules = {}
    for page in PAGES:
        lines: list[str] = []
        for block in python_blocks(page):
            lines += [""] * (block.line - 1 - len(lines)) + block.text.splitlines()
        if lines:
            path = tmp_path / f"{name_of(page).removesuffix('.md').replace('/', '_').replace('-', '_')}.py"
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
            modules[path.name] = name_of(page)
    assert len(modules) >= 15
    config = tmp_path / "mypy.ini"  # the cookbook's program imports packages of which a check takes a minute and a half
    config.write_text("[mypy-torch.*,transformers.*,optimum.*,ray.*]\nfollow_imports = skip\n", encoding="utf-8")
    rules = ("--check-untyped-defs", "--disable-error-code=import-untyped", "--disable-error-code=import-not-found")
    found = mypy([tmp_path / name for name in modules], *rules, config=config)
    assert [f"{modules[finding.file]}:{finding.line}: {finding.text}" for finding in found] == []


# -- names and options ------------------------------------------------------------------------------------------------


def test_typed_options_are_the_fields_of_the_config() -> None:
    hints = {field.name: field.type for field in GenerationConfig.__dataclass_fields__.values()}
    assert {name: kind.__forward_arg__ for name, kind in GenerationOptions.__annotations__.items()} == hints
    assert not GenerationOptions.__required_keys__
    assert set(RequestOptions.__annotations__) == {*hints, *REQUEST_OPTIONS}
    assert {*REQUEST_OPTIONS} < {*inspect.signature(ov_phi3.Pipeline.generate).parameters}


def test_typed_flags_are_those_that_an_export_takes() -> None:
    hints = get_type_hints(flags.ExportFlags)
    assert list(hints) == list(flags.FLAGS)
    for name, flag in flags.FLAGS.items():
        choices = tuple(word for part in get_args(hints[name]) for word in get_args(part))
        if flag.choices:
            assert choices == flag.choices, name
        else:
            assert (flag.kind in get_args(hints[name])) or flag.kind is dict, name
    assert get_args(flags.RecipeName) == tuple(flags.RECIPES)


def annotations_of(node: ast.AST, *, constructors: bool) -> Iterator[ast.expr]:
    """The annotations in the public part of a class or function."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        a = node.args
        arguments = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
        yield from (argument.annotation for argument in arguments if argument.annotation is not None)
        if node.returns is not None:
            yield node.returns
    elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id[0] != "_":
        yield node.annotation
    elif isinstance(node, ast.ClassDef):
        for member in node.body:
            name = getattr(member, "name", "")
            if not name.startswith("_") or (name == "__init__" and constructors):
                yield from annotations_of(member, constructors=constructors)


def names_in(annotation: ast.expr) -> set[str]:
    """Every name that an annotation uses, inside strings too."""
    names = {node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)}
    for node in ast.walk(annotation):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            names.add(node.value)
    return names


def own_types() -> set[str]:
    """Every public class and type alias of the package, by name."""
    names: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names.add(node.target.id)
            elif isinstance(node, ast.Assign):
                names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return {name for name in names if name[0].isupper() and not name.isupper()}


def test_what_a_signature_names_is_exported() -> None:
    used: dict[str, str] = {}
    for name, home in ov_phi3._HOME_OF.items():
        path = PACKAGE / f"{home.replace('.', '/')}.py"
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if getattr(node, "name", None) != name:
                continue
            made_by_us = "Made by" in (ast.get_docstring(node) or "") if isinstance(node, ast.ClassDef) else False
            for annotation in annotations_of(node, constructors=not made_by_us):
                used |= dict.fromkeys(names_in(annotation), name)
    known = {*ov_phi3.__all__, *INTERNAL, "Sequence"}  # our class of this name is never in a public signature
    ours = own_types()
    assert {name: by for name, by in used.items() if name in ours and name not in known} == {}
    assert not INTERNAL & set(ov_phi3.__all__)


@pytest.mark.parametrize("name", [name for name in ov_phi3.__all__ if name[0].isupper()])
def test_exported_types_work_in_unions_at_run_time(name: str) -> None:
    """`def f(prompt: ov_phi3.Prompt | None)` is evaluated where annotations are."""
    assert getattr(ov_phi3, name) | None


# -- completion -------------------------------------------------------------------------------------------------------


WITH_OPTIONS: list[Callable[..., Any]] = [
    ov_phi3.Pipeline.generate, ov_phi3.Pipeline.stream, ov_phi3.Pipeline.generate_many, ov_phi3.Chat.send,
    ov_phi3.Chat.stream, ov_phi3.GenerationConfig,
]  # fmt: skip


@pytest.mark.parametrize("function", WITH_OPTIONS, ids=lambda function: function.__qualname__)
def test_signatures_name_every_option(function: Callable[..., Any]) -> None:
    parameters = inspect.signature(function).parameters
    assert set(GenerationConfig.__dataclass_fields__) <= set(parameters)
    assert all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in parameters.values())


COMPLETION = """
from IPython.core.completer import provisionalcompleter
from IPython.core.interactiveshell import InteractiveShell
import ov_phi3

shell = InteractiveShell.instance()
shell.user_ns["ov_phi3"] = ov_phi3
pipe = shell.user_ns["pipe"] = object.__new__(ov_phi3.Pipeline)
texts = ("ov_phi3.Gen", "pipe.gen", "pipe.generate('a', temp", "ov_phi3.GenerationConfig(temp", "ov_phi3.export(gro")
for text in texts:
    with provisionalcompleter():
        print(sorted({c.text for c in shell.Completer.completions(text, len(text))}))
"""


def test_ipython_completes_names_methods_and_options(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPLETION],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "IPYTHONDIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    names, methods, *options = done.stdout.splitlines()
    assert {"GenerationConfig", "GenerationResult", "GenerationOptions"} <= set(ast.literal_eval(names))
    assert {"generate", "generate_many"} <= set(ast.literal_eval(methods))
    assert options == ["['temperature=']", "['temperature=']", "['group_size=', 'group_size_fallback=']"]
