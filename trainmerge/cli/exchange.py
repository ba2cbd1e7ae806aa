"""The commands `rebuild` and `push`, between exports and other people; heavy imports happen inside them."""

from trainmerge.system.memory import keep_freed_memory


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
