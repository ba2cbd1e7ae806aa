"""Packed experts: `export --as packed`, and the command `unpack`; heavy imports happen inside them."""

from collections import Counter
from pathlib import Path
from typing import Literal

from trainmerge.cli.adapters import compares_only
from trainmerge.system.memory import format_size, keep_freed_memory


def unpack(packed: str, task: str, out: str, base: str | None = None, overwrite: bool = False) -> None:
    """Write one of the experts of `trainmerge export --as packed` as an ordinary checkpoint folder.

    An expert with a head of its own becomes a checkpoint of its own class. Another base than the one that the
    experts were packed with is refused, by its files' checksums.

    Example: trainmerge unpack packed/ sentiment sentiment/

    Args:
        packed: The folder of packed experts.
        task: The expert's name.
        out: The folder to create.
        base: The base, if it is no longer where it was: a folder, or an id on the hub.
        overwrite: Replace the folder if it exists.
    """
    keep_freed_memory()
    from trainmerge.packed.unpack import unpack as unpack_task

    print(f"checkpoint of {task}: {unpack_task(packed, task, out, base, overwrite)}")


def export_packed_experts(
    run: str,
    out: str,
    codec: str | None,
    budget: str | None,
    dtype: Literal["float32", "bfloat16", "float16"] | None,
    router: bool,
    overwrite: bool,
    verify: bool,
) -> None:
    """`trainmerge export --as packed`."""
    from trainmerge.packed.export_packed import export_packed
    from trainmerge.packed.form import PackedForm

    if not compares_only(out, overwrite, verify):
        print_packed(export_packed(run, out, PackedForm(codec, budget, dtype, router), overwrite))
    if verify:
        from trainmerge.packed.verify import verify_packed

        print(f"{out}: {verify_packed(run, out)} tensors are the packed experts of {run}, bit for bit")


def print_packed(folder: Path) -> None:
    """Print the codecs, the size and every task's error."""
    from trainmerge.packed.record import read_record
    from trainmerge.system.console import print_table

    record = read_record(folder)
    print_table(
        str(folder), ["task", "relative error"], [[task, f"{e:.3g}"] for task, e in record.errors.items()]
    )
    used = Counter(one.codec for one in record.tensors.values())
    codecs = ", ".join(f"{count} {name}" for name, count in used.most_common())
    print(f"{len(record.tensors)} tensors: {codecs}")
    print(
        f"packed experts: {folder}, {format_size(record.bytes)}, {record.bits:.3g} bits per weight and task"
    )
    if record.router:
        told = record.router
        print(f"router: {told['accuracy']:.1%} of {told['held_out']} held-out texts go to their own task")
