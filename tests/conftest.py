"""Small models, and random task vectors in every form.

Legend: `K` experts, `*S` parameter shape.
"""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from tests.threads import limit_threads
from trainmerge.kernels import Difference, ExpertWeight, LowRank, Term, Untouched
from trainmerge.task_vectors.delta import Delta, TaskVectors

MakeDelta = Callable[..., Delta]
MakeTaskVectors = Callable[..., TaskVectors]

limit_threads()

# Files and a script for an older commit; and what the server of ranks imports, which sets its threads.
collect_ignore = ["fixtures", "ranks_imports.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with tests marked `long` come first: with several processes none is left alone at the end."""
    long = {item.path for item in items if item.get_closest_marker("long")}
    items.sort(key=lambda item: item.path not in long)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def tiny_llama() -> LlamaForCausalLM:
    """Two layers; the output embedding is the input embedding."""
    config = LlamaConfig(
        vocab_size=29, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, tie_word_embeddings=True, initializer_range=0.2,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return LlamaForCausalLM(config).eval()


@pytest.fixture
def tiny_bert() -> BertForSequenceClassification:
    """Two layers and three classes; no dropout."""
    config = BertConfig(
        vocab_size=31, hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, num_labels=3, initializer_range=0.2, pad_token_id=0,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return BertForSequenceClassification(config).eval()


@pytest.fixture
def tiny_mlp() -> nn.Module:
    """A scalar, vectors, matrices and a convolution's three-dimensional weight."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(
            nn.Linear(6, 8), nn.Tanh(), nn.Unflatten(1, (2, 4)), nn.Conv1d(2, 3, 2), nn.Tanh(),
            nn.Flatten(), Gain(), nn.Linear(9, 4),
        )  # fmt: skip


class Gain(nn.Module):
    """Multiplies by one learned number."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * x


@pytest.fixture
def random_delta(generator: torch.Generator) -> MakeDelta:
    """A random base and one term for each of `forms`, all in `dtype`."""

    def make(
        shape: Sequence[int],
        forms: Sequence[type[Term]],
        dtype: torch.dtype = torch.float32,
        base: Tensor | None = None,
        size: float = 0.05,
    ) -> Delta:
        shape = torch.Size(shape)
        base = torch.randn(shape, generator=generator).to(dtype) if base is None else base.detach().clone()
        return Delta(base, tuple(random_term(form, base, size) for form in forms))

    def random_term(form: type[Term], base: Tensor, size: float) -> Term:
        noise = (size * torch.randn(base.shape, generator=generator)).to(base.dtype)
        if form is Difference:
            return Difference(noise)
        if form is ExpertWeight:
            return ExpertWeight(base + noise)
        if form is Untouched:
            return Untouched()
        rows, width = base.shape[0] if base.dim() else 1, base.shape[1:].numel()
        up = torch.randn(rows, 3, generator=generator).to(base.dtype)
        down = torch.randn(3, width, generator=generator).to(base.dtype)
        return LowRank(up, down, size)

    return make


@pytest.fixture
def random_task_vectors(random_delta: MakeDelta) -> MakeTaskVectors:
    """One expert for each of `forms`, around the weights of `module`.

    A `LowRank` expert leaves vectors and scalars `Untouched`, as a LoRA adapter does.
    """

    def make(module: nn.Module, forms: Sequence[type[Term]], size: float = 0.05) -> TaskVectors:
        deltas = {
            name: random_delta(parameter.shape, fitting(forms, parameter), base=parameter, size=size)
            for name, parameter in module.named_parameters()
        }
        return TaskVectors(tuple(f"expert{k}" for k in range(len(forms))), deltas)

    def fitting(forms: Sequence[type[Term]], parameter: Tensor) -> list[type[Term]]:
        return [Untouched if form is LowRank and parameter.dim() < 2 else form for form in forms]

    return make
