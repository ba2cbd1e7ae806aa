"""The columns of calibration and test files."""

from dataclasses import dataclass, field, fields, replace

from trainmerge.system.ranges import check_fields


@dataclass(frozen=True)
class Columns:
    """The columns of a calibration file; None if absent.

    Args:
        text: The text. Not read if `messages` is given. None for pictures or sounds without text.
        messages: A chat, a list of {"role", "content"}: rendered by the tokenizer's chat template; only the
            assistant's turns enter the loss.
        spans: Lists of [begin, end): the characters of the text that enter the loss. A position enters if the
            token that it predicts overlaps one of them.
        target: The decoder's text of a sequence-to-sequence model; its positions enter the loss.
        image: Path of a picture, absolute, or relative to the file's folder; or a `datasets.Image`, a file's
            bytes, or an array [height, width] or [height, width, colours] of 0 to 255. A text beside it has
            the model's placeholder (`<|vision_start|><|image_pad|><|vision_end|>`, say). All positions enter
            the loss, the picture's too.
        audio: Path of a WAV file; or a `datasets.Audio`, bytes, or `array` and `sampling_rate`. Needs
            `text` None.
        pair: The second text of a pair: a hypothesis, a passage to rank, the context of the question in
            `text`.
    """

    text: str | None = "text"
    messages: str | None = None
    spans: str | None = None
    target: str | None = None
    image: str | None = None
    audio: str | None = field(default=None, metadata={"added": "0.2.0"})
    pair: str | None = field(default=None, metadata={"added": "0.2.0"})

    def __post_init__(self) -> None:
        check_fields(self)
        if not (self.messages or self.text or self.image or self.audio):
            raise ValueError("data.columns.text is null: name a column of pictures (image) or sounds (audio)")
        if self.audio and (self.messages or self.text or self.image):
            raise ValueError("data.columns.audio: sounds are read alone: set text to null, without image")
        if self.pair and (self.messages or self.spans or self.media or not self.text):
            raise ValueError(
                "data.columns.pair: pairs are two plain texts: leave out messages, spans, image and audio"
            )

    def names(self) -> list[str]:
        """The columns that a file must have."""
        chosen = [self.messages or self.text, self.spans, self.target, *self.media, self.pair]
        return list(dict.fromkeys(name for name in chosen if name))

    @property
    def media(self) -> list[str]:
        """The columns whose values are no texts."""
        return [name for name in (self.image, self.audio) if name]

    def plain(self) -> "Columns":
        """Only what identifies an example: its texts, or its picture or sound if that is all."""
        return replace(
            self, spans=None, target=None, image=None if self.text or self.messages else self.image
        )

    def record(self) -> dict[str, str | None]:
        """The columns as a run's manifest has them: without one that older versions lack, at its default."""
        values = {f: getattr(self, f.name) for f in fields(self)}
        return {f.name: value for f, value in values.items() if "added" not in f.metadata or value}
