"""One process in a group of its own, over NCCL on a GPU: the sharded fit is the plain one."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from tests.bounds import TERMS, assert_within, sum_bound
from tests.gpu.setting import Row, Setting, row
from tests.ranks import free_port
from tests.world import llama
from trainmerge.checkpoints import load_meta_model, load_model, open_checkpoint
from trainmerge.coefficients.coefficients import Coefficients
from trainmerge.coefficients.layout import Grouping
from trainmerge.kernels import ExpertWeight, using
from trainmerge.model.fsdp import shard_model
from trainmerge.model.merged_model import MergedModel
from trainmerge.task_vectors.delta import Delta, TaskVectors


def run(setting: Setting) -> Iterator[Row]:
    """Raises AssertionError where the sharded gradient differs."""
    kind = "nccl" if setting.cuda else "gloo"
    address = f"tcp://127.0.0.1:{free_port()}"
    dist.init_process_group(kind, init_method=address, rank=0, world_size=1)
    try:
        with tempfile.TemporaryDirectory() as name:
            llama().save_pretrained(name)
            for backend in setting.backends:
                with using(backend):
                    plain, sharded = (gradient(Path(name), setting, shard) for shard in (False, True))
                bound = sum_bound(plain.abs().max(), TERMS, torch.float32)
                assert_within(sharded, plain, bound)
                apart = float((sharded - plain).abs().max() / plain.abs().max())
                yield row(f"{kind}_{backend}_gradient_apart", apart, "relative to the largest")
    finally:
        dist.destroy_process_group()


def gradient(folder: Path, setting: Setting, shard: bool) -> torch.Tensor:
    """The coefficients' gradient of a tiny Llama, [K, G], whole or sharded."""
    base = open_checkpoint(folder)
    loaded = load_meta_model(base) if shard else load_model(base)
    generator = torch.Generator().manual_seed(1)
    deltas = {}
    for name in loaded.names:
        weight = base.read(name)
        near = [weight + 0.05 * torch.randn(weight.shape, generator=generator) for _ in range(2)]
        deltas[name] = Delta(weight.clone(), tuple(ExpertWeight(one) for one in near))
    vectors = TaskVectors(("a", "b"), deltas)
    coefficients = Coefficients(vectors.experts, Grouping("tensor").layout(vectors.shapes), 0.3)
    inputs = torch.arange(12, device=setting.device).view(2, 6)
    root = shard_model(loaded, base, list(deltas), setting.device) if shard else None
    merged = MergedModel(loaded.module.to(setting.device), vectors, coefficients, loaded.names)
    merged.materialise()
    output = root(loaded.module, inputs) if root else loaded.module(inputs)
    output[0].float().square().mean().backward()
    return merged.gradient().cpu()
