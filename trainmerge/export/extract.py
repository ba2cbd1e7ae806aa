"""A LoRA out of a full fine-tune, or an adapter of another rank: from files, one tensor at a time."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from trainmerge.checkpoints import find_own_heads, find_sources, lora_targets, open_checkpoint
from trainmerge.export.adapter import write_adapter
from trainmerge.export.adapter_card import adapter_metadata, adapter_words
from trainmerge.export.adapter_form import AdapterForm, AdapterReport, adapter_record
from trainmerge.export.adapter_source import AdapterSource
from trainmerge.export.card_metadata import hub_metadata
from trainmerge.export.card_sources import Source, base_origin, source_of
from trainmerge.export.explain import write_export_manifest
from trainmerge.export.export import check_target
from trainmerge.export.export_adapter import warn_of_errors
from trainmerge.export.markdown import code, inline
from trainmerge.system.hub import folder_of
from trainmerge.system.staging import staging
from trainmerge.task_vectors.changes import Change

EXPERT = "expert"


def extract(
    base: str | Path,
    expert: str | Path,
    out: str | Path,
    form: AdapterForm | None = None,
    overwrite: bool = False,
    ignore: Sequence[str] = (),
    allow_pickle: bool = False,
) -> Path:
    """Write expert - base as a LoRA adapter on the base; no model is built with weights.

    An expert that is an adapter itself is recompressed from its factors.

    Args:
        base: The checkpoint that the expert was fine-tuned from: a folder, or an id on the hub.
        expert: The full checkpoint or adapter.
        out: The folder to create.
        form: Rank or energy, what becomes of changes that no LoRA holds, and the dtype.
        overwrite: Replace `out` if it is such a folder already.
        ignore: fnmatch patterns of tensors to leave out.
        allow_pickle: Read `.bin` files too.

    Raises:
        FileExistsError: `out` exists and `overwrite` is not set.
        ValueError: base and expert do not match; or, as `write_adapter`, a choice in `form` is missing.
    """
    form, target = form or AdapterForm(), Path(out)
    if form.each:
        raise ValueError("extract writes one adapter: leave out `each`")
    folders = [folder_of(str(path), True, allow_pickle) for path in (base, expert)]
    check_target(target, folders)
    with staging(target, overwrite) as folder:
        workspace = folder / ".workspace"  # of adapters that are not plainly low-rank
        checkpoint = open_checkpoint(folders[0], allow_pickle)
        sources = find_sources(
            checkpoint, {EXPERT: folders[1]}, ignore=ignore, allow_pickle=allow_pickle, workspace=workspace
        )
        one = torch.ones(1, 1, dtype=torch.float64)
        changes = {name: Change(name, delta, one) for name, delta in sources.open(checkpoint).deltas.items()}
        named = zip(("base", EXPERT), (base, expert), folders, strict=True)
        described = [source_of(name, str(path), where) for name, path, where in named]
        source = AdapterSource(
            checkpoint, lora_targets(checkpoint, ignore), changes, base_origin(described), str(expert)
        )
        report, made = write_adapter(source, form, folder)
        heads = find_own_heads(checkpoint, {EXPERT: folders[1]}, sources, ignore, allow_pickle)
        left = sorted(heads[EXPERT].own) if EXPERT in heads else []
        card = _card(target.name, described, checkpoint.config, form, report, left)
        (folder / "README.md").write_text(card, encoding="utf-8")
        record = {"extracted": True, "own_head": left} | adapter_record(form, [report])
        write_export_manifest(folder, made, None, record)
        shutil.rmtree(workspace, ignore_errors=True)
    warn_of_errors([report])
    return target


def _card(
    name: str,
    sources: list[Source],
    config: Mapping[str, Any],
    form: AdapterForm,
    report: AdapterReport,
    left: Sequence[str],
) -> str:
    """The model card; it names no path of this machine."""
    head = dict(adapter_metadata(hub_metadata(name, sources, config), form.to_json(), sources))
    head["tags"] = [tag for tag in head["tags"] if tag != "merge"]
    base, expert = sources
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False, width=110)}---\n# {inline(name)}",
        f"The difference of {code(expert.label)} from {code(base.label)} as a LoRA, made by trainmerge.",
        adapter_words(form, [report]),
    ]
    if left:
        parts.append(f"Not in the adapter: the expert's own head, {', '.join(map(code, left))}.")
    return "\n\n".join(parts) + "\n"
