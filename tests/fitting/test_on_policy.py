"""On-policy learning: what the merge writes in a round, the experts' record of it, gradients, resuming.

Legend: `K` experts, `V` vocabulary.
"""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch.func import functional_call
from transformers import AutoModelForCausalLM

import trainmerge as tm
from tests.world import languages_recipe, recipe, write_languages, write_world
from trainmerge.cli import main
from trainmerge.data.steps import Steps
from trainmerge.fitting.from_config import from_config
from trainmerge.fitting.on_policy_rounds import FOLDER, TEXTS, Rounds
from trainmerge.fitting.plan_fit import plan_fit
from trainmerge.fitting.preflight import check_rounds
from trainmerge.model.sampling import sample_tokens
from trainmerge.plan.devices import device_named
from trainmerge.run.folder import RunFolder
from trainmerge.run.recipe_files import calibration_files
from trainmerge.system.workspace import digest

STEPS, EVERY, LENGTH = 5, 2, 6


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_languages(tmp_path_factory.mktemp("languages"))
    experts = {n: {"path": str(root / n), "calibration": str(root / f"{n}.jsonl")} for n in "ab"}
    config = {
        "recipe": {"base": str(root / "base"), "experts": experts},
        "model": {
            "objective": {"class_path": "trainmerge.JensenShannon", "init_args": {"beta": 1.0}},
            "on_policy": {"every": EVERY, "prompt": 3, "length": LENGTH},
            "optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.05}},
        },
        "data": {"batch_size": 3, "max_length": 16},
        "trainer": {"max_steps": STEPS, "accelerator": "cpu", "enable_progress_bar": False},
        "save_every": 1,
        "report": False,
    }
    (root / "long.jsonl").write_text(6 * (json.dumps({"text": "good " * 12}) + "\n"))
    (root / "config.yaml").write_text(yaml.safe_dump(config))
    return root


@pytest.fixture(scope="module")
def run(world: Path) -> RunFolder:
    folder = RunFolder(world / "run")
    assert main(["fit", str(world / "config.yaml"), str(folder.path)]) == 0
    return folder


def texts(folder: RunFolder, number: int) -> list[list[tuple[int, list[int]]]]:
    (file,) = folder.workspace.glob(f"{FOLDER}/*/{number}/{TEXTS}")
    content: dict[str, Any] = json.loads(file.read_text())
    return content["texts"]


def test_a_round_is_what_the_merge_writes_after_the_prompts(world: Path, run: RunFolder) -> None:
    """Round 0 by a model of transformers with the merge's starting weights."""
    settings = from_config(world / "config.yaml", world / "other")
    base, *experts = (AutoModelForCausalLM.from_pretrained(world / n).eval() for n in ("base", "a", "b"))
    c = settings.module.coefficients()[:, 0].tolist()
    assert len({*settings.module.coefficients().flatten().tolist()}) == 1
    with torch.no_grad():
        for name, weight in base.named_parameters():
            weight += sum(ck * (e.get_parameter(name) - weight) for ck, e in zip(c, experts, strict=True))
    found = texts(run, 0)
    for name, examples, own in zip("ab", settings.data.examples, found, strict=True):
        prompts = [settings.data.tokenize([e.text])["input_ids"][0].tolist()[:3] for e in examples]
        assert [ids[:begin] for begin, ids in own] == prompts
        seeds = [int(digest(f"0 0 {name} {i}", 15), 16) for i in range(len(prompts))]
        answers = sample_tokens(
            base, prompts, seeds, LENGTH, [settings.module.opened.base.config["eos_token_id"]], 0
        )
        assert [ids[begin:] for begin, ids in own] == answers
    assert [[begin for begin, _ in own] for own in found] == [[b for b, _ in own] for own in texts(run, 1)]
    assert found != texts(run, 1) != texts(run, 2)


def test_it_resumes_within_a_round_to_the_same_bits(world: Path, run: RunFolder, tmp_path: Path) -> None:
    config = str(world / "config.yaml")
    other = RunFolder(tmp_path / "run")
    assert main(["fit", config, str(other.path), "--trainer.max_steps=3"]) == 0  # round 1 has another step
    for record in other.workspace.glob(f"{FOLDER}/*/*/teachers-*"):
        record.unlink()
    assert main(["fit", config, str(other.path)]) == 0
    assert other.coefficients.read_bytes() == run.coefficients.read_bytes()
    assert [texts(other, n) for n in range(3)] == [texts(run, n) for n in range(3)]
    assert len([*other.workspace.glob(f"{FOLDER}/*/*/teachers-*")]) == 1  # of the last round


def test_lost_texts_of_a_round_are_an_error(
    world: Path, run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The fit ended within round 2."""
    copy = RunFolder(shutil.copytree(run.path, tmp_path / "run"))
    next(copy.workspace.glob(f"{FOLDER}/*/2/{TEXTS}")).unlink()
    assert main(["fit", str(world / "config.yaml"), str(copy.path), "--trainer.max_steps=6"]) != 0
    assert "texts of round 2 are lost" in capsys.readouterr().err


def on_policy(world: Path, folder: Path, **settings: object) -> tuple[tm.MergeModule, tm.Calibration]:
    given: dict[str, Any] = {
        "objective": tm.JensenShannon(0.5),
        "on_policy": tm.OnPolicy(2, 3, LENGTH),
        **settings,
    }
    merge = given.pop("recipe", languages_recipe(world))
    data = given.pop("data", {})
    module = tm.MergeModule(merge, workspace=str(folder / "workspace"), **given)
    return module, tm.Calibration(
        calibration_files(merge), merge.base, **{"batch_size": 3, "max_length": 16, **data}
    )


def test_fits_in_one_workspace_have_their_own_rounds(world: Path, tmp_path: Path) -> None:
    """The second, of another learning rate, comes while the first is within its second round."""

    def learn(run: str, workspace: str, steps: int, lr: float = 0.05) -> bytes:
        def adam(parameters: Any) -> torch.optim.Adam:
            return torch.optim.Adam(parameters, lr=lr)

        module, data = on_policy(world, tmp_path / workspace, optimizer=adam)
        trainer = tm.make_trainer(
            tmp_path / run, max_steps=steps, accelerator="cpu", enable_progress_bar=False
        )
        return tm.fit(module, data, trainer, tmp_path / run).coefficients.read_bytes()

    alone = learn("alone", "own", steps=4)
    learn("first", "shared", steps=3)
    assert learn("second", "shared", steps=4, lr=0.5) != alone
    assert learn("first", "shared", steps=4) == alone
    assert len([*(tmp_path / "shared/workspace" / FOLDER).iterdir()]) == 2


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_loss_and_gradient_are_the_divergence_where_the_merge_wrote(
    world: Path, tmp_path: Path, beta: float
) -> None:
    """By autograd through W0 + sum_k c_k tau_k in float64, from the written tokens."""
    module, data = on_policy(world, tmp_path, objective=tm.JensenShannon(beta))
    module.load(data)
    assert module.loaded.rounds is not None
    (batch, _) = module.loaded.rounds.rewritten(Steps(data.examples, data.tokenize, 3, seed=0)[0], 0)
    merged = module.resident.merged
    merged.materialise()
    loss = module.loss(batch)
    loss.backward()
    got = merged.gradient()

    base, a, b = (AutoModelForCausalLM.from_pretrained(world / n).eval().double() for n in ("base", "a", "b"))
    values = module.coefficients().detach().double().requires_grad_()
    groups = module.opened.layout.groups
    weights = {
        name: w.detach() + sum(
            values[k, groups[name][0]] * (e.get_parameter(name) - w).detach() for k, e in enumerate((a, b))
        )
        if name in groups else w.detach()
        for name, w in base.named_parameters()
    }  # fmt: skip
    rows = []
    for i in batch.ids.tolist():
        written = module.loaded.rounds.examples[0][i]
        assert written.tokens is not None
        assert written.spans is not None
        ids, ((begin, _),) = written.tokens, written.spans
        inputs = {"input_ids": torch.tensor([ids])}
        log_q = functional_call(base, weights, (), inputs, tie_weights=True).logits[0].log_softmax(-1)
        log_p = a(**inputs).logits[0].log_softmax(-1)
        rows.append(divergence(beta, log_p, log_q)[begin - 1 : len(ids) - 1].mean())
    want = torch.stack(rows).mean()
    (slope,) = torch.autograd.grad(want, values)
    torch.testing.assert_close(loss.detach().double(), want.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(got.double(), slope, rtol=1e-3, atol=1e-5 * float(slope.abs().max()))


def divergence(beta: float, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """Rows [T] of log-probabilities [T, V] of the expert and the merge."""
    if beta == 0:
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    if beta == 1:
        return (log_q.exp() * (log_q - log_p)).sum(-1)
    log_m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
    return (beta * log_p.exp() * (log_p - log_m) + (1 - beta) * log_q.exp() * (log_q - log_m)).sum(-1)


def test_a_prompt_is_all_before_the_first_span(world: Path, tmp_path: Path) -> None:
    """As chats have them: words 4 and 5 of six are the answer, in tokens of a word each."""
    words = "red blue green one two three"
    begin, end = words.index("one"), words.index(" three")
    row = json.dumps({"text": words, "spans": [[begin, end]]})
    (tmp_path / "spans.jsonl").write_text(2 * (row + "\n"))
    columns = tm.Columns(spans="spans")
    data = tm.Calibration({"a": str(tmp_path / "spans.jsonl")}, str(world / "base"), columns=columns)
    given: Any = SimpleNamespace(data=data)
    resident: Any = None
    prompt = Rounds(tm.OnPolicy(prompt=1), given, resident)._prompt(data.examples[0][0])
    assert prompt == data.tokenize(["red blue green"])["input_ids"][0].tolist()


def test_a_plan_has_the_written_length(world: Path, tmp_path: Path) -> None:
    module, data = on_policy(world, tmp_path)
    long = tm.Calibration(
        {n: str(world / "long.jsonl") for n in "ab"}, str(world / "base"), batch_size=3, max_length=3 + LENGTH
    )
    plain = tm.MergeModule(module.recipe, module.objective, workspace=str(tmp_path / "plain"))
    device = device_named("h100")
    assert plan_fit(module, data, device=device).dry_run == plan_fit(plain, long, device=device).dry_run


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"objective": tm.Entropy()}, "needs the experts' predictions"),
        ({"on_policy": tm.OnPolicy(length=40)}, "over the model's limit of 32"),
        ({"keep_better": True}, "model.on_policy excludes"),
        ({"data": {"columns": tm.Columns(pair="text")}}, "leave them out"),
    ],
)
def test_a_fit_that_cannot_is_refused(
    world: Path, tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    module, data = on_policy(world, tmp_path, **settings)
    with pytest.raises(ValueError, match=words):
        check_rounds(module, data)


def test_encoders_write_nothing(tmp_path: Path) -> None:
    write_world(tmp_path)
    module, data = on_policy(tmp_path, tmp_path / "run", recipe=recipe(tmp_path))
    trainer = tm.make_trainer(tmp_path / "run", max_steps=1, accelerator="cpu")
    with pytest.raises(ValueError, match="which writes no texts"):
        tm.fit(module, data, trainer, tmp_path / "run")
