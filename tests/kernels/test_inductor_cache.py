"""Computers of several instruction sets share a cache folder: each finds its own compiled loops in it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trainmerge.kernels.inductor_cache import processor

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
COMPILED = """
import os
import warnings
import torch
from tests.contracts import assert_merge_is_exact
from trainmerge.kernels import Difference, ExpertWeight, using
from trainmerge.task_vectors.delta import Delta

warnings.filterwarnings("error", message="torch.compile failed")
generator = torch.Generator().manual_seed(0)
base, weight, tau = torch.randn(3, 300, 400, generator=generator)
delta = Delta(base, (ExpertWeight(weight), Difference(tau)))
with using("compiled"):
    assert_merge_is_exact(delta, torch.rand(2, 2, generator=generator))
print(os.environ["TORCHINDUCTOR_CACHE_DIR"])
"""


def folder_of(capability: str, cache: str) -> Path:
    """Compile under this capability, check the results; -> the cache folder in use."""
    found = subprocess.run(
        [sys.executable, "-c", COMPILED],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability, VARIABLE: cache},
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    return Path(found.stdout.splitlines()[-1])


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="one instruction set only"
)
def test_an_instruction_set_never_runs_loops_of_another(tmp_path):
    own = torch.backends.cpu.get_cpu_capability().lower()
    other = "default" if own == "avx2" else "avx2"
    first = folder_of(own, str(tmp_path))
    second = folder_of(other, str(first))  # as a process inherits the variable
    assert first != second
    assert first.parent == second.parent == tmp_path
    assert {path.name for path in tmp_path.iterdir()} == {first.name, second.name}
    assert (own in first.name, other in second.name) == (True, True)


def test_processors_with_other_instructions_have_other_names(tmp_path):
    names = []
    for flags in ("fma avx2", "avx2 fma", "fma avx2 avx_vnni"):
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\nprocessor\t: 1\n")
        names.append(processor(tmp_path / "cpuinfo"))
    assert names[0] == names[1] != names[2]
    assert processor(tmp_path / "none") != names[0]
