"""What all checkpoints of one evaluation are scored with; heads and experts' similarities on first use."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from torch import Tensor

from trainmerge.checkpoints import Checkpoint, OwnHead, load_model
from trainmerge.data.classifier import Classifier
from trainmerge.data.tokenizer import Tokenizer
from trainmerge.evaluate.own_checkpoint import own_subject
from trainmerge.evaluate.runs import Heads, build_task_heads, references_from_files
from trainmerge.evaluate.subject import Subject
from trainmerge.evaluate.tasks import Task
from trainmerge.evaluate.vocabulary import Reading
from trainmerge.model.embedding import Embedding, read_embedding
from trainmerge.model.own_head import OwnModel, attach
from trainmerge.model.resident import DEVICE, special_ids
from trainmerge.run.recipe import Recipe


@dataclass(frozen=True)
class Planned:
    """Checkpoints as subjects.

    Args:
        words: The recipe's tokenizer, and its base.
        recipe: The recipe of the tasks.
        tasks: What is scored.
        tokenize: The tokenizer.
        answers: Maximal tokens of an answer.
    """

    words: Reading
    recipe: Recipe
    tasks: Sequence[Task]
    tokenize: Tokenizer
    answers: int | None = None

    def load(self, folder: Path) -> Subject:
        """A checkpoint under the tasks' heads; a sentence embedder embeds by its own folder's modules."""
        self.make()
        checkpoint = self.words.open(folder)
        loaded = load_model(checkpoint, self.recipe.ignore)
        subject = Subject(loaded.module.to(DEVICE), {}, self.tokenize, self.answers)
        return self.headed(subject, loaded.names, checkpoint)

    def alone(self, folder: Path) -> Subject:
        """A checkpoint with a head of its own."""
        path = self.words.open(folder).path
        return own_subject(path, self.recipe, self.tasks, self.tokenize, self.answers)

    def make(self) -> None:
        """Make heads and similarities now: they need a model in memory, for as long as they are made."""
        _ = self._heads, self._references

    def headed(self, subject: Subject, names: Mapping[str, str], checkpoint: Checkpoint) -> Subject:
        """A model with the tasks' heads; `names` are its parameters by the tensors of the base's files."""
        special, module = special_ids(self.tokenize), subject.module
        heads: Heads = {
            task: attach(head, module, names, special) if isinstance(head, OwnHead) else head
            for task, head in self._heads.items()
        }
        return replace(
            subject, heads=heads, embedding=self._embedding(checkpoint), references=self._references
        )

    def _embedding(self, checkpoint: Checkpoint) -> Embedding | None:
        return read_embedding(checkpoint) if any(task.similar for task in self.tasks) else None

    @cached_property
    def _heads(self) -> Mapping[str, Classifier | OwnModel | OwnHead | None]:
        """The tasks' heads; loads the base temporarily. Experts' own ones stand on each checkpoint."""
        recipe = self.words.recipe
        base = load_model(self.words.open(recipe.folders["base"]), recipe.ignore).module.to(DEVICE)
        others = [task for task in self.tasks if not isinstance(task.head, OwnHead)]
        own = {task.name: task.head for task in self.tasks if isinstance(task.head, OwnHead)}
        return {**own, **build_task_heads(base, others, self.tokenize)}

    @cached_property
    def _references(self) -> Mapping[str, Tensor]:
        return references_from_files(self.recipe, self.tasks, self.tokenize)
