"""Upload an export to the hub, as it was written: every file is compared with the export's manifest first."""

from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import constants

from trainmerge.checkpoints.whole import MANIFEST, check_whole
from trainmerge.export.card_sources import front_matter
from trainmerge.system.hub import parse_id, server_name
from trainmerge.system.json_file import read_json
from trainmerge.system.links import leads_outside
from trainmerge.system.safetensors_file import sha256
from trainmerge.system.text import listed, shortened

AGAIN = "Export the run again."


@dataclass(frozen=True)
class Upload:
    """What would be uploaded, and to where."""

    folder: Path
    repository: str  # org/name
    private: bool
    files: Mapping[str, int]  # path in the folder -> bytes
    left: tuple[str, ...]  # files of the folder that are not part of the export
    card: Mapping[str, Any]  # the metadata of the model card

    @property
    def address(self) -> str:
        """The place of the model, without a password."""
        return f"{server_name()}/{self.repository}"


def plan_upload(folder: str | Path, repository: str, private: bool = False) -> Upload:
    """Check an export, and list what would be uploaded; the hub is not asked.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: not a whole export, a file that changed since, or a name that is not `org/name`.
    """
    place = Path(folder)
    name = parse_id(repository)
    if name is None or name.subfolder or name.revision:
        raise ValueError(f"{repository}: not the name of a model on the hub: write org/name")
    if not place.is_dir():
        raise FileNotFoundError(
            f"{place}: not a folder. Name an export: `trainmerge export RUN OUT` makes one"
        )
    check_whole(place)
    if not (place / MANIFEST).is_file():
        raise ValueError(
            f"{place}: not an export of trainmerge (no {MANIFEST}). `trainmerge export` makes one"
        )
    listed_files = read_json(place / MANIFEST, AGAIN).get("files")
    if not isinstance(listed_files, dict) or "README.md" not in listed_files:
        raise ValueError(f"{place / MANIFEST}: no list of files with a model card. {AGAIN}")
    there = {path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()}
    check_export_unchanged(place, listed_files, there)
    sizes = {file: (place / file).stat().st_size for file in sorted({*listed_files, MANIFEST})}
    card = front_matter((place / "README.md").read_text(encoding="utf-8"))
    return Upload(place, repository, private, sizes, tuple(sorted(there - sizes.keys())), card)


def check_export_unchanged(folder: Path, files: Mapping[str, Any], there: Set[str]) -> None:
    """Raise ValueError for files of an export that are not in its folder, or were changed."""
    wrong = [
        name
        for name, digest in files.items()
        if name not in there or leads_outside(folder, folder / name) or sha256(folder / name) != digest
    ]
    if wrong:
        raise ValueError(
            f"{folder}: {shortened(listed(wrong), 600)} is missing or was changed since the export. {AGAIN} "
            "To publish a changed card, edit it on the hub"
        )


def push(folder: str | Path, repository: str, private: bool = False) -> str:
    """Upload an export as a model of the hub, in one commit; returns its address.

    huggingface_hub sends the files: weights by Xet where hf_xet is installed, otherwise by git LFS, and none
    that the hub has already. The model is created if it does not exist. Files of the folder that are not
    part of the export stay here.

    Raises:
        FileNotFoundError: no such folder.
        PermissionError: the hub refuses, or `private` is set and a public model exists.
        ConnectionError: the hub cannot be reached, or fails.
        ValueError: as `plan_upload`.
    """
    upload = plan_upload(folder, repository, private)
    if huggingface_hub.is_offline_mode():
        raise ConnectionError(f"{repository}: not uploaded, since HF_HUB_OFFLINE is set. Unset it")
    try:
        api = huggingface_hub.HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        if private and not api.model_info(repository).private:
            raise _Public
        api.upload_folder(
            repo_id=repository,
            folder_path=upload.folder,
            allow_patterns=[_escaped(name) for name in upload.files],
            commit_message="Upload a merge by trainmerge",
        )
    except _Public:
        raise PermissionError(
            f"{repository} exists on {server_name()} and is public: nothing was uploaded. Make it private "
            "there, choose another name, or leave out --private"
        ) from None
    except Exception as error:  # of many types: the network's, the hub's and the disk's
        raise _in_words(repository, error) from error
    return f"{constants.ENDPOINT.partition('://')[0]}://{upload.address}"


class _Public(Exception):
    """The model exists, and is public."""


def _in_words(repository: str, error: Exception) -> OSError:
    """The error without its own words, which may hold an address with a token."""
    status = _status(error)
    if status in (401, 403) or type(error).__name__ == "LocalTokenNotFoundError":
        return PermissionError(
            f"{repository}: {server_name()} does not let you write there. Log in with an account that may "
            "(`hf auth login`, or HF_TOKEN with a token that can write), or choose another name"
        )
    what = f"status {status}" if status else type(error).__name__
    return ConnectionError(
        f"{repository}: not uploaded to {server_name()} ({what}). Check the network and the "
        "name, and push again"
    )


def _status(error: BaseException | None) -> int | None:
    """The hub's answer to a request; of a large file, it is the cause of the error."""
    while error is not None:
        if (status := getattr(getattr(error, "response", None), "status_code", None)) is not None:
            return int(status)
        error = error.__cause__
    return None


def _escaped(name: str) -> str:
    """A pattern that matches this file only."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)
