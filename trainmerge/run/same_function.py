"""Whether an aligned expert is the same function as the expert, on texts."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainmerge.align import Pair, stream_map
from trainmerge.checkpoints import Checkpoint
from trainmerge.data.columns import Columns
from trainmerge.data.examples import read_examples
from trainmerge.data.generate import Generate
from trainmerge.data.tokenizer import Tokenizer
from trainmerge.task_vectors.places import parameter_of, view

TEXTS, LENGTH = 8, 128
LARGEST = 1e-4  # relative change of the outputs in float32
LARGEST_NARROW = 2e-2  # in narrower dtypes, whose sums in another order differ

Inputs = Sequence[Mapping[str, Tensor]]


class Checked(NamedTuple):
    """Of what the outputs were compared, and their relative change."""

    inputs: str
    change: float
    limit: float


@torch.no_grad()
def same_function(
    base: Checkpoint, pair: Pair, ignore: Sequence[str], calibration: str | Generate | None
) -> Checked:
    """Compare the outputs of the expert and of the aligned expert; holds one model.

    The logits, or the last hidden states where a part of the model is not the expert's. Without a file of
    texts in the default columns the inputs are random.
    """
    from trainmerge.checkpoints import load_model  # imports transformers

    loaded = load_model(base, ignore)
    module: Any = loaded.module
    parameters = dict(module.named_parameters())

    def put(read: Callable[[str], Tensor], names: Iterable[str]) -> None:
        for name in names:
            inside = loaded.names[name]
            view(inside, parameters[parameter_of(inside)]).copy_(read(name))

    whole = {loaded.names[name] for name in pair.anatomy.touches} >= parameters.keys()
    what, inputs = _inputs(base, pair, calibration)
    dtype = next(iter(parameters.values())).dtype
    put(pair.expert, pair.anatomy.touches)
    before, logits = _outputs(module, inputs, dtype, whole)
    put(pair.aligned, pair.changed)
    after, _ = _outputs(module, inputs, dtype, whole)
    stream = stream_map(pair)
    if stream is not None and not logits:  # the expert's states have its own order
        before = [state[..., stream.order] for state in before]
    moved = sum(float((a - b).square().sum()) for a, b in zip(after, before, strict=True))
    size = sum(float(b.square().sum()) for b in before)
    wide = dtype in (torch.float32, torch.float64)
    return Checked(what, (moved / size) ** 0.5 if size else moved, LARGEST if wide else LARGEST_NARROW)


def _outputs(module: Any, inputs: Inputs, dtype: torch.dtype, whole: bool) -> tuple[list[Tensor], bool]:
    """Outputs of each input in float64, and whether they are logits."""
    found, logits = [], False
    for given in inputs:
        own = {key: value.to(dtype) if value.is_floating_point() else value for key, value in given.items()}
        output = (module if whole else module.base_model)(**own)
        logits = getattr(output, "logits", None) is not None
        found.append((output.logits if logits else output.last_hidden_state).double())
    return found, logits


def _inputs(base: Checkpoint, pair: Pair, calibration: str | Generate | None) -> tuple[str, Inputs]:
    """What the inputs are, and the inputs."""
    if isinstance(calibration, str):
        columns = Columns(text=None, image="image") if pair.anatomy.family.pictures else Columns()
        try:
            tokenizer = Tokenizer(str(base.path), LENGTH)
            examples = read_examples(calibration, columns, tokenizer.render, TEXTS)
            encoded = [tokenizer.encode([example]).inputs for example in islice(examples, TEXTS)]
            words = "pictures" if pair.anatomy.family.pictures else "texts"
            return f"{len(encoded)} calibration {words}", encoded
        except (ValueError, OSError):  # other columns, say: the fit says what is wrong with the file
            pass
    dice, config = torch.Generator().manual_seed(0), base.config
    if pair.anatomy.family.pictures:
        side, colours = config.get("image_size", 224), config.get("num_channels", 3)
        random = [torch.randn(1, colours, side, side, generator=dice) for _ in range(TEXTS)]
        return f"{TEXTS} random pictures", [{"pixel_values": picture} for picture in random]
    rows = [torch.randint(config["vocab_size"], (1, 16), generator=dice) for _ in range(TEXTS)]
    return f"{TEXTS} rows of random tokens", [{"input_ids": row} for row in rows]
