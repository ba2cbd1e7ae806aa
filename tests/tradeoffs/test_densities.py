"""Densities of the experts in a search: the trim itself, its rule in one pass, and a search from files.

Legend: `K` experts.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import trainmerge as tm
from tests.methods import vectors
from tests.world import languages_recipe, write_languages
from trainmerge.cli import main
from trainmerge.coefficients.coefficients import load_coefficients, save_coefficients
from trainmerge.preprocess import Magnitudes
from trainmerge.preprocess.trim import share_of_count
from trainmerge.run.config import to_config
from trainmerge.run.folder import RunFolder
from trainmerge.run.open_run import open_run
from trainmerge.task_vectors.pieces import in_pieces
from trainmerge.task_vectors.top_k import count
from trainmerge.tradeoffs.cma_es import Search, maximise
from trainmerge.tradeoffs.space import SearchSpace


def taus(ties: bool = False, seed: int = 0) -> dict[str, Tensor]:
    """Three experts of very different sizes, one parameter large enough for several pieces."""
    dice = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([1.0, 1e-3, 30.0])
    found = {
        name: torch.randn(3, *shape, generator=dice) * sizes.view(3, *[1] * len(shape))
        for name, shape in {"a": (700, 300), "b": (50,), "c": (40, 30), "temperature": ()}.items()
    }
    return {name: tau.bfloat16().float() if ties else tau for name, tau in found.items()}


def largest(given: dict[str, Tensor], expert: int, density: float) -> dict[str, Tensor]:
    """The reference: a stable sort of all entries of one expert."""
    flat = torch.cat([tau[expert].flatten() for tau in given.values()])
    order = flat.abs().argsort(descending=True, stable=True)[: count(len(flat), density)]
    kept = torch.zeros_like(flat).index_copy_(0, order, flat[order])
    parts = kept.split([tau[expert].numel() for tau in given.values()])
    return {
        name: part.view(tau[expert].shape) for (name, tau), part in zip(given.items(), parts, strict=True)
    }


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("densities", [(0.3, 0.3, 0.3), (0.05, 0.9, 1.0), (1.0, 1e-5, 0.5)])
def test_every_expert_keeps_its_share(densities: tuple[float, ...], ties: bool) -> None:
    given = taus(ties)
    found = dict(tm.Trim(densities)(vectors(given)))
    for expert, density in enumerate(densities):
        for name, want in largest(given, expert, density).items():
            assert torch.equal(found[name][expert], want)
    if len(set(densities)) == 1:
        for name, same in tm.Trim(densities[0])(vectors(given)):
            assert torch.equal(found[name], same)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("wanted", [(0.3, 0.02, 0.77), (1.0, 0.5, 0.001)])
def test_one_histogram_gives_the_rule_of_the_method(wanted: tuple[float, ...], ties: bool) -> None:
    given = vectors(taus(ties))
    densities, rule = Magnitudes(given).trim(wanted)
    want = dict(tm.Trim(densities)(given))
    for name, delta in given.deltas.items():
        parts = [rule(piece, part) for _, piece, part in in_pieces(name, delta)]
        got = torch.cat(parts, dim=1) if delta.shape else parts[0]
        assert torch.equal(got, want[name])
    for density, least in zip(densities, wanted, strict=True):
        assert least - 1e-5 <= density <= 1.06 * least + 1e-5  # the next limit between two buckets


def test_a_share_keeps_its_count_of_any_size() -> None:
    dice = torch.Generator().manual_seed(0)
    for _ in range(300):
        size = int(10 ** (13 * float(torch.rand(1, generator=dice)))) + 1
        kept = 1 + int(torch.rand(1, generator=dice, dtype=torch.float64) * (size - 1))
        assert count(size, share_of_count(kept, size)) == kept


def test_densities_of_other_experts_are_refused() -> None:
    with pytest.raises(ValueError, match="2 numbers for 3 experts"):
        list(tm.Trim((0.5, 0.5))(vectors(taus())))
    with pytest.raises(ValueError, match="density"):
        tm.Trim((0.5, 0.0))


class Digest:
    """A score that two models share only if their weights are the same, bit for bit."""

    def __call__(self, model: nn.Module) -> float:
        digest = hashlib.sha256()
        for name, weight in sorted(model.state_dict().items()):
            digest.update(name.encode() + weight.contiguous().numpy().tobytes())
        return float(int(digest.hexdigest()[:12], 16))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_languages(tmp_path_factory.mktemp("world"))
    for name, change in {"config": {}, "quantised": {"quantise": {"class_path": "trainmerge.Int8"}}}.items():
        model = {"initial": 0.6, "objective": {"class_path": "trainmerge.Alignment"}, **change}
        content = {
            "recipe": to_config(languages_recipe(root)),
            "model": model,
            "data": {"batch_size": 2, "max_length": 8},
            "trainer": {"accelerator": "cpu"},
        }
        (root / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return root


def weights(folder: Path) -> dict[str, Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())


def differences(world: Path) -> dict[str, Tensor]:
    """The task vectors of the two experts, [2, *S]."""
    base, *experts = (weights(world / name) for name in ("base", "a", "b"))
    return {name: torch.stack([e[name] - own for e in experts]).detach() for name, own in base.items()}


@pytest.mark.parametrize("method", ["cma-es", "niches"])
def test_a_search_of_densities_resumes_and_exports_what_it_scored(
    world: Path, tmp_path: Path, method: str
) -> None:
    """The score is a digest of the weights, so the best merge and its export are equal bit for bit."""
    run, again, out = tmp_path / "run", tmp_path / "again", tmp_path / "out"
    score = f"{__name__}.Digest" if method == "cma-es" else "loss"
    search = ["search", str(world / "config.yaml"), "--score", score, "--densities", "--method", method]
    assert main([*search, str(run), "--evaluations", "9"]) == 0
    assert main([*search, str(again), "--evaluations", "4"]) == 0
    assert main([*search, str(again), "--evaluations", "9"]) == 0
    for file in ("search.jsonl", "coefficients.safetensors"):
        assert (run / file).read_bytes() == (again / file).read_bytes()
    assert main(["export", str(run), str(out), "--verify"]) == 0
    tried = [json.loads(line) for line in (run / "search.jsonl").read_text().splitlines()[1:]]
    best = max(tried, key=lambda one: one["score"])
    if method == "cma-es":
        assert Digest()(AutoModelForCausalLM.from_pretrained(out)) == best["score"]
    else:  # the start, a and b alone: whole, then at a tenth
        own = [torch.tensor(one["x"]).view(2, -1)[:, -1] for one in tried]
        assert [share.tolist() for share in own[:6]] == [[1.0] * 2] * 3 + [pytest.approx([0.1] * 2)] * 3
    found = load_coefficients(run / "coefficients.safetensors")
    recipe, _, _ = open_run(RunFolder(run))
    assert recipe.preprocess == (tm.Trim(found.densities),)
    wanted = torch.tensor(best["x"]).view(2, -1)[:, -1]
    wanted = torch.minimum(wanted.abs(), 2 - wanted.abs())
    torch.testing.assert_close(torch.tensor(found.densities), wanted, rtol=0.06, atol=1e-3)
    exported = yaml.safe_load((out / "trainmerge_recipe.yaml").read_text())["recipe"]["preprocess"]
    assert exported[-1] == {"class_path": "trainmerge.Trim", "init_args": {"density": [*found.densities]}}
    assert_close_to_float64(world, out, found)
    start = str(run / "coefficients.safetensors")
    trimmed = languages_recipe(world, preprocess=[tm.Trim(found.densities)])
    tm.MergeModule(trimmed, initial=start, workspace=str(tmp_path / "workspace"))
    with pytest.warns(UserWarning, match="make trainmerge.Trim with density"):
        tm.MergeModule(languages_recipe(world), initial=start, workspace=str(tmp_path / "workspace"))


def assert_close_to_float64(world: Path, out: Path, found: tm.Coefficients) -> None:
    """The export against base + sum_k c_k tau_k in float64, tau_k trimmed by a stable sort."""
    given, base = differences(world), weights(world / "base")
    trimmed = [largest(given, expert, share) for expert, share in enumerate(found.densities)]
    values = found().detach()
    for name, got in weights(out).items():
        own = found.of(name, values)[:, 0].double()
        parts = [base[name].double(), *(c * tau[name].double() for c, tau in zip(own, trimmed, strict=True))]
        bound = 4 * torch.finfo(torch.float32).eps * sum(part.abs() for part in parts)
        assert ((got.double() - sum(parts)).abs() <= bound).all(), name


def test_a_search_finds_the_densities_of_a_known_merge(tmp_path: Path) -> None:
    """The target is all of the first expert and the largest tenth of the second."""
    dice = torch.Generator().manual_seed(0)
    given = {"w": torch.randn(2, 50, 60, generator=dice)}
    space = SearchSpace(torch.full((2, 1), 0.6), "experts", Magnitudes(vectors(given)))
    target = given["w"][0] + largest(given, 1, 0.1)["w"]
    delta = vectors(given).deltas["w"]

    def near(x: Sequence[float]) -> float:
        trim = space.trim(x)
        assert trim is not None
        merged = torch.einsum("kg,kij->ij", space.coefficients(x), trim[1]("w", delta).float())
        return -float((merged - target).norm())

    tried = maximise(near, space.first(), Search(500), tmp_path / "log")
    best = space.found(max(tried, key=lambda one: one.score))
    torch.testing.assert_close(best.coefficients, torch.ones(2, 1), rtol=0, atol=0.05)
    assert best.densities[0] > 0.85  # the entries below it are near 0
    assert best.densities[1] == pytest.approx(0.1, abs=0.03)


def test_densities_beyond_their_range_are_reflected() -> None:
    space = SearchSpace(torch.ones(3, 1), "experts", Magnitudes(vectors(taus())))
    inside, beyond = (space.trim([1, a, 1, b, 1, c]) for a, b, c in [(0.7, 0.2, 0.5), (1.3, -0.2, 2.5)])
    assert inside is not None
    assert beyond is not None
    assert inside[0] == beyond[0]
    assert space.first() == [1.0] * 6


def test_what_a_search_of_densities_refuses(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(tmp_path / "run")
    words = ["--score", "loss", "--evaluations", "2"]
    assert main(["search", str(world / "quantised.yaml"), run, *words, "--densities"]) == 1
    assert "leave out model.quantise" in capsys.readouterr().err
    assert main(["search", str(world / "config.yaml"), run, *words]) == 0
    assert not load_coefficients(tmp_path / "run" / "coefficients.safetensors").densities
    assert main(["search", str(world / "config.yaml"), run, *words, "--densities"]) == 1
    assert "different search" in capsys.readouterr().err


@pytest.mark.parametrize("densities", ["[0.5]", "[0.5, 2.0]", "[0.5, 0.0]", '"a"', "{"])
def test_damaged_densities_in_a_file_are_an_error(tmp_path: Path, densities: str) -> None:
    layout = tm.Grouping().layout({"w": torch.Size([2, 3])})
    own = tm.Coefficients(("a", "b"), layout)
    own.densities = (0.5, 1.0)
    save_coefficients(own, tmp_path / "own")
    assert load_coefficients(tmp_path / "own").densities == own.densities
    header = {"experts": json.dumps(own.experts), "layout": layout.to_json(), "densities": densities}
    save_file({"coefficients": own().detach()}, tmp_path / "damaged", header)
    with pytest.raises(ValueError, match="its header is damaged"):
        load_coefficients(tmp_path / "damaged")
