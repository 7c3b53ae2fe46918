"""Exports of one model with recipes, and with flags over them, kept in the cache for a second run."""

from __future__ import annotations

import ast
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _common import Refused
from _environment import demo_model, digest, ensure_built, ensure_model, export_python, exporter_versions
from ov_phi3.exporting import flags as export_flags

__all__ = ["BASE", "Variant", "exported"]

BASE = "int4"
"""The cookbook's recipe, which all others are compared with."""

EXPORT = """
import json, sys
import ov_phi3
source, target, recipe, flags = sys.argv[1:]
ov_phi3.export(source, target, recipe, progress=print, **json.loads(flags))
"""


@dataclass(frozen=True)
class Variant:
    """A recipe, with flags of `ov_phi3.export` over it.

    Attributes:
        name: as the user wrote it, such as "int4-max" or "int4-max,group_size=64,sym=False".
        recipe: name of the recipe.
        flags: the flags over it; None removes one.
        combined: all flags of the export.
    """

    name: str
    recipe: str
    flags: dict[str, Any]
    combined: dict[str, Any]

    @classmethod
    def parse(cls, text: str, dataset: str | None = None) -> Variant:
        """Read a recipe with flags after commas; `dataset` takes the place of the recipe's own calibration text.

        Raises:
            Refused: a flag without a value.
            ConfigError: an unknown recipe or flag, or flags that contradict each other.
        """
        recipe, *pairs = text.split(",")
        flags: dict[str, Any] = {}
        for pair in pairs:
            name, equals, value = pair.partition("=")
            if not equals:
                raise Refused(f"{text}: {pair!r} has no value; expected a flag of export as in int4-max,group_size=64.")
            flags[name] = _value(value)
        if dataset is not None and "dataset" in export_flags.combine(recipe, flags) and "dataset" not in flags:
            flags["dataset"] = dataset
        combined = export_flags.combine(recipe, flags)
        if "dataset" in flags:
            flags["dataset"] = combined.get("dataset")  # the absolute path of a file
        return cls(text, recipe, flags, combined)


def _value(text: str) -> Any:
    """A number, True, False, None, or else the text itself."""
    try:
        return ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(text.lower(), text))
    except (SyntaxError, ValueError):
        return text


def exported(source: Path | None, variant: Variant) -> Path:
    """The directory of the source's export with a variant, made if it is not in the cache; None is the demo model.

    Raises:
        BootstrapError: the export failed; the message names its log.
    """
    if source is None and not variant.flags:
        return demo_model(variant.recipe)
    python = export_python()
    folder = ensure_model("demo-hf", python) if source is None else source.resolve()
    contents = [f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in sorted(folder.iterdir())]
    flags = json.dumps(variant.flags, sort_keys=True)
    code = sorted(Path(export_flags.__file__).parent.glob("*.py"))
    dataset = Path(str(variant.combined.get("dataset", "")))
    texts = [dataset] if dataset.is_file() else []
    key = digest(str(folder), *contents, variant.recipe, flags, exporter_versions(python), *code, *texts)[:16]
    return ensure_built(
        f"{folder.name}-{variant.recipe}",
        key,
        lambda out: [python, "-c", EXPORT, folder, out, variant.recipe, flags],
    )
