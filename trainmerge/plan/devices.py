"""How fast a device computes, reads its memory and is fed: stated by its maker, or measured here."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Device:
    """Speeds that a plan's times are made of.

    Args:
        name: What it is.
        flops: Operations a second of 16-bit matrix products, dense.
        bandwidth: Bytes a second from its own memory.
        link: Bytes a second from the host's memory; 0 where that is its own.
        exchange: Bytes a second between devices of one host, one way.
        memory: Its bytes; 0 if that is not known.
        use: The part of `flops` that training reaches; 0.4 is what large runs report (Llama 3, arXiv
            2407.21783: 38 to 43%).
    """

    name: str
    flops: float
    bandwidth: float
    link: float = 0.0
    exchange: float = 0.0
    memory: int = 0
    use: float = 0.4


# NVIDIA's data sheets: tensor cores without sparsity, PCIe and NVLink one way.
STATED = {
    "a100": Device("A100 SXM 80 GB, as stated", 312e12, 2.039e12, 32e9, 300e9, 80 * 10**9),
    "h100": Device("H100 SXM 80 GB, as stated", 989e12, 3.35e12, 64e9, 450e9, 80 * 10**9),
    "h200": Device("H200 SXM 141 GB, as stated", 989e12, 4.8e12, 64e9, 450e9, 141 * 10**9),
    "l4": Device("L4 24 GB, as stated", 121e12, 300e9, 32e9, 32e9, 24 * 10**9),
}


def device_named(name: str, dtype: torch.dtype = torch.float32) -> Device:
    """A stated device, or `here`: this machine's processor, measured in half a second.

    Raises:
        ValueError: another name.
    """
    if name == "here":
        return measured(dtype)
    if name not in STATED:
        raise ValueError(f"no device {name!r}: choose one of here, {', '.join(STATED)}")
    return STATED[name]


def measured(dtype: torch.dtype = torch.float32) -> Device:
    """The processor here, as many threads as torch uses: a matrix product and a copy, the best of a few."""
    size = 768
    a, b = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    source, target = torch.ones(1 << 24), torch.empty(1 << 24)
    product = _best(lambda: torch.mm(a, b))
    copy = _best(lambda: target.copy_(source))
    name = f"this processor, {torch.get_num_threads()} threads, measured"
    return Device(name, 2 * size**3 / product, 2 * source.nbytes / copy, use=1.0)


def _best(action: Callable[[], object], tries: int = 4) -> float:
    """Seconds of the fastest of some tries."""
    seconds = []
    for _ in range(tries):
        began = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - began)
    return min(seconds)
