"""A run of dense experts -> one mixture of experts: `trainmerge export --as moe`."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from trainmerge.checkpoints import load_model, open_checkpoint
from trainmerge.checkpoints.whole import MANIFEST, export_manifest
from trainmerge.data.tokenizer import Tokenizer
from trainmerge.export.explain import explain
from trainmerge.export.export import write_checkpoint
from trainmerge.export.form import DtypeName, Form
from trainmerge.export.shards import write_shard
from trainmerge.export.verify import compare_tensors
from trainmerge.mixtures.facts import facts_of, mixture_facts, warn_of_chance
from trainmerge.mixtures.families import feed_forward
from trainmerge.mixtures.held_out_alignment import Recorded, mean_divergence, record_predictions
from trainmerge.mixtures.learn_routers import Learned, learn_routers
from trainmerge.mixtures.mixture_card import mixture_words
from trainmerge.mixtures.upcycle_plan import UpcyclePlan, plan_upcycling
from trainmerge.mixtures.upcycled import Upcycled
from trainmerge.model.resident import DEVICE, Placement, Resident, load_resident
from trainmerge.run.router_texts import RouterTexts, router_texts
from trainmerge.run.sources import text_length
from trainmerge.system.staging import staging

TEMPERATURES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # factors of the rows that are tried
Texts = Sequence[RouterTexts]  # of each expert


def export_mixture(
    run: str | Path,
    out: str | Path,
    top_k: int = 2,
    routed: float = 0.5,
    overwrite: bool = False,
    dtype: DtypeName | None = None,
    shard_size: str | None = None,
) -> Path:
    """Write a run's experts as one mixture, whose experts are their feed-forward networks.

    All other tensors are the run's merge. Llama and Mistral become Mixtral, Qwen2 becomes Qwen2-MoE and Qwen3
    becomes Qwen3-MoE. Each layer's router is a logistic regression that tells the experts' calibration texts
    apart; a factor of all routers is chosen by the divergence from the experts on held-out ones. The dense
    merge is in memory, and after it the mixture.

    Args:
        run: The run's folder.
        out: The folder to create.
        top_k: Experts for each token.
        routed: In Qwen2-MoE, which has a shared expert (the merge's network), the share of the routed ones.
        overwrite: Replace `out` if it exists.
        dtype: As in `export_run`.
        shard_size: Bytes per weight file, 5GB by default.

    Raises:
        FileExistsError: `out` exists and `overwrite` is not set.
        ValueError: as `export_run`; a base without such a mixture, fewer than two experts, `top_k` above
            their number, or an expert without calibration texts.
    """
    plan = plan_upcycling(run, out, top_k, routed, Form(dtype, shard_size))
    exported = plan.exported
    tokenizer = Tokenizer(
        exported.recipe.tokenizer_folder(exported.run.workspace), text_length(exported.run.path)
    )
    with staging(Path(out), overwrite) as folder:
        plan.check(folder)
        texts = [*router_texts(exported.recipe, exported.run, tokenizer.render).values()]
        learned, recorded, before = _learn(plan, texts, tokenizer)
        made = write_checkpoint(plan.tensors({name: own.rows for name, own in learned.items()}), folder)
        plan.write_settings(folder)
        factor, after = choose_temperature(folder, plan, recorded)
        if factor != 1:
            rows = {name: factor * own.rows for name, own in learned.items()}
            made |= rewrite_routers(plan.tensors(rows), folder)
        facts = facts_of(plan, learned, factor, {"merge": before, "mixture": after})
        explain(folder, Path(out).name, replace(exported, mixture=facts, about=mixture_words(facts)), made)
    warn_of_chance(facts)
    return Path(out)


def verify_mixture(run: str | Path, out: str | Path) -> int:
    """Compare a mixture with its run, bit for bit, its routers as they are; returns the number of tensors.

    Raises:
        ValueError: another folder; lists the first differences.
    """
    folder = Path(out)
    facts = mixture_facts(folder)
    form = Form.read(export_manifest(folder).get("form"), folder / MANIFEST)
    plan = plan_upcycling(run, out, facts["top_k"], facts.get("routed", 0.5), form)
    there = open_checkpoint(folder)
    routers = {layer: there.read(plan.mixture.router(layer)) for layer in plan.layers}
    return compare_tensors(plan.tensors(routers), Path(run), folder)


def choose_temperature(
    folder: Path, plan: UpcyclePlan, recorded: Sequence[Sequence[Recorded]]
) -> tuple[float, float]:
    """The factor of all routers with the least divergence from the experts on held-out texts, and that."""
    loaded = load_model(open_checkpoint(folder))
    module = loaded.module.to(DEVICE)
    routers = [module.get_parameter(loaded.names[plan.mixture.router(layer)]) for layer in plan.layers]
    rows = [router.detach().clone() for router in routers]
    losses = {}
    for factor in TEMPERATURES:
        for router, own in zip(routers, rows, strict=True):
            router.data.copy_(factor * own)
        losses[factor] = mean_divergence(module, recorded)
    best = min(losses, key=lambda factor: (losses[factor], abs(factor - 1)))
    return best, losses[best]


def rewrite_routers(tensors: Upcycled, folder: Path) -> dict[str, str]:
    """Write the files with routers again; returns their SHA-256."""
    made = {}
    for file, names in tensors.shards.items():
        if any(name in tensors.made for name in names):
            (folder / file).unlink()
            made[file] = write_shard(tensors, names, folder / file)
    return made


def _learn(
    plan: UpcyclePlan, texts: Texts, tokenizer: Tokenizer
) -> tuple[dict[str, Learned], list[list[Recorded]], float]:
    """Routers, the experts' predictions of held-out texts, and the merge's divergence from them."""
    exported = plan.exported
    resident = load_resident(
        exported.recipe, exported.opened, exported.coefficients, tokenizer, Placement(DEVICE)
    )
    recorded = record_predictions(resident, [held for _, held in texts], tokenizer)
    with torch.no_grad():
        for name, parameter in resident.merged.parameters.items():
            pieces = plan.merge.pieces(name)
            parameter.copy_(torch.cat([piece.flatten() for piece in pieces]).view(parameter.shape))
    before = mean_divergence(resident.merged.module, recorded)
    return learn_routers(resident, texts, tokenizer, _networks(plan, resident)), recorded, before


def _networks(plan: UpcyclePlan, resident: Resident) -> dict[str, nn.Module]:
    """Layer -> its feed-forward network in memory."""
    names, module = resident.merged.names, resident.merged.module
    return {
        layer: module.get_submodule(names.get(tensor, tensor).rsplit(".", 2)[0])
        for tensor, (layer, _) in feed_forward(plan.merge.tensors).items()
    }
