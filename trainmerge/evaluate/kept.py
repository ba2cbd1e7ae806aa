"""Scores of earlier evaluations, in a folder beside the runs, found by a digest of all that decides them.

An entry is a JSON value after the SHA-256 of its key and text: a damaged or foreign file is as none.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from trainmerge.checkpoints import Stamp, fingerprint, stamps
from trainmerge.evaluate.subject import TaskScore
from trainmerge.evaluate.tasks import Task
from trainmerge.run.opened import Opened
from trainmerge.system import distributed
from trainmerge.system.atomic import write_whole, write_whole_bytes
from trainmerge.system.workspace import digest

SCORES = ".scores"


def scores_beside(path: Path) -> Path:
    """The folder of kept scores beside a run folder, an export or a configuration."""
    return path.resolve().parent / SCORES


@dataclass
class KeptScores:
    """Scores that are kept; several processes see those that the first one reads.

    Args:
        folder: The entries; None keeps none.
        tasks: Task -> a digest of what decides its scores beside the model; nothing is kept of others.
        watched: Folder -> its files' stamps when they were digested; nothing is kept once they changed.
    """

    folder: Path | None = None
    tasks: Mapping[str, str] = field(default_factory=dict)
    watched: dict[Path, Mapping[str, Stamp]] = field(default_factory=dict)
    _read: dict[str, Any] = field(default_factory=dict)

    def get(self, key: str | None) -> Any:
        """The value of a key; None if it is not kept."""
        if self.folder is None or key is None:
            return None
        if key not in self._read:
            own = _load(self._path(key), key) if distributed.rank() == 0 else None
            self._read[key] = distributed.broadcast(own)
        return self._read[key]

    def put(self, key: str | None, value: Any) -> None:
        """Keep a value of JSON data; where that is impossible, for this object's life only."""
        if self.folder is None or key is None:
            return
        self._read[key] = value
        if distributed.rank() > 0:
            return
        text = json.dumps(value).encode()
        try:
            if all(stamps(folder) == then for folder, then in self.watched.items()):
                if not (ignore := self.folder / ".gitignore").exists():
                    write_whole(ignore, "*\n")
                write_whole_bytes(self._path(key), _seal(key, text) + b"\n" + text)
        except (OSError, ValueError):  # a full disk, a place that cannot be written
            return

    def known(self, model: str | None, tasks: Sequence[Task]) -> dict[str, TaskScore] | None:
        """A model's scores on all of these tasks; None if one is not kept, or the model has no digest."""
        found = {task.name: self._score(model, task.name) for task in tasks}
        sure = {name: score for name, score in found.items() if score is not None}
        return sure if len(sure) == len(tasks) else None

    def scores(
        self, model: str | None, tasks: Sequence[Task], score: Callable[[Task], TaskScore]
    ) -> dict[str, TaskScore]:
        """A model's scores on tasks; those that are not kept are computed by `score`, and kept."""
        found = {}
        for task in tasks:
            known = self._score(model, task.name)
            found[task.name] = self.keep(model, task.name, score(task)) if known is None else known
        return found

    def keep(self, model: str | None, task: str, score: TaskScore) -> TaskScore:
        """The score itself, which is kept."""
        value = {"measures": dict(score.measures), "outcomes": score.outcomes.tolist()}
        self.put(self.key(model, task), value)
        return score

    def key(self, model: str | None, *tasks: str, about: str = "") -> str | None:
        """A digest of a model and of what decides its scores on tasks; None if one of them has no digest."""
        own = [about, model, *map(self.tasks.get, tasks)]
        return None if None in own else digest(json.dumps(own), length=64)

    def checksums(self, folder: Path) -> Mapping[str, str]:
        """A folder's `fingerprint`; known from earlier if no file's stamp changed. The folder is watched."""
        stamped = self.watched.setdefault(folder, stamps(folder))
        key = digest(json.dumps([str(folder.resolve()), stamped]), length=64)
        found: Mapping[str, str] | None = self.get(key)
        if found is None:
            found = distributed.broadcast(fingerprint(folder) if distributed.rank() == 0 else {})
            self.put(key, found)
        return found

    def watch(self, opened: Opened) -> None:
        """Watch a recipe's files."""
        for name, then in opened.stamps.items():
            self.watched.setdefault(opened.folders[name], then)

    def _score(self, model: str | None, task: str) -> TaskScore | None:
        if (value := self.get(self.key(model, task))) is None:
            return None
        return TaskScore(value["measures"], torch.tensor(value["outcomes"], dtype=torch.float64))

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{key[:32]}.json"


def _load(path: Path, key: str) -> Any:
    """The value of a whole file of this key, else None."""
    try:
        seal, _, text = path.read_bytes().partition(b"\n")
    except OSError:
        return None
    return json.loads(text) if seal == _seal(key, text) else None


def _seal(key: str, text: bytes) -> bytes:
    return hashlib.sha256(key.encode() + text).hexdigest().encode()
