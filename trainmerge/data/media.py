"""Pictures or sounds without text -> model inputs, by the model's own processor.

Pictures go through transformers' processors over Pillow and numpy, which need no torchvision.

Legend: `B` examples, `H` and `W` a picture's size in pixels, `L` samples of a sound.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import (
    ASTFeatureExtractor,
    AutoFeatureExtractor,
    AutoImageProcessor,
    Wav2Vec2FeatureExtractor,
)

from trainmerge.data.examples import Example
from trainmerge.data.media_values import open_picture, open_sound
from trainmerge.system.links import check_link
from trainmerge.system.text import reason

FILES = ("config.json", "preprocessor_config.json", "processor_config.json")


def without_text(examples: Sequence[Example]) -> bool:
    """Whether the examples are pictures or sounds alone."""
    return not examples[0].text and bool(examples[0].image or examples[0].audio)


def _longest(extractor: Any) -> int | None:
    """The samples at which an extractor cuts: Whisper's window, and AST's frames (25 ms, every 10 ms)."""
    if isinstance(extractor, ASTFeatureExtractor):
        return 400 + 160 * int(extractor.max_length) - 1
    samples: int | None = getattr(extractor, "n_samples", None)
    return samples


class MediaInputs:
    """The encoder of pictures and sounds; each processor is loaded with the first example."""

    def __init__(self, path: str) -> None:
        self.path = path

    def encode(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Pixels [B, 3, H, W], or samples [B, L] or their spectrogram, named as the model names them.

        Raises:
            ValueError: the folder has no processor, or a picture or a sound cannot be read or does not fit.
        """
        if examples[0].audio:
            return self._sounds(examples)
        pictures = [open_picture(example.image) for example in examples if example.image]
        if len(pictures) < len(examples):
            raise ValueError("either all examples of an expert must have a picture, or none")
        processor = self._image_processor
        try:
            made = processor(images=pictures, return_tensors="pt")
        except Exception as error:  # as in `_loaded`
            raise ValueError(
                f"{self.path}: the image processor cannot encode {len(pictures)} pictures "
                f"({reason(error)}). All must get one size: set size or crop_size in preprocessor_config.json"
            ) from error
        return dict(made)

    def problems(self, examples: Sequence[Example]) -> list[str]:
        """One line for every example that cannot be read, by its number."""
        found = []
        for i, example in enumerate(examples):
            try:
                if example.audio:
                    self._samples(example)
                elif example.image:
                    open_picture(example.image)
            except ValueError as error:
                found.append(f"example {i}: {error}")
        return found

    def _sounds(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        extractor = self._feature_extractor
        sounds = [self._samples(example) for example in examples]
        # Waves are padded to the longest; spectrograms get their model's own length.
        padding = {"padding": True} if isinstance(extractor, Wav2Vec2FeatureExtractor) else {}
        made = extractor(sounds, sampling_rate=extractor.sampling_rate, return_tensors="pt", **padding)
        return dict(made)

    def _samples(self, example: Example) -> Any:
        """Samples [L] at the model's rate."""
        if example.audio is None:
            raise ValueError("either all examples of an expert must have a sound, or none")
        samples, rate = open_sound(example.audio)
        name = example.audio if isinstance(example.audio, str) else "a sound"
        if rate != (own := self._feature_extractor.sampling_rate):
            raise ValueError(f"{name}: it has {rate} samples a second, the model needs {own}: resample it")
        longest = _longest(self._feature_extractor)
        if longest and len(samples) > longest:
            raise ValueError(
                f"{name}: it has {len(samples) / rate:.1f} s, the model reads {longest / rate:.0f} s: cut it"
            )
        return samples

    @cached_property
    def _image_processor(self) -> Any:
        return self._loaded(AutoImageProcessor.from_pretrained, "image processor", backend="pil")

    @cached_property
    def _feature_extractor(self) -> Any:
        return self._loaded(AutoFeatureExtractor.from_pretrained, "feature extractor")

    def _loaded(self, load: Callable[..., Any], what: str, **options: Any) -> Any:
        folder = Path(self.path)
        for name in FILES:
            check_link(folder, folder / name)
        try:
            return load(self.path, local_files_only=True, trust_remote_code=False, **options)
        except Exception as error:  # of many types, for a file that is a stranger's
            raise ValueError(
                f"{self.path}: no {what} that transformers can load without torchvision in "
                f"it ({reason(error)}). Save the model's own into the base's folder: preprocessor_config.json"
            ) from error
