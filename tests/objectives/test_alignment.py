"""Alignment against its formulas, and the gradient of coefficients against functional_call autograd.

Legend: `B` examples, `T` tokens, `V` vocabulary, `D` hidden size, `P` counted positions.
"""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import trainmerge as tm
from tests.world import WORDS, languages_recipe, llama, nudge, write_languages
from trainmerge.data.batch import Asks, Batch, Outputs, Predictions, Signals
from trainmerge.kernels import ExpertWeight
from trainmerge.model.merged_model import MergedModel
from trainmerge.run.recipe_files import calibration_files
from trainmerge.task_vectors.delta import Delta, TaskVectors

B, T, V, D = 2, 4, 9, 6
MASK = torch.tensor([[True, True, True, False], [True, False, False, False]])
DISTANCES = {
    "squared": lambda h, e: (h - e).square().sum(-1),
    "mse": lambda h, e: (h - e).square().mean(-1),
    "normalised": lambda h, e: (h - e).square().sum(-1) / e.square().sum(-1),
    "cosine": lambda h, e: 1 - torch.cosine_similarity(h, e, dim=-1),
}


def example_means(rows: Tensor) -> Tensor:
    """Of the 3 and 1 counted positions of MASK."""
    return torch.stack([rows[:3].mean(), rows[3]])


def world() -> tuple[Tensor, dict[int, Tensor], Batch]:
    torch.manual_seed(0)
    logits = torch.randn(B, T, V, dtype=torch.float64, requires_grad=True)
    hidden = {i: torch.randn(B, T, D, dtype=torch.float64, requires_grad=True) for i in (1, -1)}
    said = Signals(
        Predictions(torch.randn(4, V, dtype=torch.float64).log_softmax(-1)),
        {i: torch.randn(4, D, dtype=torch.float64) for i in (1, -1)},
    )
    return logits, hidden, Batch(0, {}, MASK, torch.arange(B), said)


@pytest.mark.parametrize("distance", list(DISTANCES))
def test_every_term_is_its_formula(distance: str) -> None:
    logits, hidden, batch = world()
    objective = tm.Alignment(0.5, temperature=2.0, hidden=3.0, layers=(1, -1), distance=distance)
    got = objective(Outputs(1.0 * logits, hidden), batch)
    assert batch.teacher is not None
    assert batch.teacher.predictions is not None
    log_p = batch.teacher.predictions.log_p
    log_q = (logits[MASK] / 2).log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    apart = [DISTANCES[distance](hidden[i][MASK], batch.teacher.hidden[i]) for i in (1, -1)]
    want = 0.5 * 4 * example_means(kl) + 3 * (example_means(apart[0]) + example_means(apart[1])) / 2
    torch.testing.assert_close(got, want)
    for leaf in (logits, *hidden.values()):
        gradients = [torch.autograd.grad(loss.sum(), leaf, retain_graph=True)[0] for loss in (want,)]
        torch.testing.assert_close(gradient_of(objective, leaf), gradients[0])
        assert not gradients[0][~MASK].any()


def gradient_of(objective: tm.Alignment, leaf: Tensor) -> Tensor:
    """Of a fresh graph, with the same numbers: the divergence uses its logits up."""
    logits, hidden, batch = world()
    loss = objective(Outputs(1.0 * logits, hidden), batch).sum()
    mine = next(x for x in (logits, *hidden.values()) if torch.equal(x, leaf))
    return torch.autograd.grad(loss, mine)[0]


def test_what_padding_holds_changes_nothing() -> None:
    objective = tm.Alignment(hidden=1.0, layers=(1,))
    losses = []
    for fill in (0.0, 1e6):
        logits, hidden, batch = world()
        spoiled = torch.where(MASK[..., None], logits, fill)
        states = {i: torch.where(MASK[..., None], h, fill) for i, h in hidden.items()}
        losses.append(objective(Outputs(spoiled, states), batch))
    assert torch.equal(*losses)


def test_it_asks_for_what_it_uses() -> None:
    assert tm.Alignment().asks == Asks(1.0, ())
    assert tm.Alignment(0.0, hidden=1.0, layers=[2, 2, -1]).asks == Asks(None, (2, -1))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"logits": 0.0}, "logits or hidden above 0"),
        ({"hidden": -1.0}, "must be 0 or more"),
        ({"temperature": 0.0}, "above 0"),
        ({"hidden": 1.0, "layers": ()}, "at least one"),
    ],
)
def test_settings_that_mean_nothing(settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tm.Alignment(**settings)


def test_the_gradient_is_autograds() -> None:
    dtype = torch.float64
    experts = [llama().to(dtype) for _ in range(2)]
    for k, expert in enumerate(experts):
        nudge(expert, k)
    base, model = llama().to(dtype), llama().to(dtype)
    deltas = {
        name: Delta(p.detach(), tuple(ExpertWeight(e.get_parameter(name).detach()) for e in experts))
        for name, p in base.named_parameters()
    }
    vectors = TaskVectors(("a", "b"), deltas)
    torch.set_default_dtype(dtype)
    try:
        layout = tm.Grouping("chunk", 3).layout(vectors.shapes)
        coefficients = tm.Coefficients(("a", "b"), layout, 0.4)
    finally:
        torch.set_default_dtype(torch.float32)
    ids = torch.randint(len(WORDS), (B, T), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": MASK.long()}
    with torch.no_grad():
        said = experts[0](**inputs, output_hidden_states=True)
    log_p = (said.logits[MASK] / 1.5).log_softmax(-1)
    batch = Batch(
        0, inputs, MASK, torch.arange(B), Signals(Predictions(log_p), {1: said.hidden_states[1][MASK]})
    )
    objective = tm.Alignment(temperature=1.5, hidden=2.0, layers=(1,))

    def loss(output: object) -> Tensor:
        return objective(Outputs(output.logits, {1: output.hidden_states[1]}), batch).mean()

    merged = MergedModel(model, vectors, coefficients)
    merged.materialise()
    loss(model(**inputs, output_hidden_states=True)).backward()
    got = merged.gradient()
    weights = tm.merged_weights(vectors, coefficients)
    reference = torch.func.functional_call(base, weights, (), {**inputs, "output_hidden_states": True})
    (want,) = torch.autograd.grad(loss(reference), coefficients.raw)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.fixture(scope="module")
def languages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_languages(tmp_path_factory.mktemp("languages"))


def build(
    root: Path, run: Path, objective: tm.Objective, **settings: object
) -> tuple[tm.MergeModule, tm.Calibration]:
    merge = languages_recipe(root)
    module = tm.MergeModule(merge, objective, workspace=str(run / "workspace"), **settings)
    return module, tm.Calibration(calibration_files(merge), merge.base, batch_size=3, max_length=16)


@pytest.mark.parametrize("budget", [1 << 20, 2000])
def test_an_experts_own_merge_costs_nothing(languages: Path, tmp_path: Path, budget: int) -> None:
    objective = tm.Alignment(hidden=1.0, layers=(0, 1, -1))
    for k in range(2):
        start = [float(j == k) for j in range(2)]
        module, data = build(languages, tmp_path, objective, initial=start, teacher_budget=budget)
        module.load(data)
        module.resident.merged.materialise()
        inputs, mask = data.tokenize.encode(data.examples[k])
        own = module.loss(Batch(k, inputs, mask, torch.arange(6)))
        assert 0 <= own.item() < 1e-4  # bfloat16's rounding of hidden states, squared and relative
        inputs, mask = data.tokenize.encode(data.examples[1 - k])
        other = module.loss(Batch(1 - k, inputs, mask, torch.arange(6)))
        assert other.item() > 100 * own.item()


def test_the_model_in_bfloat16_has_the_gradient_of_the_exact_one(languages: Path, tmp_path: Path) -> None:
    gradients = []
    for weights in ("stored", "bfloat16"):
        module, data = build(languages, tmp_path, tm.Alignment(), weights=weights)
        module.load(data)
        model = module.resident.merged.module
        dtype = torch.float32 if weights == "stored" else torch.bfloat16
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert {b.dtype for b in model.buffers()} == {torch.float32}  # positions
        module.resident.merged.materialise()
        for k in range(2):
            inputs, mask = data.tokenize.encode(data.examples[k])
            module.loss(Batch(k, inputs, mask, torch.arange(6))).backward()
        gradients.append(module.resident.merged.gradient())
        assert gradients[-1].dtype == torch.float32
    exact, rounded = (gradient.flatten() for gradient in gradients)
    assert not torch.equal(exact, rounded)
    assert torch.cosine_similarity(exact, rounded, dim=0) > 0.999


def test_a_small_budget_keeps_the_largest_and_says_so(
    languages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, data = build(languages, tmp_path, tm.Alignment())
    whole.load(data)
    assert "tokens" not in whole.loaded.teachers[0].parts
    part, _ = build(languages, tmp_path, tm.Alignment(), teacher_budget=2000)
    part.load(data)
    assert "probabilities per position are recorded" in capsys.readouterr().out
    for k in range(2):
        full, kept = whole.loaded.teachers[k].parts["log_p"], part.loaded.teachers[k].parts
        m = kept["log_p"].shape[1]
        assert 2000 // 2 < 8 * m * sum(len(t.parts["log_p"]) for t in part.loaded.teachers) <= 2000
        largest = kept["log_p"].sort(dim=-1, descending=True).values
        torch.testing.assert_close(largest, full.topk(m, dim=-1).values)
        torch.testing.assert_close(kept["log_p"], full.gather(-1, kept["tokens"].long()))
        torch.testing.assert_close(kept["log_p"].exp().sum(-1) + kept["tail"].exp(), torch.ones(len(full)))


def test_rows_come_in_the_order_of_ids(languages: Path, tmp_path: Path) -> None:
    module, data = build(languages, tmp_path, tm.Alignment(hidden=1.0, layers=(1,)))
    module.load(data)
    record, ids = module.loaded.teachers[0], torch.tensor([4, 0, 4])
    got = record.of(ids, torch.device("cpu"))
    inputs, mask = data.tokenize.encode([data.examples[0][i] for i in ids])
    with module.resident.merged.teacher(0) as expert, torch.no_grad():
        output = expert(**inputs, output_hidden_states=True)
    assert got.predictions is not None
    torch.testing.assert_close(
        got.predictions.log_p, output.logits[mask].log_softmax(-1), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(got.hidden[1].float(), output.hidden_states[1][mask], rtol=1e-2, atol=1e-2)


def test_a_fit_aligns_resumes_bit_for_bit_and_records_once(languages: Path, tmp_path: Path) -> None:
    def run(name: str, steps: int) -> Tensor:
        module, data = build(
            languages, tmp_path / name, tm.Alignment(hidden=1.0), anchor=tm.Anchor(0.01), keep_better=True,
            optimizer=lambda c: torch.optim.Adam(c, lr=0.02),
        )  # fmt: skip
        trainer = tm.make_trainer(
            tmp_path / name, max_steps=steps, accelerator="cpu", enable_progress_bar=False
        )
        folder = tm.fit(module, data, trainer, tmp_path / name)
        return tm.load_coefficients(folder.coefficients)().detach()

    whole = run("whole", 8)
    run("parts", 3)
    (record,) = (tmp_path / "parts" / "workspace").glob("teachers-*")
    written = record.stat().st_mtime_ns
    assert torch.equal(run("parts", 8), whole)
    assert record.stat().st_mtime_ns == written
    losses = json.loads((tmp_path / "whole" / "calibration_loss.json").read_text())
    assert losses["end"] < 0.95 * losses["start"]


def test_lbfgs_takes_several_losses_a_step(languages: Path, tmp_path: Path) -> None:
    module, _ = build(
        languages, tmp_path, tm.Alignment(),
        optimizer=lambda c: torch.optim.LBFGS(c, max_iter=6, line_search_fn="strong_wolfe"), keep_better=True,
    )  # fmt: skip
    data = tm.Calibration(
        calibration_files(module.recipe), str(languages / "base"), batch_size=6, max_length=16
    )
    trainer = tm.make_trainer(tmp_path, max_steps=2, accelerator="cpu", enable_progress_bar=False)
    tm.fit(module, data, trainer, tmp_path)
    losses = json.loads((tmp_path / "calibration_loss.json").read_text())
    assert losses["end"] < 0.95 * losses["start"]


def test_a_fit_that_only_hurts_is_taken_back_with_a_word(languages: Path, tmp_path: Path) -> None:
    module, data = build(
        languages, tmp_path, tm.Alignment(), keep_better=True, initial=0.5,
        optimizer=lambda c: torch.optim.SGD(c, lr=3.0, maximize=True),
    )  # fmt: skip
    trainer = tm.make_trainer(tmp_path, max_steps=4, accelerator="cpu", enable_progress_bar=False)
    with pytest.warns(UserWarning, match="starting coefficients were saved"):
        tm.fit(module, data, trainer, tmp_path)
    saved = tm.load_coefficients(tmp_path / "coefficients.safetensors")()
    torch.testing.assert_close(saved, torch.full_like(saved, 0.5))


def test_a_loss_that_never_falls_gets_a_word(languages: Path, tmp_path: Path) -> None:
    module, data = build(
        languages, tmp_path, tm.Alignment(), optimizer=lambda c: torch.optim.SGD(c, lr=3.0, maximize=True)
    )
    trainer = tm.make_trainer(tmp_path, max_steps=8, accelerator="cpu", enable_progress_bar=False)
    with pytest.warns(UserWarning, match="no step had a lower loss than the first"):
        tm.fit(module, data, trainer, tmp_path)


def test_one_example_is_enough_with_a_word(languages: Path) -> None:
    merge = languages_recipe(languages)
    with pytest.warns(UserWarning, match="only one calibration example"):
        data = tm.Calibration(calibration_files(merge), merge.base, max_examples=1)
    assert [len(own) for own in data.examples] == [1, 1]


def test_examples_over_the_models_limit_are_refused(languages: Path, tmp_path: Path) -> None:
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"text": "red " * 40}) + "\n" + json.dumps({"text": "red"}) + "\n")
    merge = languages_recipe(languages)
    module = tm.MergeModule(merge, tm.Alignment(), workspace=str(tmp_path))
    files = {**calibration_files(merge), "b": str(long)}
    with pytest.raises(
        ValueError, match=r"long\.jsonl: an example of 40 tokens is over the model's limit of 32"
    ):
        module.load(tm.Calibration(files, merge.base))
    module.load(tm.Calibration(files, merge.base, max_length=32))


def test_strided_logits_get_their_gradient_too() -> None:
    logits, _, batch = world()
    wide = logits.repeat(1, 1, 2)
    loss = tm.Alignment()(Outputs(wide[..., :V], {}), batch)
    (got,) = torch.autograd.grad(loss.sum(), logits)
    logits, _, batch = world()
    (want,) = torch.autograd.grad(tm.Alignment()(Outputs(1.0 * logits, {}), batch).sum(), logits)
    torch.testing.assert_close(got, want)
