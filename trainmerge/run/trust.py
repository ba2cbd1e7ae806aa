"""Whose classes may be imported when files of a run are read: this package's, and those that the user names.

A recipe or configuration names classes by path, and importing a class runs its module. A configuration file
is the user's own word. The files of a run folder or an export may come from a stranger: only classes of this
package, of torch.optim and of Lightning's components are imported for them, unless the user trusts further
modules (`--trust NAME`, or `trusting` in a program). A configuration that the user keeps in a run folder
under a name of their own may import what that run was fitted with. A plug-in that the program has imported
itself is known.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from jsonargparse import _common, set_parsing_settings

from trainmerge.checkpoints.whole import MANIFEST, RECIPE
from trainmerge.system.json_file import read_json
from trainmerge.system.text import shortened

PACKAGE = __name__.partition(".")[0]
LONGEST = 600  # characters of names in an error
LIGHTNING = ("accelerators", "callbacks", "loggers", "plugins", "profilers", "strategies")
KNOWN = (
    PACKAGE,
    "torch.optim",
    "pytorch_lightning.cli.ReduceLROnPlateau",
    *(f"{package}.{part}" for package in ("pytorch_lightning", "lightning_fabric") for part in LIGHTNING),
)
RUN_RECIPE = "recipe.yaml"
RUN_FILES = (RUN_RECIPE, RECIPE, "trainmerge_config.yaml")
RUN_CONFIG, RUN_MANIFEST = "config.yaml", "manifest.json"
RUN_MARKS = (RUN_MANIFEST, "coefficients.safetensors")

_trusted: ContextVar[tuple[str, ...]] = ContextVar("trusted", default=())


@contextmanager
def trusting(*modules: str) -> Iterator[None]:
    """In this context the files of a run may name classes of these modules or packages too.

    Raises:
        ValueError: a name that is not a module's.
    """
    for name in modules:
        if not all(part.isidentifier() for part in name.split(".")):
            raise ValueError(f"--trust {name}: not the name of a module; write it as in `import my_package`")
    token = _trusted.set((*_trusted.get(), *modules))
    try:
        yield
    finally:
        _trusted.reset(token)


def of_a_run(path: Path) -> bool:
    """Whether a file belongs to a run folder or an export, which may be a stranger's."""
    folder = path.parent
    if path.name in RUN_FILES or (folder / MANIFEST).is_file():
        return True
    marked = any((folder / mark).is_file() for mark in RUN_MARKS)
    return marked and (path.name == RUN_CONFIG or (folder / RUN_RECIPE).is_file())


def check_classes(data: Any, where: str | Path) -> None:
    """Raise ValueError if plain data name a class that may not be imported; imports nothing."""
    refused = sorted({path for path in class_paths(data) if not _allowed(path)})
    if refused:
        modules = sorted({path.rpartition(".")[0] or path for path in refused})
        names, words = ", ".join(refused), " ".join(f"--trust {name}" for name in modules)
        raise ValueError(
            f"{where} names {shortened(names, LONGEST)}, which is not part of {PACKAGE}: importing it runs "
            f"its code. If you trust it, add {shortened(words, LONGEST)} (in a program: import it first)"
        )


@contextmanager
def imports_checked(data: Any, where: str | Path) -> Iterator[None]:
    """In this context jsonargparse imports only allowed classes, wherever a value names one.

    Raises:
        ValueError: as `check_classes`.
    """
    check_classes(data, where)
    known = {path for path in class_paths(data) if _allowed(path)}
    settings: dict[str, Any] = _common.parsing_settings
    before = dict(settings)
    set_parsing_settings(
        import_path_denylist=["*"], import_path_allowlist=[*KNOWN, *_trusted.get(), *sorted(known)]
    )
    try:
        yield
    finally:
        settings.update(before)


@contextmanager
def files_checked(contents: Mapping[Path, Any]) -> Iterator[None]:
    """`imports_checked` for those files that are a run's; a user's configuration may import anything.

    One that the user keeps in the run folder may import the modules that the run was fitted with.
    """
    with ExitStack() as guards:
        for path, content in contents.items():
            if of_a_run(path):
                guards.enter_context(trusting(*_fitted_with(path)))
                guards.enter_context(imports_checked(content, path))
        yield


def _fitted_with(path: Path) -> list[str]:
    """The modules of the run that a file lies in, unless a fit wrote the file: the user has named it."""
    manifest = path.parent / RUN_MANIFEST
    if path.name in (*RUN_FILES, RUN_CONFIG) or not manifest.is_file():
        return []
    return foreign_modules(read_json(manifest, "Restore it, or move the configuration to another folder."))


def class_paths(data: Any) -> Iterator[str]:
    """Every `class_path` with a dot in plain data; a name without one imports nothing."""
    if isinstance(data, Mapping):
        path = data.get("class_path")
        if isinstance(path, str) and "." in path:
            yield path
        for value in data.values():
            yield from class_paths(value)
    elif isinstance(data, list | tuple):
        for value in data:
            yield from class_paths(value)


def foreign_modules(data: Any) -> list[str]:
    """The modules of classes in plain data that a reader of the run has to trust."""
    paths = (path for path in class_paths(data) if not _within(path, KNOWN))
    return sorted({path.rpartition(".")[0] for path in paths})


def _allowed(path: str) -> bool:
    return _within(path, (*KNOWN, *_trusted.get())) or _imported(path)


def _within(path: str, names: tuple[str, ...]) -> bool:
    return any(path == name or path.startswith(f"{name}.") for name in names)


def _imported(path: str) -> bool:
    """Whether it is a plug-in, a subclass of this package's classes, that the program has imported itself."""
    module, _, name = path.rpartition(".")
    found = vars(sys.modules[module]).get(name) if module in sys.modules else None
    bases = found.__mro__[1:] if isinstance(found, type) else ()
    return any(base.__module__.partition(".")[0] == PACKAGE for base in bases)
