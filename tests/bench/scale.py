"""Several processes: what a step sends, and what each holds.

A Llama of random numbers, K experts as differences of low rank (so that files stay small), one step of each
kind of fit; anonymous memory is counted as in `fit_memory`, from before the model is loaded.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.bench.__main__ import figure
from tests.collectives import CountStep
from tests.ranks import free_port
from trainmerge.system.memory import Peak

LAYERS, HIDDEN, MIDDLE = 48, 512, 1024
STEPS, BATCH = 2, 4
OPERATORS = {"gathered": "_allgather_base_", "reduced": "_reduce_scatter_base_"}


def write_models(root: Path, experts: int) -> None:
    """A base of 126 M parameters in float32, LoRA experts, texts."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.world import WORDS, write_texts, write_tokenizer

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS) + 2, hidden_size=HIDDEN, intermediate_size=MIDDLE, num_hidden_layers=LAYERS,
        num_attention_heads=8, max_position_embeddings=32, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(root / "base")
    write_tokenizer(root / "base")
    for k in range(experts):
        write_texts(root / f"t{k}", "mood", k, 8)
        adapter = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
        for name, parameter in adapter.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        adapter.save_pretrained(root / f"e{k}")
        model = adapter.unload()


def one_rank(root: str, run: str, experts: int, processes: int, sharded: bool) -> None:
    """A fit; print what this process grew by and sent in a step."""
    import torch

    import trainmerge as tm
    from trainmerge.model.fsdp import pass_bytes, shard_bytes
    from trainmerge.run.recipe_files import calibration_files

    torch.set_num_threads(1)
    place = Path(root)
    recipe = tm.Recipe(
        str(place / "base"),
        {
            f"e{k}": tm.Expert(str(place / f"e{k}"), str(place / f"t{k}" / "calibration.jsonl"))
            for k in range(experts)
        },
    )
    count = CountStep()
    module = tm.MergeModule(recipe, workspace=f"{run}/workspace", sharded=sharded)
    data = tm.Calibration(calibration_files(recipe), recipe.base, batch_size=BATCH, max_length=16)
    trainer = tm.make_trainer(
        run, max_steps=STEPS, accelerator="cpu", enable_progress_bar=False, devices=processes,
        strategy="ddp" if processes > 1 else "auto", callbacks=[count],
    )  # fmt: skip
    with Peak() as peak:
        tm.fit(module, data, trainer, run)
    model = module.resident.merged.module
    computed = {
        "held": shard_bytes(model, processes if sharded else 1),
        **({name: experts * b for name, b in pass_bytes(model, processes).items()} if sharded else {}),
    }
    if os.environ["RANK"] == "0":
        print(json.dumps({"grown": peak.grown, "sent": dict(count.count.bytes), "computed": computed}))


def measured(root: Path, experts: int, processes: int, sharded: bool) -> dict:
    """What rank 0 of these processes prints."""
    run = root / f"run-{experts}-{processes}-{sharded}"
    shared = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes), "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "bench",
        "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "0",
        "MALLOC_MMAP_THRESHOLD_": "65536",
    }  # fmt: skip
    arguments = [str(root), str(run), str(experts), str(processes), str(int(sharded))]
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.bench.scale", *arguments],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
            stderr=None if rank == 0 else subprocess.DEVNULL,
            text=True,
        )
        for rank in range(processes)
    ]
    said, _ = started[0].communicate(timeout=600)
    for process in started:
        process.wait(60)
    return json.loads(said.splitlines()[-1])


def main() -> None:
    """Fits on 1, 2 and 4 processes."""
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        write_models(root, 4)
        found = measured(root, 4, 2, False)
        figure("ddp_bytes_per_step", sum(found["sent"].values()), "bytes", "1000000")
        peaks, passes = {}, {}
        for processes in (1, 2, 4):
            found = measured(root, 2, processes, processes > 1)
            peaks[processes] = found["grown"]
            passes[processes] = bytes_a_task(found, 2)
            figure(f"sharded_memory_{processes}", found["grown"] / 2**20, "MiB a process", "")
            figure(f"sharded_held_{processes}", found["computed"]["held"] / 2**20, "MiB, computed", "")
            if processes > 1:
                sent = found["sent"]
                for name, operator in OPERATORS.items():
                    share = sent[operator] / found["computed"][name]
                    figure(f"sharded_{name}_{processes}_over_computed", share, "ratio", "1")
        figure("sharded_memory_4_over_1", peaks[4] / peaks[1], "ratio", "0.4")
        more = bytes_a_task(measured(root, 4, 2, True), 4)
        figure("sharded_bytes_a_task_K4_over_K2", more / passes[2], "ratio", "1")


def bytes_a_task(found: dict, tasks: int) -> float:
    """Of a model's size, sent in one task's forward and backward."""
    return sum(found["sent"].get(operator, 0) for operator in OPERATORS.values()) / tasks


if __name__ == "__main__":
    match sys.argv[1:]:
        case [root, run, experts, processes, sharded]:
            one_rank(root, run, int(experts), int(processes), bool(int(sharded)))
        case _:
            main()
