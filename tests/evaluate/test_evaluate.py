"""Measures against their formulas; a run, its held-out tasks, several processes, comparisons."""

import json
import math
import os
import shutil
import socket
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
import yaml

import trainmerge as tm
from tests.bounds import SCORE
from tests.objectives.test_alignment import languages  # noqa: F401 - a fixture
from tests.world import LABELS, languages_recipe, llama, recipe, write_world
from trainmerge.cli import main
from trainmerge.data.encoded import Encoded
from trainmerge.data.examples import Example
from trainmerge.data.tokenizer import Tokenizer
from trainmerge.evaluate import evaluate_run
from trainmerge.evaluate.bootstrap import score_differences
from trainmerge.evaluate.harness import run_harness
from trainmerge.evaluate.race import Race
from trainmerge.evaluate.score_task import probabilities, score_task, token_losses
from trainmerge.evaluate.subject import Subject
from trainmerge.evaluate.tasks import Task, load_tasks
from trainmerge.evaluate.torchmetrics_states import TokenLosses, class_measures
from trainmerge.run.config import to_config
from trainmerge.run.recipe import Recipe
from trainmerge.run.recipe_files import calibration_files
from trainmerge.run.recipe_tasks import HeldOut
from trainmerge.run.sources import text_length
from trainmerge.system.safetensors_file import sha256

LENGTH = 5  # tokens: most texts are longer


def test_class_measures_are_their_formulas() -> None:
    p = torch.tensor([[0.9, 0.1, 0.0], [0.6, 0.4, 0.0], [0.2, 0.8, 0.0], [0.3, 0.7, 0.0]])
    found = class_measures(3)(p, torch.tensor([0, 1, 1, 1]))
    assert found["accuracy"].item() == 0.75
    assert found["macro_f1"].item() == pytest.approx((2 / 3 + 4 / 5) / 2)  # a class that never occurs is none
    errors = [abs(1 - 0.9), abs(0 - 0.6), abs(1 - 0.8), abs(1 - 0.7)]  # each in a bin of its own
    assert found["calibration_error"].item() == pytest.approx(sum(errors) / 4)


def test_a_token_without_probability_has_a_finite_loss(languages: Path) -> None:  # noqa: F811
    model = llama().eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)
    losses, _ = token_losses(subject(languages, model), "t", encoded(languages, "red blue green"))
    assert 200 < losses.item() < math.inf  # exp of it is 0 in float32


def examples(*texts: str) -> list[Example]:
    return [Example(text) for text in texts]


def encoded(root: Path, *texts: str) -> Encoded:
    return Tokenizer(str(root / "base"), 16).encode(examples(*texts))


def subject(root: Path, model: torch.nn.Module, **settings: int) -> Subject:
    return Subject(model, {"t": None}, Tokenizer(str(root / "base"), 16), **settings)


@torch.no_grad()
def test_perplexity_and_bits_per_byte_are_of_the_models_own_loss(languages: Path) -> None:  # noqa: F811
    model = llama().eval()
    texts = ["red blue green", "one two", "cat dog bird fish good"]
    own = subject(languages, model)
    found = score_task(own, Task("t", examples(*texts)))
    nats, count = 0.0, 0
    for text in texts:
        ids = own.tokenize([text])["input_ids"]
        nats += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    size = sum(
        len(text) - len(text.split()[0]) for text in texts
    )  # what is predicted: all but the first word
    assert found.score == found.measures["perplexity"] == pytest.approx(math.exp(nats / count), rel=SCORE)
    assert found.measures["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=SCORE)
    totals = found.outcomes.sum(0).tolist()
    assert totals == pytest.approx([nats, count], rel=SCORE)


def test_answers_are_greedy_and_as_long_as_allowed(languages: Path) -> None:  # noqa: F811
    model = llama().eval()
    task = Task("t", examples("red"), prompts=["red blue", "one"])
    found = score_task(subject(languages, model, answers=3), task).measures
    assert (found["answer_tokens"], found["answers_cut"]) == (3, 1)
    model.generation_config.eos_token_id = list(range(model.config.vocab_size))  # whatever comes ends it
    found = score_task(subject(languages, model, answers=3), task).measures
    assert (found["answer_tokens"], found["answers_cut"]) == (1, 0)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merge of two experts, and the third one's task held out."""
    root = tmp_path_factory.mktemp("world")
    write_world(root)
    whole = recipe(root)
    kept = {name: whole.experts[name] for name in ("mood", "colour")}
    out = {"animal": HeldOut(whole.experts["animal"].test, whole.experts["animal"].head)}
    merge = replace(whole, experts=kept, held_out=out)
    module = tm.MergeModule(merge, initial=1.5, workspace=str(root / "run" / "workspace"))
    data = tm.Calibration(calibration_files(merge), merge.base, batch_size=4, max_length=LENGTH)
    tm.fit(module, data, tm.make_trainer(root / "run", max_steps=0), root / "run")
    tm.export_run(root / "run", root / "merged")
    return root / "run"


def test_an_unfinished_run_says_its_step(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped = Path(shutil.copytree(run, tmp_path / "stopped"))
    manifest = json.loads((stopped / "manifest.json").read_text())
    manifest["saved"][0] |= {"step": 40, "steps": 80}
    (stopped / "manifest.json").write_text(json.dumps(manifest))
    line = f"{stopped} is unfinished: its coefficients are those of step 40 of 80"
    assert main(["evaluate", str(stopped), "--limit", "2", "--compare", "false"]) == 0
    assert capsys.readouterr().out.startswith(line)
    assert json.loads((stopped / "scores.json").read_text())["learned"]["step"] == 40
    assert main(["compare", str(stopped), str(run), "--limit", "2"]) == 0
    assert capsys.readouterr().out.startswith(line)


def test_a_run_with_a_task_held_out(run: Path) -> None:
    assert main(["evaluate", str(run)]) == 0
    found = json.loads((run / "evaluation.json").read_text())
    short = json.loads((run / "scores.json").read_text())
    assert short.keys() == found.keys() >= {"base", "average", "learned", "expert"}
    made = {"coefficients", "step", "precision"}
    assert short["learned"].keys() == {"mood", "colour", "mean", "normalised", *made}
    assert short["learned"]["coefficients"] == sha256(run / "coefficients.safetensors")
    assert found["learned"]["measures"].keys() == {"mood", "colour", "animal"}
    assert found["learned"]["measures"]["mood"].keys() == {"accuracy", "macro_f1", "calibration_error"}
    lost = found["base"]["held_out"]["animal"] - found["learned"]["held_out"]["animal"]
    assert found["learned"]["forgetting"] == pytest.approx(lost)
    assert found["base"]["forgetting"] == 0
    assert "forgetting" not in found["expert"]
    out = HeldOut("x", recipe(run.parent).experts["mood"].head)
    kept = Recipe(**{**vars(recipe(run.parent)), "held_out": {"mood": out}})
    tokenize = Tokenizer(kept.base, LENGTH)
    with pytest.raises(ValueError, match=r"\['mood'\] are names of experts"):
        load_tasks(kept, tokenize)
    with pytest.raises(ValueError, match="limit must be at least 1"):
        load_tasks(recipe(run.parent), tokenize, limit=-1)


def test_task_arithmetic_that_cannot_be_the_best_is_left_early(run: Path) -> None:
    """The best coefficient and its scores are those of scoring every one to the end."""
    grid = (0.1, 0.5, 1.0, 1.5)
    alone = {f"task arithmetic {c}": evaluate_run(run, grid=(c,), reuse=False) for c in grid}
    best = max(alone, key=lambda row: alone[row].means()[row])
    found = evaluate_run(run, grid=grid, reuse=False)
    assert list(found.rows) == ["base", "average", best, "learned", "expert"]
    for row, scores in alone[best].rows.items():
        assert found.scores[row] == alone[best].scores[row]
        for task, score in scores.items():
            assert found.rows[row][task].measures == pytest.approx(score.measures, rel=SCORE, abs=SCORE)
            assert torch.equal(found.rows[row][task].outcomes, score.outcomes)
    assert found.scores["average"] == alone["task arithmetic 0.5"].scores["task arithmetic 0.5"]  # K = 2


def test_task_arithmetic_races_after_all_other_rows(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What base, average, the merge and the experts missed is read first."""
    learned: list[float] = []
    monkeypatch.setattr(Race, "learn_from", lambda _, found: learned.append(found["mood"].score))
    found = evaluate_run(run, grid=(0.1,), reuse=False)
    assert learned == [found.rows[row]["mood"].score for row in ("base", "average", "learned", "expert")]


def test_a_race_reads_the_examples_that_others_missed_first(run: Path) -> None:
    merge = recipe(run.parent)
    task = Task(
        "mood", examples("red", "blue", "green", "one"), [0, 0, 0, 0], head=merge.experts["mood"].head
    )
    own = evaluated(run, task)
    says = [int(p.argmax()) for _, p in sorted(probabilities(own, task, range(4)))]
    task = replace(task, labels=[1 - says[0], *says[1:]])  # the first is missed, and the others are right
    whole = score_task(own, task)
    assert whole.score == 0.75
    race = Race([task])
    assert race.score(own)["mood"].measures == pytest.approx(whole.measures, rel=SCORE, abs=SCORE)
    assert race.score(own) is not None  # as good as the best
    race.best = 0.8
    assert race.score(own) is None
    assert race.missed["mood"].tolist() == [3, 0, 0, 0]
    assert Race([]).score(own) == {}  # of a run without test files


def test_forwards_in_bfloat16(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Probabilities move by bfloat16's rounding of a few layers; the scores say how they were made."""
    path, found = shutil.copytree(run, tmp_path / "run"), {}
    for precision in ("32", "bf16"):
        assert main(["evaluate", str(path), "--no-compare", "--precision", precision]) == 0
        assert json.loads((path / "scores.json").read_text())["learned"]["precision"] == precision
        measures = json.loads((path / "evaluation.json").read_text())["learned"]["measures"]
        found[precision] = measures["mood"]["calibration_error"]
    assert "forwards in bfloat16" in " ".join(capsys.readouterr().out.split())
    assert found["32"] != found["bf16"] == pytest.approx(found["32"], abs=2**-5)
    assert main(["evaluate", str(run), "--precision", "16"]) == 1
    assert "--precision 16: choose 32 (the model's own) or bf16" in capsys.readouterr().err


def test_a_checkpoint_is_cut_as_the_run_was(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merged, config = run.parent / "merged", tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"recipe": to_config(recipe(run.parent)), "data": {"max_length": 7}}))
    lengths = [text_length(path) for path in (run, merged, config, run.parent)]
    assert lengths == [LENGTH, LENGTH, 7, 256]
    assert text_length(run, 9) == 9
    own = evaluate_run(run, compare=False).rows["learned"]
    assert main(["evaluate", str(merged)]) == 1  # an export names no folders of this machine
    assert "--recipe RUN" in capsys.readouterr().err
    assert main(["evaluate", str(run), "--recipe", str(config)]) == 1
    assert "scored on the tasks of its own recipe: leave out --recipe" in capsys.readouterr().err
    given = ["--recipe", str(run), "--output", str(tmp_path / "out.json")]
    assert main(["evaluate", str(merged), *given]) == 0
    found = json.loads((tmp_path / "out.json").read_text())[str(merged)]
    for task, score in own.items():
        assert found["measures"][task] == pytest.approx(score.measures, rel=SCORE, abs=SCORE)


def _evaluate(rank: int, ports: list[int], run: str, out: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    for port, limit in zip(ports, ("11", "1", "11"), strict=True):
        os.environ["MASTER_PORT"] = str(port)
        given = ["--compare", "false", "--limit", limit, "--output", f"{out}/{limit}.json"]
        assert main(["evaluate", run, *given]) == 0


def test_two_processes_score_as_one(run: Path, tmp_path: Path) -> None:
    """With one example the second process has none. The third time both take what they kept."""
    with socket.socket() as one, socket.socket() as two, socket.socket() as three:
        for free in (one, two, three):
            free.bind(("127.0.0.1", 0))
        ports = [free.getsockname()[1] for free in (one, two, three)]
    mp.start_processes(
        _evaluate, (ports, str(run), str(tmp_path)), nprocs=2, start_method="spawn"
    )  # torch may have threads, which a fork loses
    for limit in (11, 1):
        shared = json.loads((tmp_path / f"{limit}.json").read_text())
        assert evaluate_run(run, limit, compare=False).to_json() == shared  # kept
        alone = evaluate_run(run, limit, compare=False, reuse=False).to_json()
        for row in ("base", "learned"):
            for task in ("mood", "colour", "animal"):
                assert shared[row]["measures"][task] == pytest.approx(
                    alone[row]["measures"][task], rel=SCORE, abs=SCORE
                )


def test_token_losses_of_two_processes_add_up() -> None:
    parts, whole = [TokenLosses(), TokenLosses()], TokenLosses()
    for i, (nats, tokens, size) in enumerate([(3.0, 2, 9), (8.0, 5, 21), (1.0, 1, 4)]):
        row = torch.tensor([nats]), torch.tensor([tokens]), torch.tensor([size])
        parts[i % 2].update(*row)
        whole.update(*row)
    parts[0].merge_state(parts[1])
    assert parts[0].compute() == whole.compute()


def test_differences_are_paired(generator: torch.Generator) -> None:
    """Two noisy rows that differ in the same few examples are told apart; two with equal means are not."""
    right = (torch.rand(400, generator=generator) < 0.7).double()
    better, other = right.clone(), right[torch.randperm(400, generator=generator)]
    better[(right == 0).nonzero()[:12]] = 1
    rows = [torch.stack([row, torch.ones(400).double()], dim=1) for row in (better, right, other)]
    best, worse, shuffled = score_differences({"t": rows}, best=0, sign=1)
    assert best == (0, 0, 0)
    assert worse.worse_by == pytest.approx(12 / 400)
    assert 0 < worse.low < worse.worse_by < worse.high
    assert not worse.noise
    assert shuffled.worse_by == pytest.approx(worse.worse_by)  # the same score
    assert shuffled.noise  # from other examples: a wide interval
    normal = 12 / 400 * (1 - 12 / 400) / 400  # variance of a mean of 12 ones among 400
    assert (worse.high - worse.low) / 2 / 1.96 == pytest.approx(normal**0.5, rel=0.1)


def test_compare_a_run_its_export_and_the_base(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merged, base = str(run.parent / "merged"), str(run.parent / "base")
    out = ["--output", str(tmp_path / "out.json")]
    assert main(["compare", str(run), merged, base, "--recipe", str(run), *out]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert found[str(run)]["difference"] == found[merged]["difference"]
    assert found[str(run)]["forgetting"] == found[merged]["forgetting"]
    assert min(row["difference"]["worse_by"] for name, row in found.items() if name != "base") == 0
    assert "best" in capsys.readouterr().out
    assert main(["compare", merged, merged]) == 1
    assert "two or more different" in capsys.readouterr().err


@pytest.mark.skipif(not find_spec("lm_eval"), reason="lm-eval is not installed: pip install '.[harness]'")
@pytest.mark.filterwarnings("ignore")  # its own
def test_the_harness_agrees_with_the_models_likelihoods(languages: Path, tmp_path: Path) -> None:  # noqa: F811
    rows = [{"q": "red blue", "a": " green", "b": " cat", "gold": k % 2} for k in range(4)]
    (tmp_path / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "inline", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "task.jsonl")}},
        "doc_to_text": "{{q}}", "doc_to_choice": ["green", "cat"], "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    model = llama().eval()
    found = run_harness(model, str(languages / "base"), [task])["inline"]
    assert found.better["acc,none"] == 1
    losses, _ = token_losses(
        subject(languages, model), "t", encoded(languages, "red blue green", "red blue cat")
    )
    says = int(losses.argmin())
    assert found.metrics["acc,none"] == sum(row["gold"] == says for row in rows) / 4


def test_without_the_harness_its_name_is_said(languages: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(ValueError, match=r"trainmerge\[harness\]"):
        run_harness(llama(), str(languages / "base"), ["arc_easy"])


def test_wrong_labels_are_said(run: Path) -> None:
    head = recipe(run.parent).experts["mood"].head
    task = Task("mood", examples("red"), [len(LABELS["mood"])], head=head)
    with pytest.raises(ValueError, match="its file has label 2; its classifier has 2 classes"):
        score_task(evaluated(run, task), task)


def evaluated(run: Path, task: Task) -> Subject:
    from trainmerge.checkpoints import load_model, open_checkpoint
    from trainmerge.evaluate.runs import build_task_heads

    tokenize = Tokenizer(str(run.parent / "base"), 16)
    base = load_model(open_checkpoint(run.parent / "base")).module
    return Subject(base, build_task_heads(base, [task], tokenize), tokenize)


def test_a_language_run_answers_prompts(languages: Path, tmp_path: Path) -> None:  # noqa: F811
    merge = languages_recipe(languages)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"text": "red blue green", "prompt": "red blue"}) + "\n")
    merge = replace(merge, experts={n: replace(e, test=str(prompts)) for n, e in merge.experts.items()})
    module = tm.MergeModule(merge, workspace=str(tmp_path / "run" / "workspace"))
    data = tm.Calibration(calibration_files(merge), merge.base, max_length=16)
    tm.fit(module, data, tm.make_trainer(tmp_path / "run", max_steps=0), tmp_path / "run")
    found = evaluate_run(tmp_path / "run", compare=False, answers=4)
    assert set(found.measures()["learned"]) == {"perplexity", "bits_per_byte", "answer_tokens", "answers_cut"}
