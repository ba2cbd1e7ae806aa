"""The metadata at the head of a model card, in the hub's schema."""

import re
from collections.abc import Mapping
from typing import Any

from trainmerge.export.card_sources import Source, base_ids, datasets, licences
from trainmerge.export.markdown import code, inline

TASKS = {  # ending of a transformers class -> the hub's name of its task
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForImageClassification": "image-classification",
    "ForSpeechSeq2Seq": "automatic-speech-recognition",
    "ForCTC": "automatic-speech-recognition",
    "ForImageTextToText": "image-text-to-text",
}
OF_METRIC = {"accuracy": "text-classification", "perplexity": "text-generation"}
Scores = tuple[str, Mapping[str, float]]  # the metric, and task -> score


def hub_metadata(
    name: str,
    sources: list[Source],
    config: Mapping[str, Any],
    sentences: bool = False,
    scores: Scores | None = None,
) -> dict[str, Any]:
    """The metadata of a merge.

    Args:
        name: The model's.
        sources: The base, and every expert.
        config: The base's config.json.
        sentences: Whether it is a model of sentence-transformers.
        scores: Those of the merge, if they are known.
    """
    ids = base_ids(sources)
    task = pipeline_tag(sources[0], config, sentences)
    content: dict[str, Any] = {}
    if ids:
        content |= {"base_model": ids, "base_model_relation": "merge"}
    content |= _licence(sources)
    content["library_name"] = "sentence-transformers" if sentences else "transformers"
    if task:
        content["pipeline_tag"] = task
    if languages := list(dict.fromkeys(one for source in sources for one in source.texts("language"))):
        content["language"] = languages
    if named := list(datasets(sources)):
        content["datasets"] = named
    content["tags"] = ["merge", "trainmerge"]
    if scores is not None:
        content["model-index"] = [{"name": name, "results": _results(scores, task)}]
    return content


def pipeline_tag(base: Source, config: Mapping[str, Any], sentences: bool = False) -> str | None:
    """The hub's name of the model's task: the base's own, or by its class; None if neither says it."""
    own = base.metadata.get("pipeline_tag")
    if isinstance(own, str) and re.fullmatch(r"[a-z0-9-]+", own):
        return own
    if sentences:
        return "sentence-similarity"
    classes = config.get("architectures")
    first = classes[0] if isinstance(classes, list) and classes and isinstance(classes[0], str) else ""
    if first.endswith("ForConditionalGeneration"):
        return "image-text-to-text" if "vision_config" in config else None
    found = [task for ending, task in TASKS.items() if first.endswith(ending)]
    return found[0] if found else "feature-extraction" if first.endswith("Model") else None


def _licence(sources: list[Source]) -> dict[str, str]:
    """The one licence of all whose README names one; `other` if they differ; nothing if none does."""
    named = [source for source in sources if source.licence]
    if not named:
        return {}
    if len({source.licence for source in named}) > 1:
        return {"license": "other", "license_name": "several", "license_link": "README.md"}
    keys = ("license", "license_name", "license_link") if named[0].metadata["license"] == "other" else ()
    own = {key: str(named[0].metadata[key]) for key in keys if key in named[0].metadata}
    return own or {"license": str(named[0].licence)}


def licence_words(sources: list[Source]) -> str:
    """A sentence on the licences, where they differ or some are unknown; empty otherwise."""
    found = licences(sources)
    if found.keys() == {"unknown"} or len(found) == 1:
        return ""
    parts = [f"{code(licence)} ({', '.join(map(inline, names))})" for licence, names in found.items()]
    return f"Licences of what was merged, as their cards name them: {', '.join(parts)}."


def _results(scores: Scores, task: str | None) -> list[dict[str, Any]]:
    """One entry per task, as `huggingface_hub.EvalResult` has it."""
    metric, values = scores
    kind = task or OF_METRIC.get(metric, "text-classification")
    return [
        {
            "task": {"type": kind},
            "dataset": {"name": name, "type": re.sub(r"[^\w.-]+", "-", name).strip("-").lower() or "own"},
            "metrics": [{"type": metric, "value": value}],
        }
        for name, value in values.items()
    ]
