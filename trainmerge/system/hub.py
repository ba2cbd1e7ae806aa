"""A model's name on the Hugging Face hub -> its folder on disk, through huggingface_hub and its cache.

`org/name`, `org/name@revision` and `org/name/subfolder@revision` are ids. A path that exists is never asked
from the hub, and neither is one below an existing folder. Only what a merge reads is downloaded: safetensors,
configuration, tokenizer, model card and licence; no code, no weights of other programs, and pickles only
where they are allowed.
"""

import re
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
from huggingface_hub import constants

from trainmerge.system.access import check_readable
from trainmerge.system.atomic import seen_from

PART = r"[A-Za-z0-9](?:[\w.-]{0,94}[A-Za-z0-9_])?"
ID = re.compile(rf"({PART}/{PART})((?:/[\w-][\w.-]*)*)(?:@([\w-][\w./-]*))?", re.ASCII)
SIDE = (
    "*.json", "*.jinja", "*.txt", "*.model", "*.spm", "*.vocab", "*.vcb", "*.bpe", "*.merges", "*.codes",
    "*.tiktoken", "README.md", "LICENSE*", "NOTICE*",
)  # fmt: skip
WEIGHTS = ("model*.safetensors", "adapter_model*.safetensors", "[0-9]*_*/*.safetensors")
PICKLES = ("pytorch_model*.bin", "adapter_model*.bin", "[0-9]*_*/*.bin")
ELSEWHERE = ("checkpoint-*/*", "onnx/*", "openvino/*", "original/*", "coreml/*", "runs/*", "*.py")
CACHED = "models--"


class HubId(NamedTuple):
    """An id in its parts."""

    repository: str  # org/name
    subfolder: str = ""
    revision: str | None = None


class Origin(NamedTuple):
    """The place on the hub that a folder of the hub's cache was downloaded from."""

    id: str  # org/name, or org/name/subfolder
    revision: str  # the commit


def parse_id(text: str) -> HubId | None:
    """The parts of a text in the form of an id; None for any other text.

    >>> parse_id("org/name/sub@v1")
    HubId(repository='org/name', subfolder='sub', revision='v1')
    >>> parse_id("/models/name"), parse_id("name"), parse_id("../org/name")
    (None, None, None)
    """
    found = ID.fullmatch(text)
    if found is None or ".." in text or "--" in found[1]:
        return None
    return HubId(found[1], found[2].strip("/"), found[3])


def is_hub_id(text: str) -> bool:
    """Whether a text means a model of the hub: an id, and no path, nor one below an existing folder."""
    return parse_id(text) is not None and not Path(text).exists() and not Path(text.split("/")[0]).is_dir()


def folder_of(text: str | Path, weights: bool = True, allow_pickle: bool = False) -> Path:
    """The folder that a path or an id means; an id is downloaded into the hub's cache, unless it is there.

    Args:
        text: A path, which is returned as it is, or an id.
        weights: Whether weights are needed too, and not only configuration and tokenizer.
        allow_pickle: Whether `.bin` files may be downloaded.

    Raises:
        FileNotFoundError: an id that is neither in the cache nor can be downloaded.
        ValueError: a folder that must not be read.
    """
    name = str(text)
    if not isinstance(text, str) or not is_hub_id(name):
        return check_readable(Path(text))
    found = parse_id(name)
    assert found is not None
    try:
        return _snapshot(found, weights, allow_pickle)
    except Exception as error:  # of many types: the network's, the hub's and the disk's
        cached = None if _status(error) else cached_folder(name)
        if cached is not None:  # a commit, which older versions of huggingface_hub want the server for
            return cached
        raise FileNotFoundError(f"{name}: {_reason(name, found, error)}") from error


def cached_folder(text: str) -> Path | None:
    """The folder that a path or an id means, if it is on disk already; the hub is not asked."""
    if not is_hub_id(text):
        return Path(text) if Path(text).is_dir() else None
    found = parse_id(text)
    assert found is not None
    try:
        return _snapshot(found, weights=True, allow_pickle=False, offline=True)
    except Exception:  # as in `folder_of`; not there, or not whole
        return None


def cached_config(text: str) -> Path | None:
    """The folder that a path or an id means, if its config.json is on disk; the hub is not asked."""
    found = parse_id(text) if is_hub_id(text) else None
    if found is None:
        return Path(text)
    name = f"{found.subfolder}/config.json".lstrip("/")
    file = huggingface_hub.try_to_load_from_cache(
        found.repository, name, cache_dir=constants.HF_HUB_CACHE, revision=found.revision
    )
    return Path(file).parent if isinstance(file, str) else None


def origin_of(folder: Path) -> Origin | None:
    """The id and commit of a folder inside the hub's cache, however the path reaches it; None elsewhere.

    >>> origin_of(Path("/cache/models--org--name/snapshots/0a1b/sub"))
    Origin(id='org/name/sub', revision='0a1b')
    """
    for place in (folder.absolute(), folder.resolve()):
        for i, part in enumerate(place.parts[:-2]):
            if part.startswith(CACHED) and place.parts[i + 1] == "snapshots":
                name = part.removeprefix(CACHED).replace("--", "/", 1)
                return Origin("/".join([name, *place.parts[i + 3 :]]), place.parts[i + 2])
    return None


# One commit per id and process, whatever is pushed meanwhile; and every earlier answer.
_commits: dict[tuple[str, HubId], str] = {}
_folders: dict[tuple[str, HubId, bool, bool], Path] = {}


def _snapshot(found: HubId, weights: bool, allow_pickle: bool, offline: bool = False) -> Path:
    cache = constants.HF_HUB_CACHE
    asked, key = (cache, found, weights, allow_pickle), (cache, found._replace(subfolder=""))
    if (known := _folders.get(asked)) is not None and known.is_dir():
        return known
    kinds = (*SIDE, *(WEIGHTS if weights else ()), *(PICKLES if weights and allow_pickle else ()))
    within = f"{found.subfolder}/" if found.subfolder else ""
    snapshot = huggingface_hub.snapshot_download(
        found.repository,
        revision=_commits.get(key, found.revision),
        allow_patterns=[within + kind for kind in kinds],
        ignore_patterns=[within + kind for kind in ELSEWHERE],
        cache_dir=cache,
        local_files_only=offline or huggingface_hub.is_offline_mode(),
    )
    _commits[key] = Path(snapshot).name
    folder = Path(snapshot) / found.subfolder
    if not folder.is_dir():
        raise NotADirectoryError(f"no folder {found.subfolder}")
    if not offline:
        _folders[asked] = folder
    return folder


def _reason(text: str, found: HubId, error: Exception) -> str:
    """What was tried, and the remedy; not the error's own words, which may hold an address with a token."""
    from huggingface_hub import errors  # imports an HTTP client, which only an id needs

    model = f"{found.repository} at revision {found.revision}" if found.revision else found.repository
    cache, server = constants.HF_HUB_CACHE, server_name()
    whole = "only a part of" if type(error).__name__ == "IncompleteSnapshotError" else "no"
    here = f"no such folder{seen_from(text)}, and {whole} {model} in the hub's cache {cache}"
    login = "log in with an account that may read it: `hf auth login`, or HF_TOKEN"
    status = _status(error)
    if isinstance(error, NotADirectoryError):
        return f"{model} has {error} with files that a merge reads. Check the part after the name"
    if isinstance(error, errors.GatedRepoError):
        return f"{here}; it is gated on {server}. Accept its terms there, and {login}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{here}; {server} has the model without this revision. Check the part after @"
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 403):
        return (
            f"{here}; on {server} there is none, or it is private. Check the name; if it is private, {login}"
        )
    if huggingface_hub.is_offline_mode():
        return f"{here}; the hub was not asked, since HF_HUB_OFFLINE is set. Check the path, or unset it"
    answer = f"status {status}" if status else type(error.__cause__ or error).__name__
    return (
        f"{here}; {server} did not give it ({answer}). Check the path, the network and the free space, or "
        "copy the model's folder here"
    )


def _status(error: Exception) -> int | None:
    """The status of the hub's answer; None if it did not answer."""
    found = getattr(getattr(error.__cause__ or error, "response", None), "status_code", None)
    return found if isinstance(found, int) else None


def server_name() -> str:
    """The hub's address without a password that it may hold."""
    return constants.ENDPOINT.partition("://")[2].rpartition("@")[2] or "the hub"
