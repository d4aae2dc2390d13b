"""The packages whose Chinese text the examples read: pinned, fetched once, verified, never unpacked to disk."""

from __future__ import annotations

import hashlib
import lzma
import os
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from megatron_lite.config.errors import ConfigError, DataError

_ARCHIVE, _HEADER = b"!<arch>\n", 60
_LARGEST = 1 << 26  # bytes of a package, and of a file in it
_MOST = 1 << 28  # bytes of all files of a package
_SECONDS = 300  # for one call of apt-get
TEXT_INSTEAD = "or give texts of your own: TEXT=FOLDER"


@dataclass(frozen=True, slots=True)
class Package:
    """A package of Debian; licence: of its texts, as its copyright file says."""

    name: str
    version: str
    sha256: str
    licence: str
    texts: str

    @property
    def file(self) -> str:
        """As apt-get names it."""
        return f"{self.name}_{self.version}_all.deb"


PACKAGES = (
    Package(
        "manpages-zh", "1.6.4.0-1",
        "81bae29495f6445db290e3f329f1203eb19b651c2a7ea165b74ebdc853a32ac1",
        "GFDL-1.2+; some pages GPL-2 or GPL-2+", "manual pages, section by section",
    ),
    Package(
        "debian-reference-zh-cn", "2.100",
        "6d2d8d9a646397e28b04cdff23d2e4374101ebf9be348e35961af62c8a2d0977",
        "GPL-2+", "a handbook for users",
    ),
    Package(
        "maint-guide-zh-cn", "1.2.53",
        "d605b60a034f63857bc44205aed5ad7ba6e17d0d2b1ba5e79179b4e7ec4ee4bc",
        "GPL-2+", "a handbook for maintainers",
    ),
    Package(
        "debian-faq-zh-cn", "11.1",
        "3545356b1aa04d87e91dd15e8406210cf5b4f476662e597897bcb42234591758",
        "its own: copies and translations keep the notice", "questions and answers",
    ),
)  # fmt: skip
"""All text there is without TEXT=; docs: examples/chinese/README.md."""


def fetch(package: Package, cache: Path) -> Path:
    """The package in the cache, downloaded by apt-get if it is not there; its hash is right.

    Raises ConfigError, naming the way without a network, where it cannot be had.
    """
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / package.file
    if not path.is_file():
        with tempfile.TemporaryDirectory(prefix=".download-", dir=cache) as folder:
            _download(package, Path(folder), cache)
            os.replace(Path(folder) / package.file, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != package.sha256:
        raise DataError(
            f"{path} has the SHA-256 {digest}, not {package.sha256}: it is another file than the "
            f"examples were made with - remove it and start again, {TEXT_INSTEAD}"
        )
    return path


def _download(package: Package, folder: Path, cache: Path) -> None:
    """By this system's lists of packages, else by fresh ones in the cache; the system is not touched."""
    lists = cache.resolve() / "lists"
    own = ["-o", f"Dir::State::lists={lists}", "-o", f"Dir::Cache={cache.resolve() / 'apt'}"]
    wanted = ["download", f"{package.name}={package.version}"]
    said = _apt(wanted, folder)
    if said is not None:
        (lists / "partial").mkdir(parents=True, exist_ok=True)
        said = _apt([*own, "update"], folder) or _apt([*own, *wanted], folder)
    if said is not None or not (folder / package.file).is_file():
        raise ConfigError(
            f"the package {package.name} {package.version} of Debian 12, from which the text is made, "
            f"cannot be downloaded ({said or 'apt-get left no file'}): copy {package.file} into "
            f"{cache}, {TEXT_INSTEAD}"
        )


def _apt(words: list[str], folder: Path) -> str | None:
    """None where it went well, else why not."""
    try:
        done = subprocess.run(
            ["apt-get", "-qq", *words], cwd=folder, capture_output=True, text=True,
            timeout=_SECONDS, stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip
    except FileNotFoundError:
        return "there is no apt-get"
    except subprocess.TimeoutExpired:
        return f"apt-get took more than {_SECONDS} s"
    if done.returncode == 0:
        return None
    lines = [line for line in done.stderr.splitlines() if line.startswith("E:")]
    return lines[0] if lines else f"apt-get ended with {done.returncode}"


def read_package(path: Path) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of every ordinary file in a .deb; links, devices and the rest are passed over.

    Nothing is written anywhere, so that no name in it can lead out of a folder.  Raises DataError
    for what is no such package, or far larger than one of texts.
    """
    content = path.read_bytes()
    if not content.startswith(_ARCHIVE) or len(content) > _LARGEST:
        raise DataError(f"{path} is no package of Debian of at most {_LARGEST >> 20} MB")
    try:
        with tarfile.open(fileobj=BytesIO(_data(content)), mode="r:xz") as files:
            left = _MOST
            for member in files:
                left -= member.size
                if member.size > _LARGEST or left < 0:
                    raise DataError(
                        f"{path}: {member.name} holds more than a text of a package does"
                    )
                opened = files.extractfile(member) if member.isreg() else None
                if opened is not None:
                    yield member.name, opened.read()
    except (tarfile.TarError, lzma.LZMAError, EOFError, ValueError) as error:
        raise DataError(f"{path} is damaged: {error} - remove it and start again") from error


def _data(content: bytes) -> bytes:
    """The archive of files within the package, one of three members."""
    at = len(_ARCHIVE)
    while at + _HEADER <= len(content):
        header = content[at : at + _HEADER]
        name, size = header[:16].decode("ascii").strip().rstrip("/"), int(header[48:58])
        at += _HEADER
        if name == "data.tar.xz":
            return content[at : at + size]
        at += size + size % 2
    raise ValueError("it holds no data.tar.xz")
