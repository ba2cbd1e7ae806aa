"""Tasks of the lm-evaluation-harness (EleutherAI) through its API, if it is installed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from trainmerge.data.tokenizer import Tokenizer
from trainmerge.run.config import read_yaml

HarnessTask = str | Mapping[str, Any]  # a task's name, the path of its YAML file, or its contents


class HarnessScore(NamedTuple):
    """A result of the harness; `better` is 1 where higher is better and -1 where lower is."""

    metrics: Mapping[str, float]
    better: Mapping[str, int]


def run_harness(
    module: nn.Module, base: str, tasks: Sequence[HarnessTask], limit: int | None = None, batch_size: int = 4
) -> dict[str, HarnessScore]:
    """Task -> its metrics, as the harness names them ("acc,none").

    `base` is the folder of the tokenizer. Each of several processes runs all tasks: correct, but redundant.

    Raises:
        ValueError: the harness is not installed, or has no such task.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ValueError(
            f"harness tasks need lm-eval ({error}): pip install 'trainmerge[harness]'"
        ) from error
    tokenizer = Tokenizer(base, 1)
    wrapped: Any = HFLM(
        pretrained=module,
        tokenizer=tokenizer.transformers,
        batch_size=batch_size,
        prefix_token_id=tokenizer.beginning,
    )
    try:
        found = simple_evaluate(
            model=wrapped, tasks=[_task(task) for task in tasks], limit=limit, bootstrap_iters=0
        )
    except KeyError as error:
        raise ValueError(f"the harness has no task {error}") from error
    assert found is not None  # None only on later processes of its own launcher
    return {task: _score(found, task) for task in found["results"]}


def _task(task: HarnessTask) -> Any:
    """A task in the harness's form: a name, or a mapping."""
    if isinstance(task, str) and Path(task).suffix in (".yaml", ".yml"):
        return read_yaml(Path(task))
    return dict(task) if isinstance(task, Mapping) else task


def _score(found: Mapping[str, Any], task: str) -> HarnessScore:
    results = found["results"][task]
    metrics = {
        key: float(value)
        for key, value in results.items()
        if isinstance(value, int | float) and "stderr" not in key and "," in key
    }
    higher = found["higher_is_better"].get(task, {})
    better = {key: 1 if higher.get(key.partition(",")[0], True) else -1 for key in metrics}
    return HarnessScore(metrics, better)
