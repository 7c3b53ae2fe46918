"""Checks of the README and of the pages under `docs/`: their examples run, and their tables and lists are complete.

How an example runs here:

- All ```python blocks of a page run in order, in one namespace, in an empty directory. There,
  `model/phi3-instruct/int4` and `model/demo` are links to the demo model, and `model/my-adapter` a random LoRA
  adapter for it.
- `"GPU.0"` is replaced by the device that the tests run on (OV_PHI3_TEST_DEVICE, default CPU).
- `ov_phi3.export` checks the recipe and the flags with the real code and then links to the demo model, because an
  export takes minutes. The tests of the real export are in `tests/exporting/`.
- A ```text block directly after a ```python block is the output of that block. White space is normalised, `...`
  matches anything, and a number before ms, s or tokens/s matches any number.
- `<!-- not run: reason -->` directly before a block excludes it. NOT_RUN lists all excluded blocks.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from lora import lora_tensors, write_adapter
from pages import ALL_PAGES, DOCS, FENCE, PAGES, ROOT, Block, blocks, name_of, python_blocks

import ov_phi3
from ov_phi3 import errors
from ov_phi3.exporting.flags import FLAGS, RECIPES, combine
from ov_phi3.generation import config as generation_config

MODEL = "model/phi3-instruct/int4"
DEMO = "model/demo"  # where scripts/quickstart.py puts its model
NOT_RUN = {
    "docs/cookbook.md": ["the cookbook's program needs torch, transformers and optimum-intel at run time"],
    "docs/ray.md": [
        "needs a Ray cluster; tests/serving/test_ray_batches.py runs it on one of two nodes",
        "writes to shared storage; tests/serving/test_ray_batches.py does this",
        "needs a Ray cluster",
        "needs a Ray cluster; tests/serving/test_ray_serve.py runs it with two replicas and kills one",
    ],
    "docs/recipes.md": [
        "it is docs/examples/web.py, which tests/project/test_recipes.py runs",
        "it is docs/examples/worker.py, which tests/project/test_recipes.py runs",
        "llama-index-core installs sixty packages, too many for the test environment",
    ],
    "docs/serving.md": ["needs a running server; tests/serving/test_openai_client.py runs this client against one"],
}
WITH_PYTHON = [page for page in PAGES if python_blocks(page)]


# -- examples ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path: Path, demo_int4: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with only the demo model, and an adapter for it, at the paths that the pages use."""
    for model_dir in (tmp_path / MODEL, tmp_path / DEMO):
        model_dir.parent.mkdir(parents=True, exist_ok=True)
        model_dir.symlink_to(demo_int4, target_is_directory=True)
    config = json.loads((demo_int4 / "config.json").read_text(encoding="utf-8"))
    write_adapter(tmp_path / "model" / "my-adapter", lora_tensors(config))
    monkeypatch.chdir(tmp_path)
    real_export = ov_phi3.export

    def export(source: Any, output: Any, recipe: str = "int4", **options: Any) -> ov_phi3.ModelInfo:
        """Do the checks of `export`, then link to the demo model."""
        own = real_export.__kwdefaults__
        combine(recipe, {name: value for name, value in options.items() if name not in own})
        if Path(output).exists():
            return real_export(source, output, recipe, **options)
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        Path(output).symlink_to(demo_int4, target_is_directory=True)
        return ov_phi3.ModelInfo.from_dir(output)

    monkeypatch.setattr(ov_phi3, "export", export)
    return tmp_path


def run_block(block: Block, namespace: dict[str, Any], device: str) -> str:
    """Run a block and return its output."""
    source = block.text.replace('"GPU.0"', repr(device))
    code = compile("\n" * (block.line - 1) + source, str(block.page), "exec", dont_inherit=True)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, namespace)
    return printed.getvalue()


_TIMES = re.compile(r"\b\d+(?:\.\d+)?(?= (?:ms|s|tokens/s)\b)")


def normalised(text: str) -> str:
    """The text with single spaces, and with `#` for each time."""
    return " ".join(_TIMES.sub("#", text).split())


def is_output(expected: str, printed: str) -> bool:
    """Whether the printed text matches the output that the page shows."""
    parts = (re.escape(part) for part in normalised(expected).split("..."))
    return re.fullmatch(".*?".join(parts), normalised(printed)) is not None


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
                assert is_output(block.output, printed), (
                    f"{block.location} shows\n{block.output}\nbut prints\n{printed}"
                )
    finally:
        for value in namespace.values():
            if isinstance(value, ov_phi3.Pipeline):
                value.close()


def test_excluded_examples_are_few_and_listed_here() -> None:
    excluded = {
        name_of(page): reasons
        for page in PAGES
        if (reasons := [block.not_run for block in python_blocks(page) if block.not_run])
    }
    assert excluded == NOT_RUN
    assert sum(map(len, excluded.values())) <= 9


def test_an_example_that_fails_or_prints_something_else_is_detected(tmp_path: Path) -> None:
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


# -- tables and lists -------------------------------------------------------------------------------------------------


def script(name: str) -> types.ModuleType:
    """A script in the folder of the pages, as a module."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_options_page_equals_the_code() -> None:
    text = (DOCS / "options.md").read_text(encoding="utf-8")
    assert script("gen_options").with_tables(text) == text, "run: python docs/gen_options.py"
    for name in generation_config.GenerationConfig.__dataclass_fields__:
        assert f"| `{name}` |" in text


def test_every_option_is_described_in_the_docstring() -> None:
    assert set(script("gen_options").descriptions()) == set(generation_config.GenerationConfig.__dataclass_fields__)


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


@pytest.mark.parametrize("page", ALL_PAGES, ids=name_of)
def test_links_to_files_resolve(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text)]
    broken = [t for t in targets if t and "://" not in t and not (page.parent / t).exists()]
    assert broken == []


@pytest.mark.parametrize("page", ALL_PAGES, ids=name_of)
def test_paths_of_the_repository_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    paths = re.findall(r"\b((?:src/ov_phi3|tests|scripts|benchmarks|docs|peers)/[\w./-]*\w/?)", text)
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", ALL_PAGES, ids=name_of)
def test_pages_are_plain_text_of_reasonable_width(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    long = [line[:60] for line in text.splitlines() if len(line) > 120 and not line.startswith("|")]
    assert long == []
    assert text.endswith("\n")
    assert str(sys.prefix) not in text


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_code_fits_the_page(page: Path) -> None:
    lines = [(block.location, line) for block in blocks(page) for line in block.text.splitlines()]
    assert [(location, line) for location, line in lines if len(line) > 88] == []


# -- glossary ---------------------------------------------------------------------------------------------------------


# Terms that a reader may not know: a page that uses one links to its entry in the glossary.
TERMS = {
    r"TTFT": "ttft",
    r"TPOT": "tpot",
    r"ITL": "itl",
    r"[Pp]refill(?:s|ed|ing)?": "prefill",
    r"KV caches?": "kv-cache",
    r"LongRoPE": "longrope",
    r"[Pp]aged attention": "paged-attention",
    r"canary": "canary",
    r"compile cache": "compile-cache",
    r"prefix cache": "prefix-cache",
    r"[Pp]reempt(?:s|ed|ion)?": "preemption",
    r"copy on write": "copy-on-write",
    r"[Gg]reedy": "greedy",
    r"logits": "logits",
    r"int4": "int4",
    r"[Pp]erplexity": "perplexity",
    r"cookbook(?:'s)?": "cookbook",
    r"continuous batching": "continuous-batching",
    r"[Cc]hat templates?": "chat-template",
    r"[Pp]rompt lookup": "prompt-lookup",
    r"draft models?": "draft-model",
}


def prose(page: Path) -> str:
    """The text of a page without code, link targets and headings."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    text = re.sub(r"`[^`\n]+`|\]\([^)]+\)|<!--.*?-->", " ", text, flags=re.DOTALL)
    return re.sub(r"^#.*$", "", text, flags=re.MULTILINE)


@pytest.mark.parametrize("page", [p for p in PAGES if p.stem not in ("glossary", "api")], ids=name_of)
def test_terms_are_linked_to_the_glossary(page: Path) -> None:
    text = prose(page)
    links = re.findall(r"glossary\.md#([\w-]+)", page.read_text(encoding="utf-8"))
    text = re.sub(r"[Ss]aved\s+KV\s+caches?", "", text)  # an entry of its own
    missing = {entry for term, entry in TERMS.items() if re.search(rf"\b{term}\b", text)} - set(links)
    assert missing == set()


def test_the_glossary_is_alphabetical_and_has_every_linked_entry() -> None:
    text = (DOCS / "glossary.md").read_text(encoding="utf-8")
    titles = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert titles == sorted(titles, key=str.lower)
    entries = {re.sub(r"[^\w-]+", "-", title.lower()) for title in titles}
    links = {link for page in ALL_PAGES for link in re.findall(r"glossary\.md#([\w-]+)", page.read_text("utf-8"))}
    assert links | set(TERMS.values()) <= entries


# -- figures ----------------------------------------------------------------------------------------------------------


def test_the_picture_of_the_cache_is_what_the_prefix_index_says() -> None:
    module = script("gen_kv_cache")
    assert module.PICTURE.read_text(encoding="utf-8") == module.draw(module.steps()), "run docs/gen_kv_cache.py"


@pytest.mark.parametrize(
    ("row", "layers", "heads", "head_dim"),
    [("Phi-3-mini, Phi-3.5-mini", 32, 32, 96), ("Phi-3-medium", 40, 10, 128), ("Phi-4-mini", 32, 8, 128)],
)
def test_bytes_per_token(row: str, layers: int, heads: int, head_dim: int) -> None:
    from ov_phi3.kv.layout import KVLayout

    info: Any = types.SimpleNamespace(num_layers=layers, num_kv_heads=heads, head_dim=head_dim)
    line = next(line for line in (DOCS / "kv-cache.md").read_text("utf-8").splitlines() if line.startswith(f"| {row}"))
    shown = [cell.strip() for cell in line.strip("|").split("|")][1:]
    tokens = [KVLayout(32, *pair).bytes_per_token(info) for pair in (("f16", "f16"), ("u8", "u8"), ("u8", "u4"))]
    assert shown == [*(f"{size:,.0f}" for size in tokens), f"{round(tokens[1] * 4096 / 2**20)} MiB"]


@pytest.mark.parametrize("picture", sorted(DOCS.glob("*.svg")), ids=lambda path: path.name)
def test_pictures_are_legible_on_a_phone_and_in_the_dark(picture: Path) -> None:
    """Text has 12 px on a screen of 400 px; both colour schemes have a sheet of their own behind the picture."""
    source = picture.read_text(encoding="utf-8")
    width = re.search(r'viewBox="0 0 (\d+) ', source)
    sizes = [float(size) for size in re.findall(r"font(?:-size)?: ([\d.]+)px", source)]
    assert width is not None
    assert min(sizes) * 400 / int(width[1]) >= 12
    assert "prefers-color-scheme: dark" in source
    assert source.count(".sheet {") == 2
    assert 'class="sheet"' in source
    assert "fill=" not in re.sub(r"<style>.*?</style>", "", source, flags=re.DOTALL)  # colours by scheme only


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=name_of)
def test_no_bar_is_escaped_inside_code(page: Path) -> None:
    """In a table the site shows the backslash of `a \\| b`; `<code>a &#124; b</code>` is right there and elsewhere."""
    rows = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    assert [row for row in rows if re.search(r"`[^`]*\\\|[^`]*`", row)] == []
