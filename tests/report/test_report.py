"""A run's report: its numbers against dense references, its page in a real browser."""

import csv
import json
import os
import re
import shutil
import subprocess
from itertools import combinations
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from tests.cli.test_cli import write_config
from tests.conftest import MakeTaskVectors
from tests.fitting.test_fit import fit_world
from tests.world import write_world
from trainmerge import write_report
from trainmerge.cli import main
from trainmerge.coefficients.chunk_allocation import magnitude
from trainmerge.coefficients.coefficients import load_coefficients
from trainmerge.coefficients.constraints import Box, Free, Sigmoid
from trainmerge.coefficients.layout import Grouping
from trainmerge.fitting.rewind import drop_incomplete
from trainmerge.kernels import ExpertWeight, LowRank, Untouched
from trainmerge.report.heatmap import EVERYTHING, grid_of, heatmap
from trainmerge.report.importance import importance_picture, magnitudes
from trainmerge.report.picture import style
from trainmerge.report.read_run import _metric, read_numbers
from trainmerge.report.scores import relative_scores, score_picture
from trainmerge.report.steps import loss_picture, path_picture
from trainmerge.report.task_vectors import norm_picture, similarity_picture
from trainmerge.run import trajectory
from trainmerge.run.folder import RunFolder
from trainmerge.run.open_run import open_run
from trainmerge.run.scores import ACCURACY, PERPLEXITY
from trainmerge.run.trajectory import Trajectory, capacity, read_trajectory, stride
from trainmerge.task_vectors import pieces
from trainmerge.task_vectors.geometry import Geometry, load_geometry, measure_geometry, save_geometry

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
    "--enable-logging=stderr", "--window-size=1100,4000",
]  # fmt: skip
SCORES = {
    "base": {"mood": 0.5, "colour": 0.25, "animal": 0.5, "mean": 0.4167, "normalised": 0.6},
    "learned": {"mood": 0.7, "colour": 0.5, "animal": 0.8, "mean": 0.6667, "normalised": 0.9},
    "expert": {"mood": 0.8, "colour": 0.5, "animal": 0.9, "mean": 0.7333, "normalised": 1.0},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small real run with scores, and its report."""
    root = tmp_path_factory.mktemp("report")
    write_world(root)
    fit_world(root, root / "run", steps=5)
    (root / "run" / "scores.json").write_text(json.dumps(SCORES))
    write_report(root / "run")
    return root / "run"


def test_scores_of_other_coefficients_are_left_out_and_named(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    later = Path(shutil.copytree(run, tmp_path / "later"))
    manifest = json.loads((later / "manifest.json").read_text())
    now = manifest["saved"][0]["coefficients"]
    assert manifest["saved"][0]["step"] == 5
    for scored, shown in ((now, True), ("0" * 64, False)):
        learned = {**SCORES["learned"], "coefficients": scored, "step": 3}
        (later / "scores.json").write_text(json.dumps({**SCORES, "learned": learned}))
        numbers = read_numbers(later)
        assert numbers.scores.keys() == ({"base", "learned", "expert"} if shown else {"base", "expert"})
        said = ["The scores are of step 3; the run is at step 5: run `trainmerge evaluate` again."]
        assert numbers.notes == ([] if shown else said)
    for time, shown in ((2**33, True), (1, False)):  # without a hash, as of older versions, the times decide
        (later / "scores.json").write_text(json.dumps(SCORES))
        os.utime(later / "scores.json", (time, time))
        assert ("learned" in read_numbers(later).scores) == shown
    (later / "scores.json").write_text(json.dumps({**SCORES, "learned": learned}))
    manifest["saved"][0]["steps"] = 80
    (later / "manifest.json").write_text(json.dumps(manifest))
    assert main(["report", str(later)]) == 0
    text = (later / "report" / "index.html").read_text()
    assert (
        "The run is unfinished: the coefficients are those of step 5 of 80. The scores are of step 3" in text
    )
    assert "unfinished: its coefficients are those of step 5 of 80" in capsys.readouterr().out


def test_the_page_holds_all_it_shows_and_asks_for_nothing(run: Path) -> None:
    text = (run / "report" / "index.html").read_text()
    assert "default-src 'none'" in text
    assert "<script" not in text
    assert set(re.findall(r"https?://[\w.]+", text)) <= {"http://www.w3.org"}  # names of formats
    asked = {target for target in re.findall(r'(?:src|href)="([^"]*)"', text) if target[:1] != "#"}
    assert {target for target in asked if not target.startswith("data:")} <= {
        file.name for file in (run / "report").iterdir()
    }
    for anchor in ("coefficients", "scores", "path", "loss", "similarity", "norms", "importance"):
        assert f'id="{anchor}"' in text
        with Image.open(run / "report" / f"{anchor}.png") as image:
            assert min(image.size) > 200
    assert text.count('role="img" aria-label="') == 7
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(set(ids)) == len(ids)
    assert set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', text)) <= {(i, "") for i in ids} | {
        ("", i) for i in ids
    }
    for name in ("mood", "colour", "animal", "0 to 5", "torch"):
        assert name in text


def test_the_tables_beside_the_pictures_are_the_run_s_numbers(run: Path) -> None:
    coefficients = load_coefficients(RunFolder(run).coefficients)
    with (run / "report" / "coefficients.csv").open() as file:
        header, *rows = list(csv.reader(file))
    assert header[1:] == list(coefficients.experts)
    told = torch.tensor([[float(value) for value in row[1:]] for row in rows]).T
    assert torch.equal(told, coefficients().detach())
    with (run / "report" / "loss.csv").open() as file:
        losses = [float(row[2]) for row in csv.reader(file) if row[0] == "all"]
    logged = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert losses == pytest.approx(logged, rel=1e-6)


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")
def test_a_browser_shows_the_page_without_a_complaint(run: Path, tmp_path: Path) -> None:
    picture = tmp_path / "page.png"
    page = (run / "report" / "index.html").as_uri()
    done = subprocess.run(
        [str(CHROMIUM), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={picture}", page],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Content Security Policy" not in done.stderr
    with Image.open(picture) as image:
        assert image.size == (1100, 4000)
        colours = image.convert("RGB").getcolors(1 << 24)
    assert colours is not None
    assert len(colours) > 1000  # a drawn page, with the scales' colours on it


def test_without_its_experts_a_run_is_still_drawn(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("workspace", "report"))
    recipe = (copy / "recipe.yaml").read_text()
    (copy / "recipe.yaml").write_text(recipe.replace("experts/mood", "experts/gone"))
    page = write_report(copy, tmp_path / "out")
    assert "could not be measured" in page.read_text()
    assert not (tmp_path / "out" / "similarity.png").exists()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="is not a report"):
        write_report(copy, foreign)
    with pytest.raises(ValueError, match="not a run folder"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("pareto.json", "{}", "`tasks` is not a list of names"),
        ("pareto.json", '{"tasks": ["mood"], "coefficients": "x", "front": [3]}', "an entry of `front`"),
        ("scores.json", '{"learned": [1, 2]}', "'learned' is [1, 2], not scores per task"),
        ("scores.json", "[]", "not a JSON object"),
        ("evaluation.json", "5", "not a JSON object"),
        ("usage.jsonl", '{"first_step": 0}\n', "no number for 'last_step'"),
        ("usage.jsonl", '{"first_\n{}\n', "line 1 is not valid JSON"),
        ("metrics.jsonl", '{"loss": 1.0}\n', "no number for 'step'"),
    ],
)
def test_files_of_another_form_are_named(
    run: Path, tmp_path: Path, name: str, content: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / name).write_text(content)
    assert main(["report", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err
    assert f"run/{name}: " in said
    assert words in said


def test_the_metric_is_that_of_the_evaluation(tmp_path: Path) -> None:
    """A classifier of its own has no heads in the recipe."""
    file = tmp_path / "evaluation.json"
    assert _metric(file, heads=False) == PERPLEXITY
    file.write_text(json.dumps({"learned": {"mood": 0.5, "measures": {"mood": {"accuracy": 0.5}}}}))
    assert _metric(file, heads=False) == ACCURACY


def test_a_resumed_fit_drops_an_incomplete_line(tmp_path: Path) -> None:
    log = tmp_path / "usage.jsonl"
    log.write_text('{"first_step": 0}\n{"first_st')
    drop_incomplete(log)
    assert log.read_text() == '{"first_step": 0}\n'
    drop_incomplete(tmp_path / "absent")


def test_a_fit_draws_itself_and_outlives_its_report(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_world(tmp_path)
    run = tmp_path / "run"
    (run / "report").mkdir(parents=True)
    (run / "report" / "mine.txt").write_text("not a report")
    config = str(write_config(tmp_path))
    fit = ["fit", "--config", config, "--run", str(run), "--trainer.max_steps", "1", "--report", "true"]
    assert main(fit) == 0
    told = capfd.readouterr()
    assert "the report failed" in told.err
    assert "coefficients: " in told.out
    assert (run / "report" / "mine.txt").read_text() == "not a report"
    assert main(["report", str(run), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "index.html").stat().st_size > 10_000


def test_geometry_is_the_dense_one(
    random_task_vectors: MakeTaskVectors, tiny_mlp: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "PIECE", 16)  # parameters in pieces
    vectors = random_task_vectors(tiny_mlp, [ExpertWeight, LowRank, ExpertWeight])
    save_geometry(measure_geometry(vectors), tmp_path / "kept.safetensors")
    geometry = load_geometry(tmp_path / "kept.safetensors")
    dense = {name: delta.dense().double().reshape(3, -1) for name, delta in vectors.deltas.items()}
    everything = torch.cat(list(dense.values()), dim=1)
    base = torch.cat([delta.base.double().flatten() for delta in vectors.deltas.values()])
    whole = geometry.of(geometry.names)
    close(whole.gram[0], everything @ everything.T)
    close(whole.base_gram[0], everything @ base)
    close(whole.sizes[0], everything.abs().sum(dim=1))
    close(whole.relative_norms()[0], everything.norm(dim=1) / base.norm())
    for i, j in combinations(range(3), 2):
        close(whole.cosines()[0, i, j], torch.cosine_similarity(everything[i], everything[j], dim=0))
        both = (everything[i] != 0) & (everything[j] != 0)
        opposed = (everything[i] * everything[j] < 0)[both].double().mean()
        close(whole.conflicts()[0, i, j], opposed)
        close(whole.cosines_with_base()[0, i], torch.cosine_similarity(base, base + everything[i], dim=0))
    name = geometry.names[0]
    close(geometry.of([name]).gram[0], dense[name] @ dense[name].T)
    untouched = [n for n, delta in vectors.deltas.items() if isinstance(delta.terms[1], Untouched)]
    assert geometry.of(untouched).cosines()[0, 1].isnan().all()


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want.to(got), rtol=2e-5, atol=1e-6)


def test_importance_is_that_of_the_second_stage(run: Path) -> None:
    numbers = read_numbers(run)
    _, coefficients, opened = open_run(RunFolder(run))
    assert numbers.geometry is not None
    ours = magnitudes(numbers.layout, numbers.values, numbers.geometry)
    with torch.no_grad():
        theirs = magnitude(opened.task_vectors, coefficients)
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_the_trajectory_is_thinned_alike_wherever_a_run_was_interrupted(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert stride(10_000, 100) == 128
    assert 10_000 / stride(10_000, 100) < capacity(100) == 128
    assert capacity(1 << 20) == trajectory.FEWEST
    monkeypatch.setattr(trajectory, "FEWEST", 3)
    monkeypatch.setattr(trajectory, "MOST", 3)
    for name, parts in {"whole": [7], "parts": [3, 5, 7]}.items():
        for steps in parts:
            fit_world(run.parent, tmp_path / name, steps=steps)
    files = [RunFolder(tmp_path / name).trajectory for name in ("whole", "parts")]
    assert files[0].read_bytes() == files[1].read_bytes()
    values = load_coefficients(RunFolder(tmp_path / "whole").coefficients)().detach()
    kept = read_trajectory(files[0], *values.shape)
    assert kept is not None
    assert kept.steps.tolist() == [0, 4]
    assert torch.equal(kept.values[0], torch.full_like(values, 0.3))
    assert not torch.equal(kept.values[0], kept.values[1])


def test_cells_are_means_over_the_kind_s_coefficients() -> None:
    shapes = {
        "embed.weight": torch.Size([8, 4]),
        "layers.0.q_proj.weight": torch.Size([4, 4]),
        "layers.0.q_proj.bias": torch.Size([4]),
        "layers.1.q_proj.weight": torch.Size([4, 4]),
        "layers.1.up_proj.weight": torch.Size([4, 4]),
    }
    layout = Grouping("chunk", chunks={"*.q_proj.weight": 2}).layout(shapes)
    values = torch.arange(2 * len(layout.labels), dtype=torch.float32).reshape(2, -1)
    grid = grid_of(layout, values)
    assert grid.blocks == ("0", "1")
    assert list(grid.inside) == ["query", "mlp up", "bias"]
    for block in (0, 1):
        groups = list(layout.groups[f"layers.{block}.q_proj.weight"])
        assert torch.equal(grid.inside["query"][:, block], values[:, groups].mean(dim=1))
    assert grid.inside["mlp up"][:, 0].isnan().all()
    assert list(grid.outside) == ["embed"]
    whole = Grouping("block").layout(shapes)
    assert list(grid_of(whole, torch.zeros(2, len(whole.labels))).inside) == [EVERYTHING]


LONG = "an-expert-whose-name-nobody-thought-would-be-in-a-picture"


@pytest.mark.parametrize(
    ("experts", "blocks", "granularity"),
    [(2, 2, "task"), (16, 24, "tensor"), (3, 80, "chunk"), (4, 3, "block"), (1, 2, "tensor")],
)
def test_pictures_of_any_size(tmp_path: Path, experts: int, blocks: int, granularity: str) -> None:
    names = [f"{LONG}-{k}" for k in range(experts)]
    kinds = ("q_proj.weight", "k_proj.weight", "down_proj.weight", "down_proj.bias", "input_norm.weight")
    names_of = [
        f"model.{s}.{b}.{kind}" for s in ("encoder", "decoder") for b in range(blocks) for kind in kinds
    ]
    shapes = dict.fromkeys([*names_of, "model.embed_tokens.weight"], torch.Size([64, 4]))
    grouping = Grouping(granularity, chunks=8 if granularity == "chunk" else 1)
    layout = grouping.layout(shapes)
    dice = torch.Generator().manual_seed(0)
    values = torch.randn(experts, len(layout.labels), generator=dice)
    P = len(shapes)
    taus = torch.randn(P, experts, 32, generator=dice).double()
    gram = taus @ taus.mT
    both = torch.full((P, experts, experts), 32.0).double()
    geometry = Geometry(
        tuple(shapes), gram, torch.ones(P).double(), gram[:, 0] / 9, both, both / 2, taus.abs().sum(dim=2)
    )
    path = Trajectory(torch.arange(3), torch.stack([values, values + 0.1, values + 0.3]))
    losses = {name: torch.tensor([[0, 500.0], [1, 0.1], [2, 0.01]]) for name in names}
    scores = {row: dict.fromkeys(names, 0.1 * i) for i, row in enumerate(("base", "learned", "expert"), 1)}
    with style():
        drawn = [
            heatmap(names, layout, values, 0.3),
            path_picture(names, path),
            loss_picture(losses),
            norm_picture(names, geometry),
            importance_picture(layout, values, geometry),
            score_picture(scores, ACCURACY),
        ]
        drawn += [similarity_picture(names, geometry)] if experts > 1 else []
        for picture in drawn:
            assert picture is not None
            width, height = picture.figure.get_size_inches()
            assert 3 < width <= 11
            assert 1 < height < 60
            picture.figure.savefig(tmp_path / f"{picture.stem}.png", dpi=40)
            assert len(picture.header) == len(picture.rows[0])


def test_scores_are_relative_to_the_experts() -> None:
    accuracies = {"base": {"a": 0.4}, "learned": {"a": 0.6}, "expert": {"a": 0.8}}
    assert relative_scores(accuracies, ACCURACY)["learned"]["a"] == pytest.approx(0.75)
    perplexities = {"base": {"a": 16.0}, "learned": {"a": 8.0}, "expert": {"a": 4.0}}
    near = relative_scores(perplexities, PERPLEXITY)
    assert [near[row]["a"] for row in near] == pytest.approx([0.0, 0.5, 1.0])
    assert relative_scores({"learned": {"a": 0.6}}, ACCURACY) == {}
    assert score_picture({"learned": {"a": 0.6}}, ACCURACY) is None


def test_coefficients_at_the_bounds() -> None:
    values = torch.tensor([[0.0, 0.5, 1.0, 0.999]])
    assert Box().at_bound(values).tolist() == [[True, False, True, False]]
    assert Sigmoid().at_bound(values).tolist() == [[True, False, True, True]]
    assert not Free().at_bound(values).any()
