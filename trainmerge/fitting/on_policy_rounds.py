"""The rounds of on-policy learning: the merge writes, the experts judge, steps learn from the record.

A round's texts are in the workspace, so a killed fit goes on within a round with the same ones.

Legend: `K` experts.
"""

import json
import shutil
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from trainmerge.data.batch import Batch, Step
from trainmerge.data.examples import Example
from trainmerge.fitting.on_policy import OnPolicy
from trainmerge.fitting.prepare import FitInputs, record_experts
from trainmerge.model.resident import Resident
from trainmerge.model.sampling import sample_tokens, seed_of
from trainmerge.model.teachers import Record
from trainmerge.model.written_texts import ends_of
from trainmerge.run.manifest import description_digest
from trainmerge.system import distributed
from trainmerge.system.atomic import write_whole
from trainmerge.system.json_file import read_json
from trainmerge.system.workspace import digest

FOLDER = "rounds"  # in the workspace
TEXTS = "texts.json"

Written = list[list[tuple[int, list[int]]]]  # K lists: the prompt's length, and all tokens


@dataclass
class Rounds:
    """The current round of a fit: its examples and the experts' records.

    Args:
        settings: How it is written.
        given: The fit's inputs, with the prompts.
        resident: The merged model.
        fit: What the fit depends on, as JSON: fits that differ in anything have their own texts.
    """

    settings: OnPolicy
    given: FitInputs
    resident: Resident
    fit: str = "{}"
    number: int = -1
    records: list[Record] = field(default_factory=list)  # K, of the experts on the round's texts
    examples: list[list[Example]] = field(default_factory=list)  # K lists

    def rewritten(self, step: Step, at: int) -> Step:
        """The step's batches with the round's texts of the same examples, which a new round writes first.

        Raises:
            ValueError: the fit goes on within a round whose texts are lost.
        """
        number = at // self.settings.every
        if number != self.number:
            self._open(number, begins=at % self.settings.every == 0)
        return [self._batch(batch) for batch in step]

    def _batch(self, batch: Batch) -> Batch:
        """The round's texts of a batch's examples."""
        own = [self.examples[batch.expert][i] for i in batch.ids.tolist()]
        written = self.resident.batch(batch.expert, own, self.given.data.tokenize)
        return written._replace(ids=batch.ids, share=batch.share)

    def _open(self, number: int, begins: bool) -> None:
        folder = self.folder / str(number)
        texts = self._texts(folder / TEXTS, number, begins)
        decode = self.given.data.tokenize.transformers.decode
        self.examples = [
            [Example(decode(ids) or " ", ((begin, len(ids)),), tokens=tuple(ids)) for begin, ids in own]
            for own in texts
        ]
        data = self.given.data.with_examples(self.examples)
        settings = replace(self.given.settings, workspace=folder)
        self.records = record_experts(replace(self.given, data=data, settings=settings), self.resident)
        self.number = number
        if distributed.rank() == 0:  # the outputs of earlier rounds are not needed again
            for other in (folder.parent).glob("*/teachers-*"):
                if other.parent != folder:
                    other.unlink()

    def _texts(self, file: Path, number: int, begins: bool) -> Written:
        """The round's texts, read if this fit wrote them at these coefficients, or else written."""
        merge = self.resident.merged.coefficients().detach().cpu().numpy().tobytes()
        key = {"fit": self._identity, "merge": sha256(merge).hexdigest()}
        with distributed.rank_zero_first():
            found: dict[str, Any] = read_json(file, "Remove it, and start anew.") if file.exists() else {}
            if found.get("fit") == key["fit"] and (not begins or found.get("merge") == key["merge"]):
                return [[(begin, ids) for begin, ids in own] for own in found["texts"]]
            if not begins:
                raise ValueError(
                    f"{file}: the texts of round {number} are lost, and the fit goes on within it. Resume "
                    f"from a snapshot of step {number * self.settings.every}, or start anew in another folder"
                )
            shutil.rmtree(file.parent, ignore_errors=True)
            texts = self._write(number)
            write_whole(file, json.dumps({**key, "texts": texts}))
        return texts

    @property
    def _identity(self) -> str:
        given = self.given
        return digest(repr([given.opened.identity(), given.data.identity(), self.settings]), length=32)

    @property
    def folder(self) -> Path:
        """The fit's own folder in the workspace."""
        return self.given.settings.workspace / FOLDER / description_digest(self.fit)

    def _write(self, number: int) -> Written:
        """Every prompt with the merge's continuation: one materialise, all experts' prompts together."""
        self.resident.merged.materialise()
        data, module = self.given.data, self.resident.merged.module
        ends, padding = ends_of(module, data.tokenize), data.tokenize.padding
        prompts = [[self._prompt(example) for example in own] for own in data.examples]
        seeds = [
            seed_of(f"{data.seed} {number} {name} {i}")
            for name, own in zip(data.files, prompts, strict=True)
            for i in range(len(own))
        ]
        flat = [prompt for own in prompts for prompt in own]
        length, temperature = self.settings.length, self.settings.temperature
        answers = iter(sample_tokens(module, flat, seeds, length, ends, padding, temperature))
        return [[(len(prompt), prompt + next(answers)) for prompt in own] for own in prompts]

    def _prompt(self, example: Example) -> list[int]:
        """The first tokens of an example; with spans those up to the first that counts."""
        tokenize = self.given.data.tokenize
        encoded = tokenize.encode([example])
        ids: list[int] = encoded.inputs["input_ids"][0].tolist()
        if example.spans is not None:
            return ids[: int(encoded.mask[0].nonzero()[0, 0]) + 1]
        prompt = ids[: self.settings.prompt]
        return prompt[:-1] if len(prompt) > 1 and prompt[-1] in tokenize.special_ids else prompt
