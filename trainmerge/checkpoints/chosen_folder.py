"""The folder of a merge's tokenizer, chat template and configurations, made from those of base and experts.

Its name is a digest of everything that it is made from, so it is made once for a workspace.
"""

import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainmerge.checkpoints.chat_template import (
    REMEDY,
    ROLES,
    TEMPLATES,
    open_tokenizer,
    save,
    take_template,
)
from trainmerge.checkpoints.choice import BASE, UNION, TokenizerChoice
from trainmerge.checkpoints.special_ids import ends, move_ids, resized, with_ends
from trainmerge.checkpoints.stated_settings import state_settings
from trainmerge.checkpoints.tokenizer_choice import Chosen, choose_vocabulary
from trainmerge.checkpoints.vocabulary import ADDED, SETTINGS, WHOLE, tokenizer_files
from trainmerge.system.atomic import rename_whole, temporary_folder
from trainmerge.system.json_file import read_json
from trainmerge.system.links import check_link, leads_outside
from trainmerge.system.safetensors_file import sha256
from trainmerge.system.workspace import VOCABULARY, digest

GENERATION = "generation_config.json"
READ = ("config.json", GENERATION, "adapter_config.json", *TEMPLATES)
DECODER, PIECES = "added_tokens_decoder", ".model"
KEPT = (".json", ".jinja", ".txt", ".model", ".tiktoken")  # of the base


def tokenizer_folder(folders: Mapping[str, Path], choice: TokenizerChoice, workspace: Path) -> Path:
    """The folder in the workspace, made if it is not there; no weight is read.

    Args:
        folders: `base`, and every expert.
        choice: From whom its parts are.
        workspace: The folder to make it in.

    Raises:
        ValueError: as `choose_vocabulary`; no tokenizer.json; or a template of tokens that the tokenizer
            lacks.
    """
    contents = {
        name: {file.name: sha256(file) for file in _files(folder)} for name, folder in folders.items()
    }
    target = workspace / f"{VOCABULARY}{digest(repr([2, contents, choice]))}"
    if target.is_dir():
        return target
    chosen = choose_vocabulary(folders, choice)
    workspace.mkdir(parents=True, exist_ok=True)
    with temporary_folder(workspace, "vocabulary") as folder:
        made = folder / "made"
        made.mkdir()
        _write(chosen, made)
        try:
            rename_whole(made, target)
        except OSError:  # another process was faster
            if not target.is_dir():
                raise
    return target


def _files(folder: Path) -> list[Path]:
    """The files that the merge's folder is made from."""
    named = [path for name in READ if (path := folder / name).is_file()]
    found = [*named, *tokenizer_files(folder)]
    for path in found:
        check_link(folder, path)
    return found


def _write(chosen: Chosen, target: Path) -> None:
    base, owner = chosen.folders[BASE], chosen.folders[chosen.owner]
    gone = {file.name for file in tokenizer_files(base)} | {*TEMPLATES}
    for path in base.iterdir():
        if path.suffix in KEPT and path.is_file() and not path.name.endswith(".index.json"):
            own = path.name not in gone and not path.name.startswith("trainmerge_")
            if own and not leads_outside(base, path):
                shutil.copyfile(path, target / path.name)
    for path in [*tokenizer_files(owner), *(owner / name for name in TEMPLATES)]:
        if path.is_file():
            shutil.copyfile(path, target / path.name)
    if chosen.new:
        _add_tokens(chosen, target)
    tokenizers = {
        name: open_tokenizer(folder) for name, folder in chosen.folders.items() if tokenizer_files(folder)
    }
    take_template(chosen, tokenizers, target)
    state_settings(target)
    _check(chosen, target)
    _write_configs(chosen, tokenizers, target)


def _add_tokens(chosen: Chosen, target: Path) -> None:
    """Append the experts' tokens to the base's files; the rest of those is as it was.

    llama.cpp takes the tokens of a sentencepiece model from that file, and further ones from
    tokenizer_config.json, never from tokenizer.json: there they are listed in both.
    """
    if not (target / WHOLE).is_file():
        raise ValueError(
            f"{chosen.folders[BASE]}: no tokenizer.json, so no tokens can be added; save it as one"
        )
    content, entries = read_json(target / WHOLE, REMEDY), []
    for i, (name, own) in chosen.new.items():
        entries.append({**_entry(chosen, name, chosen.vocabularies[name].tokens[own]), "id": i})
    content["added_tokens"] = [*(content.get("added_tokens") or []), *entries]
    save(target / WHOLE, content)
    if (file := target / SETTINGS).is_file():
        settings, pieces = read_json(file, REMEDY), any(path.suffix == PIECES for path in target.iterdir())
        listed = settings.get(DECODER, {} if pieces else None)
        if listed is not None:
            every = entries if listed else content["added_tokens"]
            more = {str(e["id"]): {key: e[key] for key in e if key != "id"} for e in every}
            save(file, {**settings, DECODER: {**listed, **more}})
    if (file := target / ADDED).is_file():
        save(file, {**read_json(file, REMEDY), **{e["content"]: e["id"] for e in entries}})


def _entry(chosen: Chosen, name: str, token: str) -> dict[str, Any]:
    """An expert's added token as its tokenizer.json has it, with its flags."""
    backend = chosen.vocabularies[name].backend
    added = json.loads(backend.to_str())["added_tokens"] if backend is not None else []
    plain = {"content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return next((dict(e) for e in added if e["content"] == token), {**plain, "special": True})


def _check(chosen: Chosen, target: Path) -> None:
    """Raise ValueError unless transformers reads every token of the merge under its id."""
    found = {str(token): int(i) for token, i in open_tokenizer(target).get_vocab().items()}
    wrong = [(t, i) for t, i in chosen.ids.items() if found.get(t) != i]
    if wrong:
        token, i = wrong[0]
        raise ValueError(
            f"{chosen.folders[BASE]}: its tokenizer's ids have gaps: transformers gives {token!r} the id "
            f"{found.get(token)}, and {i} follows the base's tokens ({len(wrong)} differ). Set `tokenizer` "
            "to an expert's name"
        )


def _write_configs(chosen: Chosen, tokenizers: Mapping[str, Any], target: Path) -> None:
    """config.json and generation_config.json: the merge's ids, and every model's ends of an answer."""
    generation = {
        name: read_json(file, REMEDY) if (file := folder / GENERATION).is_file() else {}
        for name, folder in chosen.folders.items()
    }
    found: dict[int, None] = {}
    for name in chosen.folders:
        role = getattr(tokenizers.get(name), "eos_token_id", None)
        for own in ends(chosen.configs[name], generation[name], role):
            if (i := chosen.id_of(name, own)) is not None:
                found[i] = None
            elif name != BASE:
                token = chosen.vocabularies[name].tokens.get(own, str(own))
                warnings.warn(
                    f"{chosen.folders[name]}: answers of {name} end with {token!r}, which the merge's "
                    f"tokenizer lacks, so nothing ends them; set tokenizer: {UNION}",
                    stacklevel=2,
                )
    save(target / "config.json", with_ends(resized(chosen.configs[BASE], chosen), found))
    name = chosen.choice.generation_config or BASE
    if chosen.choice.generation_config and not generation[name]:
        raise ValueError(f"{chosen.folders[name]}: no {GENERATION}, and generation_config is {name!r}")
    made = move_ids(generation[name], lambda own: chosen.id_of(name, own))
    final = open_tokenizer(target)
    roles = {f"{r}_id": i for r in ROLES if (i := getattr(final, f"{r}_id", None)) is not None}
    lacking = {key: i for key, i in roles.items() if made.get(key) is None}
    save(target / GENERATION, with_ends({**made, **lacking}, found))
