"""Dataclasses <-> YAML with class paths: one form for configurations, run folders and exports.

Classes of this package have their public path, `trainmerge.Ties`, whichever module defines them. Files of
version 0.1.0 have `trainmerge.preprocess.ties.Ties`; both are read as the same class.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentParser

from trainmerge.run.sections import check_sections
from trainmerge.run.templates import expand
from trainmerge.run.trust import files_checked, imports_checked
from trainmerge.system.atomic import write_whole
from trainmerge.system.json_file import read_bytes
from trainmerge.system.plain_data import check_plain
from trainmerge.system.text import reason, shortened

T = TypeVar("T")

LONGEST = 2000  # characters of a parser's error
PACKAGE = __name__.partition(".")[0]


class UniqueKeys(yaml.SafeLoader):
    """Plain data; a duplicate key is an error, where YAML would silently use the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping of a node.

        Raises:
            yaml.YAMLError: a duplicate key.
        """
        pairs = node.value if isinstance(node, yaml.MappingNode) else ()
        keys = [key for key, _ in pairs if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        words = [key.value for key in keys]
        for place, key in enumerate(keys):
            if key.value in words[:place]:
                raise yaml.MarkedYAMLError(problem=f"{key.value!r} again", problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)


def public_path(text: str) -> str:
    """The public path of a class of this package, whichever module `text` names; other texts unchanged.

    >>> public_path("trainmerge.preprocess.ties.Ties"), public_path("my_package.Ties")
    ('trainmerge.Ties', 'my_package.Ties')
    """
    found = re.fullmatch(rf"{PACKAGE}(?:\.\w+)*\.([A-Z]\w*)", text)
    if (
        found is None or found[1] not in import_module(PACKAGE).__all__
    ):  # by name, without importing wings above
        return text
    return f"{PACKAGE}.{found[1]}"


def public_paths(data: Any) -> Any:
    """Plain data with every class path made public."""
    if isinstance(data, str):
        return public_path(data)
    if isinstance(data, Mapping):
        return {key: public_paths(item) for key, item in data.items()}
    if isinstance(data, list):
        return [public_paths(item) for item in data]
    return data


def to_config(value: Any) -> Any:
    """A frozen dataclass as plain YAML data; a plug-in (one with a base class) with its class path."""
    if is_dataclass(value) and not isinstance(value, type):
        content = {
            field.name: to_config(getattr(value, field.name))
            for field in fields(value)
            # A field that older versions lack, at its default: their files have the same settings without it.
            if "added" not in field.metadata or getattr(value, field.name) != field.default
        }
        if type(value).__mro__[1] is object:
            return content
        path = public_path(f"{type(value).__module__}.{type(value).__qualname__}")
        return {"class_path": path, "init_args": content}
    if isinstance(value, Mapping):
        return {str(key): to_config(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [to_config(item) for item in value]
    return value


def build(kind: type[T], content: Any, where: str | Path) -> T:
    """Undo `to_config` for a plug-in in a run's file `where`: an instance of a subclass of `kind`.

    Raises:
        ValueError: the content is something else, or a class of a module that the user did not name.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=kind)
    content = public_paths(content)
    with imports_checked(content, where):
        try:
            result: T = parser.instantiate(parser.parse_object({"value": content}))["value"]
        except Exception as error:  # as in `read_config`
            words = f"{reason(error, LONGEST)}; it is {shortened(repr(content), LONGEST)}"
            raise ValueError(f"{where}: not a {kind.__name__}: {words}") from error
    return result


def write_config(value: Any, key: str, path: Path) -> None:
    """Write a dataclass under `key`, through a temporary file."""
    write_whole(path, yaml.safe_dump({key: to_config(value)}, sort_keys=False, width=110))


def read_yaml(path: Path) -> Any:
    """The plain data of a file.

    Raises:
        ValueError: not YAML in UTF-8, a duplicate key, or data nested too deeply.
    """
    text = read_bytes(path, "Check the path.")
    try:
        data = yaml.load(text.decode("utf-8"), UniqueKeys)
        check_plain(data)
    except Exception as error:  # PyYAML lets through what the constructors of dates and numbers raise
        raise ValueError(f"{path}: not usable YAML: {reason(error)}") from error
    return data


def read_settings(path: Path) -> Any:
    """A configuration's data, with `recipe.each` filled in for every expert.

    Raises:
        ValueError: as `read_yaml` and `check_sections`, and for templates that cannot be filled in.
    """
    data = read_yaml(path)
    try:
        check_sections(data)
        return expand(data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_config(cls: type[T], key: str, path: Path) -> T:
    """Undo `write_config`; other keys of the file are ignored.

    A run's file imports only this package's classes and modules that the user named.

    Raises:
        ValueError: the file lacks `key`, has a key or value that the class does not accept, or names a class
            that may not be imported.
    """
    data = read_settings(path)
    if not isinstance(data, dict) or key not in data:
        raise ValueError(f"{path}: no section {key!r} in it")
    kind: Any = cls  # mypy knows no type[T] as a key
    parser, section = _parser(kind, key), public_paths(data[key])
    with files_checked({path: section}):
        try:
            result: T = parser.instantiate(parser.parse_object({key: section}))[key]
        except Exception as error:  # jsonargparse raises many types; all mean that the file is wrong
            raise ValueError(f"{path}: {reason(error, LONGEST)}") from error
    return result


@cache
def _parser(cls: type[Any], key: str) -> ArgumentParser:
    """Made once: it takes longer than most files."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, key)
    return parser
