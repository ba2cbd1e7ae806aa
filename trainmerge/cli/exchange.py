"""The commands `rebuild` and `push`, between exports and other people; heavy imports happen inside them."""

from typing import TYPE_CHECKING

from trainmerge.system.memory import keep_freed_memory

if TYPE_CHECKING:
    from trainmerge.export.push import Upload


def rebuild(source: str, out: str, overwrite: bool = False, workers: int = 1) -> None:
    """Merge again what an export or its model card alone describes, and compare the weight files.

    Ids of the hub are taken from its cache, or downloaded. Models without an id are looked for by their
    folder's name in the working directory. Nothing is written if a weight file differs.

    Examples: trainmerge rebuild merged/README.md again/
              trainmerge rebuild merged/ again/

    Args:
        source: The folder of an export, or its README.md.
        out: The folder to create.
        overwrite: Replace the folder if it exists.
        workers: Shards to write in parallel; their number changes no byte.
    """
    keep_freed_memory()
    from trainmerge.export.rebuild import rebuild as rebuild_merge

    print(f"merged checkpoint, with the published SHA-256: {rebuild_merge(source, out, overwrite, workers)}")


def push(out: str, repository: str, private: bool = False, dry_run: bool = False) -> None:
    """Upload an export to the hub as a model, in one commit.

    Only files that the export wrote are uploaded, and only if none was changed since. It needs an account
    and its login: `hf auth login`, or HF_TOKEN.

    Examples: trainmerge push merged/ org/name --dry-run
              trainmerge push merged/ org/name --private

    Args:
        out: The folder of an export.
        repository: The model's name on the hub, org/name.
        private: Create it as a private model; a public one of this name is refused.
        dry_run: Print files, sizes, the place and the card's metadata, and stop; the hub is not asked.
    """
    from trainmerge.export.push import plan_upload
    from trainmerge.export.push import push as upload

    if dry_run:
        print_upload(plan_upload(out, repository, private))
    else:
        print(f"uploaded: {upload(out, repository, private)}")


def print_upload(plan: "Upload") -> None:
    """Print what would be uploaded, and to where."""
    from trainmerge.system.console import print_table

    rows = [[name, f"{size:,}"] for name, size in plan.files.items()]
    rows.append(["all", f"{sum(plan.files.values()):,}"])
    kind = "private" if plan.private else "public, or as it is if it exists"
    print(f"nothing is uploaded; it would be to {plan.address} ({kind})")
    print_table("files", ["file", "bytes"], rows)
    card = [[key, _short(value)] for key, value in plan.card.items()]
    print_table("the model card", ["key", "value"], card)
    if plan.left:
        print(f"not part of the export, and not uploaded: {', '.join(plan.left)}")


def _short(value: object) -> str:
    """A value of the card's metadata on one line."""
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return ", ".join(value)
    return value if isinstance(value, str) else f"{len(value) if isinstance(value, list) else 1} entries"
