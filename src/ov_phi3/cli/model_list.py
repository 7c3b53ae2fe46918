"""The models that this user has exported or used, and the names that stand for their directories."""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ov_phi3.cli.state import state_file
from ov_phi3.errors import ModelError, did_you_mean
from ov_phi3.files import expanded, lock_file, text_or_empty, write_atomically

if TYPE_CHECKING:
    from ov_phi3.model.info import ModelInfo

__all__ = ["KnownModel", "find_model", "known_models", "remember"]

_FILE = "models.json"
_RECIPE = re.compile(r"int[48].*|fp(16|32)|f(16|32)")
_log = logging.getLogger("ov_phi3")


@dataclass(frozen=True)
class KnownModel:
    """An exported model that this user has made or used.

    Attributes:
        name: short name, from the source and the recipe, or from the directory.
        path: its directory.
        source: what it was exported from, a hub name or a directory; "" if it is not known.
        recipe: how it was exported; "" if it is not known.
    """

    name: str
    path: str
    source: str
    recipe: str

    @classmethod
    def of(cls, info: ModelInfo) -> KnownModel:
        """From a model's files."""
        manifest = info.manifest or {}
        source, recipe = str(manifest.get("source") or ""), str(manifest.get("recipe") or "")
        if source:
            name = f"{_last(source)}-{recipe}" if recipe else _last(source)
        elif _RECIPE.fullmatch(info.path.name):
            name = f"{info.path.parent.name}-{info.path.name}"
        else:
            name = info.path.name
        return cls(name.lower(), str(info.path), source, recipe)

    @property
    def names(self) -> set[str]:
        """Everything that it can be called by, in lower case."""
        by_source = {self.source, _last(self.source), f"{self.source}-{self.recipe}"} if self.source else set()
        return {name.lower() for name in (self.name, Path(self.path).name, *by_source)}


def _last(source: str) -> str:
    return re.split(r"[/\\]", source.rstrip("/\\"))[-1]


def known_models() -> list[KnownModel]:
    """The models of the list whose directories are still there, oldest first."""
    file = state_file(_FILE)
    return [] if file is None else [model for model in _read(file) if Path(model.path).is_dir()]


def _read(file: Path) -> list[KnownModel]:
    try:
        rows = json.loads(text_or_empty(file) or "[]")
        return [KnownModel(*(str(row[name]) for name in ("name", "path", "source", "recipe"))) for row in rows]
    except (ValueError, TypeError, LookupError, RecursionError):
        _log.info("%s is not a list of models; it is written anew", file)
        return []


def remember(info: ModelInfo) -> None:
    """Add a model to the list, unless it is there; models whose directories have gone are left out."""
    model, file = KnownModel.of(info), state_file(_FILE)
    if file is None or model in _read(file):
        return
    with contextlib.suppress(OSError), lock_file(file.with_suffix(".lock"), wait=True):
        others = [known for known in _read(file) if known.path != model.path and Path(known.path).is_dir()]
        text = json.dumps([asdict(known) for known in (*others, model)], indent=1, ensure_ascii=False)
        with write_atomically(file) as out:
            out.write(f"{text}\n".encode())


def find_model(given: Path) -> Path:
    """The directory that a MODEL argument means: a directory, or the name of a known model.

    Raises:
        ModelError: a name that belongs to several models, or to none.
    """
    with contextlib.suppress(OSError, ValueError):
        if expanded(given).exists():
            return given
    wanted, models = given.as_posix().lower(), known_models()
    matches = [model for model in models if wanted in model.names]
    if len(matches) == 1:
        return Path(matches[0].path)
    if matches:
        several = ", ".join(f"{model.name} ({model.path})" for model in matches)
        raise ModelError(f"{str(given)!r} is the name of {len(matches)} models; give one of these: {several}.")
    if len(given.parts) == 1:
        hint = did_you_mean(wanted, _all_names(models))
        raise ModelError(
            f"{str(given)!r} is neither a directory nor the name of a model.{hint} `ov-phi3 models` lists the "
            "names, and `ov-phi3 export microsoft/Phi-3-mini-4k-instruct DIRECTORY`, for instance, makes a model."
        )
    return given


def _all_names(models: Iterable[KnownModel]) -> list[str]:
    return sorted({name for model in models for name in model.names})
