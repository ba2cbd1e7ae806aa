"""The places of an expert's own head: its class, and for each of its parameters the base's or its own tensor.

It is found from headers and config.json, after `find_sources` has decided what is merged (`find_own_heads`).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from trainmerge.checkpoints.meta_model import shorten
from trainmerge.checkpoints.output import ENDS, Output, names_in_forward, output_of_class
from trainmerge.checkpoints.sources import FullSource, OpenedFiles

HeadKind = Literal["classes", "tokens", "spans", "labels", "values"]  # as `data.batch.Kind`
OF_FILES = (
    "_name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
)  # keys of where and how it is stored


@dataclass(frozen=True)
class OwnHead:
    """One expert's class over the merged weights.

    Args:
        folder: The expert's.
        kind: Its class.
        config: Its configuration, with dropout 0.
        config_file: Where that is from: the expert's, or the base's for an adapter.
        shared: Parameter or buffer of the class -> the base's tensor that it is.
        own: Parameter or buffer of the class -> its place in the expert's files.
        absent: Parameters of the class that are in no file.
    """

    folder: Path
    kind: type[PreTrainedModel]
    config: PreTrainedConfig
    config_file: Path
    shared: Mapping[str, str]
    own: Mapping[str, FullSource]
    absent: Sequence[str] = ()

    def check(self) -> None:
        """Raise ValueError if a parameter is neither the base's nor in the expert's files."""
        if self.absent:
            raise ValueError(
                f"{self.folder}: {self.kind.__name__} has parameters that neither its files nor the base's "
                f"have, so they would be random: {shorten(self.absent)}. Save the expert with the class that "
                "it was trained with, or set the expert's `head`"
            )

    @property
    def output(self) -> Output:
        """What its class puts out."""
        return output_of_class(self.kind, self.config)

    @property
    def labels(self) -> dict[str, int]:
        """The names of its classes -> their numbers."""
        return {str(name): int(i) for i, name in (self.config.id2label or {}).items()}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every own parameter and buffer, mapped."""
        files = OpenedFiles()
        for name, place in self.own.items():
            yield name, files.read(place.file, place.tensor)

    def identity(self) -> str:
        """Its class and everything in config.json that its function may depend on; files have checksums."""
        told = {key: value for key, value in self.config.to_dict().items() if key not in OF_FILES}
        return f"own {self.kind.__name__} {json.dumps(told, sort_keys=True, default=str)}"

    @property
    def outputs(self) -> HeadKind:
        """What its outputs are: by its class, `problem_type`, and the number of labels."""
        match self.output.kind:
            case "token classifier":
                return "tokens"
            case "question-answering model":
                return "spans"
        problem = self.config.problem_type
        if problem == "regression" or (not problem and self.config.num_labels == 1):
            return "values"
        return "labels" if problem == "multi_label_classification" else "classes"

    @property
    def padding(self) -> int | None:
        """The token that its class takes for padding; None if it does not look for one.

        Raises:
            ValueError: it does, and config.json names none; or it reads the last position, padding or not.
        """
        if self.output.ends:
            raise ValueError(f"{self.config_file}: {self.kind.__name__} {ENDS}")
        if self.output.kind != "classifier" or not self._reads_last_token():
            return None
        token: int | None = self.config.get_text_config().pad_token_id
        if token is None:
            raise ValueError(
                f"{self.config_file}: {self.kind.__name__} classifies by the last token that is not padding, "
                "and no pad_token_id is set, so batches of several texts have no last token: set "
                "pad_token_id there to the token that the expert was padded with"
            )
        return token

    def _reads_last_token(self) -> bool:
        """Whether its class's forward looks for the padding token in its inputs."""
        return "pad_token_id" in names_in_forward(self.kind)
