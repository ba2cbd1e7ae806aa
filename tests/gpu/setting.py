"""What the parts of `make gpu` share: the device, the sizes, and one row of the answer."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Row = dict[str, Any]  # name, value, unit


@dataclass(frozen=True)
class Setting:
    """Where the parts run, and whether on sizes that take seconds on a CPU."""

    device: torch.device
    tiny: bool = False

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def backends(self) -> tuple[str, ...]:
        """Those that are compared here; without a GPU the compiled ones have tests of their own."""
        return ("eager", "compiled", "triton") if self.cuda else ("eager",)

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def seconds(self, call: Callable[[], object], rounds: int = 5) -> float:
        """Of the fastest of some calls, after one that compiles and touches every page."""
        best = float("inf")
        for i in range(1 + (1 if self.tiny else rounds)):
            self.wait()
            began = time.perf_counter()
            call()
            self.wait()
            best = min(best, time.perf_counter() - began) if i else best
        return best


def row(name: str, value: float | None, unit: str) -> Row:
    """One figure; None where it could not be taken, and `unit` says why."""
    return {"name": name, "value": None if value is None else float(f"{value:.4g}"), "unit": unit}
