"""A run folder that goes back to a step has nothing of the later ones."""

import json
from pathlib import Path

import torch
from pytorch_lightning.loggers import CSVLogger

from trainmerge.fitting.metrics_log import JsonLines
from trainmerge.fitting.rewind import rewind
from trainmerge.run.folder import RunFolder
from trainmerge.run.trajectory import append, read_trajectory


def test_nothing_later_than_the_step_is_left(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.checkpoints.mkdir()
    for step in (2, 4):
        (folder.checkpoints / f"step-{step}.ckpt").touch()
    metrics = JsonLines(folder.metrics)
    for step in range(5):
        append(folder.trajectory, step, torch.full((2, 3), float(step)))
        metrics.log_metrics({"loss": 1.0}, step)
    with folder.metrics.open("a") as file, folder.trajectory.open("ab") as path:  # a killed run's last words
        file.write('{"step": 5, "lo')
        path.write(b"half")
    table = CSVLogger(tmp_path, name="csv", version=0)
    (Path(table.log_dir)).mkdir(parents=True)
    (Path(table.log_dir) / "metrics.csv").touch()

    rewind(folder, 2, (2, 3), [metrics, table])
    assert list(folder.snapshots()) == [2]
    assert [json.loads(line)["step"] for line in folder.metrics.read_text().splitlines()] == [0, 1]
    trajectory = read_trajectory(folder.trajectory, 2, 3)
    assert trajectory is not None
    assert trajectory.steps.tolist() == [0, 1, 2]
    assert [path.name for path in Path(table.log_dir).iterdir()] == ["metrics-until-2.csv"]

    rewind(folder, 0, (2, 3), [metrics, table])
    assert not folder.snapshots()
    assert not folder.trajectory.exists()
    assert folder.metrics.read_text() == ""
