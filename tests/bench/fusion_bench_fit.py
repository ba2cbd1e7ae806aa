"""fusion_bench's side of `peer_fit`: its own merged model, driven as its own loop does, in its own Python."""

import contextlib
import io
import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch
from fusion_bench.method.adamerging.entropy_loss import entropy_loss
from fusion_bench.method.adamerging.layer_wise_adamerging import LayerWiseAdaMergingAlgorithm
from omegaconf import OmegaConf
from safetensors import safe_open
from transformers import CLIPVisionModel

EXPERTS, STEPS, IMAGES = 8, 3, int(os.environ.get("IMAGES", "1"))  # a task and step
SETTINGS = {
    "weights": None, "init_values": 0.3, "clamp_weights": False, "tie_weights": True, "strict": False,
    "optimizer": "adam", "lr": 1e-3, "max_steps": STEPS,
}  # fmt: skip


def anonymous() -> int:
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


class Pool:
    """What its algorithm asks for models."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.model_names = folder, [f"t{k}" for k in range(EXPERTS)]

    def load_model(self, name: str) -> torch.nn.Module:
        own = "base" if name == "_pretrained_" else f"expert{name[1:]}"
        return CLIPVisionModel.from_pretrained(self.folder / own)


class LayerWise(LayerWiseAdaMergingAlgorithm):
    """Its construction of the merged model; data and heads are given in the loop below instead."""

    def compute_logits(self, *_: object) -> torch.Tensor:
        raise NotImplementedError

    def get_shuffled_test_loader_iter(self, *_: object) -> None:
        raise NotImplementedError


def main(folder: Path) -> dict[str, object]:
    torch.set_num_threads(1)
    data = safe_open(folder / "data.safetensors", "pt")
    projection, scale = data.get_tensor("visual_projection"), data.get_tensor("logit_scale")
    heads = [data.get_tensor(f"head.t{k}") for k in range(EXPERTS)]
    images = [data.get_slice(f"images.t{k}")[: STEPS * IMAGES] for k in range(EXPERTS)]
    with contextlib.redirect_stdout(io.StringIO()):
        algorithm = LayerWise(OmegaConf.create(SETTINGS))
        module = algorithm.construct_layer_wise_merged_model(Pool(folder))
    loaded = highest = anonymous()
    optimizer = torch.optim.Adam([module.merge_weight], lr=1e-3)
    module.train()
    module.merge_weights()
    seconds, merging = [], []
    for step in range(STEPS):
        began, apart = time.process_time(), 0.0
        for k in range(EXPERTS):
            pixels = images[k][step * IMAGES : (step + 1) * IMAGES]
            features = torch.nn.functional.normalize(module(pixels).pooler_output @ projection.T, dim=-1)
            loss = entropy_loss(scale * features @ heads[k].T)
            # backward in two halves, so that the coefficients' half can be timed; together they are its one
            merged = [weight for weight in module._merged_state_dict.values() if weight.requires_grad]
            slopes = torch.autograd.grad(loss, merged, retain_graph=True, allow_unused=True)
            used = [(w, s) for w, s in zip(merged, slopes, strict=True) if s is not None]
            halfway = time.process_time()
            torch.autograd.backward([w for w, _ in used], [s for _, s in used], retain_graph=True)
            apart += time.process_time() - halfway
            highest = max(highest, anonymous())
            del slopes, used
        optimizer.step()
        optimizer.zero_grad()
        before = time.process_time()
        module.merge_weights()
        apart += time.process_time() - before
        highest = max(highest, anonymous())
        seconds.append(time.process_time() - began)
        merging.append(apart)
    return {
        "seconds": statistics.median(seconds), "merging": statistics.median(merging),
        "bytes": highest - loaded, "coefficients": module.merge_weight.tolist(),
        "names": [name for name, _ in module.task_vectors[0].named_parameters()],
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
