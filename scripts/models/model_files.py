"""Shared by the model builders: the downloads folder, Phi-3's chat template, and a directory that is complete or
absent.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

# The chat template of microsoft/Phi-3-mini-4k-instruct as published since July 2024, byte for byte.
PHI3_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)


def default_downloads() -> Path:
    """Return the folder of downloaded packages: in ``OV_PHI3_CACHE``, or in the user's cache folder on Linux."""
    if configured := os.environ.get("OV_PHI3_CACHE"):
        return Path(configured) / "downloads"
    return Path.home() / ".cache" / "ov-phi3" / "downloads"


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented UTF-8 JSON, with the same bytes on every platform."""
    path.write_bytes((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


@contextmanager
def whole_directory(out: Path) -> Iterator[Path]:
    """Yield a temporary directory that becomes ``out`` at the end of the block, and is removed after an exception."""
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
    try:
        yield temporary
        temporary.chmod(0o755)
        for file in temporary.iterdir():
            file.chmod(0o644)
        if out.exists():
            shutil.rmtree(out)
        temporary.replace(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
