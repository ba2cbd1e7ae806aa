"""The router: Fisher's discriminant against its formula, and texts of a run sent to their tasks."""

import json
from pathlib import Path

import pytest
import torch

import trainmerge as tm
from tests.world import WORDS, languages_recipe, write_languages
from trainmerge.cli import main
from trainmerge.packed.router import fit_router


def test_the_nearest_mean_by_the_shrunk_covariance() -> None:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(6, 6, generator=generator)
    centres = 2 * torch.randn(3, 6, generator=generator)
    sizes = (20, 30, 40)
    rows = [torch.randn(n, 6, generator=generator) @ mix + c for n, c in zip(sizes, centres, strict=True)]
    router = fit_router(rows)
    means = torch.stack([own.double().mean(dim=0) for own in rows])
    inside = torch.cat([own - mean for own, mean in zip(rows, means, strict=True)])
    covariance = inside.T @ inside / 90
    shrunk = 90 / 96 * covariance + 6 / 96 * covariance.diagonal().mean() * torch.eye(6, dtype=torch.float64)
    whole = torch.cat(rows).double()
    apart = whole[:, None] - means
    distances = torch.einsum("nkd,de,nke->nk", apart, shrunk.inverse(), apart)
    assert torch.equal(router(whole), distances.argmin(dim=1))


def test_more_dimensions_than_texts_and_equal_rows() -> None:
    rows = [torch.randn(4, 50, generator=torch.Generator().manual_seed(k)) + 3 * k for k in range(2)]
    router = fit_router(rows)
    assert router(torch.cat(rows)).tolist() == [0] * 4 + [1] * 4
    same = fit_router([torch.zeros(3, 5), torch.ones(3, 5)])  # no covariance at all
    assert same(torch.stack([torch.zeros(5), torch.ones(5)])).tolist() == [0, 1]


def test_texts_go_to_their_tasks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_languages(tmp_path)
    for name, words in (("a", WORDS[:8]), ("b", WORDS[10:])):
        rows = [{"text": " ".join(words[(3 * i + j) % 8] for j in range(3 + i % 4))} for i in range(24)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe, run = languages_recipe(tmp_path), tmp_path / "run"
    module = tm.MergeModule(recipe, initial=0.4, workspace=str(run / "workspace"))
    trainer = tm.make_trainer(run, max_steps=0, accelerator="cpu", enable_progress_bar=False)
    tm.fit(module, tm.Calibration({n: str(tmp_path / f"{n}.jsonl") for n in "ab"}, recipe.base), trainer, run)
    out = str(tmp_path / "packed")
    assert main(["export", str(run), out, "--as", "packed", "--codec", "ternary", "--router"]) == 0
    assert "100.0% of 16 held-out texts go to their own task" in capsys.readouterr().out
    told = json.loads((tmp_path / "packed" / "packed.json").read_text())["router"]
    assert told["tasks"] == {"a": 1.0, "b": 1.0}
    assert (told["fitted_on"], told["held_out"]) == (32, 16)
    packed = tm.open_packed(out)
    assert packed.route(["good happy", "blue cat dog fish", "bad sad great"]) == ["a", "b", "a"]
    plain = tm.export_packed(run, tmp_path / "plain", tm.PackedForm("ternary"))
    with pytest.raises(ValueError, match="has no router: export the run again, with --router"):
        tm.open_packed(plain).route(["good"])
