"""Values of a column of pictures or sounds: paths, files' bytes, or arrays.

Legend: `H` rows, `W` columns and `C` colours of a picture; `L` samples of a sound.
"""

import struct
import wave
from collections.abc import Mapping
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from trainmerge.system.safetensors_file import sha256 as file_sha256
from trainmerge.system.text import reason

EIGHT_BITS = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "LAB", "HSV"}
CHANNELS = {1: "L", 3: "RGB", 4: "RGBA"}
PCM = "Save it as PCM in a .wav file, or give arrays with their sampling_rate"


class Sound(NamedTuple):
    """A sound given as an array."""

    samples: bytes  # [L] float32 in -1 .. 1
    rate: int  # samples per second


Media = str | bytes | Sound  # a path, a file's content, or an array of samples


def picture_value(value: Any, folder: Path, where: str) -> str | bytes:
    """A picture's path, or its file's content.

    `value` is a path, relative to `folder` or absolute; bytes; a mapping with `bytes` or `path`
    (`datasets.Image`); or an array [H, W] or [H, W, C] of integers 0 to 255, which becomes a PNG file.

    Raises:
        ValueError: none of these, or no such file; `where` names file and row.
    """
    found = _path_or_bytes(value, folder, f"{where}: no picture")
    if found is not None:
        return found
    if value is None or isinstance(value, Mapping):
        raise ValueError(f"{where} has no picture")
    try:
        array = np.asarray(value)
        whole = array.astype(np.uint8)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} has {_shape(value)}, which is not a picture: {reason(error)}") from error
    colours = 1 if array.ndim == 2 else array.shape[-1] if array.ndim == 3 else 0
    if colours not in CHANNELS or not array.size or not np.array_equal(whole, array):
        raise ValueError(
            f"{where} has an array {list(array.shape)} of {array.dtype}: a picture is [height, width] or "
            "[height, width, 1, 3 or 4] of integers from 0 to 255"
        )
    content = BytesIO()
    Image.fromarray(whole.squeeze(-1) if array.ndim == 3 and colours == 1 else whole).save(content, "PNG")
    return content.getvalue()


def sound_value(value: Any, folder: Path, where: str) -> Media:
    """A sound's path, its file's content, or its samples.

    `value` is a path, bytes, or a mapping: with `bytes` or `path`, or with `array` [L] and `sampling_rate`.

    Raises:
        ValueError: as `picture_value`.
    """
    found = _path_or_bytes(value, folder, f"{where}: no sound")
    if found is not None:
        return found
    if not isinstance(value, Mapping) or value.get("array") is None or not value.get("sampling_rate"):
        raise ValueError(
            f"{where} has {_shape(value)}: a sound is a path, or a mapping with `array` and `sampling_rate`"
        )
    try:
        samples = np.asarray(value["array"], dtype=np.float32)
        rate = int(value["sampling_rate"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: its array cannot be read: {reason(error)}") from error
    if samples.ndim != 1 or not samples.size or not np.isfinite(samples).all() or np.abs(samples).max() > 1:
        raise ValueError(f"{where}: its array is {list(samples.shape)}: samples are [length], from -1 to 1")
    return Sound(samples.tobytes(), rate)


def _path_or_bytes(value: Any, folder: Path, absent: str) -> str | bytes | None:
    """The path or the bytes that a value or mapping has; None if it has neither."""
    if isinstance(value, Mapping):
        content, path = value.get("bytes"), value.get("path")
        value = path if content is None else content
    if isinstance(value, str):
        path = folder / value
        if not path.is_file():
            raise ValueError(f"{absent} {path}")
        return str(path)
    return bytes(value) if isinstance(value, bytes | bytearray) and value else None


def _shape(value: Any) -> str:
    return f"a {type(value).__name__}" + (f" of {len(value)}" if isinstance(value, list | Mapping) else "")


def content_digest(media: Media | None) -> str | None:
    """SHA-256 of a file's content, or of rate and samples; None without."""
    if media is None:
        return None
    if isinstance(media, str):
        return file_sha256(media)
    return sha256(
        struct.pack("<q", media.rate) + media.samples if isinstance(media, Sound) else media
    ).hexdigest()


def open_picture(media: str | bytes) -> Image.Image:
    """The picture in RGB, turned as its EXIF data say.

    Raises:
        ValueError: it cannot be read, or has more than 8 bits per colour, which RGB would cut off.
    """
    name = media if isinstance(media, str) else f"a picture of {len(media)} bytes"
    try:
        with Image.open(media if isinstance(media, str) else BytesIO(media)) as picture:
            mode, found = picture.mode, ImageOps.exif_transpose(picture).convert("RGB")
    except Exception as error:  # of many types, for a file that is a stranger's
        raise ValueError(f"{name}: not a picture that can be read ({reason(error)})") from error
    if mode not in EIGHT_BITS:
        raise ValueError(f"{name}: its pixels have the mode {mode}; save it with 8 bits per colour")
    return found


def open_sound(media: Media) -> tuple[NDArray[np.float32], int]:
    """Samples [L] in -1 .. 1, the mean of the channels, and their rate.

    Raises:
        ValueError: not a WAV file of integers.
    """
    if isinstance(media, Sound):
        return np.frombuffer(media.samples, dtype=np.float32), media.rate
    name = media if isinstance(media, str) else f"a sound of {len(media)} bytes"
    try:
        with wave.open(media if isinstance(media, str) else BytesIO(media)) as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            content = file.readframes(file.getnframes())
    except Exception as error:  # as for pictures
        raise ValueError(f"{name}: not a sound that can be read ({reason(error)}). {PCM}") from error
    raw = np.frombuffer(content[: len(content) // (width * channels) * width * channels], dtype=np.uint8)
    if not raw.size:
        raise ValueError(f"{name}: it has no samples")
    wide = np.zeros((raw.size // width, 4), dtype=np.uint8)
    wide[:, 4 - width :] = raw.reshape(-1, width)
    if width == 1:  # the only width without a sign
        wide[:, 3] ^= 0x80
    samples = wide.reshape(-1).view("<i4").reshape(-1, channels).astype(np.float64) / 2**31
    return samples.mean(axis=1).astype(np.float32), rate
