"""Which rows of a batch belong to which example, with transformers' own processors of pictures.

Legend: `B` examples.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor

from tests.checkpoints.test_families import (
    internvl,
    qwen2_processor,
    qwen2_vl,
    without_video,
    write_picture_tokenizer,
)
from trainmerge.data import pictures as pictures_of_ours
from trainmerge.data.batch import Batch
from trainmerge.data.example_rows import row_counts, split_rows
from trainmerge.data.examples import Example
from trainmerge.data.steps import Steps
from trainmerge.data.tokenizer import Tokenizer
from trainmerge.plan.micro_batches import StepSchedule, rounds

SIZES = [(30, 40), (120, 30), (60, 60)]  # of three pictures, which take different numbers of patches or tiles


def tiles(tokenizer: Any) -> Any:
    pictures = transformers.GotOcr2ImageProcessorPil(
        size={"height": 28, "width": 28}, crop_to_patches=True, max_patches=6
    )
    return without_video(
        transformers.InternVLProcessor, image_processor=pictures, tokenizer=tokenizer, image_seq_length=1
    )


def idefics(tokenizer: Any) -> Any:
    pictures = transformers.Idefics3ImageProcessorPil(
        size={"longest_edge": 56}, max_image_size={"longest_edge": 28}
    )
    return transformers.Idefics3Processor(pictures, tokenizer, image_seq_len=1)


def llava_next(tokenizer: Any) -> Any:
    pictures = transformers.LlavaNextImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28},
        image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]],
    )  # fmt: skip
    return transformers.LlavaNextProcessor(
        pictures, tokenizer, patch_size=14, vision_feature_select_strategy="default", image_token="<picture>"
    )


PROCESSORS = {
    "Qwen2-VL": qwen2_processor,
    "InternVL": tiles,
    "Idefics3": idefics,
    "LLaVA-Next": llava_next,
}


def pictures_in(folder: Path) -> list[Example]:
    examples = []
    for i, size in enumerate(SIZES):
        noise = torch.randint(256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(i))
        Image.fromarray(noise.byte().numpy()).save(folder / f"{i}.png")
        examples.append(Example("<picture> red" + " blue" * i, image=str(folder / f"{i}.png")))
    return examples


def tokenizer_of(folder: Path, make: Callable[[Any], Any], patch: pytest.MonkeyPatch) -> Tokenizer:
    words = write_picture_tokenizer(folder)
    if make is idefics:
        words.add_special_tokens({"additional_special_tokens": ["<image>", "<fake_token_around_image>"]})
    processor = make(words)
    patch.setattr(pictures_of_ours, "load_processor", lambda _: processor)
    return Tokenizer(str(folder), 64)


def inside(part: Tensor, alone: Tensor) -> bool:
    """Whether `part` [n, ...] is `alone` [n, ...], padded at one end of its other dimensions."""
    first = tuple(slice(0, size) for size in alone.shape)
    last = tuple(slice(whole - size, whole) for whole, size in zip(part.shape, alone.shape, strict=True))
    same = any(torch.equal(part[place], alone) for place in (first, last))
    return part.shape[0] == alone.shape[0] and same


@pytest.mark.parametrize("family", PROCESSORS)
def test_parts_are_the_examples(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizer_of(tmp_path, PROCESSORS[family], monkeypatch)
    examples = pictures_in(tmp_path)
    if family == "Idefics3":
        examples = [e._replace(text=e.text.replace("picture", "image")) for e in examples]
    (batch,) = Steps([examples], tokenizer, len(examples), 0)[0]
    parts = [part for (part,) in rounds([batch], StepSchedule(1, 1))]
    assert sorted(int(part.ids) for part in parts) == [0, 1, 2]
    for part in parts:
        alone = tokenizer.encode([examples[int(part.ids)]]).inputs
        assert part.inputs.keys() == alone.keys()
        wrong = {n: (v.shape, alone[n].shape) for n, v in part.inputs.items() if not inside(v, alone[n])}
        assert not wrong
    (pair, last) = [part for (part,) in rounds([batch], StepSchedule(1, 2))]
    again = [part for (part,) in rounds([pair], StepSchedule(1, 1))] + [last]
    for one, other in zip(parts, again, strict=True):
        assert all(torch.equal(one.inputs[name], other.inputs[name]) for name in one.inputs)


def test_a_patch_model_runs_on_parts_as_on_the_whole() -> None:
    module = qwen2_vl().eval()
    first = module.config.image_token_id
    ids = torch.tensor([[first, first, first, 3, 4], [first, 5, 6, 7, 8]])
    grid = torch.tensor([[1, 2, 6], [1, 2, 2]])
    pixels = torch.randn(16, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(0))
    inputs = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels,
        "image_grid_thw": grid, "mm_token_type_ids": (ids == first).int(),
    }  # fmt: skip
    batch = Batch(0, inputs, torch.ones_like(ids).bool(), torch.arange(2))
    with torch.no_grad():
        whole = module(**inputs).logits
        each = [module(**part.inputs).logits for (part,) in rounds([batch], StepSchedule(1, 1))]
    torch.testing.assert_close(torch.cat(each), whole)


def test_a_tile_model_runs_on_parts_as_on_the_whole() -> None:
    module = internvl().eval()
    token = module.config.image_token_id
    ids = torch.tensor([[token, token, 3, 4], [token, 5, 6, 7]])
    inputs = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(0)),
    }  # fmt: skip
    batch = Batch(0, inputs, ids >= 0, torch.arange(2), rows={"pixel_values": [2, 1]})
    with torch.no_grad():
        whole = module(**inputs).logits
        each = [module(**part.inputs).logits for (part,) in rounds([batch], StepSchedule(1, 1))]
    torch.testing.assert_close(torch.cat(each), whole)


def test_rows_that_belong_to_no_example_are_refused() -> None:
    inputs = {"input_ids": torch.zeros(4, 3), "pixel_values": torch.zeros(6, 2), "scale": torch.tensor(1.0)}
    batch = Batch(0, inputs, torch.ones(4, 3).bool(), torch.arange(4))
    with pytest.raises(ValueError, match=r"pixel_values \(6, 2\), scale \(\) .*data.batch_size to 2"):
        list(rounds([batch], StepSchedule(1, 2)))
    assert next(iter(rounds([batch], StepSchedule(1, 4)))) == [batch]  # needs no split
    with pytest.raises(ValueError, match="pixel_values"):
        split_rows(inputs, 4, {"pixel_values": [1, 1, 1, 1]}, 2)
    grids = {"a_grid_thw": torch.tensor([[1, 1, 2]] * 2), "b_grid_hw": torch.tensor([[1, 1], [1, 3]])}
    assert row_counts({"pixels": torch.zeros(4, 2), **grids}, 2, {})["pixels"] is None  # two grids fit


def test_pictures_and_videos_of_as_many_patches_go_by_their_own_grids() -> None:
    """By the sums alone, 12 patches each, both grids fit both."""
    pictures, videos = torch.arange(12.0)[:, None], torch.arange(12.0, 24.0)[:, None]
    inputs = {
        "input_ids": torch.zeros(2, 3), "second_per_grid_ts": torch.ones(2),
        "pixel_values": pictures, "image_grid_thw": torch.tensor([[1, 2, 2], [1, 2, 4]]),
        "pixel_values_videos": videos, "video_grid_thw": torch.tensor([[2, 2, 2], [1, 2, 2]]),
    }  # fmt: skip
    first, last = split_rows(inputs, 2, {}, 1)
    assert torch.equal(first["pixel_values"], pictures[:4])
    assert torch.equal(last["pixel_values"], pictures[4:])
    assert torch.equal(first["pixel_values_videos"], videos[:8])
    assert torch.equal(last["pixel_values_videos"], videos[8:])
    del inputs["image_grid_thw"], inputs["pixel_values"]
    assert row_counts(inputs, 2, {})["pixel_values_videos"] == (8, 4)
