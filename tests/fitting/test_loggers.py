"""Users' own loggers beside ours, and a fit that stops by itself."""

import csv
import json
import time
import warnings
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from tensorboardX.proto.event_pb2 import Event

import trainmerge as tm
from tests.fitting.test_fit import build, learned
from tests.world import write_world
from trainmerge.run.folder import RunFolder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("loggers")
    write_world(root)
    return root


def fit(world: Path, run: Path, steps: int, **trainer: object) -> None:
    module, data = build(world, run)
    made = tm.make_trainer(
        run, save_every=3, max_steps=steps, accelerator="cpu", enable_progress_bar=False, **trainer
    )
    tm.fit(module, data, made, run)


def ours(run: Path) -> list[dict[str, float]]:
    """The lines of our own log."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def events(folder: Path) -> list[Event]:
    """Every record of TensorBoard's files: length, its checksum, the event, its checksum."""
    found = []
    for file in sorted(folder.glob("events.*")):
        data, place = file.read_bytes(), 0
        while place < len(data):
            size = int.from_bytes(data[place : place + 8], "little")
            found.append(Event.FromString(data[place + 12 : place + 12 + size]))
            place += size + 16
    return found


def test_csv_and_tensorboard_beside_our_own_over_a_resume(world: Path, tmp_path: Path) -> None:
    run, side = tmp_path / "run", tmp_path / "side"
    for steps in (3, 5):
        time.sleep(1.1)  # an event file's name is its second: a resumed run begins later than that
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Experiment logs directory")  # Lightning's, for CSV
            loggers = [CSVLogger(side, "csv", version=0), TensorBoardLogger(side, "board", version=0)]
            fit(world, run, steps, logger=loggers)
    tables = side / "csv" / "version_0"
    rows = []
    for name in ("metrics-until-3.csv", "metrics.csv"):
        with (tables / name).open() as file:
            rows += [row for row in csv.DictReader(file) if row["loss"]]
    lines = ours(run)
    assert [int(row["step"]) for row in rows] == [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert [float(row["loss"]) for row in rows] == pytest.approx([line["loss"] for line in lines])
    assert not any(key.startswith("coefficients") for line in lines for key in line)
    values = [value for event in events(side / "board" / "version_0") for value in event.summary.value]
    tags = {value.tag for value in values}
    assert {"loss", "losses/mood", "coefficients/mood/mean", "coefficients/animal/max"} <= tags
    pictures = [value.image for value in values if value.tag == "coefficients"]
    assert len(pictures) == 2
    assert pictures[-1].encoded_image_string.startswith(b"\x89PNG")
    means = [value.simple_value for value in values if value.tag == "coefficients/mood/mean"]
    assert means[-1] == pytest.approx(learned(run)[0].mean().item(), rel=1e-5)


def test_weights_and_biases_offline(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="pip install wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger("merge", save_dir=tmp_path, offline=True, project="trainmerge")
    fit(world, tmp_path / "run", 3, logger=logger)
    logged = dict(wandb.run.summary)
    wandb.finish()
    assert logged["coefficients/mood/mean"] == pytest.approx(learned(tmp_path / "run")[0].mean().item())
    assert logged["loss"] == pytest.approx(ours(tmp_path / "run")[-1]["loss"])
    assert len(list(tmp_path.rglob("media/images/coefficients_*.png"))) == 1


def test_mlflow_in_files(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="pip install mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # mlflow-skinny has no other store on a disk
    logger = MLFlowLogger("merges", tracking_uri=(tmp_path / "mlflow").as_uri())
    fit(world, tmp_path / "run", 3, logger=logger)
    client, run = logger.experiment, logger.run_id
    assert run is not None
    means = client.get_metric_history(run, "coefficients/mood/mean")
    assert [metric.step for metric in means] == [0, 1, 2]
    assert means[-1].value == pytest.approx(learned(tmp_path / "run")[0].mean().item())
    assert [file.path for file in client.list_artifacts(run)] == ["coefficients-3.png"]


def test_a_flat_loss_stops_at_the_same_step_after_an_interruption(world: Path, tmp_path: Path) -> None:
    patience = {
        "patience": 2,
        "smoothing": 0.5,
        "least": 1.0,
    }  # no minimum is ever low enough after the first
    fit(world, tmp_path / "whole", 9, callbacks=[tm.StopWhenFlat(**patience)])
    steps = [
        json.loads(line)["step"] for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    ]
    stop = steps[-1] + 1
    assert 2 < stop < 9
    assert RunFolder(tmp_path / "whole").snapshots().keys() == {stop}
    fit(world, tmp_path / "parts", 2, callbacks=[tm.StopWhenFlat(**patience)])
    for _ in range(2):  # the second finds a run that has stopped
        fit(world, tmp_path / "parts", 9, callbacks=[tm.StopWhenFlat(**patience)])
    assert torch.equal(learned(tmp_path / "parts"), learned(tmp_path / "whole"))
    assert (tmp_path / "parts" / "metrics.jsonl").read_text() == (
        tmp_path / "whole" / "metrics.jsonl"
    ).read_text()


def test_when_a_loss_is_flat() -> None:
    stop = tm.StopWhenFlat(patience=3, smoothing=0.0)
    losses = [5.0, 4.0, 4.5, 3.9, 4.0, 3.9, 4.2]
    assert [stop.flat(loss, step) for step, loss in enumerate(losses, start=1)] == [False] * 6 + [True]
    smooth = tm.StopWhenFlat(patience=3, smoothing=0.9)
    smooth.flat(2.0, 1)
    smooth.flat(1.0, 2)
    assert smooth.lowest == pytest.approx((0.9 * 2.0 + 1.0) / 1.9)
    with pytest.raises(ValueError, match="patience"):
        tm.StopWhenFlat(patience=0)


def test_early_stopping_that_would_never_look_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="StopWhenFlat"):
        tm.make_trainer(tmp_path, max_steps=1, callbacks=[pl.callbacks.EarlyStopping("loss")])
