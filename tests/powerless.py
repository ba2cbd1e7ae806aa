"""Run a function as a user for whom permissions count: root may read and write everything."""

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

NOBODY = 65534


@pytest.fixture
def entered() -> Iterator[Path]:
    """A new folder that every user may enter and read, unlike pytest's."""
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        yield Path(place)


def error_of(function: Callable[[], object]) -> str:
    """The type and words of what `function` raises in a child without root's rights; `none` of no error."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        words = "none"
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            function()
        except BaseException as error:
            words = f"{type(error).__name__}: {error}"
        os.write(writer, words.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as lines:
        words = lines.read()
    os.waitpid(child, 0)
    return words
