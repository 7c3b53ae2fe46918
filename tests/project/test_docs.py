"""The README and the pages under `docs/` say what the code does: their examples run, their tables and lists are whole.

How an example runs here:

- All ```python blocks of a page run in order, in one namespace, in an empty directory. `model/phi3-instruct/int4` is
  a link to the demo model there.
- `"GPU.0"` is replaced by the device that the tests run on (OV_PHI3_TEST_DEVICE, default CPU).
- `ov_phi3.export` checks the recipe and the flags with the real code and then links to the demo model instead of
  spending minutes; the real export has its tests in `test_export.py`.
- A ```text block that directly follows a ```python block is what that block prints. White space counts once, `...`
  stands for anything, and a number before ms, s or tokens/s for any number.
- `<!-- not run: reason -->` directly before a block leaves it out; NOT_RUN lists them all.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import io
import re
import shlex
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import ov_phi3
from ov_phi3 import errors
from ov_phi3.cli import build_parser, reply, tools
from ov_phi3.exporting.flags import FLAGS, RECIPES, combine
from ov_phi3.generation import config as generation_config

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
MODEL = "model/phi3-instruct/int4"
NOT_RUN = {
    "docs/cookbook.md": ["the cookbook's program needs torch, transformers and optimum-intel at run time"],
}


@dataclass(frozen=True)
class Block:
    """A fenced block: where it begins, its language, its text, and why it is not run, if so."""

    page: Path
    line: int
    language: str
    text: str
    not_run: str | None
    output: str | None

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT).as_posix()}:{self.line}"


_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^(?P=indent)``` *$", re.MULTILINE | re.DOTALL
)
_NOT_RUN = re.compile(r"<!-- not run: (.+?) -->\s*\Z")


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, a ```text block that directly follows a ```python one taken as its output."""
    source = page.read_text(encoding="utf-8")
    found = list(_FENCE.finditer(source))
    out = []
    for at, match in enumerate(found):
        follower = found[at + 1] if at + 1 < len(found) else None
        is_output = (
            follower is not None
            and follower["language"] == "text"
            and not source[match.end() : follower.start()].strip()
            and match["language"] == "python"
        )
        reason = _NOT_RUN.search(source, 0, match.start())
        indent = len(match["indent"])
        text = "".join(line[indent:] if line.strip() else line for line in match["text"].splitlines(keepends=True))
        out.append(
            Block(
                page=page,
                line=source.count("\n", 0, match.start("text")) + 1,
                language=match["language"],
                text=text,
                not_run=reason[1] if reason else None,
                output=follower["text"] if is_output and follower is not None else None,
            )
        )
    return out


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def python_blocks(page: Path) -> list[Block]:
    return [block for block in blocks(page) if block.language == "python"]


WITH_PYTHON = [page for page in PAGES if python_blocks(page)]


# -- examples ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path: Path, demo_int4: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with the demo model where the pages have their model."""
    place = tmp_path / MODEL
    place.parent.mkdir(parents=True)
    place.symlink_to(demo_int4, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    real_export = ov_phi3.export

    def export(source: Any, output: Any, recipe: str = "int4", **options: Any) -> ov_phi3.ModelInfo:
        """Everything that `export` checks before it starts work, and then the demo model."""
        own = inspect.signature(real_export).parameters
        combine(recipe, {name: value for name, value in options.items() if name not in own})
        if Path(output).exists():
            return real_export(source, output, recipe, **options)
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        Path(output).symlink_to(demo_int4, target_is_directory=True)
        return ov_phi3.ModelInfo.from_dir(output)

    monkeypatch.setattr(ov_phi3, "export", export)
    return tmp_path


def run_block(block: Block, namespace: dict[str, Any], device: str) -> str:
    """Run a block; returns what it printed."""
    source = block.text.replace('"GPU.0"', repr(device))
    code = compile("\n" * (block.line - 1) + source, str(block.page), "exec", dont_inherit=True)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, namespace)
    return printed.getvalue()


_TIMES = re.compile(r"\b\d+(?:\.\d+)?(?= (?:ms|s|tokens/s)\b)")


def as_compared(text: str) -> str:
    return " ".join(_TIMES.sub("#", text).split())


def is_output(expected: str, printed: str) -> bool:
    """Whether a block printed what the page shows."""
    parts = (re.escape(part) for part in as_compared(expected).split("..."))
    return re.fullmatch(".*?".join(parts), as_compared(printed)) is not None


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name_of)
@pytest.mark.usefixtures("checkout")
def test_every_python_example_runs_and_prints_what_the_page_shows(page: Path, device: str) -> None:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    try:
        for block in python_blocks(page):
            if block.not_run:
                continue
            printed = run_block(block, namespace, device)
            if block.output is not None:
                assert is_output(block.output, printed), f"{block.place} shows\n{block.output}\nbut prints\n{printed}"
    finally:
        for value in namespace.values():
            if isinstance(value, ov_phi3.Pipeline):
                value.close()


def test_examples_that_are_not_run_are_few_and_listed_here() -> None:
    left_out = {
        name_of(page): reasons
        for page in PAGES
        if (reasons := [block.not_run for block in python_blocks(page) if block.not_run])
    }
    assert left_out == NOT_RUN
    assert sum(map(len, left_out.values())) <= 3


def test_an_example_that_fails_or_prints_something_else_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\nprint('a', 12.5, 'ms')\n```\n\n```text\na 3 ms\n```\n\n```python\n1 / 0\n```\n")
    first, second = (block for block in blocks(page) if block.language == "python")
    printed = run_block(first, {}, "CPU")
    assert first.output is not None
    assert is_output(first.output, printed)
    assert not is_output("b 3 ms", printed)
    assert not is_output("a 3 ms and more", printed)
    assert is_output("a ... ms", printed)
    with pytest.raises(ZeroDivisionError):
        run_block(second, {}, "CPU")


# -- command lines ----------------------------------------------------------------------------------------------------


def command_lines(block: Block) -> Iterator[list[str]]:
    """The arguments of each `ov-phi3` (or `python -m ov_phi3`) in a block of shell."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        for part in re.split(r" [|] ", "\0".join(words).replace("\0|\0", " | ")):
            arguments = part.split("\0")
            for cut in ("<", ">"):
                arguments = arguments[: arguments.index(cut)] if cut in arguments else arguments
            if arguments[:1] == ["ov-phi3"]:
                yield arguments[1:]
            elif arguments[:3] == ["python", "-m", "ov_phi3"]:
                yield arguments[3:]


COMMANDS = [
    pytest.param(arguments, id=f"{block.place}-{at}")
    for page in PAGES
    for block in blocks(page)
    if block.language in ("console", "bash", "sh", "powershell")
    for at, arguments in enumerate(command_lines(block))
]


def check_command(arguments: list[str]) -> None:
    """What the command line itself checks before it loads anything."""
    args, extra = build_parser().parse_known_args(arguments)
    assert args.command == "export" or not extra, extra
    if args.command == "export":
        combine(args.recipe, tools._flags(extra))
    if args.command in ("generate", "chat"):
        reply._options(args)


@pytest.mark.parametrize("arguments", COMMANDS)
def test_every_command_line_is_accepted_by_the_real_parser(arguments: list[str]) -> None:
    with contextlib.suppress(SystemExit):
        check_command(arguments)
        return
    assert arguments in (["--version"], ["--help"]) or arguments[1:] == ["--help"], arguments


def test_there_are_command_lines_of_every_command() -> None:
    shown = {arguments[0] for param in COMMANDS if (arguments := param.values[0])}
    assert shown >= {"export", "generate", "chat", "bench", "devices", "doctor"}


def test_a_wrong_command_line_is_noticed() -> None:
    with pytest.raises(ov_phi3.ConfigError, match="group_siz"):
        check_command(["export", "a", "b", "--group-siz", "64"])
    with pytest.raises(SystemExit):
        check_command(["generate"])
    with pytest.raises(AssertionError):
        check_command(["generate", "m", "--max-tokens", "3"])


def test_cli_page_names_every_command_and_every_flag() -> None:
    text = (DOCS / "cli.md").read_text(encoding="utf-8")
    commands = next(a for a in build_parser()._actions if a.dest == "command").choices
    assert commands is not None
    options = {"--" + name.replace("_", "-") for name in generation_config.GenerationConfig.__dataclass_fields__}
    for name, parser in dict(commands).items():
        assert f"ov-phi3 {name}" in text, name
        flags = {flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")}
        missing = [f for f in flags - options - {"--help"} if not re.search(rf"`{f}[ `]", text)]
        missing = [f for f in missing if not f.startswith("--no-")]
        assert not missing, (name, missing)


# -- tables and lists -------------------------------------------------------------------------------------------------


def script(name: str) -> types.ModuleType:
    """A script that lies beside the pages."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_options_page_equals_the_code() -> None:
    text = (DOCS / "options.md").read_text(encoding="utf-8")
    assert script("gen_options").filled(text) == text, "run: python docs/gen_options.py"
    for name in generation_config.GenerationConfig.__dataclass_fields__:
        assert f"| `{name}` |" in text


def test_every_option_is_described_in_the_docstring() -> None:
    assert set(script("gen_options").described()) == set(generation_config.GenerationConfig.__dataclass_fields__)


def test_every_error_class_has_a_section_with_a_message() -> None:
    text = (DOCS / "errors.md").read_text(encoding="utf-8")
    for name in set(errors.__all__) - {"Error"}:
        section = re.search(rf"^## `{name}`\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
        assert section, name
        assert "```text" in section[1] or name == "SnapshotError", name


def test_every_public_name_is_in_the_reference() -> None:
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^::: ov_phi3\.(\w+)$", text, re.MULTILINE))
    assert named == set(ov_phi3.__all__) - {"__version__"}


def test_export_page_names_every_recipe_and_flag() -> None:
    text = (DOCS / "export.md").read_text(encoding="utf-8")
    assert [name for name in (*RECIPES, *FLAGS) if f"`{name}`" not in text] == []


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert [page.name for page in DOCS.glob("*.md") if f": {page.name}" not in navigation] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_to_files_resolve(page: Path) -> None:
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text)]
    broken = [t for t in targets if t and "://" not in t and not (page.parent / t).exists()]
    assert broken == []


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=name_of)
def test_pages_are_plain_text_of_reasonable_width(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    long = [line[:60] for line in text.splitlines() if len(line) > 120 and not line.startswith("|")]
    assert long == []
    assert text.endswith("\n")
    assert str(sys.prefix) not in text


def test_the_picture_of_the_cache_is_what_the_books_say() -> None:
    module = script("gen_kv_cache")
    assert module.PICTURE.read_text(encoding="utf-8") == module.drawn(module.steps()), "run docs/gen_kv_cache.py"


@pytest.mark.parametrize(
    ("row", "layers", "heads", "head_dim"),
    [("Phi-3-mini, Phi-3.5-mini", 32, 32, 96), ("Phi-3-medium", 40, 10, 128), ("Phi-4-mini", 32, 8, 128)],
)
def test_bytes_per_token(row: str, layers: int, heads: int, head_dim: int) -> None:
    from ov_phi3.kv.cache import KVLayout

    info: Any = types.SimpleNamespace(num_layers=layers, num_kv_heads=heads, head_dim=head_dim)
    line = next(line for line in (DOCS / "kv-cache.md").read_text("utf-8").splitlines() if line.startswith(f"| {row}"))
    shown = [cell.strip() for cell in line.strip("|").split("|")][1:]
    tokens = [KVLayout(32, *pair).bytes_per_token(info) for pair in (("f16", "f16"), ("u8", "u8"), ("u8", "u4"))]
    assert shown == [*(f"{size:,.0f}" for size in tokens), f"{round(tokens[1] * 4096 / 2**20)} MiB"]
