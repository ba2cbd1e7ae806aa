"""How many threads the tests compute with: TRAINMERGE_TEST_THREADS, or one.

The tests' tensors are small: more threads only wait for each other, much so on a busy machine. Tests that
compare bits of two processes need the same number in both, since another number sums in another order.
"""

import os

import torch

THREADS = int(os.environ.get("TRAINMERGE_TEST_THREADS", "1"))


def limit_threads() -> None:
    """Let torch compute with this number of threads, in this process."""
    torch.set_num_threads(THREADS)
