"""A small mixture of real texts: a tiny Llama, eight fine-tunes upcycled, the mixture tuned on two domains.

Domains are the demo's tasks (`make data`), the newsgroups in three, and Python's standard library. One tune
of the mixture is merged with another, and shrunk by a quarter, on texts that no training saw.
"""

import json
import sysconfig
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import trainmerge as tm
from tests.bench.__main__ import figure
from tests.bench.moe_world import fit, shrunk, silent, train
from trainmerge.checkpoints.meta_model import quiet

CACHE = Path("data/cache/text")
NEWS = {"computers": range(1, 6), "sports": range(7, 11), "society": range(11, 20)}  # by label
TASKS = ("r8", "movie", "uncertain", "amazon")
TUNED = ("r8", "code")  # what the mixture is tuned on
WORDS, LENGTH, BATCH = 1000, 64, 16
STEPS = {"base": 400, "dense": 80, "mixture": 150, "tuned": 80, "fit": 60}
SEEDS = 3
CLOSED = {  # preprocessing, and the coefficient of both
    "average": ([], 0.5),
    "arithmetic": ([], 1.0),
    "ties": ([tm.Ties(density=0.2)], 1.0),
    "ties_all": ([tm.Ties(density=1.0)], 1.0),
}


def domains() -> dict[str, dict[str, list[str]]]:
    """Domain -> texts to train on, to calibrate with, and to test with."""
    found: dict[str, dict[str, list[str]]] = {}
    for task in TASKS:
        found[task] = {part: _texts(task, part) for part in ("train", "calibration", "test")}
    for name, labels in NEWS.items():
        own = _texts("news20", "train", labels)
        cut = len(own) - 40
        found[name] = {
            "train": own[:cut],
            "calibration": own[cut:],
            "test": _texts("news20", "test", labels),
        }
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    code = [file.read_text(encoding="utf-8", errors="ignore")[2000:2800] for file in files]
    code = [text for text in code if len(text) == 800]
    found["code"] = {"train": code[80:], "calibration": code[:40], "test": code[40:80]}
    return found


def _texts(task: str, part: str, labels: Sequence[int] | None = None) -> list[str]:
    rows = [json.loads(line) for line in (CACHE / task / f"{part}.jsonl").read_text().splitlines()]
    return [row["text"] for row in rows if labels is None or row["label"] in labels]


def tokenizer_of(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Byte pairs of these texts."""
    own = Tokenizer(models.BPE())
    own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    own.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=WORDS, special_tokens=["<pad>", "<s>", "</s>"])
    )
    return PreTrainedTokenizerFast(tokenizer_object=own, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def windows(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> Tensor:
    """The token ids of the texts, one after the other, [N, LENGTH]."""
    flat = [i for text in texts for i in tokenizer(text)["input_ids"]]
    return torch.tensor(flat[: len(flat) // LENGTH * LENGTH]).view(-1, LENGTH)


def rows_of(ids: Tensor, dice: torch.Generator) -> Tensor:
    """A batch [BATCH, LENGTH]."""
    return ids[torch.randint(len(ids), (BATCH,), generator=dice)]


class World:
    """Models and texts of one seed."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.seed, self.texts = root, seed, domains()
        self.tokenizer = tokenizer_of([text for own in self.texts.values() for text in own["train"]])
        self.ids = {
            part: {name: windows(self.tokenizer, own[part]) for name, own in self.texts.items()}
            for part in ("train", "test")
        }
        (root / "texts").mkdir(parents=True)
        for name, own in self.texts.items():
            for part in ("calibration", "test"):
                lines = [json.dumps({"text": text}) + "\n" for text in own[part][:40]]
                (root / "texts" / f"{name}-{part}.jsonl").write_text("".join(lines))

    def file(self, name: str, part: str) -> Path:
        """The texts of a domain."""
        return self.root / "texts" / f"{name}-{part}.jsonl"

    def recipe(self, base: str, folder: str, names: Sequence[str]) -> tm.Recipe:
        """A base, and its fine-tunes on these domains."""
        experts = {
            name: tm.Expert(
                str(self.root / folder / name),
                str(self.file(name, "calibration")),
                str(self.file(name, "test")),
            )
            for name in names
        }
        return tm.Recipe(str(self.root / base), experts)

    def tuned(self, source: str, out: str, names: Sequence[str], steps: int, rate: float) -> None:
        """Train a checkpoint on these domains, into another folder."""
        with quiet():
            model = AutoModelForCausalLM.from_pretrained(self.root / source)
        ids = torch.cat([self.ids["train"][name] for name in names])
        train(model, partial(rows_of, ids), steps, rate, self.seed)
        with quiet():
            model.save_pretrained(self.root / out)
        self.tokenizer.save_pretrained(self.root / out)

    def make(self) -> None:
        """The base, its fine-tunes, the mixture of them, and the mixture's fine-tunes."""
        torch.manual_seed(self.seed)
        config = LlamaConfig(
            vocab_size=WORDS, hidden_size=96, intermediate_size=192, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=128, pad_token_id=0,
            bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        with quiet():
            LlamaForCausalLM(config).save_pretrained(self.root / "start")
        self.tuned("start", "base", list(self.texts), STEPS["base"], 4e-3)
        for name in self.texts:
            self.tuned("base", f"dense/{name}", [name], STEPS["dense"], 1e-3)
        run = fit(self.recipe("base", "dense", list(self.texts)), self.root / "run", 0, 0.125, LENGTH)
        with silent():
            tm.export_mixture(run, self.root / "upcycled", top_k=2)
        self.tuned("upcycled", "mixture", list(self.texts), STEPS["mixture"], 1e-3)
        for name in TUNED:
            self.tuned("mixture", f"tuned/{name}", [name], STEPS["tuned"], 1e-3)


def merges(world: World) -> dict[str, float]:
    """Perplexities of merges of the two fine-tunes, and shares of tokens with their own experts."""
    recipe = world.recipe("mixture", "tuned", TUNED)
    found = {}
    for name, (preprocess, scale) in {**CLOSED, "learned": ([], 0.5)}.items():
        steps = STEPS["fit"] if name == "learned" else 0
        run = world.root / "runs" / name
        with silent():
            fit(replace(recipe, preprocess=preprocess), run, steps, scale, LENGTH)
            scores = tm.evaluate_run(run, compare=name == "average")
        found[name] = scores.means()["learned"]
        shares = [row["learned"] for row in scores.layers().values()]
        found[f"agreement_{name}"] = sum(shares) / len(shares)
        if name == "average":
            found["base"], found["expert"] = scores.means()["base"], scores.means()["expert"]
    return found


def measure(root: Path) -> None:
    """Print all figures."""
    losses: dict[str, list[float]] = {}
    for seed in range(SEEDS):
        world = World(root / f"{seed}", seed)
        world.make()
        if seed == 0:
            for name, value in merges(world).items():
                unit = "share" if name.startswith("agreement") else "perplexity"
                figure(f"real_{name}", value, unit, "")
        test = world.ids["test"]["r8"][:200]
        folder = world.root / "tuned" / "r8"
        for plan, loss in shrunk(
            folder, 6, world.file("r8", "calibration"), test, world.root / "less"
        ).items():
            losses.setdefault(plan, []).append(loss)
    for plan, own in losses.items():
        figure(f"real_shrink_{plan}_loss", sum(own) / len(own), "nats", "")
