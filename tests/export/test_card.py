"""The model card of a merge: metadata in the hub's schema, by huggingface_hub's classes, and its words."""

import json
import os
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index

import trainmerge as tm
from tests.cli.test_cli import write_config
from tests.fitting.test_fit import fit_world
from tests.hub_stand_in import COMMIT, use, write_cache
from tests.world import languages_recipe, write_languages, write_world
from trainmerge.cli import main
from trainmerge.export.card_metadata import hub_metadata, licence_words, pipeline_tag
from trainmerge.export.card_run import last_command, optimizer_settings
from trainmerge.export.card_sources import Source, base_ids, front_matter
from trainmerge.system.hub import Origin
from trainmerge.system.safetensors_file import sha256

KEYS = {  # of the hub's documented metadata -> the type of the value
    "base_model": (list, str), "base_model_relation": str, "license": str, "license_name": str,
    "license_link": str, "library_name": str, "pipeline_tag": str, "language": list, "datasets": list,
    "tags": list, "model-index": list,
}  # fmt: skip
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def check_card(text: str) -> dict:
    """Read by huggingface_hub's card, written again without loss, and in the hub's schema."""
    card = ModelCard(text)
    head = yaml.safe_load(text.split("---\n")[1])
    assert card.data.to_dict() == head
    for key, value in head.items():
        assert isinstance(value, KEYS[key]), key
    for key in ("base_model", "language", "datasets", "tags"):
        assert all(isinstance(one, str) for one in head.get(key, []))
    bases = head.get("base_model", [])
    assert isinstance(bases, str) == (head.get("base_model_relation") == "adapter")  # one, or a list
    assert all(REPOSITORY.fullmatch(name) for name in ([bases] if isinstance(bases, str) else bases))
    assert ("base_model" in head) == ("base_model_relation" in head)
    if "model-index" in head:
        (entry,) = head["model-index"]
        assert entry["name"]
        for result in entry["results"]:
            assert result["task"]["type"]
            assert result["dataset"].keys() >= {"type", "name"}
            assert all(metric.keys() >= {"type", "value"} for metric in result["metrics"])
    return head


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run by folders, evaluated."""
    root = tmp_path_factory.mktemp("world")
    write_world(root)
    fit_world(root, root / "run", steps=2)
    assert main(["evaluate", str(root / "run"), "--limit", "4", "--no-compare"]) == 0
    return root


def card_of(run: Path, out: Path) -> str:
    return (tm.export_run(run, out) / "README.md").read_text()


def test_a_merge_of_folders(world: Path, tmp_path: Path) -> None:
    text = card_of(world / "run", tmp_path / "out")
    head = check_card(text)
    assert head["library_name"] == "transformers"
    assert head["pipeline_tag"] == "feature-extraction"
    assert "A merge of 3 experts of `base`." in text
    assert "without labels, in 2 steps." in text
    assert "| mood | `mood` |  | `not named` |" in text
    assert str(world) not in text


def test_scores_of_these_coefficients_enter(world: Path, tmp_path: Path) -> None:
    head = check_card(card_of(world / "run", tmp_path / "out"))
    scores = json.loads((world / "run" / "scores.json").read_text())["learned"]
    results = [
        EvalResult("feature-extraction", task, task, "accuracy", scores[task])
        for task in ("mood", "colour", "animal")
    ]
    assert head["model-index"] == eval_results_to_model_index("out", results)


def test_scores_of_other_coefficients_do_not(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(world / "run", tmp_path / "run")
    scores = tmp_path / "run" / "scores.json"
    content = json.loads(scores.read_text())
    assert content["learned"]["coefficients"] == sha256(tmp_path / "run" / "coefficients.safetensors")
    os.utime(scores, (1, 1))  # the hash decides, whatever the files' times
    assert "model-index" in check_card(card_of(tmp_path / "run", tmp_path / "own"))
    content["learned"]["coefficients"] = "0" * 64
    scores.write_text(json.dumps(content))
    assert "model-index" not in check_card(card_of(tmp_path / "run", tmp_path / "other"))
    assert "scores of other coefficients, so the model card has none" in capsys.readouterr().out
    del content["learned"]["coefficients"]  # as older versions wrote them: then the times decide
    for time, known in ((2**33, True), (1, False)):
        scores.write_text(json.dumps(content))
        os.utime(scores, (time, time))
        assert ("model-index" in check_card(card_of(tmp_path / "run", tmp_path / f"at {time}"))) == known


def test_ids_licences_and_data_sets_of_a_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_languages(tmp_path)
    cards = {
        "base": "license: apache-2.0\nlanguage: en\n",
        "a": "license: mit\ndatasets: [me/texts, c4]\n",
        "b": "license: other\nlicense_name: own-terms\ndatasets: me/texts\n",
    }
    for name, text in cards.items():
        (tmp_path / name / "README.md").write_text(f"---\n{text}---\n# {name}\n")
        write_cache(tmp_path / "cache", f"org/{name}", tmp_path / name)
    use(monkeypatch, tmp_path / "cache")
    own = languages_recipe(tmp_path)
    snapshot = tmp_path / "cache" / "models--org--b" / "snapshots" / COMMIT
    experts = {
        "a": replace(own.experts["a"], path="org/a"),
        "b": replace(own.experts["b"], path=str(snapshot)),
    }
    fit_world(tmp_path, tmp_path / "run", steps=0, recipe=replace(own, base="org/base", experts=experts))
    text = card_of(tmp_path / "run", tmp_path / "out")
    head = check_card(text)
    assert head["base_model"] == ["org/base", "org/a", "org/b"]
    assert head["base_model_relation"] == "merge"
    assert head["license"] == "other"
    assert head["datasets"] == ["me/texts", "c4"]
    assert head["language"] == ["en"]
    assert head["pipeline_tag"] == "text-generation"
    assert "`apache-2.0` (base), `mit` (a), `own-terms` (b)" in text
    assert f"| b | `org/b` | `{COMMIT}` | `own-terms` |" in text
    assert "were not learned: no steps were taken" in text
    saved = yaml.safe_load((tmp_path / "out" / "trainmerge_recipe.yaml").read_text())["recipe"]
    assert saved["experts"]["b"]["path"] == f"org/b@{COMMIT}"
    manifest = json.loads((tmp_path / "out" / "trainmerge_manifest.json").read_text())
    assert manifest["hub"]["base"] == {"id": "org/base", "revision": COMMIT}
    assert str(tmp_path) not in text


def test_methods_name_their_papers(world: Path, tmp_path: Path) -> None:
    own = tm.Recipe(str(world / "base"), {"mood": tm.Expert(str(world / "experts" / "mood"))}, [tm.Ties(0.5)])
    fit_world(world, tmp_path / "run", steps=0, recipe=own)
    text = card_of(tmp_path / "run", tmp_path / "out")
    assert "- Ties: [arXiv 2306.01708](https://arxiv.org/abs/2306.01708)" in text
    assert "Entropy" not in text.partition("## Reproduce")[0]
    learned = card_of(world / "run", tmp_path / "learned")
    assert "(https://arxiv.org/abs/2310.02575)" in learned


def test_the_last_command_of_a_resumed_run(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = str(write_config(world, trainer__max_steps=1))
    for steps in ("1", "2"):
        words = ["fit", config, str(tmp_path / "run"), "--trainer.max_steps", steps]
        monkeypatch.setattr(sys, "argv", ["/home/me/bin/trainmerge", *words])
        assert main(words) == 0
    text = card_of(tmp_path / "run", tmp_path / "out")
    check_card(text)
    assert "trainmerge fit config.yaml run --trainer.max_steps 2\n" in text
    assert "max_steps 1" not in text
    settings = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
    assert settings["optimizer"]["class_path"] == "torch.optim.Adam"
    assert settings["optimizer"]["init_args"]["lr"] == 0.02
    assert settings["optimizer"]["init_args"]["betas"] == [0.9, 0.999]
    assert "in 2 steps." in text
    assert "resumed" not in json.loads((tmp_path / "out" / "trainmerge_manifest.json").read_text())["run"]


@pytest.mark.parametrize(
    ("command", "public"),
    [
        ("pytest -q", ""),
        ("", ""),
        ("'unclosed", ""),
        ("trainmerge fit c.yaml /home/me/run", "trainmerge fit c.yaml run"),
        ("/x/pytest/__main__.py fit", ""),
        ("/x/trainmerge/cli/__main__.py fit --run=/a/b/c", "trainmerge fit --run=c"),
        ("trainmerge fit --logger.api_key abcd1234 x", "trainmerge fit --logger.api_key '(removed)' x"),
        ("trainmerge fit --logger.token=abcd1234", "trainmerge fit --logger.token='(removed)'"),
        ("trainmerge fit --x hf_abcdefgh1", "trainmerge fit --x '(removed)'"),
    ],
)
def test_a_command_without_places(command: str, public: str) -> None:
    got = last_command({"started": {"command": command}})
    assert got.replace("'--logger.token=(removed)'", "--logger.token='(removed)'") == public


def test_an_optimizer_of_ones_own_and_one_with_groups() -> None:
    groups = "Adam (\nParameter Group 0\n    lr: 1\n\nParameter Group 1\n    lr: 2\n)"
    assert optimizer_settings(groups) == "Adam ( Parameter Group 0 lr: 1 Parameter Group 1 lr: 2 )"
    assert optimizer_settings("Own (\nParameter Group 0\n    betas: (0.9, 0.5)\n    x: <y>\n)") == {
        "class_path": "Own",
        "init_args": {"betas": [0.9, 0.5], "x": "<y>"},
    }


def source(name: str, **more: object) -> Source:
    return Source(name, name, **more)


@pytest.mark.parametrize(
    ("sources", "ids"),
    [
        ([source("base"), source("a")], []),
        ([source("base", recorded="org/base"), source("a", recorded="org/base")], ["org/base"]),
        ([source("base"), source("a", recorded="org/base")], ["org/base"]),
        ([source("base", origin=Origin("org/b", "1")), source("a", recorded="org/x")], ["org/b"]),
        (
            [source("base", recorded="org/x"), source("a", origin=Origin("org/e/a", "1")),
             source("b", origin=Origin("org/e/b", "1"))],
            ["org/x", "org/e"],
        ),
    ],
)  # fmt: skip
def test_ids_of_base_and_experts(sources: list[Source], ids: list[str]) -> None:
    assert base_ids(sources) == ids


@pytest.mark.parametrize(
    ("recorded", "known"),
    [("org/base", True), ("models/base", False), ("/home/me/base", False), ("base", False),
     ("out/ckpt", False), ("org/base/sub", False), (5, False)],
)  # fmt: skip
def test_recorded_names_that_are_ids(recorded: object, known: bool, world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "base", tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "_name_or_path": recorded}))
    own = tm.Recipe(str(tmp_path / "base"), {"mood": tm.Expert(str(world / "experts" / "mood"))})
    fit_world(world, tmp_path / "run", steps=0, recipe=own)
    head = check_card(card_of(tmp_path / "run", tmp_path / "out"))
    assert head.get("base_model") == ([recorded] if known else None)


def licence(name: str, text: object, **more: object) -> Source:
    return source(name, metadata={"license": text, **more})


@pytest.mark.parametrize(
    ("sources", "want", "words"),
    [
        ([source("base"), source("a")], {}, ""),
        ([licence("base", "mit"), licence("a", ["mit"])], {"license": "mit"}, ""),
        ([licence("base", "mit"), source("a")], {"license": "mit"}, "`mit` (base), `unknown` (a)"),
        ([licence("base", "mit"), licence("a", "gemma")], {"license": "other"}, "`mit` (base), `gemma` (a)"),
        (
            [licence("base", "other", license_name="x", license_link="LICENSE"),
             licence("a", "other", license_name="x")],
            {"license": "other", "license_name": "x", "license_link": "LICENSE"},
            "",
        ),
    ],
)  # fmt: skip
def test_licences(sources: list[Source], want: dict, words: str) -> None:
    head = hub_metadata("x", sources, {})
    assert {key: head.get(key) for key in want} == want
    assert "license" in head or not want
    assert words in licence_words(sources)
    assert bool(words) == bool(licence_words(sources))


@pytest.mark.parametrize(
    ("architecture", "tag"),
    [
        ("LlamaForCausalLM", "text-generation"),
        ("GPT2LMHeadModel", "text-generation"),
        ("BertModel", "feature-extraction"),
        ("BertForSequenceClassification", "text-classification"),
        ("BertForTokenClassification", "token-classification"),
        ("T5ForConditionalGeneration", None),
        ("X", None),
    ],
)
def test_the_task_of_an_architecture(architecture: str, tag: str | None) -> None:
    config = {"architectures": [architecture]}
    assert pipeline_tag(source("base"), config) == tag
    assert pipeline_tag(source("base"), config, sentences=True) == "sentence-similarity"
    own = source("base", metadata={"pipeline_tag": "translation"})
    assert pipeline_tag(own, config, sentences=True) == "translation"


@pytest.mark.parametrize(
    "text", ["", "# x", "---\n- a\n---\n", "---\na: [\n---\n", "---\na: 1", "---\n&a [*a]\n---"]
)
def test_a_card_without_metadata(text: str) -> None:
    assert front_matter(text) == {}
