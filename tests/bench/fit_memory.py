"""Peak memory of a fit for K = 2, 4, 8: one model, one gradient and activations, whatever K is.

What is counted is anonymous memory (RssAnon), sampled every two milliseconds: mapped files are the page
cache's, which the kernel takes back when it wants.
"""

import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

from tests.bench.__main__ import figure
from tests.bench.suite_model import many_experts

BATCH, STEPS, MAX_LENGTH = 4, 2, 64


def anonymous() -> int:
    """This process's anonymous memory in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("no RssAnon in /proc/self/status: this benchmark needs Linux")


class Peak:
    """The highest anonymous memory between start and stop, less what there was at the start."""

    def __enter__(self) -> "Peak":
        self.start = self.highest = anonymous()
        self._running = True
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while self._running:
            self.highest = max(self.highest, anonymous())
            time.sleep(0.002)

    def __exit__(self, *_: object) -> None:
        self._running = False
        self._thread.join()
        self.highest = max(self.highest, anonymous())

    @property
    def grown(self) -> int:
        """Bytes above the start."""
        return self.highest - self.start


def fit_peak(experts: int) -> None:
    """Print the peak of a fit, and what it may be: model + largest gradient + activations."""
    import trainmerge as tm
    from trainmerge.batch import Batch
    from trainmerge.checkpoints import load_model, open_checkpoint
    from trainmerge.fit_cli import calibration_files
    from trainmerge.forward import hidden_states

    torch.set_num_threads(2)
    with many_experts(experts) as recipe, tempfile.TemporaryDirectory() as run:
        module = tm.MergeModule(recipe, workspace=f"{run}/workspace")
        data = tm.Calibration(calibration_files(recipe), recipe.base, batch_size=BATCH, max_length=MAX_LENGTH)
        trainer = tm.make_trainer(run, max_steps=STEPS, accelerator="cpu", enable_progress_bar=False)
        warm_up = load_model(open_checkpoint(recipe.base)).module  # kernels, threads and pools, once
        inputs = data.tokenize(["a b c d e f g h " * 20] * BATCH)
        batch = Batch(0, inputs, inputs["attention_mask"].bool(), torch.arange(BATCH))
        parameters = [p for n, p in warm_up.named_parameters() if not n.startswith(("embeddings", "pooler"))]
        for parameter in parameters:
            parameter.requires_grad_(True)
        with Peak() as activations:
            loss = hidden_states(warm_up, batch.inputs).square().mean()
        loss.backward()
        del loss
        model_bytes = sum(p.nbytes for p in warm_up.parameters())
        gradient_bytes = max(p.nbytes for p in parameters)
        warm_up.to("meta")
        with Peak() as fit:
            tm.fit(module, data, trainer, run)
    print(fit.grown, model_bytes + gradient_bytes + activations.grown)


def main() -> None:
    """A process a K."""
    peaks = {}
    for experts in (2, 4, 8):
        done = subprocess.run(
            [sys.executable, "-m", "tests.bench.fit_memory", str(experts)],
            check=True,
            capture_output=True,
            text=True,
        )
        peak, budget = map(int, done.stdout.split()[-2:])
        peaks[experts] = peak
        figure(f"fit_peak_K{experts}", peak / 2**20, "MiB", "")
        figure(
            f"fit_peak_over_budget_K{experts}",
            peak / budget,
            "ratio",
            "<= 1 (model + one gradient + activations)",
        )
    figure("fit_peak_ratio_K8_over_K2", peaks[8] / peaks[2], "ratio", "flat: <= 1.05")


if __name__ == "__main__":
    fit_peak(int(sys.argv[1])) if len(sys.argv) > 1 else main()
