"""The parts of a model card that only an adapter has: the hub's metadata, how to load it, what it lacks."""

from collections.abc import Mapping, Sequence
from typing import Any

from trainmerge.checkpoints.whole import PATCH
from trainmerge.export.adapter_form import KIND, AdapterForm, AdapterReport
from trainmerge.export.card_sources import Source, base_ids
from trainmerge.export.markdown import code, code_block, inline

PEFT = """\
from peft import PeftModel
model = PeftModel.from_pretrained(model, "{folder}")  # `model` is the {what}
"""
LOAD_PATCH = """\
import torch
from safetensors.torch import load_file

parameters = dict(model.named_parameters())  # of the {what}, before the adapter
with torch.no_grad():
    for name, difference in load_file("{folder}/{patch}").items():
        parameters[name].copy_(parameters[name].float() + difference)
"""


def adapter_metadata(
    head: Mapping[str, Any], record: Mapping[str, Any], sources: list[Source]
) -> dict[str, Any]:
    """The hub's metadata of a merge -> of its adapter: peft's, on the base alone.

    Adapters on the merged model have no base on the hub.
    """
    content = {key: value for key, value in head.items() if key not in ("base_model", "base_model_relation")}
    base = base_ids(sources[:1])
    if base and record.get(KIND) == "adapter":
        content = {"base_model": base[0], "base_model_relation": "adapter"} | content
    return content | {"library_name": "peft", "tags": ["lora", *content.get("tags", [])]}


def adapter_words(form: AdapterForm, reports: Sequence[AdapterReport]) -> str:
    """Markdown: how to load the adapters, their ranks and errors, and what they lack."""
    what = "merged model" if form.each else "base model"
    first = "Each folder is one expert as a LoRA on the merged model." if form.each else (
        "This is the merge as a LoRA on the base model."
    )  # fmt: skip
    lines = [
        f"- {inline(report.place) + ': ' if report.place else ''}{report.summary}"
        + (f". Largest errors: {', '.join(map(inline, [report.worst]))}" if report.worst else "")
        for report in reports
    ]
    folder = f"FOLDER/{reports[0].place}" if form.each else "FOLDER"
    parts = ["## Adapter", f"{first} alpha is the rank in every module.", "\n".join(lines)]
    parts.append(code_block(PEFT.format(folder=folder, what=what), "python"))
    if any(report.patched for report in reports):
        parts.append(
            f"Norms, biases and other tensors that no LoRA holds are in {code(PATCH)}, as "
            "differences under the model's parameter names. Add them first:"
        )
        parts.append(code_block(LOAD_PATCH.format(folder=folder, what=what, patch=PATCH), "python"))
    return "\n\n".join(parts)
