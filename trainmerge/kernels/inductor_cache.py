"""One folder of compiled loops per processor, instruction set and torch."""

import hashlib
import os
import platform
import re
from functools import cache
from pathlib import Path

import torch

CACHE = "trainmerge-torch-"  # prefix of our folder in inductor's cache


@cache
def use_own_cache() -> None:
    """Let inductor cache in a folder of this processor, instruction set and torch, once per process.

    Inductor finds a cached loop by its source, not by the instruction set: one compiled for AVX-512 gives
    wrong numbers in a process that runs as AVX2, and one compiled with another processor's instructions does
    not run at all. Computers of a cluster share their home folders. The
    folder lies in the user's `TORCHINDUCTOR_CACHE_DIR`, or in inductor's default; a process that inherits
    the variable from one of ours uses the same parent folder.
    """
    from torch._inductor.runtime.cache_dir_utils import cache_dir  # takes a second: only when needed

    parent = Path(cache_dir())
    if parent.name.startswith(CACHE):
        parent = parent.parent
    capability = torch.backends.cpu.get_cpu_capability().lower().replace(" ", "-")
    name = f"{CACHE}{torch.__version__}-{capability}-{processor()}"
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(parent / name)


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Eight hexadecimal digits of this processor's instructions, or of its name outside Linux."""
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo.read_text() if cpuinfo.is_file() else "", re.M)
    words = " ".join(sorted(found[1].split())) if found else f"{platform.machine()} {platform.processor()}"
    return hashlib.sha256(words.encode()).hexdigest()[:8]
