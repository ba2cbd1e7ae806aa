"""The GPU kernels without a GPU: interpreted, and compiled ahead of time for two generations of them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
EXPERTS = 8
ARGUMENTS = {
    "merge": {"table": "*i64", "sizes": "*i64", "segments": "*i64", "blocks": "*i64", "weights": "*fp32"},
    "inner": {"table": "*i64", "sizes": "*i64", "segments": "*i64", "blocks": "*i64", "partials": "*fp32"},
    "sum": {"partials": "*fp32", "bounds": "*i64", "sums": "*fp32", "programs": "i32"},
}


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


def compile_for(name: str, capability: int, constants: dict, warps: int):
    """One kernel for a GPU that need not be there: its PTX and machine code."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from trainmerge.kernels import triton_kernels

    arguments = ARGUMENTS[name]
    source = ASTSource(
        getattr(triton_kernels, f"{name}_kernel"),
        signature={**arguments, **dict.fromkeys(constants, "constexpr")},
        constexprs=constants,
        attrs={
            (i,): [["tt.divisibility", 16]] for i, kind in enumerate(arguments.values()) if kind[0] == "*"
        },
    )
    options = {"num_warps": warps, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(binary: bytes, path: Path) -> dict[str, int]:
    """Registers a thread, bytes of stack (spills), as NVIDIA's own tool reads them from the machine code."""
    path.write_bytes(binary)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    text = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", ["merge", "inner"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_machine_code(name, dtype, capability, tmp_path):
    from trainmerge.kernels import triton_kernels as kernels

    block, warps = getattr(kernels, f"{name.upper()}_BLOCK"), getattr(kernels, f"{name.upper()}_WARPS")
    kind = getattr(triton.language, dtype)
    constants = dict.fromkeys(("FIRST", "MODEL", "TAU"), kind)
    constants |= {"MODELS": EXPERTS, "TAUS": 0, "ALIGN": 16, "BLOCK": block}
    compiled = compile_for(name, capability, constants, warps)
    ptx = compiled.asm["ptx"]
    bits = 8 * kind.primitive_bitwidth // 8
    wide = block * bits // (32 * warps) // 128  # 16-byte loads of one tensor a thread
    tensors = EXPERTS + (1 if name == "merge" else 2)  # the origin; the gradient and the base
    assert len(re.findall(r"ld\.global\.v4\.b32", ptx)) == tensors * wide
    if name == "merge":
        assert len(re.findall(r"st\.global\.v4\.b32", ptx)) == wide
        assert ("cvt.rn.bf16" in ptx) == (dtype == "bfloat16")  # rounded to nearest
    used = resources(compiled.asm["cubin"], tmp_path / "kernel.cubin")
    assert used["STACK"] == used["LOCAL"] == 0  # nothing spilled
    assert used["REG"] <= 65536 // (32 * warps) // 4  # four programs and more at a time on each processor
    assert "atom" not in ptx
    assert "red.global" not in ptx


def test_second_stage(tmp_path):
    compiled = compile_for("sum", 90, {"BLOCK": 256}, 4)
    assert "add.f64" in compiled.asm["ptx"] or "add.rn.f64" in compiled.asm["ptx"]
    assert resources(compiled.asm["cubin"], tmp_path / "kernel.cubin")["STACK"] == 0
