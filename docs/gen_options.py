"""Write the tables of `options.md` from the code: `python docs/gen_options.py` after an option is added or renamed.

The tables stand between marker comments; the text around them is written by hand. `tests/project/test_docs.py` fails
while the page and the code differ.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ov_phi3.generation import names
from ov_phi3.generation.config import GenerationConfig
from ov_phi3.generation.options import DEFAULTS

PAGE = Path(__file__).with_name("options.md")


def descriptions() -> dict[str, tuple[str, str]]:
    """Meaning and default of each option, from the docstring of `GenerationConfig`."""
    attributes = (GenerationConfig.__doc__ or "").partition("Attributes:\n")[2].partition("\n\n")[0]
    entries = re.findall(r"^ {8}(\w+): (.+(?:\n {12}.+)*)", attributes, re.MULTILINE)
    meanings: dict[str, tuple[str, str]] = {}
    for name, text in entries:
        meaning, _, default = " ".join(text.split()).rstrip(".").partition("; default: ")
        meanings[name] = meaning, default or default_of(name)
    return meanings


def default_of(name: str) -> str:
    """The value in `DEFAULTS`, as Markdown."""
    value = DEFAULTS.get(name)
    return "none" if value in (None, ()) else f"`{value!r}`".replace("'", '"')


def names_in(vocabulary: Mapping[str, str], option: str) -> str:
    """The names of an option in another vocabulary."""
    matches = [
        "same" if name == option else breakable(name) for name, ours in vocabulary.items() if option in ours.split(", ")
    ]
    return ", ".join(matches) or "–"


def breakable(name: str) -> str:
    """A name as code, with possible line breaks behind underscores if it is long."""
    return f"<code>{name.replace('_', '_<wbr>')}</code>" if len(name) > 16 else f"`{name}`"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def options() -> str:
    """One row for each option, in the order of `GenerationConfig`."""
    about = descriptions()
    rows = []
    for name in GenerationConfig.__dataclass_fields__:
        meaning, default = about[name]
        others = (names_in(vocabulary, name) for vocabulary in (names.GENAI, names.HF, names.OPENAI))
        rows.append([f"`{name}`", meaning, default, *others])
    return table(["Option", "Meaning", "Default", "OpenVINO GenAI", "Hugging Face", "OpenAI"], rows)


def unsupported() -> str:
    """Fields of GenAI's config without an option."""
    rows = [[f"`{name}`", reason] for name, reason in names.GENAI_UNSUPPORTED.items()]
    return table(["Field of `openvino_genai.GenerationConfig`", "Why there is no option for it"], rows)


def no_effect() -> str:
    """Keys of Hugging Face's config without an option, and the values at which they change nothing."""
    rows = [
        [f"`{key}`", ", ".join(f"`{value!r}`" for value in ("null", *values)).replace("'null'", "null")]
        for key, values in names.HF_NO_EFFECT.items()
    ]
    return table(["Key of `generation_config.json`", "Accepted values, which change nothing"], rows)


def ignored() -> str:
    """Names that are accepted and do not affect the reply."""
    rows = [
        ["Hugging Face", ", ".join(f"`{name}`" for name in names.HF_IGNORED)],
        ["OpenAI", ", ".join(f"`{name}`" for name in names.OPENAI_IGNORED)],
    ]
    return table(["Vocabulary", "Ignored, because it does not affect the reply"], rows)


TABLES = {"options": options, "unsupported": unsupported, "no-effect": no_effect, "ignored": ignored}


def with_tables(text: str) -> str:
    """The page with each table written again between its markers."""
    for name, make_table in TABLES.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise SystemExit(f"{PAGE} must hold {begin} and {end} once each")
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n\n{make_table()}\n\n{end}{rest.partition(end)[2]}"
    return text


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
