"""Check experts against the base: every mismatch in one error, then task vectors over mapped files."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from trainmerge.checkpoints.choice import BASE, TokenizerChoice
from trainmerge.checkpoints.chosen_folder import tokenizer_folder
from trainmerge.checkpoints.config_check import recorded_mismatches
from trainmerge.checkpoints.full_expert import FullExpert, plan_full
from trainmerge.checkpoints.head_parts import with_whole_heads
from trainmerge.checkpoints.hidden_changes import Plan, warn_of_hidden_changes
from trainmerge.checkpoints.low_rank_adapter import plan_adapter
from trainmerge.checkpoints.own_buffers import own_statistics
from trainmerge.checkpoints.parameters import Parameters, open_parameters
from trainmerge.checkpoints.reader import Checkpoint
from trainmerge.checkpoints.roles import place_role, roles_of
from trainmerge.checkpoints.side_experts import SidePlan, plan_side, side_roles
from trainmerge.checkpoints.side_modules import MODULES
from trainmerge.checkpoints.sources import Sources
from trainmerge.checkpoints.ties import differing_ties, lost_ties, one_sided_updates
from trainmerge.checkpoints.token_ties import token_tie_problems
from trainmerge.checkpoints.tokenizer_check import tokenizer_mismatches, warn_of_lost_tokens
from trainmerge.checkpoints.tokenizer_choice import choose_vocabulary
from trainmerge.checkpoints.vocabulary_rows import on_one_vocabulary
from trainmerge.checkpoints.weight_files import ADAPTER, check_one_generation, read_folder_json
from trainmerge.task_vectors.places import parameter_of


@dataclass(frozen=True)
class Rules:
    """How experts are compared with a base: the arguments of `find_sources`.

    Args:
        ignore: As there.
        allow_pickle: As there.
        workspace: As there.
        shared_vocabulary: As there.
        own_heads: As there.
        choice: Whose tokenizer the merge has.
        tokenizer: The folder of that tokenizer; None is the base's.
        statistics: Whether to warn of batch norms' statistics that an expert changed.
    """

    ignore: Sequence[str] = ()
    allow_pickle: bool = False
    workspace: Path | None = None
    shared_vocabulary: bool = False
    own_heads: Collection[str] = ()
    choice: TokenizerChoice = TokenizerChoice()  # noqa: RUF009 - frozen
    tokenizer: Path | None = None
    statistics: bool = True


def find_sources(
    base: Checkpoint,
    experts: Mapping[str, str | Path],
    *,
    ignore: Sequence[str] = (),
    allow_pickle: bool = False,
    workspace: Path | None = None,
    shared_vocabulary: bool = False,
    own_heads: Collection[str] = (),
) -> Sources:
    """Compare experts, any mix of full models and peft adapters, with one base.

    Rows of embeddings are matched by their number.

    Args:
        base: The checkpoint that every expert was fine-tuned from.
        experts: Name -> folder.
        ignore: fnmatch patterns of tensors that are not merged, an expert's own head, say.
        allow_pickle: Read `.bin` files too.
        shared_vocabulary: Merge the common tokens if an expert has more or fewer than the base.
        workspace: Folder for the merged weights of adapters that are not plain low-rank updates.
        own_heads: The experts whose head is not merged, though the base may have one of the same shapes.

    Raises:
        ValueError: lists every mismatch of all experts, before a weight is read; later, an expert whose tied
            tensors differ, or an adapter that peft cannot merge.
    """
    rules = Rules(ignore, allow_pickle, workspace, shared_vocabulary, own_heads)
    return _compared(base, experts, rules)[1]


def find_chosen(
    base: Checkpoint, experts: Mapping[str, str | Path], choice: TokenizerChoice, rules: Rules
) -> tuple[Checkpoint, Sources]:
    """The same, and the base, with the tokenizer of a choice: embeddings have the rows of its tokens.

    By default the base is as it is.

    Raises:
        ValueError: as `find_sources`, `tokenizer_folder` and `on_one_vocabulary`; or there is no workspace.
    """
    if choice.is_default:
        return base, _compared(base, experts, rules)[1]
    if rules.workspace is None:
        raise ValueError("a choice of the tokenizer needs a workspace folder for the merge's rows")
    folders = {BASE: base.path} | {name: Path(folder) for name, folder in experts.items()}
    folder = tokenizer_folder(folders, choice, rules.workspace)
    frame, sources = _compared(base, experts, replace(rules, choice=choice, tokenizer=folder))
    return on_one_vocabulary(frame, sources, choose_vocabulary(folders, choice), folder, rules.workspace)


def _compared(
    base: Checkpoint, experts: Mapping[str, str | Path], rules: Rules
) -> tuple[Parameters, Sources]:
    frame = open_parameters(base, rules.ignore)
    plans: dict[str, Plan] = {}
    side: dict[str, SidePlan] = {}
    folders = {name: Path(folder) for name, folder in experts.items()}
    whole = with_whole_heads(base.path, folders, rules.own_heads)
    problems = [f"base: {line}" for line in lost_ties(frame, rules.ignore)]
    for expert, path in folders.items():
        try:
            plans[expert], found = _plan(frame, expert, path, rules, expert in whole)
            found += _tokenizers(frame, path, rules)
            problems += [f"{expert}: {line}" for line in found]
            if (path / MODULES).is_file() or not (path / ADAPTER).is_file():
                side[expert] = plan_side(base, path, rules.ignore, rules.allow_pickle)
                problems += [f"{expert}: {line}" for line in side[expert].problems]
        except (ValueError, FileNotFoundError) as error:
            problems += [f"{expert}: {line}" for line in str(error).splitlines()]
    _raise(base, problems)
    return frame, _sources(frame, plans, side, rules.statistics)


def _tokenizers(frame: Parameters, path: Path, rules: Rules) -> list[str]:
    """The mismatches of an expert's tokenizer with the one of the merge."""
    if rules.choice.moves_rows and rules.tokenizer:
        warn_of_lost_tokens(rules.tokenizer, path)
        return []
    rows = _vocabulary(frame) if rules.shared_vocabulary else None
    return tokenizer_mismatches(frame.checkpoint.path, path, rows)


def _vocabulary(frame: Parameters) -> int | None:
    rows: int | None = getattr(frame.meta_model.config.get_text_config(), "vocab_size", None)
    return rows


def _sources(
    frame: Parameters, plans: Mapping[str, Plan], side: Mapping[str, SidePlan], statistics: bool
) -> Sources:
    """The places of every expert's tensors; reads what ties and `ignore` hide."""
    _check_ties(frame, plans)
    warn_of_hidden_changes(frame, plans, statistics)
    after = {expert: plan.sources for expert, plan in side.items()}
    sources = {expert: {**plan.sources(), **after.get(expert, {})} for expert, plan in plans.items()}
    roles = roles_of(frame.meta_model)
    known = {name: place_role(roles[parameter_of(inside)], inside) for inside, name in frame.files.items()}
    known |= side_roles(frame.checkpoint)
    own = {
        expert: own_statistics(frame, plan) for expert, plan in plans.items() if isinstance(plan, FullExpert)
    }
    return Sources(tuple(known), frame.tied, sources, known, own if any(own.values()) else {})


def _plan(
    frame: Parameters, expert: str, path: Path, rules: Rules, whole_head: bool
) -> tuple[Plan, list[str]]:
    """One expert, and its mismatches beyond those that its plan raises.

    Those are an adapter's with the base's configuration and ties.
    """
    check_one_generation(path)
    ignore, pickle, shared, choice = rules.ignore, rules.allow_pickle, rules.shared_vocabulary, rules.choice
    if not (path / ADAPTER).is_file():
        return plan_full(frame, expert, path, ignore, pickle, shared, whole_head, choice), []
    every = choice.moves_rows
    plan = plan_adapter(frame, path, ignore, pickle, rules.workspace, shared, whole_head, every)
    recorded = read_folder_json(path / ADAPTER).get("base_model_name_or_path")
    mismatches = recorded_mismatches(frame.meta_model, frame.checkpoint.path, path, recorded, choice)
    mismatches += token_tie_problems(frame, path, plan.adapter.keys, recorded)
    return plan, mismatches + one_sided_updates(frame, path, plan.adapter.keys)


def _check_ties(frame: Parameters, plans: Mapping[str, Plan]) -> None:
    sides = {"base": frame} | {
        name: plan.parameters for name, plan in plans.items() if isinstance(plan, FullExpert)
    }
    _raise(
        frame.checkpoint, [f"{side}: {line}" for side, own in sides.items() for line in differing_ties(own)]
    )


def _raise(base: Checkpoint, problems: Sequence[str]) -> None:
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        count = "1 mismatch" if len(problems) == 1 else f"{len(problems)} mismatches"
        raise ValueError(f"{count} between the base {base.path} and its experts:\n{lines}")
