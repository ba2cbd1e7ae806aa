"""Tokens that a model writes: the distribution, the ends, and that a row depends on its seed alone.

Legend: `V` vocabulary.
"""

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.world import llama
from trainmerge.model.sampling import Gumbel, sample_tokens

PROMPTS = [[2], [3, 4, 5], [6, 7], [8], [9, 10, 11, 12]]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return llama().eval()


def written(
    model: LlamaForCausalLM, prompts: list[list[int]], first: int = 0, **options: object
) -> list[list[int]]:
    settings = {"length": 6, "ends": (), "padding": 0, **options}
    return sample_tokens(model, prompts, range(first, first + len(prompts)), **settings)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_the_largest_is_a_sample_of_the_softmax(temperature: float) -> None:
    """Within five standard deviations of every class's frequency."""
    logits, draws = torch.tensor([0.0, 1.5, -1.0, 3.0, 2.0]), 4000
    noisy = Gumbel(range(draws), temperature)(torch.empty(0), logits.expand(draws, -1))
    p = (logits.double() / temperature).softmax(-1)
    frequency = noisy.argmax(-1).bincount(minlength=len(p)) / draws
    assert ((frequency - p).abs() <= 5 * (p * (1 - p) / draws).sqrt()).all()


def test_rows_do_not_depend_on_their_batch(model: LlamaForCausalLM) -> None:
    together = written(model, PROMPTS)
    assert together == [written(model, [prompt], i)[0] for i, prompt in enumerate(PROMPTS)]
    assert len({tuple(row) for row in together}) == len(PROMPTS)


def test_without_temperature_it_takes_the_most_probable(model: LlamaForCausalLM) -> None:
    """Against whole forward passes without a cache or padding."""
    for prompt, got in zip(PROMPTS, written(model, PROMPTS, temperature=1e-6), strict=True):
        ids = list(prompt)
        with torch.no_grad():
            for _ in got:
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert got == ids[len(prompt) :]


def test_a_text_ends_with_the_first_end(model: LlamaForCausalLM) -> None:
    free = written(model, PROMPTS)
    end = free[1][2]
    for row, whole in zip(written(model, PROMPTS, ends=[end]), free, strict=True):
        assert row == (whole[: whole.index(end) + 1] if end in whole else whole)


def test_the_checkpoint_s_own_settings_do_not_count(model: LlamaForCausalLM) -> None:
    before = model.generation_config
    free = written(model, PROMPTS)
    try:
        model.generation_config.repetition_penalty, model.generation_config.min_new_tokens = 50.0, 6
        assert written(model, PROMPTS) == free
        assert model.generation_config is before
    finally:
        model.generation_config.repetition_penalty = model.generation_config.min_new_tokens = None
