"""The merge's share of a step: materialise and inner products over plain forward and backward.

`merge_share` is with `keep_gradients`, one task a backward; beside it the shares without, and the limit: the
two passes' bytes at the speed of a plain copy.

Two models: the suite's with 8 experts, and a Llama of 152M parameters with 3 experts, 2 x 256 tokens each.
"""

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from unittest.mock import patch

import torch

from tests.bench.__main__ import figure
from tests.bench.suite_model import demo, many_experts, texts_of
from trainmerge.coefficients.coefficients import Coefficients
from trainmerge.coefficients.layout import Grouping
from trainmerge.data.batch import Batch
from trainmerge.data.tokenizer import Tokenizer
from trainmerge.kernels import ExpertWeight, using
from trainmerge.model.merged_model import MergedModel
from trainmerge.model.resident import Resident, load_resident
from trainmerge.objectives import Entropy
from trainmerge.run.recipe import Recipe
from trainmerge.task_vectors.delta import Delta, TaskVectors

EXPERTS, BATCH, MAX_LENGTH, ROUNDS = 8, 16, 64, 5
DEMO_BATCH = 4
TOGETHER = 4  # tasks a backward, as in configs/


def clock() -> float:
    """Of this process where it has one thread, which a busy machine moves little; else of the wall."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


class Clock:
    """A method that adds up the seconds spent in it."""

    def __init__(self, method: Callable[..., object]) -> None:
        self.method, self.seconds = method, 0.0

    def of(self, instance: object, *arguments: object) -> object:
        """Call the method on an instance."""
        began = clock()
        result = self.method(instance, *arguments)
        self.seconds += clock() - began
        return result


def backwards(resident: Resident, batches: list[Batch], together: int) -> None:
    """Entropy's forwards and backwards of all tasks, `together` tasks a backward."""
    for first in range(0, len(batches), together):
        chosen = batches[first : first + together]
        torch.stack([Entropy()(resident(batch), batch).mean() for batch in chosen]).sum().backward()


def main() -> None:
    """Alternate plain and merging steps on the same batches; report medians."""
    low_rank()
    suite()
    llama()


def suite() -> None:
    """The text suite's model."""
    with many_experts(EXPERTS) as recipe:
        resident, batches = prepared(recipe, BATCH)
        measure(resident, batches, 1, "_a_task_a_backward", keep=False)
        measure(resident, batches, TOGETHER, "_four_tasks_a_backward", keep=False)
        measure(resident, batches, 1, "")


def prepared(recipe: Recipe, size: int) -> tuple[Resident, list[Batch]]:
    """The model, and `size` texts an expert."""
    opened = recipe.open()
    tokenize = Tokenizer(recipe.base, MAX_LENGTH)
    coefficients = Coefficients(tuple(recipe.experts), opened.layout)
    resident = load_resident(recipe, opened, coefficients, tokenize)
    batches = []
    for k, name in enumerate(recipe.experts):
        inputs = tokenize(texts_of(recipe, name, size))
        batches.append(Batch(k, inputs, inputs["attention_mask"].bool(), torch.arange(size)))
    return resident, batches


def low_rank() -> None:
    """The demo's step with and without its layers' weight gradients."""
    resident, batches = prepared(demo(), DEMO_BATCH)
    merged = resident.merged
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(2 * ROUNDS + 1):
        for tapped, found in seconds.items():
            began = clock()
            merged.materialise()
            with merged.tapped() if tapped else nullcontext():
                backwards(resident, batches, TOGETHER)
            found.append(clock() - began)
            merged.gradient()
    ratio = statistics.median(seconds[True][1:]) / statistics.median(seconds[False][1:])
    figure("lowrank_gradient_cpu_ratio", ratio, "ratio", "< 1")


def llama(experts: int = 3, tokens: int = 256, batch: int = 2) -> None:
    """A randomly initialised language model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 18, "vocab_size": 32000}
    config = LlamaConfig(**sizes, num_attention_heads=12, num_key_value_heads=12, tie_word_embeddings=True)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    deltas = {}
    for name, parameter in model.named_parameters():
        base = parameter.detach().clone()
        deltas[name] = Delta(
            base, tuple(ExpertWeight(base + 1e-3 * torch.randn(base.shape)) for _ in range(experts))
        )
    vectors = TaskVectors(tuple(f"expert{k}" for k in range(experts)), deltas)
    coefficients = Coefficients(vectors.experts, Grouping().layout(vectors.shapes))
    resident = Resident(MergedModel(model, vectors, coefficients), [None] * experts)
    mask = torch.ones(batch, tokens, dtype=torch.bool)
    batches = [
        Batch(
            k,
            {"input_ids": torch.randint(sizes["vocab_size"], (batch, tokens)), "attention_mask": mask.long()},
            mask,
            torch.arange(batch),
        )
        for k in range(experts)
    ]
    measure(resident, batches, 1, "_llama_150M")


def measure(resident: Resident, batches: list[Batch], together: int, suffix: str, keep: bool = True) -> None:
    """One way to cut a step: the merge's seconds over the rest's, median of the rounds."""
    resident.merged.keep_gradients = keep
    steps: dict[str, list[tuple[float, float]]] = {"eager": [], "compiled": []}
    for _ in range(ROUNDS + 1):
        for backend, found in steps.items():
            with using(backend):
                found.append(seconds(resident, batches, together))
    for backend, found in steps.items():
        name = f"merge_share{suffix}" + "_compiled" * (backend == "compiled")
        bar = "" if not keep else "0.02" if backend == "compiled" or suffix else "0.05"
        timed = found[1:]  # the first one compiled
        figure(name, statistics.median(merging / rest for merging, rest in timed), "ratio", bar)
    if keep:
        rest = statistics.median(rest for found in steps.values() for _, rest in found[1:])
        figure(f"merge_share_limit{suffix}", limit(resident) / rest, "ratio", "")


def limit(resident: Resident) -> float:
    """Seconds of both passes if their bytes went at the speed of a copy."""
    merged = resident.merged
    groups = merged.coefficients.layout.groups
    count = sum(merged.task_vectors.deltas[name].nbytes + merged.parameters[name].nbytes for name in groups)
    return 2 * count / copy_bandwidth()


def copy_bandwidth(rounds: int = 10) -> float:
    """Bytes read and written a second by a plain copy, the fastest of some."""
    source = torch.randn(1 << 26)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(rounds):
        began = clock()
        target.copy_(source)
        best = min(best, clock() - began)
    return 2 * source.nbytes / best


def seconds(resident: Resident, batches: list[Batch], together: int) -> tuple[float, float]:
    """Of one step: merging, and the rest."""
    merge, inner = Clock(MergedModel._write), Clock(MergedModel._collect)
    with (
        patch.object(MergedModel, "_write", lambda *given: merge.of(*given)),
        patch.object(MergedModel, "_collect", lambda *given: inner.of(*given)),
    ):
        began = clock()
        resident.merged.materialise()
        backwards(resident, batches, together)
        resident.merged.gradient()
        whole = clock() - began
    merging = merge.seconds + inner.seconds
    return merging, whole - merging


if __name__ == "__main__":
    main()
