"""The doors through which foreign bytes enter: a valid file, and the function that reads it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import trainmerge as tm
from tests.data.test_media import write_wave
from tests.embedders import write_embedder
from tests.fitting.test_fit import fit_world
from tests.picture_world import picture
from tests.world import write_world
from trainmerge.checkpoints.adapter import open_adapter
from trainmerge.checkpoints.meta_model import build_meta_model
from trainmerge.checkpoints.parameters import open_parameters
from trainmerge.checkpoints.reader import open_checkpoint
from trainmerge.checkpoints.side_modules import side_weights
from trainmerge.checkpoints.tensor_file import PickleFile
from trainmerge.coefficients.coefficients import load_coefficients
from trainmerge.coefficients.layout import read_chunks
from trainmerge.data.columns import Columns
from trainmerge.data.examples import Example, read_examples
from trainmerge.data.label_texts import read_labels
from trainmerge.data.media_values import open_picture, open_sound
from trainmerge.data.text_files import load_examples
from trainmerge.data.tokenizer import Tokenizer
from trainmerge.evaluate.pairs import read_similar
from trainmerge.export import published
from trainmerge.export.card_sources import read_metadata
from trainmerge.export.published import read_published
from trainmerge.export.push import plan_upload
from trainmerge.fitting.provenance import load_snapshot
from trainmerge.model.embedding import embedding_of
from trainmerge.run import open_run
from trainmerge.run.config import read_config
from trainmerge.run.folder import RunFolder
from trainmerge.run.open_run import read_run
from trainmerge.system.json_file import read_json_lines
from trainmerge.system.safetensors_file import MappedFile

RECIPES: dict[tuple[type[Any], str, bytes], object] = {}  # that were read, by class, section and content


class Door(NamedTuple):
    """One kind of file."""

    file: Path  # is overwritten
    valid: bytes
    read: Callable[[], object]
    json: bool = False  # its values are changed too
    slow: bool = False  # more than some milliseconds per input
    forks: bool = True  # False where a reader's threads would hang in a forked process


def doors(root: Path) -> dict[str, Door]:
    """All doors, with their files in an empty folder."""
    write_world(root)
    fit_world(root, root / "run", steps=1)
    embedders, exports = _embedders(root / "embedder"), _exports(root)
    made = {**_checkpoints(root), **embedders, **exports, **_runs(root)}
    return {**made, **_texts(root), **_media(root)}


def _door(
    file: Path, read: Callable[[], object], json: bool = False, slow: bool = False, forks: bool = True
) -> Door:
    return Door(file, file.read_bytes(), read, json, slow, forks)


def _checkpoints(root: Path) -> dict[str, Door]:
    base, adapter, shards, own = root / "base", root / "experts" / "animal", root / "shards", root / "own"
    parameters = open_parameters(open_checkpoint(base))
    for folder in (shards, own):
        folder.mkdir()
        (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    for name in ("a", "b"):
        save_file({name: torch.ones(2, 3)}, shards / f"{name}.safetensors")
    index = shards / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}))
    pickled, single = own / "pytorch_model.bin", own / "model.safetensors"
    torch.save({"a": torch.arange(12.0).view(3, 4), "b": torch.ones(2, dtype=torch.bfloat16)}, pickled)
    save_file({"a": torch.arange(12.0).view(3, 4), "b": torch.ones(5, dtype=torch.bfloat16)}, single)

    wrapped = own / "last.ckpt"
    torch.save({"epoch": 3, "state_dict": {"a": torch.ones(3, 4)}, "loss": [0.5]}, wrapped)

    def read_adapter() -> None:
        found = open_adapter(parameters, adapter, (), allow_pickle=False)
        found.peft_config()

    return {
        "config.json": _door(own / "config.json", lambda: build_meta_model(own), json=True, slow=True),
        "adapter_config.json": _door(adapter / "adapter_config.json", read_adapter, json=True),
        "safetensors": _door(single, lambda: _read_all(MappedFile(single))),
        "index.json": _door(index, lambda: open_checkpoint(shards), json=True),
        "pickle": _door(pickled, lambda: _read_all(PickleFile(pickled))),
        "state dict": _door(wrapped, lambda: _state(wrapped)),
        "tokenizer.json": _door(base / "tokenizer.json", lambda: Tokenizer(str(base), 8), True, slow=True),
        "tokenizer_config.json": _door(
            base / "tokenizer_config.json", lambda: Tokenizer(str(base), 8), True, slow=True
        ),
    }


def _embedders(folder: Path) -> dict[str, Door]:
    write_embedder(folder, 1)
    modules, pooling = folder / "modules.json", folder / "1_Pooling/config.json"
    queries = folder / "queries.jsonl"
    queries.write_text('{"text": "a", "relevant": ["b", "c"], "documents": ["d"]}\n')

    def read_modules() -> None:
        embedding_of(folder)
        side_weights(folder)

    return {
        "modules.json": _door(modules, read_modules, json=True),
        "pooling": _door(pooling, lambda: embedding_of(folder), json=True),
        "queries": _door(
            queries, lambda: read_similar(str(queries), "text", 1), json=True, slow=True, forks=False
        ),
    }


def _knowing(read: Callable[..., object], *given: object) -> object:
    """`read`, for which a recipe that was read before, byte for byte, is not parsed again."""
    with pytest.MonkeyPatch.context() as changed:
        for module in (open_run, published):
            changed.setattr(module, "read_config", _read_once)
        return read(*given)


def _read_once(cls: type[Any], key: str, path: Path) -> object:
    same = (cls, key, path.read_bytes())
    if same not in RECIPES:
        RECIPES[same] = read_config(cls, key, path)
    return RECIPES[same]


def _read_all(file: MappedFile | PickleFile) -> None:
    for name, info in file.tensors.items():
        assert file.read(name).numel() == info.shape.numel()
        file.read(name).float().sum()


def _state(file: Path) -> None:
    for tensor in tm.load_state_dict(file, allow_pickle=True).values():
        tensor.float().sum()


def _runs(root: Path) -> dict[str, Door]:
    run = RunFolder(root / "run")
    chunks = root / "chunks.json"
    chunks.write_text(json.dumps({"chunks": {"encoder.layer.0.output.dense.weight": 2, "*": 1}}))
    snapshot = run.latest()
    assert snapshot is not None
    return {
        "recipe.yaml": _door(run.recipe, lambda: read_config(tm.Recipe, "recipe", run.recipe), slow=True),
        "recipe.yaml, values": Door(
            run.recipe,
            json.dumps(yaml.safe_load(run.recipe.read_bytes())).encode(),
            lambda: read_config(tm.Recipe, "recipe", run.recipe),
            json=True,
            slow=True,
        ),
        "manifest.json": _door(run.manifest, lambda: _knowing(read_run, run), json=True, slow=True),
        "coefficients.safetensors": _door(run.coefficients, lambda: load_coefficients(run.coefficients)),
        "coefficients' header": _header(run.coefficients),
        "snapshot": _door(snapshot, lambda: load_snapshot(snapshot)),
        "chunks.json": _door(chunks, lambda: read_chunks(chunks), json=True),
        "metrics.jsonl": _door(run.metrics, lambda: read_json_lines(run.metrics)),
    }


def _exports(root: Path) -> dict[str, Door]:
    out = tm.export_run(root / "run", root / "merged")
    card, manifest, place = out / "README.md", out / "trainmerge_manifest.json", root / "unpacked"
    place.mkdir()
    metadata = root / "metadata" / "README.md"
    metadata.parent.mkdir()
    metadata.write_text("---\nlicense: mit\ndatasets: [a/b]\nbase_model: [c/d]\n---\n# A model\n")
    return {
        "card": _door(card, lambda: _knowing(read_published, card, place), slow=True),
        "card's metadata": _door(metadata, lambda: read_metadata(metadata.parent)),
        "export's manifest": _door(manifest, lambda: plan_upload(out, "org/name"), json=True),
    }


def _header(file: Path) -> Door:
    """The layout in the metadata of coefficients, as a JSON file that is put there first."""
    layout, values = file.with_name("layout.json"), load_file(file)
    layout.write_text(MappedFile(file).metadata["layout"])

    def read() -> object:
        text = layout.read_bytes().decode("utf-8", "replace")
        save_file(values, file, {"layout": text, "experts": '["mood", "colour", "animal"]'})
        return load_coefficients(file)

    return _door(layout, read, json=True)


def _media(root: Path) -> dict[str, Door]:
    """Pictures and a sound."""
    files = [root / f"a.{end}" for end in ("png", "jpg", "wav")]
    for file in files[:2]:
        picture(0, size=(8, 8)).save(file)
    write_wave(files[2], np.zeros(8), 8000)

    def reader(file: Path) -> Callable[[], object]:
        return lambda: (open_sound if file.suffix == ".wav" else open_picture)(str(file))

    return {file.name: _door(file, reader(file)) for file in files}


def _texts(root: Path) -> dict[str, Door]:
    rows = {"text": ["good happy", "bad", "red blue"], "label": [0, 1, 1]}
    folder = root / "texts"
    folder.mkdir()
    made = datasets.Dataset.from_dict(rows)
    made.to_json(folder / "a.jsonl")
    made.to_csv(folder / "a.csv", index=False)
    made.to_parquet(folder / "a.parquet")
    (folder / "a.txt").write_text("good happy\nbad\n")
    made.save_to_disk(str(folder / "saved"))
    labels = root / "mood" / "labels.json"

    columns = Columns()

    def reader(file: Path) -> Callable[[], object]:
        return lambda: read_examples(str(file), columns, lambda _: Example("x"))

    return {
        **{f"texts.{end}": _door(folder / f"a.{end}", reader(folder / f"a.{end}"), slow=True, forks=False)
           for end in ("jsonl", "csv", "parquet", "txt")},
        **{f"saved, {file}": _door(folder / "saved" / file, reader(folder / "saved"), slow=True, forks=False)
           for file in ("state.json", "dataset_info.json", "data-00000-of-00001.arrow")},
        "labels.json": _door(labels, lambda: read_labels(labels), json=True),
        "labelled texts": _door(
            folder / "a.jsonl", lambda: load_examples(str(folder / "a.jsonl"), ["text", "label"]),
            slow=True, forks=False,
        ),
    }  # fmt: skip
