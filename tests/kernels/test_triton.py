"""The GPU kernels without a GPU: interpreted, and compiled ahead of time for three generations of them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu.contract import random_delta
from trainmerge.kernels import Difference, ExpertWeight, LowRank, Quantised

triton = pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
EXPERTS = 8
KINDS = {
    "table": "*i64", "bounds": "*i64", "weights": "*fp32", "partials": "*fp32", "sums": "*fp32",
    "segments": "i32", "total": "i32",
}  # fmt: skip
ISSUED = 8.5  # instructions of a thread that an H100 issues while it loads a byte: 4 x 32 a cycle, 15 bytes


def test_interpreted():
    found = subprocess.run(
        [sys.executable, "-m", "tests.interpreted"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.stdout.endswith("interpreted as eager\n"), found.stderr


def compile_for(kernel, capability: int, given: dict):
    """One kernel for a GPU that need not be there: its PTX and machine code."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    arguments = {name: KINDS[name] for name in kernel.arg_names if name in KINDS}
    constants = {name: value for name, value in given.items() if name in kernel.arg_names}
    source = ASTSource(
        kernel,
        signature={**arguments, **dict.fromkeys(constants, "constexpr")},
        constexprs=constants,
        attrs={
            (i,): [["tt.divisibility", 16]] for i, kind in enumerate(arguments.values()) if kind[0] == "*"
        },
    )
    options = {name: value for name, value in given.items() if name not in constants}
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={**options, "enable_fp_fusion": True})


def tool(name: str, *arguments: object) -> str:
    """What one of NVIDIA's own tools says of machine code."""
    place = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([place, *arguments], capture_output=True, text=True, check=True).stdout


def resources(binary: bytes, path: Path) -> dict[str, int]:
    """Registers a thread, bytes of stack (spills), and instructions."""
    path.write_bytes(binary)
    found = re.findall(r"(REG|STACK|LOCAL):(\d+)", tool("cuobjdump", "-res-usage", path))
    code = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s", tool("cuobjdump", "-sass", path), re.M)
    return {**{key: int(value) for key, value in found}, "instructions": len(code)}


def segment_of(form, dtype, name: str):
    """A large aligned matrix with EXPERTS terms of a form, as a launch would get it."""
    from trainmerge.kernels import Merge, Product, triton_segments

    like = torch.empty(0, dtype=dtype)
    delta = random_delta([64, 128], [form] * EXPERTS, like, rank=16)
    call = (
        Merge(torch.empty_like(delta.base), delta.base, delta.terms, torch.ones(EXPERTS, 1))
        if name == "merge"
        else Product(delta.base, delta.base, delta.terms, 1)
    )
    (segment,) = (triton_segments.merges_of if name == "merge" else triton_segments.segments_of)(call)
    assert segment.constants()["ALIGN"] == 16
    return segment


CODE = [  # every generation, dtype and form in one of the two passes; `make gpu` runs all of them
    ("merge", ExpertWeight, torch.float32, 80),
    ("inner", ExpertWeight, torch.bfloat16, 80),
    ("merge", ExpertWeight, torch.bfloat16, 90),
    ("inner", ExpertWeight, torch.float32, 90),
    ("inner", Difference, torch.float16, 100),
    ("merge", Quantised, torch.bfloat16, 100),
    ("inner", Quantised, torch.bfloat16, 90),
    ("merge", LowRank, torch.bfloat16, 90),
    ("inner", LowRank, torch.float32, 100),
    ("inner", LowRank, torch.bfloat16, 80),
]


@pytest.mark.parametrize(("name", "form", "dtype", "capability"), CODE)
def test_machine_code(name, form, dtype, capability, tmp_path):
    from trainmerge.kernels import triton_kernels as kernels

    segment = segment_of(form, dtype, name)
    block, warps = getattr(kernels, f"{name.upper()}_BLOCK"), getattr(kernels, f"{name.upper()}_WARPS")
    given = kernels.options(segment, block, warps)
    kernel = getattr(kernels, f"{name}_tiles_kernel" if segment.tiled else f"{name}_kernel")
    compiled = compile_for(kernel, capability, given)
    ptx = compiled.asm["ptx"]
    threads = 32 * given["num_warps"]
    each = (given["ROWS"] * given["COLUMNS"] if segment.tiled else block) // threads  # weights of a thread
    dense = [segment.first] * (name == "inner") + segment.models[: None if segment.models[1:] else 1]
    if name == "inner" and not segment.models[1:]:
        dense.pop()  # no differences from the base: it is not read
    widths = [tensor.element_size() for tensor in dense + segment.taus] + [1] * len(segment.codes)
    wide = sum(each * width // 16 for width in widths)  # 16-byte loads of a thread
    found = len(re.findall(r"ld\.global\.v4\.b32", ptx))
    assert found >= wide if form is LowRank else found == wide  # the factors' own beside them
    if name == "merge":
        assert len(re.findall(r"st\.global\.v4\.b32", ptx)) == each * dtype.itemsize // 16
        assert ("cvt.rn.bf16" in ptx) == (dtype == torch.bfloat16)  # rounded to nearest
    if form is LowRank:
        assert "mma" in ptx  # tensor cores
    used = resources(compiled.asm["cubin"], tmp_path / "kernel.cubin")
    assert used["STACK"] == used["LOCAL"] == 0  # nothing spilled
    assert used["REG"] * threads * (1 if form is LowRank else 4) <= 65536  # programs at a time
    assert "atom" not in ptx
    assert "red.global" not in ptx
    if form is not LowRank:  # its loop over experts is not unrolled, and tensor cores do the work
        loop = used["instructions"] / (1 if segment.tiled else 2)  # the other half is a segment's last block
        assert loop <= ISSUED * each * (sum(widths) + dtype.itemsize * (name == "merge"))


def test_second_stage(tmp_path):
    from trainmerge.kernels import triton_kernels

    compiled = compile_for(triton_kernels.sum_kernel, 90, {"BLOCK": 256, "num_warps": 4})
    assert "add.f64" in compiled.asm["ptx"] or "add.rn.f64" in compiled.asm["ptx"]
    assert resources(compiled.asm["cubin"], tmp_path / "kernel.cubin")["STACK"] == 0
