"""Modules after the model, as sentence-transformers saves them: read, merged, written.

Legend: `D` hidden size, `E` width of the embedding.
"""

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import trainmerge as tm
from tests.embedders import dense, write_embedder, write_embedders
from trainmerge.checkpoints import load_meta_model, load_model, open_checkpoint
from trainmerge.checkpoints.integrity import as_recorded, as_then, fingerprint, same_weights, stamps
from trainmerge.export.verify import verify_export

WEIGHT, BIAS = "2_Dense.linear.weight", "2_Dense.linear.bias"
FILE = "2_Dense/model.safetensors"


def test_a_dense_layers_weights_are_merged_with_coefficients_of_their_own(tmp_path: Path) -> None:
    recipe = write_embedders(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*2_Dense")
        opened = recipe.open()
    assert [opened.task_vectors.deltas[name].role for name in (WEIGHT, BIAS)] == ["linear", "vector"]
    assert {WEIGHT, BIAS} < set(opened.layout.labels)
    module = tm.MergeModule(recipe, initial=[0.25, 0.5])
    data = tm.Calibration({n: str(tmp_path / f"{n}.jsonl") for n in "ab"}, recipe.base)
    trainer = tm.make_trainer(tmp_path / "run", max_steps=0, accelerator="cpu", enable_progress_bar=False)
    tm.fit(module, data, trainer, tmp_path / "run")
    tm.export_run(tmp_path / "run", tmp_path / "merged")
    got = load_file(tmp_path / "merged" / FILE)
    for name, base in dense(0).items():
        want = base.double() + sum(
            c * (dense(k)[name].double() - base.double()) for k, c in ((1, 0.25), (2, 0.5))
        )
        torch.testing.assert_close(got[name].double(), want, rtol=1e-6, atol=1e-7)
    assert (tmp_path / "merged/modules.json").read_text() == (tmp_path / "base/modules.json").read_text()
    compared = verify_export(tmp_path / "run", tmp_path / "merged")
    assert compared == len(opened.base.tensors) + 2
    save_file({**got, "linear.bias": got["linear.bias"] + 1}, tmp_path / "merged" / FILE)
    with pytest.raises(ValueError, match=r"2_Dense\.linear\.bias \(merged\) differs in 16 of 16 numbers"):
        verify_export(tmp_path / "run", tmp_path / "merged")


def test_equal_layers_are_no_parameters_of_the_merge(tmp_path: Path) -> None:
    recipe = write_embedders(tmp_path)
    for name in "ab":
        save_file(dense(0), tmp_path / name / FILE)
    opened = recipe.open()
    assert not {WEIGHT, BIAS} & opened.task_vectors.deltas.keys()


def test_a_layer_that_one_expert_changed_is_the_bases_in_the_other(tmp_path: Path) -> None:
    recipe = write_embedders(tmp_path)
    save_file(dense(0), tmp_path / "b" / FILE)
    delta = recipe.open().task_vectors.deltas[WEIGHT]
    merged = torch.empty(delta.shape)
    delta.merge(merged, torch.tensor([[0.0], [7.0]]))
    assert torch.equal(merged, dense(0)["linear.weight"])


def test_patterns_leave_layers_out(tmp_path: Path) -> None:
    write_embedders(tmp_path)
    experts = {n: tm.Expert(str(tmp_path / n)) for n in "ab"}
    base = str(tmp_path / "base")
    opened = tm.Recipe(base, experts, grouping=tm.Grouping(exclude=["2_Dense.*"])).open()
    assert {WEIGHT, BIAS} <= opened.layout.excluded.keys()
    opened = tm.Recipe(base, experts, ignore=["2_Dense.*"]).open()
    assert not {WEIGHT, BIAS} & opened.task_vectors.deltas.keys()


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        ({"linear.weight": torch.ones(3, 32), "linear.bias": torch.ones(16)}, r"is \(3, 32\), the base's"),
        ({"linear.weight": torch.ones(16, 32)}, r"lacks 2_Dense\.linear\.bias, which the base has"),
        ({"weight": torch.ones(16, 32)}, r"a Dense module has linear\.weight, and linear\.bias"),
    ],
)
def test_layers_that_do_not_fit_are_refused_by_file_and_tensor(tmp_path: Path, layer, words: str) -> None:
    recipe = write_embedders(tmp_path)
    save_file(layer, tmp_path / "a" / FILE)
    with pytest.raises(ValueError, match=words):
        recipe.open()


def test_modules_that_are_not_merged_get_a_word(tmp_path: Path) -> None:
    recipe = write_embedders(tmp_path)
    for name in ("base", "a", "b"):
        file = tmp_path / name / "modules.json"
        file.write_text(file.read_text().replace("models.Dense", "models.CNN"))
    with pytest.warns(UserWarning, match=r"2_Dense/model\.safetensors differs from the base's"):
        opened = recipe.open()
    assert WEIGHT not in opened.task_vectors.deltas


def test_the_loaded_model_has_the_layers_as_parameters(tmp_path: Path) -> None:
    write_embedder(tmp_path, 1)
    base = open_checkpoint(tmp_path)
    loaded, empty = load_model(base), load_meta_model(base)
    own = dict(loaded.module.named_parameters())
    for name in (WEIGHT, BIAS):
        assert torch.equal(own[loaded.names[name]], base.read(name))
        assert own[loaded.names[name]].data_ptr() != base.read(name).data_ptr()
        assert dict(empty.module.named_parameters())[empty.names[name]].is_meta
    rows = torch.randn(3, 32)
    want = rows @ dense(1)["linear.weight"].T + dense(1)["linear.bias"]
    torch.testing.assert_close(loaded.module.get_submodule("2_Dense")(rows), want)


def test_fingerprints_have_the_layers_and_those_of_older_versions_still_fit(tmp_path: Path) -> None:
    write_embedder(tmp_path, 1)
    now = fingerprint(tmp_path)
    assert {FILE, "2_Dense/config.json"} <= now.keys() == stamps(tmp_path).keys()
    assert "1_Pooling/config.json" not in now
    before = {name: digest for name, digest in now.items() if "/" not in name}
    assert same_weights(before, now)
    assert as_recorded({"a": now}, {"a": before}) == as_then({"a": now}, {"a": before}) == {"a": before}
    save_file(dense(2), tmp_path / FILE)
    assert not same_weights(now, fingerprint(tmp_path))
    assert as_recorded({"a": fingerprint(tmp_path)}, {"a": now}) == {"a": fingerprint(tmp_path)}


def test_numbers_that_are_not_finite_are_found(tmp_path: Path) -> None:
    recipe = write_embedders(tmp_path)
    save_file(dense(0) | {"linear.bias": torch.full((16,), torch.nan)}, tmp_path / "b" / FILE)
    with pytest.raises(ValueError, match=r"b: 2_Dense\.linear\.bias of .* has NaN or infinite values"):
        recipe.open().verify()


def test_pickled_layers_need_leave(tmp_path: Path) -> None:
    write_embedders(tmp_path)
    for seed, name in enumerate(("base", "a", "b")):
        (tmp_path / name / FILE).unlink()
        torch.save(dense(seed), tmp_path / name / "2_Dense/pytorch_model.bin")
    experts = {n: tm.Expert(str(tmp_path / n)) for n in "ab"}
    with pytest.warns(UserWarning, match=r"2_Dense/pytorch_model\.bin differs"):
        opened = tm.Recipe(str(tmp_path / "base"), experts).open()
    assert WEIGHT not in opened.task_vectors.deltas
    opened = tm.Recipe(str(tmp_path / "base"), experts, allow_pickle=True).open()
    coefficients = tm.Coefficients(("a", "b"), opened.layout, 1.0)
    tm.export_merge(opened.base, opened.task_vectors, coefficients, tmp_path / "merged")
    assert sorted(file.name for file in (tmp_path / "merged/2_Dense").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    entries = json.loads((tmp_path / "merged/modules.json").read_text())
    assert [entry["path"] for entry in entries] == ["", "1_Pooling", "2_Dense", "3_Normalize"]
