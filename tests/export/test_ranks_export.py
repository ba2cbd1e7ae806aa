"""An export by several processes: each writes its own files, and the folder is as one process writes it."""

import json
import os
import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

import trainmerge as tm
from tests.ranks import Failed, Ranks, run
from tests.world import bert, recipe, write_world
from trainmerge.cli import main
from trainmerge.data.calibration import Calibration
from trainmerge.export import export, shards


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of no steps over a base in several files."""
    root = tmp_path_factory.mktemp("export")
    write_world(root)
    (root / "base" / "model.safetensors").unlink()
    bert().save_pretrained(root / "base", max_shard_size="15KB")
    merge = recipe(root)
    module = tm.MergeModule(merge, workspace=str(root / "run" / "workspace"))
    trainer = tm.make_trainer(root / "run", max_steps=0, accelerator="cpu", enable_progress_bar=False)
    tm.fit(module, Calibration({}, merge.base), trainer, root / "run")
    tm.export_run(root / "run", root / "alone")
    return root


def part_of_an_export(root: Path, out: str, broken: int = -1) -> list[str]:
    """Which weight files this process wrote."""
    written = []
    write = shards.write_safetensors

    def watched(path: Path, *arguments: object) -> None:
        if os.environ["RANK"] == str(broken):
            raise OSError("no space left")
        written.append(path.name)
        write(path, *arguments)

    shards.write_safetensors = watched
    assert main(["export", str(root / "run"), str(root / out)]) == 0
    return written


def contents(folder: Path) -> dict[str, bytes]:
    """Name -> bytes of weights and JSON, without the manifest, which hashes a card that names the folder."""
    files = [*folder.glob("*.safetensors"), *folder.glob("*.json")]
    return {path.name: path.read_bytes() for path in files if path.name != export.MANIFEST}


def manifest(folder: Path) -> dict[str, str]:
    """File -> SHA-256 as the export's manifest has it, the card left out."""
    files: dict[str, str] = json.loads((folder / export.MANIFEST).read_text())["files"]
    return {name: digest for name, digest in files.items() if name != "README.md"}


@pytest.mark.parametrize("processes", [2, 4])
def test_each_process_writes_its_own_files(finished: Path, processes: int) -> None:
    written = run(processes, part_of_an_export, finished, f"by{processes}")
    names = [name for of_one in written for name in of_one]
    made = {path.name for path in (finished / "alone").glob("model-*.safetensors")}
    assert len(names) == len(made) > 4
    assert set(names) == made
    assert all(written)
    alone, together = finished / "alone", finished / f"by{processes}"
    assert contents(together) == contents(alone)
    assert manifest(together) == manifest(alone)
    torch.testing.assert_close(
        AutoModel.from_pretrained(together).state_dict(),
        AutoModel.from_pretrained(alone).state_dict(),
        rtol=0,
        atol=0,
    )


@pytest.mark.parametrize("broken", [0, 1])
def test_a_failure_of_one_leaves_nothing(finished: Path, broken: int) -> None:
    before = set(finished.iterdir())
    results = Ranks(2, part_of_an_export, finished, "never", broken).join()
    assert all(isinstance(result, Failed) for result in results)  # of the assertion on the exit code
    assert set(finished.iterdir()) == before


def one_adapter(root: Path, out: str) -> None:
    with warnings.catch_warnings(category=UserWarning, action="ignore"):  # of what so small a rank misses
        words = ["export", str(root / "run"), str(root / out), "--as", "adapter", "--rank", "2"]
        assert main([*words, "--rest", "leave"]) == 0


def test_processes_write_the_adapter_of_one(finished: Path) -> None:
    run(2, one_adapter, finished, "adapter-by2")
    one_adapter(finished, "adapter")
    assert contents(finished / "adapter-by2") == contents(finished / "adapter")
    assert manifest(finished / "adapter-by2") == manifest(finished / "adapter")
