"""Mixtures of experts: memory of a merge, routers, one made of dense models, one with fewer experts.

A Qwen3-MoE of 4 layers and 16 experts is trained for `STEPS` steps on texts of eight kinds, and two
fine-tunes of it on four kinds each. A kind is a Markov chain over 64 words. `moe_real` measures the same with
real texts.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import trainmerge as tm
from tests.bench import moe_real
from tests.bench.__main__ import figure
from tests.bench.export import timed
from tests.bench.moe_world import fit, shrunk, silent, train
from tests.family_world import write_words
from trainmerge.checkpoints.meta_model import quiet

WORDS, LENGTH, KINDS, STEPS, SEEDS = 100, 48, 8, 120, 3
SIZES = {
    "vocab_size": WORDS, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "max_position_embeddings": 64, "num_hidden_layers": 4, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def chains() -> torch.Tensor:
    """Next-word probabilities of every kind, [KINDS, 64, 64]."""
    dice = torch.Generator().manual_seed(0)
    return (3 * torch.randn(KINDS, 64, 64, generator=dice)).softmax(-1)


def draw(kinds: Sequence[int], count: int, dice: torch.Generator) -> torch.Tensor:
    """Texts of these kinds in turn, [count, LENGTH], of the words 10 to 73."""
    tables = chains()
    of = torch.tensor([kinds[i % len(kinds)] for i in range(count)])
    words = [torch.randint(64, (count,), generator=dice)]
    for _ in range(LENGTH - 1):
        words.append(torch.multinomial(tables[of, words[-1]], 1, generator=dice)[:, 0])
    return torch.stack(words, dim=1) + 10


def write_texts(root: Path, name: str, kinds: Sequence[int], seed: int) -> None:
    """Calibration and test texts of one fine-tune."""
    for file, count, own in ((f"{name}.jsonl", 48, seed), (f"{name}-test.jsonl", 64, seed + 1000)):
        texts = draw(kinds, count, torch.Generator().manual_seed(own)).tolist()
        lines = [json.dumps({"text": " ".join(f"w{i}" for i in text)}) + "\n" for text in texts]
        (root / file).write_text("".join(lines))


def write_world(root: Path, base: nn.Module, seed: int) -> tm.Recipe:
    """`base`, and fine-tunes `a` and `b` of it on the first and the last kinds."""
    halves = {"a": range(KINDS // 2), "b": range(KINDS // 2, KINDS)}
    with quiet():
        base.save_pretrained(root / "base")
    write_words(root / "base")
    for number, (name, kinds) in enumerate(halves.items()):
        tuned = type(base).from_pretrained(root / "base")  # type: ignore[attr-defined]
        train(tuned, partial(draw, kinds, 16), STEPS // 2, 2e-3, 10 * seed + number)
        with quiet():
            tuned.save_pretrained(root / name)
        write_words(root / name)
        write_texts(root, name, kinds, 100 * seed + number)
    experts = {
        n: tm.Expert(str(root / n), str(root / f"{n}.jsonl"), str(root / f"{n}-test.jsonl")) for n in "ab"
    }
    return tm.Recipe(str(root / "base"), experts)


def routers(root: Path, recipe: tm.Recipe) -> None:
    """Agreement and log-perplexity of merges of two fine-tunes with routers of four kinds."""
    kept = replace(recipe, grouping=tm.Grouping(exclude=["*.mlp.gate.weight"]))
    ways: Mapping[str, tuple[tm.Recipe, int]] = {
        "kept": (kept, 0),
        "merged": (recipe, 0),
        "harc": (replace(recipe, preprocess=[tm.CalibratedRouters("harc", scale=0.5)]), 0),
        "kl": (replace(recipe, preprocess=[tm.CalibratedRouters("kl", scale=0.5)]), 0),
        "learned": (recipe, 60),
    }
    for name, (own, steps) in ways.items():
        with silent():
            found = tm.evaluate_run(fit(own, root / "runs" / name, steps), compare=name == "merged")
        shares = [row["learned"] for row in found.layers().values()]
        figure(f"agreement_{name}", sum(shares) / len(shares), "share", "")
        figure(f"perplexity_{name}", found.means()["learned"], "perplexity", "")
        if name == "merged":
            figure("perplexity_fine_tunes", found.means()["expert"], "perplexity", "")
            figure("perplexity_base", found.means()["base"], "perplexity", "")


def ids_of(file: Path) -> torch.Tensor:
    """The token ids of texts that `write_texts` wrote, [B, LENGTH]."""
    texts = [json.loads(line)["text"] for line in file.read_text().splitlines()]
    return torch.tensor([[int(word[1:]) for word in text.split()] for text in texts])


def mixture(root: Path) -> None:
    """Divergence from two dense fine-tunes: their merge, and the mixture made of them."""
    torch.manual_seed(0)
    base = train(
        LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=128)),
        partial(draw, range(KINDS), 16),
        STEPS,
        4e-3,
        0,
    )
    run = fit(write_world(root, base, 0), root / "run", 60)
    with silent():
        moe = tm.export_mixture(run, root / "moe")
    facts = json.loads((moe / "trainmerge_manifest.json").read_text())["mixture"]
    figure("upcycle_merge_divergence", facts["divergence"]["merge"], "nats", "")
    figure("upcycle_mixture_divergence", facts["divergence"]["mixture"], "nats", "")
    accuracies = facts["accuracy"].values()
    figure("upcycle_router_accuracy", sum(accuracies) / len(accuracies), "share", "")


def memory(root: Path) -> None:
    """Anonymous memory of an export of 0 steps: a mixture's over that of a dense model of equal bytes."""
    peaks = {}
    for name, config in {
        "mixture": Qwen3MoeConfig(
            **{**SIZES, "hidden_size": 512}, num_experts=64, num_experts_per_tok=4, moe_intermediate_size=256
        ),
        "dense": LlamaConfig(**{**SIZES, "hidden_size": 512}, intermediate_size=64 * 256),
    }.items():
        for number, place in enumerate(("base", "a", "b")):
            torch.manual_seed(number)
            kind = Qwen3MoeForCausalLM if name == "mixture" else LlamaForCausalLM
            with quiet():
                kind(config).to(torch.bfloat16).save_pretrained(root / name / place)
        write_words(root / name / "base")
        recipe = tm.Recipe(str(root / name / "base"), {n: tm.Expert(str(root / name / n)) for n in "ab"})
        module = tm.MergeModule(recipe, initial=0.5, workspace=str(root / name / "run" / "workspace"))
        trainer = tm.make_trainer(
            root / name / "run", max_steps=0, accelerator="cpu", enable_progress_bar=False
        )
        tm.fit(module, tm.Calibration({}, recipe.base), trainer, root / name / "run")
        command = [
            sys.executable,
            "-m",
            "trainmerge.cli",
            "export",
            str(root / name / "run"),
            str(root / name / "out"),
        ]
        peaks[name] = timed(command).memory
        shutil.rmtree(root / name / "out")
    figure("export_memory_over_dense", peaks["mixture"] / peaks["dense"], "ratio", "1.2")


def main() -> None:
    """All figures."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        subprocess.run([sys.executable, "-m", "tests.bench.moe", name], check=True)
        mixture(root / "dense")
        losses: dict[str, list[float]] = {}
        for seed in range(SEEDS):
            torch.manual_seed(seed)
            settings = Qwen3MoeConfig(
                **SIZES, num_experts=16, num_experts_per_tok=4, moe_intermediate_size=32, norm_topk_prob=True
            )
            base = train(Qwen3MoeForCausalLM(settings), partial(draw, range(KINDS), 16), STEPS, 4e-3, seed)
            recipe = write_world(root / f"{seed}", base, seed)
            if seed == 0:
                routers(root / "0", recipe)
            place = root / f"{seed}"
            test = ids_of(place / "a-test.jsonl")
            for plan, loss in shrunk(place / "a", 12, place / "a.jsonl", test, place / "shrunk").items():
                losses.setdefault(plan, []).append(loss)
        for plan, own in losses.items():
            figure(f"shrink_{plan}_loss", sum(own) / len(own), "nats", "")
        moe_real.measure(root / "real")


if __name__ == "__main__":
    match sys.argv[1:]:
        case [place]:
            memory(Path(place) / "memory")
        case _:
            main()
