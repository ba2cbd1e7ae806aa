"""What the folders of base and experts say about themselves, for the model card: ids, licences, data sets."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from trainmerge.export.public import one_line, public_name
from trainmerge.run.recipe import Recipe
from trainmerge.system.hub import Origin, is_hub_id, origin_of, parse_id
from trainmerge.system.json_file import read_json
from trainmerge.system.links import leads_outside

# First words of paths that have the form of an id: folders in which people train.
PLACES = re.compile(
    r"(out|outputs?|results?|models?|checkpoints?|ckpts?|data|datasets?|runs?|tmp|temp|home|content|workspace"
    r"|experts?|adapters?|weights|cache|mnt|root|scratch|saves?)/.*"
)
LONGEST = 100_000  # bytes of a README whose metadata are read
RECORDED = {"config.json": "_name_or_path", "adapter_config.json": "base_model_name_or_path"}


@dataclass(frozen=True)
class Source:
    """The base or an expert.

    Args:
        name: `base`, or the expert's.
        label: Its id on the hub, or the last part of its folder.
        origin: Its place on the hub, if its folder is in a hub cache.
        recorded: The id that its configuration names: of the model that it was loaded or trained from.
        metadata: Those of its README.md.
    """

    name: str
    label: str
    origin: Origin | None = None
    recorded: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def repository(self) -> str | None:
        """`org/name` of its place on the hub."""
        return None if self.origin is None else "/".join(self.origin.id.split("/")[:2])

    @property
    def licence(self) -> str | None:
        """Its licence in the hub's terms; the name for one that the hub does not know."""
        given = self.metadata.get("license")
        given = given[0] if isinstance(given, list) and len(given) == 1 else given
        name = self.metadata.get("license_name") if given == "other" else given
        return one_line(name) if isinstance(name, str) and name.strip() else None

    def texts(self, key: str) -> list[str]:
        """The texts of a key of its metadata that holds one or several."""
        given = self.metadata.get(key)
        listed = given if isinstance(given, list) else [given]
        return [one_line(one) for one in listed if isinstance(one, str) and one.strip()]


def card_sources(recipe: Recipe, folders: Mapping[str, Path]) -> list[Source]:
    """The base and every expert, in order."""
    return [source_of(name, path, folders[name]) for name, path in recipe.paths.items()]


def source_of(name: str, path: str, folder: Path) -> Source:
    """The base or an expert, by its folder."""
    origin = origin_of(folder)
    label = origin.id if origin else public_name(path)
    return Source(name, label, origin, _recorded(folder), read_metadata(folder))


def base_ids(sources: list[Source]) -> list[str]:
    """Ids of the hub for the card's `base_model`: the base's, then the experts'; empty if there are none.

    A base outside of a hub cache has the id that its own configuration or an expert's records.
    """
    base, *experts = sources
    recorded = [source.recorded for source in (base, *experts)]
    first = base.repository or next((one for one in recorded if one), None)
    found = [first, *(source.repository for source in experts)]
    return list(dict.fromkeys(one for one in found if one))


def base_origin(sources: list[Source]) -> tuple[str | None, str | None]:
    """The base's id and commit on the hub; an id alone where a configuration records it; or neither."""
    if sources[0].origin is not None and "/" not in sources[0].origin.id.partition("/")[2]:
        return sources[0].origin.id, sources[0].origin.revision
    return next((source.recorded for source in sources if source.recorded), None), None


def _recorded(folder: Path) -> str | None:
    """The id that a folder's configuration records, if it is in the form of one, and no path's."""
    for file, key in RECORDED.items():
        if not (folder / file).is_file() or leads_outside(folder, folder / file):
            continue
        given = read_json(folder / file, "Download or save it again.").get(key)
        found = parse_id(given) if isinstance(given, str) and is_hub_id(given) else None
        if found and not found.subfolder and not PLACES.fullmatch(found.repository):
            return found.repository
    return None


def read_metadata(folder: Path) -> dict[str, Any]:
    """The metadata of a folder's README.md; empty if there are none that can be read."""
    file = folder / "README.md"
    if not file.is_file() or leads_outside(folder, file):
        return {}
    with file.open("rb") as opened:
        return front_matter(opened.read(LONGEST).decode("utf-8", "replace"))


def front_matter(text: str) -> dict[str, Any]:
    r"""The mapping between the first two lines `---`; empty without one.

    >>> front_matter("---\nlicense: mit\n---\n# Title")
    {'license': 'mit'}
    """
    found = re.match(r"\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", text, re.DOTALL)
    try:
        content = yaml.safe_load(found[1]) if found else None
    except (yaml.YAMLError, ValueError, TypeError, RecursionError):  # a stranger's: it says nothing then
        return {}
    return content if isinstance(content, dict) else {}


def licences(sources: list[Source]) -> dict[str, list[str]]:
    """Licence -> the sources that have it; `unknown` for those whose README names none."""
    found: dict[str, list[str]] = {}
    for source in sources:
        found.setdefault(source.licence or "unknown", []).append(source.name)
    return found


def datasets(sources: list[Source]) -> Iterator[str]:
    """Data sets of the experts' cards."""
    yield from dict.fromkeys(name for source in sources[1:] for name in source.texts("datasets"))
