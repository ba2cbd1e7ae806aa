"""Pictures and sounds without text: every form of a column, what is refused, and the models' inputs."""

import json
import wave
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers.image_utils import load_image

from tests.picture_world import ALONE, CUT, SQUARE, picture, write_pictures, write_processor
from trainmerge.data.calibration import Calibration
from trainmerge.data.columns import Columns
from trainmerge.data.examples import Example, contents, read_examples
from trainmerge.data.media import MediaInputs
from trainmerge.data.media_values import open_picture, open_sound
from trainmerge.data.text_files import load_examples
from trainmerge.data.tokenizer import Tokenizer

SOUNDS = Columns(text=None, audio="audio")
KINDS = {
    "ViT": ("ViTImageProcessorPil", {"size": SQUARE}),
    "DeiT": ("DeiTImageProcessorPil", {"size": {"height": 36, "width": 36}, "crop_size": SQUARE}),
    "DINOv2": ("BitImageProcessorPil", CUT),
    "ConvNeXt": ("ConvNextImageProcessorPil", {"size": {"shortest_edge": 32}, "crop_pct": 0.875}),
    "CLIP": ("CLIPImageProcessorPil", CUT),
    "SigLIP": ("SiglipImageProcessorPil", {"size": SQUARE}),
    "BEiT": ("BeitImageProcessorPil", {"size": SQUARE}),
}


def read(path: Path, columns: Columns = ALONE) -> list[Example]:
    return read_examples(str(path), columns, lambda _: Example("never"))


def pixels(example: Example) -> np.ndarray:
    assert example.image is not None
    return np.asarray(open_picture(example.image))


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    match file.suffix:
        case ".jsonl":
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        case ".csv":
            datasets.Dataset.from_list(rows).to_csv(file)
        case ".parquet":
            datasets.Dataset.from_list(rows).to_parquet(file)
        case _:
            datasets.Dataset.from_list(rows).save_to_disk(file)
    return file


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet", "saved"])
def test_a_column_of_paths_relative_to_the_file(tmp_path: Path, name: str) -> None:
    picture(0).save(tmp_path / "one.png")
    picture(1).save(tmp_path / "two.png")
    file = write_rows(tmp_path / name, [{"image": "one.png"}, {"image": str(tmp_path / "two.png")}])
    found = read(file)
    assert [example.text for example in found] == ["", ""]
    assert np.array_equal(pixels(found[0]), np.asarray(picture(0)))
    assert np.array_equal(pixels(found[1]), np.asarray(picture(1)))


def test_every_form_of_a_picture_has_the_same_pixels(tmp_path: Path) -> None:
    own = picture(3)
    own.save(tmp_path / "a.png")
    content, array = (tmp_path / "a.png").read_bytes(), np.asarray(own)
    features = datasets.Features({"image": datasets.Image()})
    forms = {
        "image.parquet": datasets.Dataset.from_dict({"image": [own]}, features=features),
        "bytes.parquet": datasets.Dataset.from_dict({"image": [content]}),
        "struct.parquet": datasets.Dataset.from_dict({"image": [{"bytes": content, "path": None}]}),
        "array.parquet": datasets.Dataset.from_dict({"image": [array.tolist()]}),
    }
    for name, made in forms.items():
        made.to_parquet(tmp_path / name)
    forms["image.parquet"].save_to_disk(tmp_path / "saved")
    files = [*forms, "saved", str(write_rows(tmp_path / "list.jsonl", [{"image": array.tolist()}]))]
    for name in files:
        (example,) = read(tmp_path / name)
        assert np.array_equal(pixels(example), array), name


def test_grey_arrays_have_no_third_dimension_or_one(tmp_path: Path) -> None:
    grey = np.arange(30).reshape(5, 6)
    rows = [{"image": grey.tolist()}]
    flat, thick = read(write_rows(tmp_path / "a.jsonl", rows))[0], grey[..., None].tolist()
    assert np.array_equal(pixels(flat), np.repeat(grey[..., None], 3, axis=-1))
    assert read(write_rows(tmp_path / "b.jsonl", [{"image": thick}]))[0] == flat


def test_a_folder_gives_classes_by_name_and_a_prefix_of_all_classes(tmp_path: Path) -> None:
    write_pictures(tmp_path, "shade", 0, count=24)
    data = load_examples(str(tmp_path / "test"), ["image", "label"], media=["image"])
    assert data["label"][:6] == [0, 1, 2, 0, 1, 2]
    assert [Path(path).parent.name for path in data["image"][:3]] == ["a", "b", "c"]
    assert [Path(path).stem for path in data["image"][::3]] == ["0", "3", "6", "9", "12", "15", "18", "21"]
    assert len(read(tmp_path / "calibration")) == 24
    (tmp_path / "test" / "a" / "z.jfif").write_bytes(b"")
    assert len(load_examples(str(tmp_path / "test"), ["image", "label"], media=["image"])) == 25
    (tmp_path / "test" / "a" / "z.HEIC").write_bytes(b"")
    with pytest.raises(ValueError, match=r"z\.HEIC: a picture of a format that is not read: save it as PNG"):
        read(tmp_path / "test")
    (tmp_path / "test" / "a" / "z.HEIC").unlink()
    for name in ("a/._0.png", "__MACOSX/._0.png"):  # as macOS packs them
        (tmp_path / "test" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "test" / name).write_bytes(b"")
    packed = load_examples(str(tmp_path / "test"), ["image", "label"], media=["image"])
    assert (len(packed), packed["label"][:3]) == (25, [0, 1, 2])
    (tmp_path / "test" / "a" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(ValueError, match=r"gone\.png"):
        read(tmp_path / "test")
    (tmp_path / "test" / "a" / "gone.png").unlink()
    (tmp_path / "test" / "stray.png").write_bytes(b"")
    with pytest.raises(ValueError, match="lies beside subfolders"):
        read(tmp_path / "test")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("no.png", r"example 0: no picture .*no\.png"),
        (None, "example 0 has no value for 'image'"),
        ([[0.5, 0.25]], "integers from 0 to 255"),
        ([[300, 1]], "integers from 0 to 255"),
        ([[[1, 2], [3, 4]]], r"\[1, 2, 2\]"),
        ({"path": None}, "has no picture"),
    ],
)
def test_values_that_are_no_picture_are_refused_by_row(tmp_path: Path, value: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read(write_rows(tmp_path / "a.jsonl", [{"image": value}]))


def test_pictures_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    picture(0).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:200])
    Image.fromarray(np.full((4, 4), 40000, dtype=np.uint16)).save(tmp_path / "deep.png")
    rows = [{"image": name} for name in ("whole.png", "cut.png", "deep.png")]
    found = MediaInputs(str(tmp_path)).problems(read(write_rows(tmp_path / "a.jsonl", rows)))
    assert len(found) == 2
    assert found[0].startswith("example 1: ")
    assert "cut.png: not a picture that can be read" in found[0]
    assert "8 bits per colour" in found[1]


def test_columns_say_what_is_missing() -> None:
    with pytest.raises(ValueError, match="name a column of pictures"):
        Columns(text=None)
    with pytest.raises(ValueError, match="sounds are read alone"):
        Columns(audio="audio")


def test_records_and_identities_of_texts_are_those_of_older_versions() -> None:
    old = {"text": "text", "messages": None, "spans": None, "target": None, "image": None}
    assert Columns().record() == old
    assert contents(Example("red", ((0, 3),))) == ["red", ((0, 3),), None, None, False, None]
    assert SOUNDS.record() == {**old, "text": None, "audio": "audio"}


def test_identity_and_overlap_go_by_content(tmp_path: Path) -> None:
    write_processor(tmp_path)
    picture(0).save(tmp_path / "a.png")
    picture(0).save(tmp_path / "b.png")
    picture(1).save(tmp_path / "c.png")
    first = write_rows(tmp_path / "first.jsonl", [{"image": "a.png"}, {"image": "c.png"}])
    other = write_rows(tmp_path / "other.jsonl", [{"image": "b.png"}, {"image": "c.png"}])

    def calibration(file: Path) -> Calibration:
        return Calibration({"x": str(file)}, str(tmp_path), columns=ALONE)

    assert calibration(first).identities() == calibration(other).identities()
    picture(2).save(tmp_path / "b.png")
    assert calibration(first).identities() != calibration(other).identities()
    with pytest.warns(UserWarning, match="x: 1 of 2 test examples are also calibration examples"):
        Calibration({"x": str(first)}, str(tmp_path), {"x": str(other)}, columns=ALONE)


@pytest.mark.parametrize("name", KINDS)
def test_processors_give_what_transformers_computes_with_numpy(tmp_path: Path, name: str) -> None:
    kind, settings = KINDS[name]
    write_processor(tmp_path, kind, **settings)
    pictures = [picture(i, size=(50, 41)) for i in range(2)]
    for i, own in enumerate(pictures):
        own.save(tmp_path / f"{i}.png")
    rows = [{"image": f"{i}.png"} for i in range(2)]
    encoded = Tokenizer(str(tmp_path), 8).encode(read(write_rows(tmp_path / "a.jsonl", rows)))
    own = getattr(transformers, kind)(**settings)
    want = own(images=[np.asarray(p) for p in pictures], return_tensors="np")["pixel_values"]
    assert torch.equal(encoded.inputs["pixel_values"], torch.from_numpy(want))
    assert encoded.inputs["pixel_values"].shape == (2, 3, 32, 32)
    assert encoded.mask.tolist() == [[True], [True]]


def test_clip_pixels_are_resized_cropped_and_normalised(tmp_path: Path) -> None:
    """CLIP's own preprocessing, by Pillow and numpy: bicubic to the shorter edge, middle, mean, std."""
    write_processor(tmp_path, "CLIPImageProcessorPil", **CUT)
    whole = picture(7, size=(64, 40))
    (got,) = MediaInputs(str(tmp_path)).encode([_as_png(tmp_path, whole)])["pixel_values"]
    small = np.asarray(whole.resize((51, 32), Image.Resampling.BICUBIC))[:, 9:41]
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    want = ((small / 255 - mean) / std).transpose(2, 0, 1)
    np.testing.assert_allclose(got.numpy(), want, atol=1e-6)


def _as_png(folder: Path, own: Image.Image) -> Example:
    own.save(folder / "one.png")
    return Example("", image=str(folder / "one.png"))


def test_a_turned_photograph_is_upright(tmp_path: Path) -> None:
    own, exif = picture(4), Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    own.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(pixels(Example("", image=str(tmp_path / "a.png"))), np.rot90(np.asarray(own), -1))


def test_a_folder_without_processor_or_tokenizer_says_what_to_do(tmp_path: Path) -> None:
    write_processor(tmp_path)
    with pytest.raises(ValueError, match=r"no tokenizer, so it reads no texts.*data\.columns\.text to null"):
        Tokenizer(str(tmp_path), 8).encode([Example("red")])
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match=r"^\S*bare: no image processor that .*preprocessor_config"):
        MediaInputs(str(tmp_path / "bare")).encode([_as_png(tmp_path, picture(0))])


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
def test_pictures_of_other_modes_are_what_transformers_reads(tmp_path: Path, mode: str) -> None:
    file = tmp_path / ("p.jpg" if mode in ("CMYK", "YCbCr") else "p.png")
    grey = mode in ("1", "LA")
    (picture(3).convert("L") if grey else picture(3)).convert(mode).save(file)
    assert np.array_equal(np.asarray(open_picture(str(file))), np.asarray(load_image(str(file))))


@pytest.mark.parametrize("mode", ["I;16", "F"])
def test_more_than_eight_bits_per_colour_are_refused(tmp_path: Path, mode: str) -> None:
    grey = np.asarray(picture(3).convert("L"))
    pixels = grey.astype(np.uint16) * 257 if mode == "I;16" else grey.astype(np.float32)
    Image.fromarray(pixels).save(file := tmp_path / "p.tiff")
    with pytest.raises(ValueError, match=rf"p\.tiff: its pixels have the mode {mode}; save it with 8 bits"):
        open_picture(str(file))


MEAN = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({"feature_extractor_type": "ViTFeatureExtractor", "size": 24, **MEAN}, 24),
        ({"size": 24, **MEAN}, 24),  # its class is the one of the model's type
        ({"image_processor_type": "ViTImageProcessorFast", "size": {"height": 24, "width": 24}, **MEAN}, 24),
        ({"feature_extractor_type": "CLIPFeatureExtractor", "size": 24, "crop_size": 20, **MEAN}, 20),
        ({"image_processor_type": "ViTImageProcessor", "do_resize": False, **MEAN}, None),
    ],
)
def test_processors_of_older_files(tmp_path: Path, settings: dict[str, object], size: int | None) -> None:
    """Pixels of two pictures of other sizes; without resizing they have no common one."""
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    files = [tmp_path / "a.png", tmp_path / "b.png"]
    for file, shape in zip(files, ((40, 36), (30, 44)), strict=True):
        picture(1, size=shape).save(file)
    examples = [Example("", image=str(file)) for file in files]
    if size is None:
        words = r"cannot encode 2 pictures [\s\S]*All must get one size: set size"
        with pytest.raises(ValueError, match=words):
            MediaInputs(str(tmp_path)).encode(examples)
        return
    pixels = MediaInputs(str(tmp_path)).encode(examples)["pixel_values"]
    assert pixels.shape == (2, 3, size, size)
    assert 0 < pixels.abs().max() <= 1


def write_wave(file: Path, samples: np.ndarray, rate: int, width: int = 2, channels: int = 1) -> None:
    whole = np.round(samples * (2 ** (8 * width - 1) - 1)).astype("<i4")
    raw = whole.view(np.uint8).reshape(-1, 4)[:, :width].copy()
    if width == 1:
        raw ^= 0x80
    with wave.open(str(file), "wb") as out:
        out.setparams((channels, width, rate, 0, "NONE", ""))
        out.writeframes(raw.tobytes())


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_wav_files_of_every_width(tmp_path: Path, width: int) -> None:
    tone = np.sin(np.arange(400) / 5)
    write_wave(tmp_path / "a.wav", np.repeat(tone, 2), 8000, width, channels=2)
    samples, rate = open_sound(str(tmp_path / "a.wav"))
    assert rate == 8000
    np.testing.assert_allclose(samples, tone, atol=1.5 / 2 ** (8 * width - 1) + 1e-7)


def test_sounds_are_padded_by_the_feature_extractor(tmp_path: Path) -> None:
    transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained(tmp_path)
    write_wave(tmp_path / "a.wav", np.sin(np.arange(900) / 3), 16000)
    array = (np.cos(np.arange(500) / 4) / 2).astype(np.float32)
    rows = [{"audio": "a.wav"}]
    examples = [
        *read(write_rows(tmp_path / "a.jsonl", rows), SOUNDS),
        *read(
            write_rows(tmp_path / "b.jsonl", [{"audio": {"array": array.tolist(), "sampling_rate": 16000}}]),
            SOUNDS,
        ),
    ]
    encoded = Tokenizer(str(tmp_path), 8).encode(examples)
    assert encoded.inputs["input_values"].shape == (2, 900)
    assert encoded.inputs["attention_mask"].sum(dim=1).tolist() == [900, 500]
    want = (array - array.mean()) / np.sqrt(array.var() + 1e-7)
    np.testing.assert_allclose(encoded.inputs["input_values"][1, :500].numpy(), want, atol=1e-5)
    slow = Example("", audio=examples[1].audio._replace(rate=8000))  # type: ignore[union-attr]
    (line,) = MediaInputs(str(tmp_path)).problems([slow])
    assert "it has 8000 samples a second, the model needs 16000" in line


def test_ast_refuses_what_it_would_cut(tmp_path: Path) -> None:
    """The longest sound that is not cut fills every frame, and one sample more is cut at the next."""
    transformers.ASTFeatureExtractor(max_length=40, num_mel_bins=16).save_pretrained(tmp_path)
    sizes = (400 + 160 * 39, 400 + 160 * 40 - 1, 400 + 160 * 40)
    for i, size in enumerate(sizes):
        noise = np.random.default_rng(i).uniform(-0.5, 0.5, size)
        write_wave(tmp_path / f"{i}.wav", noise, 16000)
    examples = read(write_rows(tmp_path / "a.jsonl", [{"audio": f"{i}.wav"} for i in range(3)]), SOUNDS)
    media = MediaInputs(str(tmp_path))
    full = media.encode(examples[:2])["input_values"]
    assert full.shape == (2, 40, 16)
    assert full[:, -1].std(dim=-1).min() > 0  # no frame of padding
    (line,) = media.problems(examples)
    assert line.startswith("example 2: ")
    assert "cut it" in line


def test_whisper_refuses_what_its_window_would_cut(tmp_path: Path) -> None:
    transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=1).save_pretrained(tmp_path)
    write_wave(tmp_path / "short.wav", np.zeros(16000), 16000)
    write_wave(tmp_path / "long.wav", np.zeros(16001), 16000)
    rows = [{"audio": "short.wav"}, {"audio": "long.wav"}]
    examples = read(write_rows(tmp_path / "a.jsonl", rows), SOUNDS)
    media = MediaInputs(str(tmp_path))
    assert media.encode(examples[:1])["input_features"].shape == (1, 16, 100)
    (line,) = media.problems(examples)
    assert line.startswith("example 1: ")
    assert "the model reads 1 s: cut it" in line
