"""Started as people start it: Lightning's launcher, stopped by a signal, and torchrun; what is refused."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy

import trainmerge as tm
from tests.cli.test_cli import write_config
from tests.fitting.test_ranks import world_fit
from tests.ranks import TIMEOUT, free_port, run
from tests.threads import THREADS
from tests.world import recipe, write_world
from trainmerge.fitting.trainer import check_strategy
from trainmerge.run.folder import RunFolder

pytestmark = pytest.mark.long

ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
}  # fmt: skip
SCRIPT = Path(sys.executable).parent / "trainmerge"  # the console script


def test_a_launched_fit_stops_on_a_signal_and_torchrun_goes_on(tmp_path: Path) -> None:
    write_world(tmp_path)
    folder = RunFolder(tmp_path / "run")
    config = str(write_config(tmp_path, trainer__max_steps=5000, trainer__strategy="ddp"))
    fit = ["fit", "--config", config, "--run", str(folder.path)]
    with subprocess.Popen([SCRIPT, *fit, "--trainer.devices", "2"], env=ENVIRONMENT) as launched:
        _wait_for(folder.metrics, launched)
        launched.send_signal(signal.SIGTERM)
        assert launched.wait(TIMEOUT) == 75
    (step,) = folder.snapshots()
    assert torch.load(folder.latest(), weights_only=True)["global_step"] == step
    torchrun = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
        "--master-port", str(free_port()), "-m", "--", "trainmerge.cli", *fit, "--trainer.devices", "2",
        "--trainer.max_steps", str(step + 2), "--model.sharded", "true",
    ]  # fmt: skip
    subprocess.run(torchrun, env=ENVIRONMENT, check=True, timeout=TIMEOUT)
    assert list(folder.snapshots()) == [step + 2]
    assert len(folder.metrics.read_text().splitlines()) == step + 2


def _wait_for(file: Path, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + TIMEOUT
    while not (file.exists() and file.stat().st_size) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    assert file.exists()


def refused(root: Path, run_folder: Path) -> str:
    """The words for a batch that not every process has a part of."""
    with pytest.raises(ValueError, match=r"data\.batch_size") as error:
        world_fit(root, run_folder, 2, batch_size=1)
    return str(error.value)


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    write_world(tmp_path)
    for words in run(2, refused, tmp_path, tmp_path / "run"):
        assert "data.batch_size 1 leaves some of 2 processes without an example" in words
    assert not (tmp_path / "run").exists()
    trainer = tm.make_trainer(tmp_path / "run", max_steps=1, accelerator="cpu", enable_progress_bar=False)
    for strategy, words in [
        (ModelParallelStrategy(), "use ddp, and model.sharded true"),
        (DDPStrategy(start_method="spawn"), "use ddp; forked and spawned"),
    ]:
        trainer.strategy._lightning_module = None
        trainer._accelerator_connector.strategy = strategy
        with pytest.raises(ValueError, match=words):
            check_strategy(trainer)
    trainer = tm.make_trainer(tmp_path / "b", max_steps=1, accelerator="cpu", num_nodes=2, devices=1)
    with pytest.raises(ValueError, match=r"num_nodes is 2, and nothing says where .* set MASTER_ADDR"):
        check_strategy(trainer)  # it would wait for ever
    for settings in ({"subspace": 4}, {"recipe": recipe(tmp_path, preprocess=[tm.RegMean()])}):
        given = {"recipe": recipe(tmp_path), "sharded": True, **settings}
        with pytest.raises(ValueError, match=r"model\.sharded: "):
            tm.MergeModule(**given)
