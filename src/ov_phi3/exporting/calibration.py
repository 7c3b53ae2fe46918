"""Calibration texts for the data-aware methods of an export, from this machine instead of the hub.

`optimum-cli --dataset` takes only names of data sets on the hub, or "auto". Its configuration takes a list of texts,
so `main`, which runs in a subprocess, is `optimum-cli` with the texts in place of the name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ov_phi3.errors import ConfigError
from ov_phi3.files import expanded

__all__ = ["DATASETS", "PYTHON_DOCS", "check_dataset", "is_local", "main", "read_samples"]

DATASETS = ("auto", "wikitext2", "c4", "c4-new", "gsm8k")
"""The data sets that optimum-cli knows for language models; "auto" is text that the model itself generates."""

PYTHON_DOCS = "python-docs"
"""The language reference that every Python brings along for its `help()`."""

_SAMPLE_CHARACTERS = 512
"""About 128 tokens of English."""

_DEFAULT_SAMPLES = 128


def is_local(dataset: str) -> bool:
    """Whether a `dataset` is read from this machine, rather than by optimum-cli."""
    return dataset.partition(":")[0] not in DATASETS


def check_dataset(dataset: str) -> str:
    """The value of the flag, with an absolute path if it is a text file.

    Raises:
        ConfigError: it is neither a known name nor a UTF-8 text file of some length.
    """
    if dataset == PYTHON_DOCS or not is_local(dataset):
        return dataset
    path = expanded(dataset).absolute()
    if not path.is_file():
        raise ConfigError(
            f"dataset is {dataset!r}; expected a text file, {PYTHON_DOCS!r}, or one of {', '.join(DATASETS)}."
        )
    try:
        length = len(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"dataset {path} cannot be read as UTF-8 text: {error}.") from error
    if length < _SAMPLE_CHARACTERS:
        raise ConfigError(
            f"dataset {path} has {length} characters; expected at least {_SAMPLE_CHARACTERS} of ordinary text."
        )
    return str(path)


def read_samples(dataset: str, count: int | None = None) -> list[str]:
    """Pieces of a local data set for calibration, spread evenly over the text.

    Args:
        dataset: a text file, or `PYTHON_DOCS`.
        count: the most pieces; None for 128.

    Returns:
        Pieces of 512 characters that start at a word, fewer than `count` if the text is short.
    """
    text = _python_docs() if dataset == PYTHON_DOCS else Path(dataset).read_text(encoding="utf-8")
    count = max(1, min(count or _DEFAULT_SAMPLES, len(text) // _SAMPLE_CHARACTERS))
    starts = [index * (len(text) - _SAMPLE_CHARACTERS) // max(1, count - 1) for index in range(count)]
    pieces = [text[start : start + _SAMPLE_CHARACTERS] for start in starts]
    return [piece.partition(" ")[2] if start else piece for start, piece in zip(starts, pieces, strict=True)]


def _python_docs() -> str:
    from pydoc_data import topics

    texts: dict[str, str] = topics.topics
    return "\n\n".join(texts[name] for name in sorted(texts))


def main() -> None:
    """Run optimum-cli, with the texts of a local data set as `--dataset`."""
    from optimum.commands.export.openvino import OVExportCommand
    from optimum.commands.optimum_cli import main as optimum_cli

    run = OVExportCommand.run

    def run_with_texts(command: Any) -> None:
        arguments = command.args
        arguments.dataset = read_samples(arguments.dataset, arguments.num_samples)
        run(command)

    OVExportCommand.run = run_with_texts
    optimum_cli()
