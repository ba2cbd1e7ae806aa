"""First steps of fits and closed forms give what they gave at commit 76cb42d, version 0.1.0 before the wings.

Another processor may round otherwise, so each entry has a tolerance (`tests/tolerances.py`). For two commits
on one machine `python -m tests.golden` compares bits.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.golden import CASES, GOLDEN, differing, results
from tests.tolerances import assert_within


@pytest.mark.parametrize("case", CASES)
def test_golden(case: str) -> None:
    wanted, found = load_file(GOLDEN / f"{case}.safetensors"), results(case)
    assert {name for name in wanted if not name.startswith("tolerance/")} == found.keys()
    for name, tensor in found.items():
        assert_within(tensor, wanted[name], wanted[f"tolerance/{name}"], f"{case}: {name}")


def test_every_bit_counts_when_two_commits_are_compared(tmp_path: Path) -> None:
    for folder, value in (("a", 1.0), ("b", 1.0), ("c", 1.0 + 2**-23), ("d", 1.0)):
        (tmp_path / folder).mkdir()
        for case in CASES:
            save_file({"x": torch.tensor([value])}, tmp_path / folder / f"{case}.safetensors")
    save_file({"x": torch.tensor([1.0]), "y": torch.ones(1)}, tmp_path / "d" / "ties.safetensors")
    assert differing(tmp_path / "a", tmp_path / "b") == []
    assert differing(tmp_path / "a", tmp_path / "c") == [f"{case}: x" for case in CASES]
    assert differing(tmp_path / "a", tmp_path / "d") == ["ties: y"]
