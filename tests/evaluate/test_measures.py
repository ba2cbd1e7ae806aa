"""What the base is decides the measure; test files are checked like calibration files."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertLMHeadModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    XLNetConfig,
    XLNetLMHeadModel,
)

import trainmerge as tm
from tests.bounds import SCORE
from tests.world import WORDS, nudge, write_languages, write_tokenizer, write_world
from trainmerge.checkpoints.output import output_of_class
from trainmerge.data.columns import Columns
from trainmerge.data.examples import Example
from trainmerge.data.heads import LabelHead
from trainmerge.data.tokenizer import Tokenizer
from trainmerge.evaluate import evaluate_run, load_tasks, metric_of
from trainmerge.evaluate.measure import predicted
from trainmerge.evaluate.score_task import score_task
from trainmerge.evaluate.subject import Subject
from trainmerge.evaluate.tasks import Task
from trainmerge.run.recipe import Recipe
from trainmerge.run.recipe_files import calibration_files

SIZE = len(WORDS) + 2
SMALL = {"vocab_size": SIZE, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
         "intermediate_size": 48, "max_position_embeddings": 32}  # fmt: skip


def lines(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def save(root: Path, model: PreTrainedModel) -> None:
    model.save_pretrained(root / "base")
    write_tokenizer(root / "base")
    nudge(model, 1)
    model.save_pretrained(root / "a")


def recipe(root: Path, rows: list[dict[str, object]], **more: object) -> Recipe:
    calibration = lines(root / "calibration.jsonl", [{"text": word, "target": word} for word in WORDS[:4]])
    expert = tm.Expert(str(root / "a"), calibration, lines(root / "test.jsonl", rows), **more)  # type: ignore
    return Recipe(str(root / "base"), {"a": expert})


def learned(root: Path, merge: Recipe, columns: Columns = Columns()) -> Path:  # noqa: B008 - frozen
    module = tm.MergeModule(merge, initial=1.0, workspace=str(root / "run" / "workspace"))
    data = tm.Calibration(calibration_files(merge), merge.base, batch_size=2, max_length=16, columns=columns)
    tm.fit(module, data, tm.make_trainer(root / "run", max_steps=0), root / "run")
    return root / "run"


@torch.no_grad()
def test_a_classifier_of_its_own_has_its_own_accuracy(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**SMALL, num_labels=3)).eval()
    save(tmp_path, model)
    tokenize = Tokenizer(str(tmp_path / "base"), 16)
    texts = [" ".join(WORDS[i : i + 3]) for i in range(12)]
    right = [int(model(**tokenize([text])).logits.argmax()) for text in texts]
    labels = [*right[:9], *((label + 1) % 3 for label in right[9:])]
    rows = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]
    found = evaluate_run(learned(tmp_path, recipe(tmp_path, rows)), compare=False)
    assert (found.metric.name, found.scores["learned"]["a"]) == ("accuracy", 0.75)
    tm.export_run(tmp_path / "run", tmp_path / "merged")
    own = tm.evaluate.evaluate_checkpoint(tmp_path / "merged", recipe(tmp_path, rows))
    assert own.scores[str(tmp_path / "merged")]["a"] == 0.75
    wrong = [{"text": "red", "label": 3}]
    with pytest.raises(ValueError, match=r"test\.jsonl: example 0 has the label 3, .* 3 classes"):
        load_tasks(recipe(tmp_path, wrong), tokenize)


@torch.no_grad()
def test_a_sequence_to_sequence_model_is_scored_on_its_targets(tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = {"vocab_size": SIZE, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    model = T5ForConditionalGeneration(T5Config(**small, decoder_start_token_id=0)).eval()
    save(tmp_path, model)
    tokenize = Tokenizer(str(tmp_path / "base"), 16)
    rows = [{"text": f"{word} cat", "target": f"{word} dog bird"} for word in WORDS[:6]]
    rows.append({"text": "one two three", "target": "red"})
    nats = count = 0.0
    for row in rows:
        ids = tokenize([row["target"]])["input_ids"]
        text = tokenize([row["text"]])["input_ids"]
        nats += model(input_ids=text, labels=ids).loss.item() * ids.numel()
        count += ids.numel()
    merge, columns = recipe(tmp_path, list(rows)), Columns(target="target")
    found = evaluate_run(learned(tmp_path, merge, columns), compare=False).rows["learned"]["a"]
    assert found.measures == pytest.approx({"perplexity": math.exp(nats / count)}, rel=SCORE)
    with pytest.raises(ValueError, match=r"Set data\.columns\.target"):
        load_tasks(merge, tokenize)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (BertForMaskedLM, "masked language model: it predicts masked tokens"),
        (BertLMHeadModel, "bidirectional language model: .*is_decoder"),
        (BertForTokenClassification, "token classifier"),
        (BertForQuestionAnswering, "question-answering model"),
    ],
)
def test_models_without_a_measure_are_refused(kind: type, words: str, tmp_path: Path) -> None:
    kind(BertConfig(**SMALL)).save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=words):
        metric_of(recipe(tmp_path, [{"text": "red blue"}]))
    heads = recipe(tmp_path, [{"text": "red", "label": 0}], head=LabelHead(["red", "blue"]))
    assert metric_of(heads).name == "accuracy"


def test_regression_is_no_classification(tmp_path: Path) -> None:
    BertForSequenceClassification(BertConfig(**SMALL, num_labels=1)).save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="1 labels and the problem_type"):
        metric_of(recipe(tmp_path, [{"text": "red", "label": 0}]))


def test_a_model_that_sees_the_next_token_has_no_perplexity(tmp_path: Path) -> None:
    """XLNet's class is among the causal ones, but without its permutations it sees the whole text."""
    write_tokenizer(tmp_path)
    torch.manual_seed(0)
    config = XLNetConfig(vocab_size=SIZE, d_model=32, n_layer=2, n_head=4, d_inner=48)
    model = XLNetLMHeadModel(config).eval()
    assert output_of_class(type(model), config).kind == "causal language model"
    subject = Subject(model, {"t": None}, Tokenizer(str(tmp_path), 16))
    with pytest.raises(ValueError, match="XLNetLMHeadModel sees the tokens after"):
        score_task(subject, Task("t", [Example("red blue green cat")]))


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"text": "red blue"}, {"text": " "}], "example 1 is blank"),
        ([{"text": "red blue"}, {"text": None}], "example 1 has no value for 'text'"),
        ([{"text": 3}], "example 0 has 3 for 'text'"),
        ([{"sentence": "red"}], r"no column \['text'\].*data\.columns"),
        ([{"text": "red"}], "example 0 has no token to predict in its first 8"),
        ([], "empty"),
    ],
)
def test_files_of_texts(rows: list[dict[str, object]], words: str, tmp_path: Path) -> None:
    write_languages(tmp_path)
    with pytest.raises(ValueError, match=rf"test\.jsonl: .*{words}"):
        load_tasks(recipe(tmp_path, rows), Tokenizer(str(tmp_path / "base"), 8))


@pytest.mark.parametrize("label", [None, "good", 1.5, True, -1, 2])
def test_labels_that_are_no_class(label: object, tmp_path: Path) -> None:
    write_world(tmp_path)
    rows = [{"text": "red", "label": 0}, {"text": "blue", "label": label}]
    if label == "good":
        rows[0]["label"] = "bad"
    expert = tm.Expert("x", test=lines(tmp_path / "test.jsonl", rows), head=LabelHead(["red", "blue"]))
    with pytest.raises(ValueError, match=r"test\.jsonl: .*label"):
        load_tasks(Recipe(str(tmp_path / "base"), {"a": expert}), Tokenizer(str(tmp_path / "base"), 8))


def test_labelled_chats_need_no_assistant(tmp_path: Path) -> None:
    write_languages(tmp_path)
    tokenize = Tokenizer(str(tmp_path / "base"), 32)
    tokenize.transformers.chat_template = "{% for m in messages %}{{ m.content + ' ' }}{% endfor %}"
    chat = [{"role": "user", "content": "red blue"}]
    file = lines(tmp_path / "test.jsonl", [{"messages": chat, "label": 1}])
    expert = tm.Expert("x", test=file, head=LabelHead(["red", "blue"]))
    (task,), _ = load_tasks(
        Recipe(str(tmp_path / "base"), {"a": expert}), tokenize, Columns(messages="messages")
    )
    assert (task.examples, task.labels) == ([Example("red blue ", templated=True)], [1])
    with pytest.raises(ValueError, match=r"test\.jsonl: example 0 has no chat .* no turn with the role"):
        load_tasks(recipe(tmp_path, [{"messages": chat}]), tokenize, Columns(messages="messages"))


def test_chats_are_scored_on_their_answers(tmp_path: Path) -> None:
    write_languages(tmp_path)
    tokenize = Tokenizer(str(tmp_path / "base"), 32)
    tokenize.transformers.chat_template = "{% for m in messages %}{{ m.content + ' ' }}{% endfor %}"
    chat = [{"role": "user", "content": "red blue"}, {"role": "assistant", "content": "cat dog"}]
    merge = recipe(tmp_path, [{"messages": chat}])
    (task,), _ = load_tasks(merge, tokenize, Columns(messages="messages"))

    assert predicted(tokenize.encode(task.examples)).sum() == 2
