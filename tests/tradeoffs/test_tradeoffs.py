"""Surrogates, fronts and searches against what is known exactly; then from the command line.

Legend: `P` points, `T` tasks, `n` coordinates.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import trainmerge as tm
from tests.cli.test_cli import write_config
from tests.world import write_world
from trainmerge.cli import main
from trainmerge.coefficients.coefficients import load_coefficients
from trainmerge.fitting.reopen import reopen
from trainmerge.report import write_report
from trainmerge.report.front import BALANCED, front_picture, notable
from trainmerge.report.read_run import read_numbers
from trainmerge.run.folder import RunFolder
from trainmerge.tradeoffs.cma_es import Search, Tried, maximise, read_log
from trainmerge.tradeoffs.front import front, lattice, nondominated
from trainmerge.tradeoffs.pareto import sobol_design
from trainmerge.tradeoffs.scales import losses_at
from trainmerge.tradeoffs.surrogate import Quadratics, fit_quadratics


def quadratics(tasks: int, n: int, generator: torch.Generator) -> Quadratics:
    roots = torch.randn(tasks, n, n, generator=generator, dtype=torch.float64)
    return Quadratics(
        torch.randn(tasks, generator=generator, dtype=torch.float64),
        torch.randn(tasks, n, generator=generator, dtype=torch.float64),
        roots + roots.transpose(1, 2),  # not convex
    )


def measured(losses: Quadratics, at: Tensor) -> tuple[Tensor, Tensor]:
    slopes = torch.func.vmap(torch.func.jacrev(losses))(at)
    return losses(at), slopes


def test_a_surrogate_of_quadratics_is_exact_with_few_points(generator: torch.Generator) -> None:
    true = quadratics(3, 5, generator)  # 21 unknowns each
    at = sobol_design(5, 6, seed=0)
    got = fit_quadratics(at, *measured(true, at))
    for name in ("constant", "linear", "curvature"):
        torch.testing.assert_close(getattr(got, name), getattr(true, name))
    far = 5 * torch.randn(7, 5, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(got(far), true(far))
    with pytest.raises(ValueError, match="needs 6"):
        fit_quadratics(at[:5], *measured(true, at[:5]))
    losses, slopes = measured(true, at)
    with pytest.raises(ValueError, match="not finite: choose a smaller --radius"):
        fit_quadratics(at, losses, slopes / 0)


def test_the_front_of_two_bowls_is_the_segment_between_their_bottoms() -> None:
    a, b = torch.tensor([-0.5, 0.0, 0.5]).double(), torch.tensor([0.5, 0.8, 0.5]).double()
    eye = torch.eye(3, dtype=torch.float64).expand(2, 3, 3)
    both = torch.stack([a, b])
    losses = Quadratics((both**2).sum(1) / 2, -both, eye)  # |u - a|^2 / 2, |u - b|^2 / 2
    found = front(losses, 30)
    along = ((found - a) @ (b - a)) / ((b - a) @ (b - a))
    torch.testing.assert_close(found, a + along[:, None] * (b - a), rtol=0, atol=2e-3)
    assert len(found) >= 25
    assert along.min() < 0.1
    assert along.max() > 0.9
    assert along.sort().values.diff().max() < 0.15  # no part of it is left out


def test_no_point_of_a_front_is_worse_than_another(generator: torch.Generator) -> None:
    losses = quadratics(3, 4, generator)
    told = losses(front(losses, 40))
    assert len(told) > 10
    for i, one in enumerate(told):
        assert not any(
            bool((other <= one).all() and (other < one).any()) for other in told[torch.arange(len(told)) != i]
        )
    anywhere = losses(2 * torch.rand(4000, 4, generator=generator, dtype=torch.float64) - 1)
    beaten = (anywhere[:, None] < told[None] - 1e-3).all(-1).any(0)
    assert beaten.double().mean() < 0.1  # nor, but for few, than any of many others


def test_dominance_and_lattices_by_hand() -> None:
    losses = torch.tensor([[1.0, 4.0], [2.0, 2.0], [2.0, 3.0], [4.0, 1.0], [2.0, 2.0]])
    assert nondominated(losses).tolist() == [True, True, False, True, True]
    assert lattice(2, 5).tolist() == [[0, 1], [0.25, 0.75], [0.5, 0.5], [0.75, 0.25], [1, 0]]
    assert len(lattice(5, 40)) == 35
    torch.testing.assert_close(lattice(3, 40).sum(1), torch.ones(len(lattice(3, 40))))


def peak(x: list[float]) -> float:
    """Ill-conditioned, highest at (1, -2, 0.5)."""
    return -sum(10**i * (a - b) ** 2 for i, (a, b) in enumerate(zip(x, (1.0, -2.0, 0.5), strict=True)))


def test_evolution_finds_a_known_optimum(tmp_path: Path) -> None:
    best = max(
        maximise(peak, [0.0, 0.0, 0.0], Search(600, 0.5), tmp_path / "log"), key=lambda tried: tried.score
    )
    assert best.x == pytest.approx([1.0, -2.0, 0.5], abs=1e-3)


def test_evolution_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """Stopped amid a generation, and amid the writing of a line; then further than the first one went."""
    whole = list(maximise(peak, [0.0] * 3, Search(60, 0.5), tmp_path / "whole"))
    asked = []

    def counted(x: list[float]) -> float:
        asked.append(x)
        return peak(x)

    log = tmp_path / "log"
    stopped = maximise(counted, [0.0] * 3, Search(60, 0.5), log)
    for _ in range(24):
        next(stopped)
    with log.open("a") as file:
        file.write('{"x": [0.123')
    assert list(maximise(counted, [0.0] * 3, Search(60, 0.5), log)) == whole
    assert len(asked) == 60  # nothing twice
    assert log.read_text() == (tmp_path / "whole").read_text()
    longer = list(maximise(counted, [0.0] * 3, Search(80, 0.5), log))
    assert longer[:60] == whole
    with pytest.raises(ValueError, match="different search: \\['seed'\\]"):
        next(maximise(counted, [0.0] * 3, Search(60, 0.5, seed=1), log))


def test_a_score_that_is_no_number_is_the_worst(tmp_path: Path) -> None:
    found = list(
        maximise(lambda x: float("nan") if x[0] > 0 else x[1], [0.0, 0.0], Search(60, 0.5), tmp_path / "l")
    )
    assert max(t.score for t in found if t.score == t.score) > 1


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    write_world(root)
    config = str(
        write_config(
            root, model__objective={"class_path": "trainmerge.Entropy", "init_args": {"agreement": 1.0}}
        )
    )
    assert main(["fit", "--config", config, "--run", str(root / "run")]) == 0
    return root


def test_slopes_in_the_scales_are_those_of_the_loss(world: Path) -> None:
    module, data = reopen(RunFolder(world / "run"), examples=3)
    module.load(data)
    at, step = torch.tensor([1.2, 0.7, 1.0], dtype=torch.float64), 1e-2
    _, slopes = losses_at(module, data, module.start, at)
    for k in range(3):
        up, down = (
            losses_at(module, data, module.start, at + s * step * torch.eye(3)[k])[0] for s in (1, -1)
        )
        torch.testing.assert_close(slopes[:, k], (up - down) / (2 * step), rtol=0.02, atol=2e-4)


def test_a_front_and_the_model_of_a_point_on_it(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = str(world / "run"), world / "point"
    assert main(["pareto", run, "--export", "0", "--out", str(out)]) == 1
    assert "no front yet" in capsys.readouterr().err
    assert main(["pareto", run, "--points", "5", "--checks", "4", "--examples", "4", "--count", "20"]) == 0
    found = json.loads((world / "run" / "pareto.json").read_text())
    told = torch.tensor([list(entry["losses"].values()) for entry in found["front"]], dtype=torch.float64)
    assert nondominated(told).all()
    assert min(check["rank_correlation"] for check in found["checks"].values()) > 0.7
    assert [entry["check"] for entry in found["measured"]] == [False] * 5 + [True] * 4
    point = found["front"][-1]
    assert main(["pareto", run, "--export", str(point["point"]), "--out", str(out)]) == 0
    got, own = (
        load_coefficients(path)
        for path in (out / "trainmerge_coefficients.safetensors", world / "run" / "coefficients.safetensors")
    )
    scales = torch.tensor([point["scales"][name] for name in own.experts])
    torch.testing.assert_close(got(), own() * scales[:, None])
    assert main(["evaluate", str(out), "--limit", "5", "--recipe", run]) == 0
    assert main(["pareto", run, "--export", "999", "--out", str(out), "--overwrite", "true"]) == 1
    assert main(["pareto", run, "--out", str(out)]) == 1
    folder = write_report(run).parent
    lines = (folder / "front.csv").read_text().splitlines()
    assert len(lines) == 1 + len(found["front"])
    assert "Trade-offs between tasks" in (folder / "index.html").read_text()
    RunFolder(Path(run)).front.write_text(json.dumps({**found, "coefficients": "of another fit"}))
    assert read_numbers(run).front is None


@pytest.mark.parametrize("tasks", [["a", "b"], ["a", "b", "c"]])
def test_the_picture_of_a_front_names_the_best_points(tasks: list[str]) -> None:
    losses = [[1.0, 4.0, 2.0], [2.0, 2.0, 2.5], [4.0, 1.0, 1.0]]
    scales = dict.fromkeys(tasks, 1.0)
    front = [
        {"point": i, "losses": dict(zip(tasks, row, strict=False)), "scales": scales}
        for i, row in enumerate(losses)
    ]
    run = dict(zip(tasks, (1.0, 1.5, 2.0), strict=False))  # not the point whose largest loss is smallest
    best = {what: point["point"] for what, point in notable(tasks, run, front).items()}
    assert best[BALANCED] == 1
    assert [best[f"best for {task}"] for task in tasks] == [0, 2, 2][: len(tasks)]
    checks = {task: {"rank_correlation": 0.9} for task in tasks}
    found = {"tasks": tasks, "front": front, "checks": checks, "measured": [{"predicted": run}]}
    picture = front_picture(found)
    assert [text.get_text() for text in picture.figure.legends[0].get_texts()] == [
        "the run",
        *(f"point {point}: {what}" for what, point in best.items()),
    ]
    assert picture.rows[0] == [0, *losses[0][: len(tasks)], *[1.0] * len(tasks)]


class NearZero:
    """A black box: how small the first merged weight is, around what it should be."""

    def __init__(self, target: float) -> None:
        self.target = target

    def __call__(self, model: nn.Module) -> float:
        return -abs(next(model.parameters()).double().mean().item() - self.target)


def test_search_from_the_command_line(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, run = str(world / "config.yaml"), world / "found"
    command = ["search", config, str(run), "--score", "loss", "--evaluations"]
    assert main([*command, "5"]) == 0
    short = (run / "search.jsonl").read_text()
    assert main([*command, "9"]) == 0
    assert (run / "search.jsonl").read_text().startswith(short)
    tried = [json.loads(line) for line in (run / "search.jsonl").read_text().splitlines()[1:]]
    assert len(tried) == 9
    best = max(tried, key=lambda one: one["score"])
    values = load_file(run / "coefficients.safetensors")["coefficients"]
    torch.testing.assert_close(values, 0.3 * torch.tensor(best["x"])[:, None].expand_as(values))
    assert main(["export", str(run), str(world / "found-merged")]) == 0
    assert main([*command, "9", "--seed", "1"]) == 1
    assert "different search" in capsys.readouterr().err
    assert main(["search", config, str(world / "run"), "--score", "loss"]) == 1
    assert "has a fit" in capsys.readouterr().err


def test_search_by_a_callable_and_by_validation_files(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(world / "config.yaml")
    few = ["--evaluations", "2", "--over", "coefficients"]
    box = ["--score", "tests.tradeoffs.test_tradeoffs.NearZero", "--score_args", '{"target": 0.1}']
    assert main(["search", config, str(world / "box"), *box, *few]) == 0
    assert main(["search", config, str(world / "no"), "--score", "accuracy", *few]) == 1
    assert "needs `validation`" in capsys.readouterr().err
    assert main(["search", config, str(world / "no"), "--score", "acuracy", *few]) == 1
    assert "no score 'acuracy'" in capsys.readouterr().err
    text = (world / "config.yaml").read_text()
    labelled = "".join(
        line + (line.replace("test:", "validation:") if line.strip().startswith("test:") else "")
        for line in text.splitlines(keepends=True)
    )
    (world / "labelled.yaml").write_text(labelled)
    assert main(["search", str(world / "labelled.yaml"), str(world / "by"), "--score", "macro_f1", *few]) == 0


def test_niches_from_the_command_line(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, folder = str(world / "config.yaml"), world / "niches"
    command = ["search", config, str(folder), "--method", "niches", "--population", "4"]
    assert main([*command, "--spread", "0.1", "--over", "experts"]) == 1
    assert "--over, --spread: only of --method cma-es" in capsys.readouterr().err
    assert main([*command, "--score", "loss", "--evaluations", "7"]) == 0
    _, *lines = (folder / "search.jsonl").read_text().splitlines()
    genomes = [json.loads(line) for line in lines]
    experts = len(tm.load_coefficients(folder / "coefficients.safetensors").experts)
    alone = torch.tensor(genomes[1]["x"]).view(experts, -1)
    assert torch.equal(alone, torch.eye(experts)[:, :1].expand_as(alone))
    assert all(0 < score <= 1 for genome in genomes for score in genome["scores"])
    best = max(genomes, key=lambda genome: genome["score"])
    values = load_file(folder / "coefficients.safetensors")["coefficients"]
    torch.testing.assert_close(values.flatten(), torch.tensor(best["x"]))
    assert main([*command, "--score", "perplexity"]) == 1
    assert "a score per example: accuracy or loss" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{broken\n", "not valid JSON"),
        ('{"a": 1}\n[1\n', "not valid JSON"),
        ('{"a": 1}\n{"y": 2}\n', "a line is not"),
    ],
)
def test_a_damaged_log_of_a_search_is_named(tmp_path: Path, text: str, words: str) -> None:
    log = tmp_path / "search.jsonl"
    log.write_text(text)
    with pytest.raises(ValueError, match=rf"^{log}: {words}.* Remove it to begin the search again"):
        read_log(log, {"a": 1}, Tried)
