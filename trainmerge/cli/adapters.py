"""Adapters out: the command `extract`, and `export --as adapter`; heavy imports happen inside them."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from trainmerge.system.memory import keep_freed_memory

if TYPE_CHECKING:
    from trainmerge.export.adapter_form import AdapterForm


def extract(
    base: str,
    expert: str,
    out: str,
    rank: int | None = None,
    energy: float | None = None,
    rest: Literal["patch", "leave"] | None = None,
    embeddings: bool = False,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    ignore: list[str] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a full fine-tune as a LoRA adapter on its base, or an adapter with another rank.

    Files are read one tensor at a time; no model is built with weights.

    Examples: trainmerge extract base/ expert/ adapter/ --rank 16 --rest leave
              trainmerge extract org/base org/expert adapter/ --energy 0.95 --rest patch

    Args:
        base: The checkpoint that the expert was fine-tuned from: a folder, or an id on the hub.
        expert: The full checkpoint, or an adapter.
        out: The folder to create.
        rank: The largest rank of a module.
        energy: The share of each module's squared norm to keep, instead of a rank.
        rest: Write what no LoRA holds to a file of differences, or leave it out; by default it is an error.
        embeddings: Factor the embeddings' changes too.
        dtype: The dtype of the factors, by default float32.
        ignore: Patterns of tensors to leave out.
        overwrite: Replace the folder if it exists.
    """
    keep_freed_memory()
    from trainmerge.export.adapter_form import AdapterForm
    from trainmerge.export.extract import extract as extract_adapter

    form = AdapterForm(rank, energy, rest, embeddings, dtype)
    print_adapters(extract_adapter(base, expert, out, form, overwrite, ignore or ()))


def export_adapters(run: str, out: str, form: "AdapterForm", overwrite: bool, verify: bool) -> None:
    """`trainmerge export --as adapter` and `adapters`."""
    from trainmerge.export.export_adapter import export_adapter

    if not compares_only(out, overwrite, verify):
        print_adapters(export_adapter(run, out, form, overwrite))
    if verify:
        from trainmerge.export.verify import verify_export

        print(f"{out}: {verify_export(run, out)} tensors are the adapters of {run}, bit for bit")


def compares_only(out: str, overwrite: bool, verify: bool) -> bool:
    """Whether an export is there already and is to be read again, not written."""
    return verify and not overwrite and Path(out).is_dir() and any(Path(out).iterdir())


def print_adapters(folder: Path) -> None:
    """Print rank and error of every module, of the whole, and what is left out."""
    from trainmerge.export.export_adapter import adapter_manifest
    from trainmerge.system.console import print_table

    manifest = adapter_manifest(folder)
    for place, found in manifest["adapters"].items():
        rows = [
            [name, str(one["rank"]), f"{one['error']:.3g}", one["how"]]
            for name, one in found["modules"].items()
        ]
        rows.append(["all", str(max(int(row[1]) for row in rows)), f"{found['error']:.3g}", ""])
        print_table(str(folder / place), ["module", "rank", "relative error", "by"], rows)
        if found["rest"]:
            patched = manifest["adapter"].get("rest") == "patch"
            where = "in trainmerge_rest.safetensors" if patched else "left out"
            print(
                f"{len(found['rest'])} tensors that no LoRA holds, {found['rest_share']:.2%} of the squared "
                f"norm, are {where}: {', '.join(found['rest'])}"
            )
    if manifest.get("own_head"):
        print(f"not in the adapter: the expert's own head, {', '.join(manifest['own_head'])}")
    print(f"adapter: {folder}")
