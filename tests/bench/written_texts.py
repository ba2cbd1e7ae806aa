"""What texts that models wrote are worth, on tiny language models of three Markov chains of words.

The chains share their words. The base knows their mixture a little, each expert one of them well. Every row
makes 40 steps from 0.4; its score is the share of the gap between base and experts in log-perplexity.
"""

import json
import sys
import tempfile
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import trainmerge as tm
from tests.bench.__main__ import figure
from tests.chat_world import learn
from tests.world import WORDS, write_tokenizer
from trainmerge.run.recipe import calibration_files

SEEDS, STEPS, LENGTH, TEXTS = (0, 1, 2), 40, 24, 32
CHAINS = ("a", "b", "c")
OWN = tm.Generate(TEXTS, length=LENGTH)
ROLLS = tm.OnPolicy(every=10, prompt=4, length=LENGTH - 4)
ROWS: Mapping[str, tuple[tm.Generate | None, dict[str, Any]]] = {
    "alignment_real": (None, {"objective": tm.Alignment()}),
    "alignment_written": (OWN, {"objective": tm.Alignment()}),
    "on_policy_forward": (None, {"objective": tm.JensenShannon(0.0), "on_policy": ROLLS}),
    "on_policy_half": (None, {"objective": tm.JensenShannon(0.5), "on_policy": ROLLS}),
    "on_policy_reverse": (None, {"objective": tm.JensenShannon(1.0), "on_policy": ROLLS}),
    "reverse_real": (None, {"objective": tm.JensenShannon(1.0)}),
    "on_policy_written_prompts": (OWN, {"objective": tm.JensenShannon(1.0), "on_policy": ROLLS}),
}


def main() -> None:
    """Three worlds of other chains; the mean over them."""
    found: dict[str, list[float]] = {row: [] for row in ("uniform", *ROWS)}
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
            root = write_chains(Path(folder), seed)
            for row, (wanted, settings) in ROWS.items():
                scores = closed(root, root / row, wanted, seed, settings)
                found[row].append(scores["learned"])
            found["uniform"].append(
                max(s for name, s in scores.items() if name.startswith("task arithmetic"))
            )
    for row, shares in found.items():
        figure(f"written_{row}", mean(shares), "share", "")
        figure(f"written_{row}_spread", max(shares) - min(shares), "share", "")


def closed(
    root: Path, run: Path, wanted: tm.Generate | None, seed: int, settings: Mapping[str, Any]
) -> dict[str, float]:
    """The shares of the gap that a fit and the baselines close."""
    experts = {
        n: tm.Expert(str(root / n), wanted or str(root / f"{n}.jsonl"), str(root / f"{n}-test.jsonl"))
        for n in CHAINS
    }
    merge = tm.Recipe(str(root / "base"), experts, grouping=tm.Grouping(granularity="tensor"))
    module = tm.MergeModule(
        merge,
        initial=0.4,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.05),
        workspace=str(run / "workspace"),
        **settings,
    )
    data = tm.Calibration(calibration_files(merge), merge.base, batch_size=8, max_length=LENGTH, seed=seed)
    trainer = tm.make_trainer(run, max_steps=STEPS, accelerator="cpu", enable_progress_bar=False)
    tm.fit(module, data, trainer, run)
    return tm.evaluate_run(run).normalised()


def write_chains(root: Path, seed: int) -> Path:
    """Base and experts on disk, with 32 calibration and 64 test texts of each chain."""
    torch.manual_seed(seed)
    write_tokenizer(root / "base")
    tokenizer = AutoTokenizer.from_pretrained(root / "base")
    chains = [chain(100 * seed + k) for k in range(len(CHAINS))]
    train = [texts(own, 256, 1000 * seed + k) for k, own in enumerate(chains)]
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS) + 2, hidden_size=64, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=4, intermediate_size=128, max_position_embeddings=64, bos_token_id=None,
            eos_token_id=None, pad_token_id=None,
        )
    )  # fmt: skip
    learn(model, ids_of(tokenizer, [text for own in train for text in own[:64]]), 40, 2e-3)
    model.save_pretrained(root / "base")
    for k, name in enumerate(CHAINS):
        expert = AutoModelForCausalLM.from_pretrained(root / "base")
        learn(expert, ids_of(tokenizer, train[k]), 150, 2e-3)
        expert.save_pretrained(root / name)
        for file, count, offset in ((f"{name}.jsonl", TEXTS, 10), (f"{name}-test.jsonl", 64, 20)):
            lines = texts(chains[k], count, 1000 * seed + 100 * offset + k)
            (root / file).write_text("".join(json.dumps({"text": text}) + "\n" for text in lines))
    return root


def chain(seed: int) -> Tensor:
    """Transition probabilities of the words: each has three successors."""
    generator = torch.Generator().manual_seed(seed)
    p = torch.zeros(len(WORDS), len(WORDS))
    for row in p:
        row[torch.randperm(len(WORDS), generator=generator)[:3]] = torch.tensor([0.6, 0.3, 0.1])
    return p


def texts(p: Tensor, count: int, seed: int) -> list[str]:
    """Texts of a chain."""
    generator = torch.Generator().manual_seed(seed)
    words = [torch.randint(len(WORDS), (count,), generator=generator)]
    for _ in range(LENGTH - 1):
        words.append(torch.multinomial(p[words[-1]], 1, generator=generator)[:, 0])
    return [" ".join(WORDS[i] for i in row) for row in torch.stack(words, 1).tolist()]


def ids_of(tokenizer: Any, lines: list[str]) -> list[list[int]]:
    """Their tokens."""
    return [tokenizer(line)["input_ids"] for line in lines]


if __name__ == "__main__":
    main()
