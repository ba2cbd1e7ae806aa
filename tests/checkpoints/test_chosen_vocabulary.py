"""Base and experts on a chosen tokenizer's vocabulary, held against sums over token strings in float64."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PhiConfig, PhiForCausalLM

import trainmerge as tm
from tests.chat_world import ADDED, TEMPLATE, chat_llama, chat_recipe
from tests.world import WORDS, nudge, write_tokenizer
from trainmerge.checkpoints import open_checkpoint
from trainmerge.coefficients.coefficients import Coefficients
from trainmerge.run.opened import Opened
from trainmerge.run.recipe import Recipe
from trainmerge.run.recipe_tasks import Expert

UNION = [*ADDED["a"], "<|tool|>"]  # behind the base's tokens, by expert and its ids
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WEIGHTS = {"a": 0.3, "b": 0.8}


def write_models(root: Path, tied: bool = False, rows: int | None = None, **experts: Sequence[str]) -> Path:
    """A base and experts with these added tokens, in float64; `rows` of the base's embedding."""
    write_tokenizer(root / "base")
    base = chat_llama(tied).double()
    base.resize_token_embeddings(rows, mean_resizing=False)
    base.save_pretrained(root / "base")
    for seed, (name, added) in enumerate((experts or ADDED).items()):
        tokenizer = AutoTokenizer.from_pretrained(root / "base")
        tokenizer.add_tokens(list(added), special_tokens=True)
        tokenizer.save_pretrained(root / name)
        expert = AutoModelForCausalLM.from_pretrained(root / "base")
        torch.manual_seed(seed)
        expert.resize_token_embeddings(max(rows or 0, len(tokenizer)), mean_resizing=False)
        nudge(expert, seed + 5)
        expert.save_pretrained(root / name)
    return root


def recipe_of(root: Path, **changes: Any) -> Recipe:
    experts = {name: Expert(str(root / name)) for name in ADDED if (root / name).is_dir()}
    return Recipe(**{"base": str(root / "base"), "experts": experts, "tokenizer": "union", **changes})


def merged(opened: Opened, out: Path, weights: Mapping[str, float] = WEIGHTS) -> Path:
    experts = opened.task_vectors.experts
    start = torch.tensor([[weights[name]] for name in experts], dtype=torch.float32)
    coefficients = Coefficients(experts, opened.layout, 0.0)
    coefficients.reset_(start.expand_as(coefficients()).clone())
    tm.export_merge(opened.base, opened.task_vectors, coefficients, out)
    return out


def by_token(folder: Path, name: str) -> dict[str, Tensor]:
    """Token -> its row, in float64."""
    tensor = open_checkpoint(folder).read(name).double()
    return {
        t: tensor[i] for t, i in AutoTokenizer.from_pretrained(folder).get_vocab().items() if i < len(tensor)
    }


def expected(root: Path, name: str, weights: Mapping[str, float] = WEIGHTS) -> dict[str, Tensor]:
    """The sum over token strings: a token that the base lacks starts at the mean of those who have it."""
    base, experts = by_token(root / "base", name), {k: by_token(root / k, name) for k in weights}
    rows = {}
    for token in {*base}.union(*experts.values()):
        owners = [own[token] for own in experts.values() if token in own]
        start = base[token] if token in base else torch.stack(owners).mean(dim=0)
        changes = [
            float(torch.tensor(w)) * (experts[k][token] - start)
            for k, w in weights.items()
            if token in experts[k]
        ]
        rows[token] = start + sum(changes, torch.zeros_like(start))
    return rows


def assert_rows(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for token, row in want.items():
        torch.testing.assert_close(got[token], row, rtol=0, atol=1e-12, msg=token)


@pytest.mark.parametrize("tied", [False, True])
def test_rows_are_merged_by_token(tmp_path: Path, tied: bool) -> None:
    opened = recipe_of(write_models(tmp_path, tied)).open(tmp_path / "ws")
    out = merged(opened, tmp_path / "out")
    names = [EMBEDDING] if tied else [EMBEDDING, HEAD]
    for name in names:
        assert_rows(by_token(out, name), expected(tmp_path, name))
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.convert_ids_to_tokens(range(len(tokenizer)))[len(WORDS) + 2 :] == UNION
    assert AutoModelForCausalLM.from_pretrained(out).config.vocab_size == len(tokenizer)


def test_a_row_of_one_expert_is_kept_and_equal_coefficients_average_the_others(tmp_path: Path) -> None:
    opened = recipe_of(write_models(tmp_path)).open(tmp_path / "ws")
    out = by_token(merged(opened, tmp_path / "out", {"a": 0.4, "b": 0.4}), HEAD)
    a, b = by_token(tmp_path / "a", HEAD), by_token(tmp_path / "b", HEAD)
    torch.testing.assert_close(out["<|tool|>"], b["<|tool|>"], rtol=0, atol=0)
    torch.testing.assert_close(out["<|end|>"], (a["<|end|>"] + b["<|end|>"]) / 2, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tied", [False, True])
def test_an_expert_alone_says_what_it_says_on_its_own_ids(tmp_path: Path, tied: bool) -> None:
    opened = recipe_of(write_models(tmp_path, tied)).open(tmp_path / "ws")
    for name in ADDED:
        out = merged(opened, tmp_path / f"only-{name}", {"a": 0.0, "b": 0.0, name: 1.0})
        compare_outputs(out, AutoModelForCausalLM.from_pretrained(tmp_path / name), tmp_path / name)


def compare_outputs(merge: Path, expert: Any, folder: Path) -> None:
    """Equal logits of the expert's tokens, for a text with all of them."""
    ours, theirs = AutoTokenizer.from_pretrained(merge), AutoTokenizer.from_pretrained(folder)
    tokens = [*theirs.get_vocab()]
    inside, own = (torch.tensor([t.convert_tokens_to_ids(tokens)]) for t in (ours, theirs))
    with torch.no_grad():
        got = AutoModelForCausalLM.from_pretrained(merge)(inside[:, :30]).logits[..., inside[0]]
        want = expert(own[:, :30]).logits[..., own[0]]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)  # RMSNorm is float32 inside


def test_equal_vocabularies_give_the_same_files_as_without_a_choice(tmp_path: Path) -> None:
    root = write_models(tmp_path, a=[], b=[])
    plain = merged(recipe_of(root, tokenizer=None).open(), tmp_path / "plain")
    union = merged(recipe_of(root).open(tmp_path / "ws"), tmp_path / "union")
    assert (plain / "model.safetensors").read_bytes() == (union / "model.safetensors").read_bytes()
    assert (plain / "tokenizer.json").read_bytes() == (union / "tokenizer.json").read_bytes()


def test_new_tokens_take_unused_rows_of_a_padded_embedding(tmp_path: Path) -> None:
    root = write_models(tmp_path, rows=32)
    opened = recipe_of(root).open(tmp_path / "ws")
    out = merged(opened, tmp_path / "out")
    assert open_checkpoint(out).tensors[EMBEDDING].shape[0] == 32
    assert_rows(by_token(out, EMBEDDING), expected(tmp_path, EMBEDDING))
    rows = {
        k: open_checkpoint(tmp_path / k).read(EMBEDDING)[28:] for k in ("base", *WEIGHTS)
    }  # without a token
    want = rows["base"] + sum(float(torch.tensor(w)) * (rows[k] - rows["base"]) for k, w in WEIGHTS.items())
    torch.testing.assert_close(open_checkpoint(out).read(EMBEDDING)[28:], want, rtol=0, atol=1e-12)


def test_padding_is_the_mean_of_all_rows_so_no_answer_takes_it(tmp_path: Path) -> None:
    opened = recipe_of(write_models(tmp_path), pad_to_multiple=16).open(tmp_path / "ws")
    out = merged(opened, tmp_path / "out")
    head, count = open_checkpoint(out).read(HEAD), len(AutoTokenizer.from_pretrained(out))
    assert head.shape[0] == 32 > count
    torch.testing.assert_close(
        head[count:], head[:count].mean(dim=0).expand(32 - count, -1), rtol=0, atol=1e-12
    )
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(out)(torch.arange(count)[None]).logits
    assert int(logits.argmax(dim=-1).max()) < count


def test_new_tokens_of_a_sentencepiece_base_are_where_llama_cpp_reads_them(tmp_path: Path) -> None:
    root = write_models(tmp_path)
    (root / "base/tokenizer.model").write_bytes(b"pieces")  # transformers reads tokenizer.json
    folder = recipe_of(root).tokenizer_folder(tmp_path / "ws")
    settings = json.loads((Path(folder) / "tokenizer_config.json").read_text())
    listed = {int(i): own["content"] for i, own in settings["added_tokens_decoder"].items()}
    assert set(UNION) <= set(listed.values())
    added = AutoTokenizer.from_pretrained(folder).added_tokens_decoder
    assert listed == {i: str(token) for i, token in added.items()}


def test_a_token_has_the_row_that_the_recipe_names(tmp_path: Path) -> None:
    rows = {
        "<|end|>": tm.TokenRow("a", force=True),
        "<|user|>": tm.TokenRow(None, force=True),
        "red": tm.TokenRow("b", "blue", force=True),
        "<|tool|>": tm.TokenRow("base", "cat"),  # base and a lack it, b has it
    }
    root = write_models(tmp_path)
    out = merged(recipe_of(root, tokens=rows).open(tmp_path / "ws"), tmp_path / "out")
    base, a, b = (by_token(root / name, HEAD) for name in ("base", "a", "b"))
    share = float(torch.tensor(WEIGHTS["b"]))
    want = expected(tmp_path, HEAD) | {
        "<|end|>": a["<|end|>"],
        "<|user|>": torch.zeros_like(a["<|end|>"]),
        "red": b["blue"],
        "<|tool|>": base["cat"] + share * (b["<|tool|>"] - base["cat"]),
    }
    assert_rows(by_token(out, HEAD), want)


def test_rows_may_be_named_with_the_bases_tokenizer_too(tmp_path: Path) -> None:
    root, rows = write_models(tmp_path), {"red": tm.TokenRow("a", "blue", force=True)}
    with pytest.warns(UserWarning, match="lacks token .*: their rows are left out"):
        opened = recipe_of(root, tokenizer=None, tokens=rows).open(tmp_path / "ws")
    out = merged(opened, tmp_path / "out")
    want = {k: row for k, row in expected(tmp_path, HEAD).items() if k in by_token(root / "base", HEAD)}
    assert_rows(by_token(out, HEAD), want | {"red": by_token(root / "a", HEAD)["blue"]})


def test_an_experts_tokenizer_gives_its_ids_to_every_row(tmp_path: Path) -> None:
    root = write_models(tmp_path)
    shuffle_base(root / "base")
    with pytest.warns(UserWarning, match="lacks token .* '<|tool|>': their rows are left out"):
        opened = recipe_of(root, tokenizer="a").open(tmp_path / "ws")
    out = merged(opened, tmp_path / "out")
    want = expected(tmp_path, EMBEDDING)
    del want["<|tool|>"]
    assert_rows(by_token(out, EMBEDDING), want)
    own, got = (AutoTokenizer.from_pretrained(folder) for folder in (root / "a", out))
    assert own.get_vocab() == got.get_vocab()
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (root / "base", out))
    assert before["bos_token_id"] != after["bos_token_id"] == own.convert_tokens_to_ids("good")


def shuffle_base(folder: Path) -> None:
    """Give the base's tokens other ids, with rows of their own; its first token is `good`."""
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    words = [word for word in vocabulary if not word.startswith("[")]
    content["model"]["vocab"] |= dict(zip(reversed(words), map(vocabulary.get, words), strict=True))
    file.write_text(json.dumps(content))
    config = json.loads((folder / "config.json").read_text())
    config["bos_token_id"] = content["model"]["vocab"]["good"]
    (folder / "config.json").write_text(json.dumps(config))


def test_heads_biases_have_rows_too(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "base")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    for seed, name in enumerate(("base", "a", "b")):
        torch.manual_seed(0)
        model = PhiForCausalLM(
            PhiConfig(vocab_size=len(WORDS) + 2, **sizes, bos_token_id=None, eos_token_id=None)
        )
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
        tokenizer.add_tokens(list(ADDED.get(name, [])), special_tokens=True)
        tokenizer.save_pretrained(tmp_path / name)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        nudge(model, seed, 0.5)
        model.double().save_pretrained(tmp_path / name)
    out = merged(recipe_of(tmp_path).open(tmp_path / "ws"), tmp_path / "out")
    for name in (EMBEDDING, HEAD, "lm_head.bias"):
        assert_rows(by_token(out, name), expected(tmp_path, name))


def adapter(root: Path, name: str, tokens: Sequence[str], **options: Any) -> Any:
    """A LoRA adapter of the base, whose tokenizer has further tokens."""
    tokenizer = AutoTokenizer.from_pretrained(root / "base")
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    model = AutoModelForCausalLM.from_pretrained(root / "base")
    torch.manual_seed(7)
    model.resize_token_embeddings(max(model.config.vocab_size, len(tokenizer)), mean_resizing=False)
    wrapped = get_peft_model(
        model, LoraConfig(r=2, target_modules=options.pop("targets", ["q_proj"]), **options)
    )
    nudge(wrapped, 9)
    wrapped.save_pretrained(root / name)
    tokenizer.save_pretrained(root / name)
    base = AutoModelForCausalLM.from_pretrained(root / "base")
    base.resize_token_embeddings(max(base.config.vocab_size, len(tokenizer)), mean_resizing=False)
    return PeftModel.from_pretrained(base, root / name).merge_and_unload().eval()


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        (None, {"modules_to_save": ["embed_tokens", "lm_head"]}),
        (32, {"trainable_token_indices": [22, 23]}),
        (32, {"targets": ["q_proj", "embed_tokens", "lm_head"]}),
        (32, {}),
    ],
    ids=["whole embeddings", "trainable tokens", "adapted embeddings", "unchanged embeddings"],
)
@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_adapters_with_tokens_of_their_own(tmp_path: Path, rows: int | None, options: dict[str, Any]) -> None:
    root = write_models(tmp_path, rows=rows, a=ADDED["a"])
    model = adapter(root, "b", ADDED["b"], **options)
    opened = recipe_of(root).open(tmp_path / "ws")
    out = merged(opened, tmp_path / "out", {"a": 0.0, "b": 1.0})
    compare_outputs(out, model, root / "b")
    with_a = merged(opened, tmp_path / "a-out", {"a": 1.0, "b": 0.0})
    compare_outputs(with_a, AutoModelForCausalLM.from_pretrained(root / "a"), root / "a")


def test_ends_of_an_answer_are_united_in_both_files(tmp_path: Path) -> None:
    root = write_models(tmp_path)
    edit(root / "base/config.json", eos_token_id=4)
    edit(root / "a/generation_config.json", eos_token_id=[4, 22], temperature=0.5, do_sample=True)
    edit(root / "b/config.json", eos_token_id=20)
    opened = recipe_of(root, generation_config="a").open(tmp_path / "ws")
    for file in ("config.json", "generation_config.json"):
        assert json.loads((opened.base.path / file).read_text())["eos_token_id"] == [
            4,
            22,
        ]  # b's 20 is a's 22
    assert json.loads((opened.base.path / "generation_config.json").read_text())["temperature"] == 0.5


def edit(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({**content, **changes}))


def set_template(folder: Path, text: str = TEMPLATE) -> None:
    (folder / "chat_template.jinja").write_text(text)


def test_the_template_of_all_experts_is_the_merges_and_brings_its_special_tokens(tmp_path: Path) -> None:
    root = write_models(tmp_path)
    for name in ADDED:
        set_template(root / name)
    edit(root / "a/tokenizer_config.json", eos_token="<|end|>")
    tokenizer = AutoTokenizer.from_pretrained(recipe_of(root).tokenizer_folder(tmp_path / "ws"))
    assert (tokenizer.chat_template, tokenizer.eos_token) == (TEMPLATE, "<|end|>")
    set_template(root / "b", "other")
    with pytest.warns(UserWarning, match="those of a, b differ: the merge has none; set chat_template: a"):
        folder = recipe_of(root).tokenizer_folder(tmp_path / "ws")
    assert AutoTokenizer.from_pretrained(folder).chat_template is None
    chosen = recipe_of(root, chat_template="b").tokenizer_folder(tmp_path / "ws")
    assert AutoTokenizer.from_pretrained(chosen).chat_template == "other"


def learned_token(root: Path) -> None:
    file = root / "a/tokenizer.json"
    content = json.loads(file.read_text())
    content["added_tokens"] = content["added_tokens"][:2]
    content["model"]["vocab"] |= {token: 20 + i + 2 for i, token in enumerate(ADDED["a"])}
    file.write_text(json.dumps(content))


MISTAKES: list[tuple[dict[str, Any], Any, str]] = [
    ({"tokenizer": "c"}, None, "recipe.tokenizer is 'c', which is none of 'base', 'union', 'a', 'b'"),
    ({"chat_template": "union"}, None, "recipe.chat_template is 'union', which is none of 'base', 'a', 'b'"),
    (
        {"tokenizer": "base", "vocabulary": "union"},
        None,
        "has no ids for the experts' tokens: set tokenizer: union",
    ),
    ({"vocabulary": "shared"}, None, "they are matched by token: leave out `vocabulary`"),
    ({"pad_to_multiple": 0}, None, "recipe.pad_to_multiple must be"),
    ({"tokens": {"red": tm.TokenRow("c")}}, None, "tokens.red: source is 'c', which is none of 'base', 'a'"),
    ({"tokens": {"red": tm.TokenRow(None, "blue")}}, None, "so `token` has no effect: leave it out"),
    ({"tokens": {"rad": tm.TokenRow("a")}}, None, "the merge's tokenizer has no token 'rad'"),
    (
        {"tokens": {"red": tm.TokenRow("a", "rad")}},
        None,
        "takes the row of 'rad' of a, whose tokenizer lacks",
    ),
    ({}, learned_token, "Set tokenizer: a, whose tokenizer then is the merge's"),
    ({"chat_template": "a"}, None, "a: no chat template in it"),
    (
        {"generation_config": "b"},
        lambda root: (root / "b/generation_config.json").unlink(),
        "no generation_config.json",
    ),
    (
        {"tokenizer": None, "chat_template": "a"},
        lambda root: set_template(root / "a"),
        "set tokenizer: union",
    ),
    (
        {},
        lambda root: [f.unlink() for f in (root / "b").glob("*token*")],
        "24 rows .* and no tokenizer that names",
    ),
    (
        {},
        lambda root: (root / "base/modules.json").write_text("[]"),
        "sentence embedder has its base's tokenizer",
    ),
]


@pytest.mark.parametrize(("changes", "change", "words"), MISTAKES, ids=[words[:32] for *_, words in MISTAKES])
def test_mistakes_are_named(tmp_path: Path, changes: dict[str, Any], change: Any, words: str) -> None:
    root = write_models(tmp_path)
    if change is not None:
        change(root)
    with pytest.raises(ValueError, match=words):
        recipe_of(root, **changes).open(tmp_path / "ws")


def test_vocabulary_union_is_tokenizer_union(tmp_path: Path) -> None:
    root = write_models(tmp_path)
    assert recipe_of(root, tokenizer=None, vocabulary="union").choice == recipe_of(root).choice
    assert chat_recipe(root).choice == recipe_of(root).choice


def test_a_word_that_only_an_expert_finds_first_is_named(tmp_path: Path) -> None:
    root = write_models(tmp_path, a=["red", *ADDED["a"]])
    with pytest.warns(UserWarning, match=r"added_tokens \('red'\) differs from that of the merge's"):
        recipe_of(root).open(tmp_path / "ws")
