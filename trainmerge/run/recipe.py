"""A recipe: base, experts, preprocessing of their task vectors, and the grouping of coefficients."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from trainmerge.align import Align
from trainmerge.checkpoints import (
    Checkpoint,
    Sources,
    Stamp,
    TokenizerChoice,
    TokenRow,
    as_then,
    open_checkpoint,
    stamps,
    with_rows,
)
from trainmerge.coefficients.layout import Grouping
from trainmerge.preprocess import Preprocess
from trainmerge.run.alignment import Aligner
from trainmerge.run.names import check_names
from trainmerge.run.opened import Opened
from trainmerge.run.recipe_tasks import Expert, HeldOut
from trainmerge.system.hub import HubId, folder_of, is_hub_id, parse_id
from trainmerge.system.ranges import check_fields
from trainmerge.system.workspace import open_cached
from trainmerge.task_vectors.buffers import BufferRule, check_rule


@dataclass(frozen=True)
class Recipe:
    """A merge without its coefficients.

    Args:
        base: The checkpoint that every expert was fine-tuned from: a folder, or an id on the hub, which is
            `org/name`, `org/name@revision` or `org/name/subfolder@revision`.
        experts: Name -> expert. The coefficients have one row per name.
        preprocess: Applied to the task vectors, in order.
        grouping: Which parameters are merged and which share a coefficient.
        ignore: fnmatch patterns of tensors that an expert may have and the base lacks (its own head, say).
        vocabulary: `same`, or `shared`, which merges the common tokens if an expert's embeddings were
            resized. The result has the base's vocabulary. `union` is `tokenizer: union`.
        allow_pickle: Read `.bin` checkpoints too. Pickle can run code; use it for files you trust.
        held_out: Name -> further task, for `evaluate` only.
        tokenizer: `base`, an expert's name, or `union`: the base's tokens, then those that only experts have.
            With the last two, rows of embeddings and heads are matched by token, and a token that the base
            lacks has the mean of its rows in the experts that have it. By default the base's.
        chat_template: `base` or an expert's name; by default the tokenizer's, or for tokens of experts the
            one that all of them share. Special tokens that a template names are its owner's.
        generation_config: `base` or an expert's name; by default the base's. With this or another of these
            keys, the ends of an answer are those of base and all experts.
        pad_to_multiple: Rows of the embedding are a multiple of this number.
        tokens: Token -> the row of models that lack it, or of all; by default as under `tokenizer`.
        align: What lines full experts up with the base before task vectors are taken: `Neurons`,
            `AttentionHeads`, `ResidualStream`, `Gauge`, `NeuronScales`. Their functions stay the same.
        buffers: What becomes of batch norms' statistics: `keep` the base's, `average` those of the experts
            by their weights, or `reestimate` them on the calibration data, at the start of a fit for all of
            its steps, and at its end for the result. Experts are run with their own. None keeps the
            base's, and warns if an expert's differ.
    """

    base: str
    experts: Mapping[str, Expert]
    preprocess: Sequence[Preprocess] = ()
    grouping: Grouping = field(default_factory=Grouping)
    ignore: Sequence[str] = ()
    vocabulary: Literal["same", "shared", "union"] = "same"
    allow_pickle: bool = False
    held_out: Mapping[str, HeldOut] = field(default_factory=dict)
    tokenizer: str | None = field(default=None, metadata={"added": "0.2.0"})
    chat_template: str | None = field(default=None, metadata={"added": "0.2.0"})
    generation_config: str | None = field(default=None, metadata={"added": "0.2.0"})
    pad_to_multiple: int | None = field(default=None, metadata={"added": "0.2.0"})
    tokens: Mapping[str, TokenRow] | None = field(default=None, metadata={"added": "0.2.0"})
    align: Sequence[Align] = field(default=(), metadata={"added": "0.2.0"})
    buffers: BufferRule | None = field(default=None, metadata={"added": "0.2.0"})

    def __post_init__(self) -> None:
        check_fields(self, "recipe", pad_to_multiple="[1, 1e6]")
        object.__setattr__(self, "align", tuple(self.align))  # a list from a file equals the default
        if not self.experts:
            raise ValueError("recipe.experts is empty: name at least one expert")
        check_names([*self.experts, *self.held_out])
        if not any(expert.weight for expert in self.experts.values()):
            raise ValueError("recipe.experts: every weight is 0, so there is nothing to learn from")
        self.choice.check(list(self.experts), self.vocabulary)
        owners: dict[Path | HubId, str] = {_place(self.base): "the base"}
        for name, expert in self.experts.items():
            if (other := owners.setdefault(_place(expert.path), name)) != name:
                raise ValueError(
                    f"recipe.experts.{name}: {expert.path} is already {other}, so a second coefficient would "
                    "be redundant. Name each folder once; two tasks of one expert can share a file of "
                    "examples"
                )

    def open(self, workspace: Path | None = None, aligned: bool = True) -> Opened:
        """Check all headers and map the files; no weight is read, unless experts are aligned.

        Without `aligned` they are as on disk: the same functions, whose task vectors are not the merge's.

        Raises:
            ValueError: lists every mismatch between base and experts; or a pattern matches nothing.
        """
        from trainmerge.checkpoints import Rules, find_chosen  # import what `reopen` does not need

        folders = self.folders
        base = open_checkpoint(folders["base"], allow_pickle=self.allow_pickle)
        experts = {name: folders[name] for name in self.experts}
        own_heads = [name for name, expert in self.experts.items() if expert.head == "own"]
        shared = self.vocabulary == "shared"
        warns = self.buffers is None
        rules = Rules(self.ignore, self.allow_pickle, workspace, shared, own_heads, statistics=warns)
        check_rule(self.buffers, base.tensors, base.path)
        base, sources = find_chosen(base, experts, self.choice, rules)
        if aligned and self.align:
            calibration = {name: expert.calibration for name, expert in self.experts.items()}
            lined_up = Aligner(base, self.align, self.ignore, self.allow_pickle, workspace)
            sources = lined_up(sources, experts, calibration)
        return self._opened(base, sources, self.stamps())

    @property
    def choice(self) -> TokenizerChoice:
        """Whose tokenizer, chat template and generation settings the merge has."""
        union = self.vocabulary == "union" and self.tokenizer is None
        tokenizer = "union" if union else self.tokenizer or "base"
        return TokenizerChoice(
            tokenizer, self.chat_template, self.generation_config, self.pad_to_multiple,
            tokens=tuple((self.tokens or {}).items()),
        )  # fmt: skip

    def tokenizer_folder(self, workspace: Path) -> str:
        """The merge's tokenizer: the base, or a folder in the workspace, made if it is not there.

        Raises:
            ValueError: the choice of the tokenizer is impossible.
        """
        if self.choice.is_default:
            return self.base
        from trainmerge.checkpoints import tokenizer_folder  # imports transformers

        return str(tokenizer_folder(self.folders, self.choice, workspace))

    def reopen(self, saved: Path, checksums: Mapping[str, Mapping[str, str]]) -> Opened | None:
        """`open` from the file of `Opened.save`, if no file changed since; does not need transformers.

        `checksums` are the files' checksums at that time.
        """
        if not saved.is_file():
            return None
        try:
            content = json.loads(saved.read_text())
            known, sources = content["stamps"], Sources.from_json(content["sources"])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):  # damaged: opened anew
            return None
        made = self.stamps()
        if as_then(made, known) != known:
            return None
        try:
            base = open_checkpoint(self.folders["base"], self.allow_pickle, sources.tied)
            if not self.choice.is_default:
                folder, rows = Path(content["vocabulary"]), content["rows"]
                if self.tokenizer_folder(folder.parent) != str(folder):  # generation_config.json changed
                    return None
                base = with_rows(base, folder, open_cached(Path(rows)) if rows else None)
            return self._opened(base, sources, made, checksums)
        except FileNotFoundError:  # a merged adapter in the workspace
            return None

    def _opened(
        self,
        base: Checkpoint,
        sources: Sources,
        made: Mapping[str, Mapping[str, Stamp]],
        checksums: Mapping[str, Mapping[str, str]] | None = None,
    ) -> Opened:
        task_vectors = sources.open(base)
        layout = self.grouping.layout(task_vectors.shapes, [*base.tensors, *base.side])
        given = self.folders, self.ignore, sources, made, checksums, self.align, self.allow_pickle
        return Opened(base, task_vectors, layout, *given)

    @property
    def paths(self) -> dict[str, str]:
        """`base`, and every expert, as they were given: folders or ids."""
        return {"base": self.base} | {name: expert.path for name, expert in self.experts.items()}

    @property
    def folders(self) -> dict[str, Path]:
        """`base`, and every expert; ids are in the hub's cache, or downloaded into it.

        Raises:
            FileNotFoundError: an id that is neither in the cache nor can be downloaded.
        """
        return {name: folder_of(path, True, self.allow_pickle) for name, path in self.paths.items()}

    def stamps(self) -> dict[str, dict[str, Stamp]]:
        """The file system's stamps of all files of base and experts."""
        return {name: stamps(folder) for name, folder in self.folders.items()}


def _place(path: str) -> Path | HubId:
    """The same for two texts that mean one folder."""
    found = parse_id(path) if is_hub_id(path) else None
    return Path(path).resolve() if found is None else found._replace(revision=found.revision or "main")
