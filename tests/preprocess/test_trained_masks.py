"""Trained masks: on a network by hand, the gradients of imitation, and a recipe from fit to export.

Legend: `K` experts, `B` examples, `T` tokens, `V` vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from transformers import AutoModelForCausalLM

import trainmerge as tm
from tests.methods import vectors
from tests.preprocess.test_informed import measure
from tests.world import languages_recipe, write_languages
from trainmerge.task_vectors.delta import TaskVectors


class Deep:
    """A `Calibrator` of p(y | x) = softmax(W2 relu(W1 x)), whose last ten of twenty inputs are always 0."""

    def __init__(self, given: TaskVectors) -> None:
        self.given, self.written = given, dict[str, Tensor]()
        self.x = torch.randn(64, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        self.x[:, 10:] = 0

    def keep(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return dict(tensors)

    @contextmanager
    def merge_of(self, task_vectors: TaskVectors, scale: float) -> Iterator[None]:
        assert scale == 0.0
        self.written = {name: delta.base for name, delta in task_vectors.deltas.items()}
        yield

    def write(self, name: str, weight: Tensor) -> None:
        self.written[name] = weight

    def log_p(self, weights: dict[str, Tensor]) -> Tensor:
        return ((self.x @ weights["in"].T).relu() @ weights["out"].T).log_softmax(1)

    def imitation(self, expert: int) -> Callable[[], tuple[float, dict[str, Tensor]]]:
        own = {name: delta.base + delta.dense()[expert] for name, delta in self.given.deltas.items()}
        told = self.log_p(own)

        def compared() -> tuple[float, dict[str, Tensor]]:
            weights = {name: tensor.clone().requires_grad_() for name, tensor in self.written.items()}
            loss = (told.exp() * (told - self.log_p(weights))).sum(1).mean()
            found = torch.autograd.grad(loss, list(weights.values()))
            return float(loss.detach()), dict(zip(weights, found, strict=True))

        return compared

    def divergence(self, expert: int, masks: dict[str, Tensor]) -> float:
        """Of the base with a part of an expert."""
        for name, delta in self.given.deltas.items():
            self.written[name] = delta.base + delta.dense()[expert] * masks[name]
        return self.imitation(expert)()[0]


def deep() -> Deep:
    """Two experts: three in ten entries moved a little, and those of the inputs that are 0 moved much."""
    dice = torch.Generator().manual_seed(3)
    base = {
        "in": 0.3 * torch.randn(32, 20, generator=dice, dtype=torch.float64),
        "out": 0.3 * torch.randn(5, 32, generator=dice, dtype=torch.float64),
    }
    taus = {}
    for name, tensor in base.items():
        moved = torch.rand(2, *tensor.shape, generator=dice) < 0.3
        taus[name] = 0.15 * moved * torch.randn(2, *tensor.shape, generator=dice, dtype=torch.float64)
    taus["in"][:, :, 10:] = torch.randn(2, 32, 10, generator=dice, dtype=torch.float64)
    return Deep(vectors(taus, base))


def test_a_mask_keeps_what_the_expert_says_and_not_what_is_large() -> None:
    network = deep()
    taus = {name: delta.dense()[0] for name, delta in network.given.deltas.items()}
    masks = tm.TrainedMasks().masks(network.given, 0, network)  # type: ignore[arg-type]
    count = sum(int(mask.sum()) for mask in masks.values())
    assert not masks["in"][:, 10:].any()  # no input, no effect
    assert not any((mask & (taus[name] == 0)).any() for name, mask in masks.items())
    base = network.divergence(0, {name: torch.zeros(()) for name in taus})
    assert network.divergence(0, masks) < 0.15 * base
    for read in (20, 10):  # the largest of all entries, and of those that are read
        known = torch.cat([taus["in"][:, :read].flatten(), taus["out"].flatten()]).abs()
        limit = known.topk(count).values[-1]
        largest = {name: tau.abs() >= limit for name, tau in taus.items()}
        largest["in"][:, read:] = False
        assert network.divergence(0, masks) < 0.5 * network.divergence(0, largest)


def test_sparsity_closes_entries_and_overlaps_are_averaged() -> None:
    network = deep()
    counts = []
    for sparsity in (0.1, 1.0, 10.0):
        masks = tm.TrainedMasks(sparsity, steps=20, rate=0.5).masks(network.given, 1, network)  # type: ignore[arg-type]
        counts.append(sum(int(mask.sum()) for mask in masks.values()))
    assert counts[0] > counts[1] > counts[2] > 0
    method = tm.TrainedMasks(0.1, steps=20, rate=0.5)
    both = [method.masks(network.given, k, network) for k in range(2)]  # type: ignore[arg-type]
    overlap = 0
    for name, got in method.informed(network.given, network):  # type: ignore[arg-type]
        kept = torch.stack([own[name] for own in both])
        overlap += int(kept.all(0).sum())
        want = network.given.deltas[name].dense() * kept / kept.sum(0).clamp_min(1)
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert overlap


def test_an_expert_that_changed_nothing_has_an_empty_mask() -> None:
    network = deep()
    deltas = {name: torch.zeros_like(delta.dense()) for name, delta in network.given.deltas.items()}
    bases = {name: delta.base for name, delta in network.given.deltas.items()}
    still = Deep(vectors(deltas, bases))
    for _, taus in tm.TrainedMasks(steps=2).informed(still.given, still):  # type: ignore[arg-type]
        assert not taus.any()


@pytest.fixture(scope="module")
def languages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_languages(tmp_path_factory.mktemp("languages"))


def test_imitation_has_the_gradients_of_a_plain_model(languages: Path, tmp_path: Path) -> None:
    """KL of all next tokens of all examples, by transformers alone, one example at a time."""
    made, given = measure(languages_recipe(languages), tmp_path)
    compared = made.imitation(1)
    with made.merge_of(given, 0.5):
        loss, slopes = compared()
    base, a, b = (AutoModelForCausalLM.from_pretrained(languages / name) for name in ("base", "a", "b"))
    others = [dict(model.named_parameters()) for model in (a, b)]
    weights = {
        name: (own + sum(0.5 * (other[name] - own) for other in others)).detach().requires_grad_()
        for name, own in base.named_parameters()
    }
    total, rows = torch.zeros(()), 0
    for example in made.examples[1]:
        ids = made.tokenizer.encode([example]).inputs["input_ids"]
        told = b(ids).logits[0, :-1].log_softmax(-1).detach()
        log_p = functional_call(base, weights, (ids,)).logits[0, :-1].log_softmax(-1)
        total, rows = total + (told.exp() * (told - log_p)).sum(), rows + len(told)
    want = dict(zip(weights, torch.autograd.grad(total / rows, list(weights.values())), strict=True))
    assert loss == pytest.approx(float(total.detach() / rows), rel=1e-4)
    assert slopes.keys() == want.keys()
    for name, slope in slopes.items():
        torch.testing.assert_close(slope, want[name], rtol=1e-3, atol=1e-5 * float(want[name].abs().max()))
    with made.resident.merged.teacher(1):
        assert compared()[0] == pytest.approx(0.0, abs=1e-6)


def test_a_recipe_with_trained_masks_is_exported(languages: Path, tmp_path: Path) -> None:
    """Every entry of the export is the base's, one expert's, or the mean of both; again from the cache."""
    merge = languages_recipe(languages, preprocess=[tm.TrainedMasks(0.3, steps=4, rate=1.0)])
    data = tm.Calibration({n: e.calibration for n, e in merge.experts.items()}, merge.base, max_length=16)
    module = tm.MergeModule(merge, initial=1.0, workspace=str(tmp_path / "run" / "workspace"))
    trainer = tm.make_trainer(tmp_path / "run", max_steps=0, accelerator="cpu", enable_progress_bar=False)
    tm.fit(module, data, trainer, tmp_path / "run")
    out = AutoModelForCausalLM.from_pretrained(tm.export_run(tmp_path / "run", tmp_path / "merged"))
    merged = dict(out.named_parameters())
    names = ("base", "a", "b")
    base, a, b = (dict(AutoModelForCausalLM.from_pretrained(languages / n).named_parameters()) for n in names)
    seen = torch.zeros(4, dtype=torch.int64)
    for name, got in merged.items():
        both = (a[name] + b[name]) / 2
        near = torch.stack([(got - want).abs() < 1e-6 for want in (base[name], a[name], b[name], both)])
        assert near.any(0).all()
        seen += near.flatten(1).sum(1)
    assert (seen > 0).all()
