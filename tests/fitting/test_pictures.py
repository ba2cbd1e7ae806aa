"""Merges learned from pictures or sounds alone, end to end, and what is refused before a weight is read."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from PIL import Image
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    CLIPModel,
    CLIPVisionModel,
)

import trainmerge as tm
from tests import world
from tests.data.test_media import write_rows, write_wave
from tests.family_settings import CONVNEXT, SPEECH, SWIN, VISION, WHISPER
from tests.picture_world import (
    ALONE,
    TASKS,
    build,
    clip,
    nudge,
    siglip,
    vit,
    write_picture_world,
    write_pictures,
)
from trainmerge.checkpoints.output import output_of_class
from trainmerge.cli import main
from trainmerge.data.media import MediaInputs
from trainmerge.fitting.media_preflight import media_problems
from trainmerge.fitting.preflight import check_tasks
from trainmerge.plan.devices import Device
from trainmerge.run import recipe_files as recipes
from trainmerge.run.config import to_config

HEADS = {
    "shade": tm.LabelHead(["red", "blue", "green"], templates=["good {}", "a {} fish"]),
    "hue": tm.LabelHead(["cat", "dog", "bird"]),
}
RESNET = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1]}
ENTROPY = tm.Entropy(agreement=1.0)
BOTH = tm.Alignment(hidden=1.0, layers=(0, -1), record="float32")


def parts(
    merge: tm.Recipe, run: Path, objective: tm.Objective = BOTH, columns: tm.Columns = ALONE, **settings: Any
) -> tuple[tm.MergeModule, tm.Calibration]:
    module = tm.MergeModule(
        merge,
        objective,
        workspace=str(run / "workspace"),
        optimizer=lambda c: torch.optim.Adam(c, lr=0.02),
        **settings,
    )
    data = tm.Calibration(
        recipes.calibration_files(merge), merge.base, recipes.test_files(merge), batch_size=4, columns=columns
    )
    return module, data


def fit(module: tm.MergeModule, data: tm.Calibration, run: Path, steps: int = 3) -> None:
    tm.fit(module, data, trainer(run, steps), run)


def trainer(run: Path, steps: int) -> Any:
    return tm.make_trainer(run, max_steps=steps, accelerator="cpu", enable_progress_bar=False)


def test_own_heads_on_pictures_fit_evaluate_and_export(tmp_path: Path) -> None:
    merge = write_picture_world(tmp_path, vit)
    module, data = parts(merge, run := tmp_path / "run")
    fit(module, data, run)
    moved = (module.coefficients.raw.detach() - module.start).abs().amin(dim=0)
    for name, groups in module.opened.layout.groups.items():  # attention does not depend on its keys' biases
        assert name.endswith("key.bias") or moved[list(groups)].min() > 1e-3, name
    scores, merged = tm.evaluate_run(run).scores, tm.export_run(run, tmp_path / "merged")
    tests = {task: tmp_path / task / "test" for task in TASKS}
    for task, test in tests.items():
        assert scores["expert"][task] == pytest.approx(right(tmp_path / "experts" / task, test))
        assert scores["learned"][task] == pytest.approx(right(merged, test))
    assert scores["learned"] in tm.evaluate_checkpoint(merged, merge, columns=ALONE).scores.values()


@pytest.mark.parametrize(
    ("base", "kind", "settings"),
    [
        ("ViTModel", "ViTForImageClassification", VISION),
        ("Dinov2Model", "Dinov2ForImageClassification", VISION),
        ("DeiTModel", "DeiTForImageClassificationWithTeacher", VISION),
        ("ConvNextModel", "ConvNextForImageClassification", CONVNEXT),
        ("Swinv2Model", "Swinv2ForImageClassification", SWIN),
        ("ResNetModel", "ResNetForImageClassification", RESNET),
    ],
)
def test_experts_bring_classifiers_of_their_own(
    tmp_path: Path, base: str, kind: str, settings: dict[str, Any]
) -> None:
    """A tower as base; one expert has three classes, the other five."""
    merge = write_picture_world(tmp_path, lambda: build(base, dict(settings)))
    for seed, (task, classes) in enumerate(zip(TASKS, (3, 5), strict=True)):
        expert = build(kind, {**settings, "num_labels": classes})
        expert.base_model.load_state_dict(
            AutoModel.from_pretrained(merge.experts[task].path).state_dict(), strict=False
        )
        nudge(expert, seed, 0.2)
        expert.save_pretrained(merge.experts[task].path)
    module, data = parts(merge, run := tmp_path / "run")
    fit(module, data, run)
    scores = tm.evaluate_run(run).scores
    for task in TASKS:
        test = tmp_path / task / "test"
        assert scores["expert"][task] == pytest.approx(right(tmp_path / "experts" / task, test))
        whole = tm.export_run(run, tmp_path / f"whole-{task}", task=task)
        assert scores["learned"][task] == pytest.approx(right(whole, test))


@torch.no_grad()
def right(folder: Path, test: Path) -> float:
    """The share of right answers that transformers gives by itself."""
    module = AutoModelForImageClassification.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(test.parents[1] / "base", backend="pil")
    files = sorted(test.glob("*/*.png"))
    pixels = processor(images=[Image.open(file) for file in files], return_tensors="pt")
    truth = torch.tensor(["abc".index(file.parent.name) for file in files])
    return float((module(**pixels).logits.argmax(-1) == truth).double().mean())


@pytest.mark.parametrize("make", [clip, siglip])
def test_towers_under_their_label_heads(tmp_path: Path, make: Callable[[], nn.Module]) -> None:
    merge = write_picture_world(tmp_path, make, **HEADS)
    for task in TASKS:  # the text tower is not fine-tuned
        expert, base = (AutoModel.from_pretrained(p) for p in (merge.experts[task].path, merge.base))
        expert.text_model.load_state_dict(base.text_model.state_dict())
        expert.save_pretrained(merge.experts[task].path)
    module, data = parts(merge, run := tmp_path / "run", ENTROPY)
    fit(module, data, run)
    moved = (module.coefficients.raw.detach() - module.start).abs().amax(dim=0)
    groups = module.opened.layout.groups
    assert all(
        float(moved[list(groups[name])].max()) > 1e-3 for name in groups if "patch_embedding.weight" in name
    )
    merged = AutoModel.from_pretrained(tm.export_run(run, tmp_path / "merged"))
    base = AutoModel.from_pretrained(merge.base)
    for own, theirs in zip(merged.text_model.parameters(), base.text_model.parameters(), strict=True):
        assert torch.equal(own, theirs)
    assert not torch.equal(
        merged.vision_model.embeddings.patch_embedding.weight,
        base.vision_model.embeddings.patch_embedding.weight,
    )
    assert set(tm.evaluate_run(run, compare=False).scores["learned"]) == set(TASKS)


def test_an_expert_has_no_distance_from_itself(tmp_path: Path) -> None:
    merge = write_picture_world(tmp_path, vit)
    module, data = parts(merge, tmp_path / "run")
    fit(module, data, tmp_path / "run", 1)
    module.load(data)
    for k in range(2):
        batch = module.resident.batch(k, data.examples[k][:4], data.tokenize)
        teacher = module.loaded.teachers[k].of(batch.ids, torch.device("cpu"))
        with module.resident.merged.teacher(k), torch.no_grad():
            own = BOTH(module.resident(batch, BOTH.asks.layers), batch._replace(teacher=teacher))
        with torch.no_grad():
            far = BOTH(module.resident(batch, BOTH.asks.layers), batch._replace(teacher=teacher))
        assert own.max() < 1e-5 < far.min()


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("DeiTForImageClassification", VISION),
        ("Dinov2ForImageClassification", VISION),
        ("SwinForImageClassification", SWIN),
        ("ConvNextForImageClassification", CONVNEXT),
        ("BeitForImageClassification", {**VISION, "use_absolute_position_embeddings": True}),
    ],
)
def test_families_of_classifiers_learn_from_logits_and_hidden_states(
    tmp_path: Path, kind: str, settings: dict[str, Any]
) -> None:
    merge = write_picture_world(tmp_path, lambda: build(kind, {**settings, "num_labels": 3}))
    module, data = parts(merge, tmp_path / "run")
    assert tm.plan_fit(module, data, device=Device("none", 1.0, 1.0)).memory.activations > 0
    fit(module, data, tmp_path / "run", 1)
    assert (module.coefficients.raw.detach() - module.start).abs().max() > 0.01


def test_texts_are_no_input_of_an_image_classifier(tmp_path: Path) -> None:
    merge = write_picture_world(tmp_path, vit)
    world.write_tokenizer(tmp_path / "base")
    world.write_texts(tmp_path / "texts", "mood", 0)
    module, _ = parts(merge, tmp_path / "run")
    texts = tm.Calibration(dict.fromkeys(TASKS, str(tmp_path / "texts" / "calibration.jsonl")), merge.base)
    with pytest.raises(ValueError, match="ViTForImageClassification reads pictures or sounds and no texts"):
        check_tasks(module, texts)


def test_a_damaged_picture_is_named_before_work(tmp_path: Path) -> None:
    merge = write_picture_world(tmp_path, vit)
    damaged = tmp_path / "hue" / "calibration" / "3.png"
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(
        ValueError, match=r"hue.calibration: 1 of 12 cannot be read, the first: example 3: .*3\.png"
    ):
        check_tasks(*parts(merge, tmp_path / "run"))
    test = tmp_path / "shade" / "test" / "b" / "1.png"
    test.write_bytes(b"no picture")
    module, data = parts(merge, tmp_path / "still")
    fit(module, data, tmp_path / "still", 0)
    with pytest.raises(
        ValueError, match=r"shade.test: 1 of 12 cannot be read, the first: example 1: .*1\.png"
    ):
        tm.evaluate_run(tmp_path / "still")


@pytest.mark.parametrize(
    ("make", "heads", "columns", "words"),
    [
        (vit, HEADS, ALONE, "ViTForImageClassification has no text tower, which a LabelHead needs"),
        (clip, {}, ALONE, r"has no output layer, and \['shade', 'hue'\] no `head`"),
    ],
)
def test_what_a_base_cannot_do_is_said_before_work(
    tmp_path: Path, make: Any, heads: Any, columns: tm.Columns, words: str
) -> None:
    merge = write_picture_world(tmp_path, make, **heads)
    with pytest.raises(ValueError, match=words):
        check_tasks(*parts(merge, tmp_path / "run", ENTROPY, columns))


def test_texts_for_a_tower_of_pictures_and_pictures_for_a_text_model(tmp_path: Path) -> None:
    merge = write_picture_world(tmp_path / "c", clip, **HEADS)
    for task in TASKS:
        world.write_texts(tmp_path / "texts" / task, "mood", 0)
    texts = {task: str(tmp_path / "texts" / task / "calibration.jsonl") for task in TASKS}
    module, _ = parts(merge, tmp_path / "run", ENTROPY)
    with pytest.raises(
        ValueError, match="CLIPModel reads pictures, and its texts are their labels: set data"
    ):
        check_tasks(module, tm.Calibration(texts, merge.base))
    other = world.write_world(tmp_path / "t")
    module = tm.MergeModule(other, ENTROPY, workspace=str(tmp_path / "w"))
    folders = dict.fromkeys(other.experts, str(tmp_path / "c" / "hue" / "calibration"))
    with pytest.raises(ValueError, match="BertModel, which reads texts: name their column"):
        check_tasks(module, tm.Calibration(folders, other.base, columns=ALONE))


def test_pictures_that_a_model_needs_with_every_text_are_asked_for(tmp_path: Path) -> None:
    """BLIP-2's forward has no default for its pictures, under whose absence a step would end."""
    whole = world.write_world(tmp_path)
    bare = {name: replace(expert, head=None) for name, expert in whole.experts.items()}
    output = output_of_class(transformers.Blip2ForConditionalGeneration, transformers.Blip2Config())
    data = tm.Calibration(recipes.calibration_files(whole), whole.base)
    module = tm.MergeModule(replace(whole, experts=bare), ENTROPY, workspace=str(tmp_path / "w"))
    (problem,) = media_problems(module, data, output)
    assert "Blip2ForConditionalGeneration reads no text without pixel_values: name the column" in problem
    assert not media_problems(tm.MergeModule(whole, ENTROPY, workspace=str(tmp_path / "w")), data, output)


def test_configuration_plan_inspection_and_suggestion(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merge = write_picture_world(tmp_path, clip, **HEADS)
    settings = {
        "recipe": to_config(merge),
        "model": {
            "objective": {"class_path": "trainmerge.Entropy"},
            "optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.02}},
        },
        "data": {"batch_size": 2, "columns": {"text": None, "image": "image"}},
        "trainer": {"accelerator": "cpu", "max_steps": 2, "enable_progress_bar": False},
        "report": False,
    }
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(settings))
    config, run = str(tmp_path / "merge.yaml"), str(tmp_path / "run")
    assert main(["fit", "--config", config, "--run", run, "--dry_run", "true"]) == 0
    assert "activations" in capsys.readouterr().out
    assert main(["inspect", config, "--suggest", str(tmp_path / "suggested.yaml")]) == 0
    said = capsys.readouterr().out
    assert "error" not in said
    suggested = yaml.safe_load((tmp_path / "suggested.yaml").read_text())
    assert suggested["data"]["columns"] == ALONE.record()
    assert suggested["recipe"]["experts"]["shade"]["head"]["init_args"]["templates"] == [
        "good {}",
        "a {} fish",
    ]
    assert main(["fit", "--config", config, "--run", run]) == 0
    assert main(["evaluate", run, "--compare", "false"]) == 0
    assert "accuracy" in capsys.readouterr().out


def test_adamergings_clip_configuration_runs_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its eight tasks, with towers that were fine-tuned alone and put back into the whole."""
    config = Path("configs/adamerging-clip.yaml").resolve()
    names = yaml.safe_load(config.read_text())["recipe"]["experts"]
    write_picture_world(tmp_path / "made", clip)
    (tmp_path / "clip").mkdir()
    (tmp_path / "made" / "base").rename(tmp_path / "clip" / "base")
    whole = CLIPModel.from_pretrained(tmp_path / "clip" / "base")
    whole.vision_model.save_pretrained(tmp_path / "tower")
    for seed, name in enumerate(names):
        tower, folder = CLIPVisionModel.from_pretrained(tmp_path / "tower"), tmp_path / "clip" / name
        nudge(tower, seed)
        whole.vision_model.load_state_dict(tower.state_dict())
        whole.save_pretrained(folder)
        write_pictures(folder, TASKS[seed % 2], 50 * seed, count=3)
        (folder / "labels.json").write_text('["red", "blue", "green"]')
        (folder / "templates.json").write_text('["good {}", "a {} fish"]')
    monkeypatch.chdir(tmp_path)
    assert (
        main(
            [
                "fit",
                str(config),
                "run",
                "--trainer.max_steps",
                "2",
                "--trainer.accelerator",
                "cpu",
                "--no-report",
            ]
        )
        == 0
    )
    coefficients = tm.load_coefficients("run/coefficients.safetensors")
    assert coefficients.experts == tuple(names)
    assert {name.partition(".")[0] for name in coefficients.layout.groups} == {
        "vision_model",
        "visual_projection",
    }
    assert 0.0015 < float((coefficients.raw.detach() - 0.3).abs().max()) < 0.0025  # Adam's two steps of 0.001


def hubert() -> nn.Module:
    return build("HubertForSequenceClassification", {**SPEECH, "classifier_proj_size": 16, "num_labels": 3})


def sounds(root: Path, make: Callable[[], nn.Module], extractor: Any, length: int, **more: str) -> tm.Recipe:
    make().save_pretrained(root / "base")  # type: ignore[operator]
    extractor.save_pretrained(root / "base")
    dice = np.random.default_rng(0)
    experts = {}
    for k, name in enumerate(TASKS):
        expert = make()
        nudge(expert, k, 0.02)
        expert.save_pretrained(root / name)  # type: ignore[operator]
        for i in range(4):
            write_wave(root / f"{name}{i}.wav", dice.uniform(-0.9, 0.9, length + 40 * i), 16000)
        rows = [{"audio": f"{name}{i}.wav", "label": i % 3, **more} for i in range(4)]
        file = str(write_rows(root / f"{name}.jsonl", rows))
        experts[name] = tm.Expert(str(root / name), calibration=file, test=file)
    return tm.Recipe(str(root / "base"), experts)


@pytest.mark.filterwarnings("ignore:.*test examples are also calibration examples")
def test_sounds_through_a_classifier_of_their_own(tmp_path: Path) -> None:
    merge = sounds(tmp_path, hubert, transformers.Wav2Vec2FeatureExtractor(), 1600)
    columns = tm.Columns(text=None, audio="audio")
    module, data = parts(merge, tmp_path / "run", tm.Alignment(), columns)
    fit(module, data, tmp_path / "run")
    scores = tm.evaluate_run(tmp_path / "run", compare=False).scores
    assert set(scores["learned"]) == set(TASKS)
    hidden, _ = parts(merge, tmp_path / "hidden", BOTH, columns)
    with pytest.raises(ValueError, match="sounds differ in length"):
        check_tasks(hidden, data)


@pytest.mark.filterwarnings("ignore:.*test examples are also calibration examples")
def test_whisper_learns_from_sounds_and_their_targets(tmp_path: Path) -> None:
    settings = {**WHISPER, "vocab_size": len(world.WORDS) + 2, "max_source_positions": 50}

    def whisper() -> nn.Module:
        return build("WhisperForConditionalGeneration", settings)

    extractor = transformers.WhisperFeatureExtractor(feature_size=WHISPER["num_mel_bins"], chunk_length=1)
    merge = sounds(tmp_path, whisper, extractor, 1000, said="red cat")
    world.write_tokenizer(tmp_path / "base")
    columns = tm.Columns(text=None, audio="audio", target="said")
    module, data = parts(merge, tmp_path / "run", tm.Alignment(hidden=1.0), columns)
    fit(module, data, tmp_path / "run")
    assert data.tokenize.encode(data.examples[0][:2]).mask.tolist() == [[True, True]] * 2
    assert tm.evaluate_run(tmp_path / "run", compare=False).scores["learned"]["hue"] > 1


def test_one_processor_serves_the_whole_fit(tmp_path: Path) -> None:
    merge = write_picture_world(tmp_path, vit)
    _, data = parts(merge, tmp_path / "run")
    assert data.tokenize.media is data.tokenize.media
    assert isinstance(data.tokenize.media, MediaInputs)
