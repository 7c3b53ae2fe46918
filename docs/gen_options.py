"""Write the tables of `options.md` from the code: `python docs/gen_options.py` after an option was added or renamed.

The tables stand between marker comments; the text around them is written by hand. `tests/test_docs.py` fails while
the page and the code differ.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ov_phi3.generation import names as config_names
from ov_phi3.generation.config import DEFAULTS, GenerationConfig

PAGE = Path(__file__).with_name("options.md")


def described() -> dict[str, tuple[str, str]]:
    """Each option's meaning and default, as the docstring of `GenerationConfig` has them."""
    attributes = (GenerationConfig.__doc__ or "").partition("Attributes:\n")[2].partition("\n\n")[0]
    entries = re.findall(r"^ {8}(\w+): (.+(?:\n {12}.+)*)", attributes, re.MULTILINE)
    found: dict[str, tuple[str, str]] = {}
    for name, text in entries:
        meaning, _, default = " ".join(text.split()).rstrip(".").partition("; default: ")
        found[name] = meaning, default or written_default(name)
    return found


def written_default(name: str) -> str:
    """The default that `DEFAULTS` has, as a reader would write it."""
    value = DEFAULTS.get(name)
    return "none" if value in (None, ()) else f"`{value!r}`".replace("'", '"')


def names_in(table: Mapping[str, str], option: str) -> str:
    """What an option is called in another vocabulary."""
    found = [
        "same" if name == option else breakable(name) for name, ours in table.items() if option in ours.split(", ")
    ]
    return ", ".join(found) or "–"


def breakable(name: str) -> str:
    """A name that may go over two lines, behind an underscore."""
    return f"<code>{name.replace('_', '_<wbr>')}</code>" if len(name) > 16 else f"`{name}`"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def options() -> str:
    """One row an option, in the order of `GenerationConfig`."""
    about = described()
    rows = []
    for name in GenerationConfig.__dataclass_fields__:
        meaning, default = about[name]
        others = (names_in(names, name) for names in (config_names.GENAI, config_names.HF, config_names.OPENAI))
        rows.append([f"`{name}`", meaning, default, *others])
    return table(["Option", "Meaning", "Default", "OpenVINO GenAI", "Hugging Face", "OpenAI"], rows)


def unreachable() -> str:
    """Fields of GenAI's config that have no option here."""
    rows = [[f"`{name}`", reason] for name, reason in config_names.GENAI_UNREACHABLE.items()]
    return table(["Field of `openvino_genai.GenerationConfig`", "Why there is no option for it"], rows)


def neutral() -> str:
    """Keys of Hugging Face's config that have no counterpart."""
    rows = [
        [f"`{key}`", ", ".join(f"`{value!r}`" for value in ("null", *values)).replace("'null'", "null")]
        for key, values in config_names.HF_NEUTRAL.items()
    ]
    return table(["Key of `generation_config.json`", "Accepted, since it changes nothing"], rows)


def passed_by() -> str:
    """Names that are accepted and mean nothing for a reply."""
    rows = [
        ["Hugging Face", ", ".join(f"`{name}`" for name in config_names.HF_PASSED_BY)],
        ["OpenAI", ", ".join(f"`{name}`" for name in config_names.OPENAI_PASSED_BY)],
    ]
    return table(["Vocabulary", "Passed by: these say nothing about how a reply is generated"], rows)


TABLES = {"options": options, "unreachable": unreachable, "neutral": neutral, "passed-by": passed_by}


def filled(text: str) -> str:
    """The page with each table written anew between its markers."""
    for name, make in TABLES.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise SystemExit(f"{PAGE} must hold {begin} and {end} once each")
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n\n{make()}\n\n{end}{rest.partition(end)[2]}"
    return text


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
