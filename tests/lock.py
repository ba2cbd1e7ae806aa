"""`make lock`: requirements.lock, the versions of everything that trainmerge needs in this environment.

The environment is the one of the tests: Python 3.11 on Linux. Tools for development are left out.
"""

from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LOCK = Path(__file__).parents[1] / "requirements.lock"
HEAD = """# What the tests ran with, on Python 3.11 and Linux: `pip install -c requirements.lock .`
# No hashes: torch comes from its own index for a CPU or a version of CUDA.
# Made by `make lock` from the installed packages.
"""


def needed(package: str = "trainmerge", extras: frozenset[str] = frozenset()) -> dict[str, str]:
    """Package -> version of everything that a package requires here, without itself."""
    found: dict[str, str] = {}
    left, seen = [(package, extras)], set()
    while left:
        name, wanted = left.pop()
        if (name, wanted) in seen:
            continue
        seen.add((name, wanted))
        own = distribution(name)
        if name != package:
            found[canonicalize_name(name)] = own.version.partition("+")[0]
        for text in own.requires or ():
            need = Requirement(text)
            if need.marker is None or any(need.marker.evaluate({"extra": e}) for e in ("", *wanted)):
                left.append((need.name, frozenset(need.extras)))
    return dict(sorted(found.items()))


def main() -> None:
    """Write the file."""
    LOCK.write_text(HEAD + "".join(f"{name}=={version}\n" for name, version in needed().items()))


if __name__ == "__main__":
    main()
