"""A device's speeds of compute, memory and transfers: from data sheets, or measured here."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Device:
    """Speeds from which a plan computes its times.

    Args:
        name: The device.
        flops: Floating-point operations per second of dense 16-bit matrix products.
        bandwidth: Bytes per second from its own memory.
        link: Bytes per second from host memory; 0 where that is its own memory.
        exchange: Bytes per second between devices of one host, one way.
        memory: Bytes of its memory; 0 if unknown.
        host: Bytes of host memory for each device of a machine; 0 if unknown.
        use: The fraction of `flops` that training reaches; large runs report about 0.4 (Llama 3, arXiv
            2407.21783: 38 to 43%).
    """

    name: str
    flops: float
    bandwidth: float
    link: float = 0.0
    exchange: float = 0.0
    memory: int = 0
    host: int = 0
    use: float = 0.4


HOST = 2 * 10**12 // 8  # of a DGX A100, H100 or H200, which have 2 TB for eight devices
# NVIDIA's data sheets: tensor cores without sparsity, PCIe and NVLink one way.
STATED = {
    "a100": Device("A100 SXM 80 GB, as stated", 312e12, 2.039e12, 32e9, 300e9, 80 * 10**9, HOST),
    "h100": Device("H100 SXM 80 GB, as stated", 989e12, 3.35e12, 64e9, 450e9, 80 * 10**9, HOST),
    "h200": Device("H200 SXM 141 GB, as stated", 989e12, 4.8e12, 64e9, 450e9, 141 * 10**9, HOST),
    "l4": Device("L4 24 GB, as stated", 121e12, 300e9, 32e9, 32e9, 24 * 10**9),
}


def device_named(name: str, dtype: torch.dtype = torch.float32) -> Device:
    """A device from the table, or `here`: this machine's processor, measured in half a second.

    Raises:
        ValueError: the name is unknown.
    """
    if name == "here":
        return measured(dtype)
    if name not in STATED:
        raise ValueError(f"unknown device {name!r}: choose one of here, {', '.join(STATED)}")
    return STATED[name]


def of_card(name: str, memory: int, host: int) -> Device:
    """A GPU by the name that its driver gives: the table's speeds, or for an unknown one the slowest of them.

    >>> of_card("NVIDIA H100 80GB HBM3", 85 * 10**9, 0).bandwidth == STATED["h100"].bandwidth
    True
    """
    known = [key for key in STATED if key in name.lower().replace("-", " ").split()]
    return replace(STATED[known[0] if known else "l4"], name=name, memory=memory, host=host)


def measured(dtype: torch.dtype = torch.float32) -> Device:
    """The local processor with torch's number of threads: the best of a few matrix products and copies."""
    size = 768
    a, b = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    source, target = torch.ones(1 << 24), torch.empty(1 << 24)
    product = _best(lambda: torch.mm(a, b))
    copy = _best(lambda: target.copy_(source))
    threads = torch.get_num_threads()
    name = f"this processor, {threads} thread{'s' * (threads > 1)}, measured"
    return Device(name, 2 * size**3 / product, 2 * source.nbytes / copy, use=1.0)


def _best(action: Callable[[], object], tries: int = 4) -> float:
    """Seconds of the fastest try."""
    seconds = []
    for _ in range(tries):
        began = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - began)
    return min(seconds)
