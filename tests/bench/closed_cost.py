"""What each closed form costs on one large matrix: three bfloat16 experts of a 32,000 x 1,024 embedding.

CPU seconds and peak anonymous memory on top of the checkpoints, one thread, a process a method. DOGE's own
solver (400 steps) and the methods that run the experts are left out.
"""

import os
import subprocess
import sys
import time

from tests.bench.__main__ import figure
from tests.methods import METHODS, PAIRS
from trainmerge.system.memory import Peak

SHAPE = (32000, 1024)
LEFT_OUT = {"doge-adam", "doge-am", "fisher", "optmerge-mean", "rcp", "regmean", "regmean++", "swudi"}


def cost(name: str) -> None:
    """Of one method, a result at a time as when it is written to its file."""
    import torch

    from trainmerge.kernels import ExpertWeight
    from trainmerge.preprocess import Piecewise
    from trainmerge.task_vectors.delta import Delta, TaskVectors

    torch.set_num_threads(1)
    torch.manual_seed(0)
    base = torch.randn(SHAPE, dtype=torch.bfloat16)
    experts = "ab" if name in PAIRS else "abc"
    terms = tuple(ExpertWeight(base + 0.05 * torch.randn(SHAPE, dtype=torch.bfloat16)) for _ in experts)
    given, method = TaskVectors(tuple(experts), {"embeddings": Delta(base, terms)}), METHODS[name]
    results = method.in_pieces if isinstance(method, Piecewise) else method
    with Peak() as peak:
        start = time.process_time()
        for _, taus in results(given):
            del taus
        seconds = time.process_time() - start
    figure(f"closed_cost_{name}", seconds, "s", "60")
    figure(f"closed_cost_peak_{name}", peak.grown / 1e9, "GB", "2")


def main() -> None:
    """One process a method."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_TRIM_THRESHOLD_": "0"}
    for name in METHODS:
        if name not in LEFT_OUT:
            subprocess.run(
                [sys.executable, "-m", "tests.bench.closed_cost", name], env=environment, check=True
            )


if __name__ == "__main__":
    match sys.argv[1:]:
        case [name]:
            cost(name)
        case _:
            main()
