"""Mixtures with fewer experts: dropped is masked, M = E is the input, groups, alignment, and what is refused.

Legend: `E` experts of a layer, `M` of them after, `H` hidden size, `I` width of an expert.
"""

import itertools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import trainmerge as tm
from tests.contracts import assert_same_bits
from tests.mixture_world import write_mixture, write_picture_mixture
from trainmerge.align.assignment import assign
from trainmerge.checkpoints import check_tensors, open_checkpoint
from trainmerge.cli import main
from trainmerge.data.examples import Example
from trainmerge.data.tokenizer import Tokenizer
from trainmerge.mixtures.groups import plan_groups, read_errors, similarity
from trainmerge.mixtures.layers import mixture_layers, shrunk_settings
from trainmerge.mixtures.learn_groups import _Layer, students_of
from trainmerge.mixtures.saliency import Saliency, measure
from trainmerge.mixtures.shrunk import LayerCoefficients, Shrunk
from trainmerge.model.routing import routers_of
from trainmerge.task_vectors.places import parameter_of, view

E = 6
CHANGES = {
    "Mixtral": {"num_local_experts": E},
    "Qwen3-MoE": {"num_experts": E, "norm_topk_prob": True},
    "Qwen2-MoE": {"num_experts": E},
    "DeepSeek-V3": {"n_routed_experts": 8},
    "OLMoE clip_qkv": {"num_experts": E},
    "gpt-oss": {"num_local_experts": E},
    "Granite-MoE": {"num_local_experts": E},
    "Llama 4": {"num_local_experts": E},
    "PhiMoE": {"num_local_experts": E},
    "GLM-4-MoE": {"n_routed_experts": E},
    "DeepSeek-V2": {"n_routed_experts": 8},
    "Qwen3-Next": {"num_experts": E},
    "Jamba": {"num_experts": E},
}
STACKED = ("gpt-oss", "Granite-MoE", "Llama 4")
MASKED = {"Mixtral", "Qwen3-MoE", "DeepSeek-V3", *STACKED}  # weights that dropping leaves, given the choice
IDS = torch.arange(10, 42)[None]


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        name: write_mixture(tmp_path_factory.mktemp(name.replace(" ", "")), name, **changes)
        for name, changes in CHANGES.items()
    }


def texts(root: Path) -> tuple[list[Example], Tokenizer]:
    lines = [line for name in "ab" for line in (root / f"{name}.jsonl").read_text().splitlines()]
    (root / "texts.jsonl").write_text("\n".join(lines) + "\n")
    return [Example(json.loads(line)["text"]) for line in lines], Tokenizer(str(root / "base"), 64)


def load(folder: Path) -> nn.Module:
    model, found = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, experts_implementation="eager"
    )
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


def groups_of(folder: Path) -> list[list[list[int]]]:
    return list(json.loads((folder / "trainmerge_groups.json").read_text())["layers"].values())


@pytest.mark.parametrize("name", CHANGES)
def test_as_many_experts_as_there_are_is_the_input(
    name: str, worlds: dict[str, Path], tmp_path: Path
) -> None:
    root = worlds[name]
    texts(root)
    for plan in ("reap", "ream"):
        out = tm.shrink(
            root / "base", tmp_path / plan, 8 if "Deep" in name else E, root / "texts.jsonl", plan
        )
        made, want = (load_file(place / "model.safetensors") for place in (out, root / "base"))
        assert made.keys() == want.keys()
        for key, own in want.items():
            assert_same_bits(made[key], own)


@pytest.mark.parametrize("name", CHANGES)
def test_dropped_is_masked(name: str, worlds: dict[str, Path], tmp_path: Path) -> None:
    """To the bit where the router has the kept rows alone: a product of another shape rounds otherwise."""
    root = worlds[name]
    texts(root)
    out = tm.shrink(root / "base", tmp_path / "out", 4, root / "texts.jsonl")
    want = logits(load(out))
    routers = list(routers_of(load(out)))
    kept = [torch.tensor([group[0] for group in groups]) for groups in groups_of(out)]
    same = 1e-6 if name == "Llama 4" else 0.0  # its experts are one product of another shape
    ways = [(of_kept_rows, same), *([(of_masked_logits, 1e-5)] if name in MASKED else [])]
    for masked, close in ways:
        model, small = load(root / "base"), load(out)
        for key, rows in zip(routers, kept, strict=True):
            masked(model.get_submodule(key), small.get_submodule(key), rows)
        found = logits(model)
        assert (found - want).abs().max() <= close * want.abs().max()


def of_kept_rows(router: nn.Module, small: nn.Module, rows: torch.Tensor) -> None:
    """The large model chooses as the small one's router does."""

    def forward(states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = small(states)
        if len(found) == 2:  # Llama 4: scores [R, E], 0 for experts that are not chosen, and logits
            every = torch.zeros(len(states), router.num_experts)
            return every.index_copy(1, rows, found[0]), found[1]
        return found[0], found[1], rows[found[2]]

    router.forward = forward  # type: ignore[method-assign]


def of_masked_logits(router: nn.Module, small: nn.Module, rows: torch.Tensor) -> None:
    """The large model's own router, with -inf at the dropped experts."""
    assert router.num_experts > small.num_experts
    mask = torch.full((router.num_experts,), -torch.inf)
    mask[rows] = 0
    if (bias := getattr(router, "e_score_correction_bias", None)) is not None:
        bias.add_(mask)  # sigmoid scores are chosen by score + bias
        return

    def forward(states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        own = getattr(router, "bias", None)
        found = states.flatten(0, -2) @ router.weight.T + mask + (0 if own is None else own)
        weights, experts = found.softmax(-1).topk(router.top_k)
        if type(router).__name__ == "Llama4Router":
            return torch.zeros_like(found).scatter(1, experts, found.gather(1, experts).sigmoid()), found
        return found, weights / weights.sum(-1, keepdim=True), experts

    router.forward = forward  # type: ignore[method-assign]


def test_sums_are_those_of_a_plain_model(worlds: dict[str, Path]) -> None:
    root = worlds["Qwen3-MoE"]
    base = open_checkpoint(root / "base")
    layers = mixture_layers(base)
    examples, tokenizer = texts(root)
    found = measure(base, layers, examples, tokenizer)
    model = load(root / "base")
    norms, usage = torch.zeros(2, E), torch.zeros(2, E)

    def see(i: int, module: nn.Module, given: Sequence[torch.Tensor]) -> None:
        states, index, weights = given
        for x, chosen, scales in zip(states, index, weights, strict=True):
            for e, weight in zip(chosen.tolist(), scales, strict=True):
                gate, up = (module.gate_up_proj[e] @ x).chunk(2)
                out = module.down_proj[e] @ (nn.functional.silu(gate) * up)
                norms[i, e] += weight * out.norm()
                usage[i, e] += 1

    for i, layer in enumerate(model.model.layers):
        layer.mlp.experts.register_forward_pre_hook(lambda m, given, i=i: see(i, m, given))
    with torch.no_grad():
        for example in examples:
            model(**tokenizer.encode([example]).inputs)
    for i, layer in enumerate(layers):
        own = found[layer.prefix]
        assert torch.equal(own.usage.float(), usage[i])
        assert own.usage.sum() == 2 * sum(len(tokenizer.encode([e]).inputs["input_ids"][0]) for e in examples)
        torch.testing.assert_close(own.norms.float(), norms[i], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(own.scores.float(), norms[i] / usage[i].clamp_min(1), rtol=1e-4, atol=1e-6)


def saliency(scores: Sequence[float], outputs: torch.Tensor) -> Saliency:
    count = len(scores)
    state, each = torch.ones(1, 3), torch.tensor(scores)
    choice = torch.zeros(1, 1).long(), torch.ones(1, 1)
    return Saliency(
        torch.ones(count), each, outputs, torch.eye(count), state, *choice, state, outputs, torch.mul
    )


def test_plans_of_small_cases() -> None:
    outputs = torch.eye(3)[[0, 1, 0, 2, 1, 0]] + 0.01 * torch.arange(6)[:, None]
    own = saliency([0.1, 0.5, 0.9, 0.3, 0.2, 0.4], outputs)
    assert plan_groups("reap", own, 3) == [[1], [2], [5]]
    assert plan_groups("reap", own, 4, parts=2) == [[1], [2], [3], [5]]  # two of each half
    assert plan_groups("hc", own, 3) == [[1, 4], [2, 5, 0], [3]]
    taken = plan_groups("ream", own, 3)
    assert taken[1][0] == 2  # the largest score takes all others, of which there are fewer than 16
    assert sorted(taken[1]) == [0, 2, 3, 4]
    assert [taken[0], taken[2]] == [[1], [5]]
    torch.testing.assert_close(similarity(own), similarity(own).T)


def test_assignments_are_the_best_of_all() -> None:
    dice = torch.Generator().manual_seed(0)
    for count in (1, 2, 5, 6):
        cost = torch.randn(count, count, generator=dice)
        best = min(float(cost[range(count), order].sum()) for order in itertools.permutations(range(count)))
        found = assign(cost)
        assert sorted(found.tolist()) == list(range(count))
        assert float(cost[torch.arange(count), found].sum()) == pytest.approx(best, abs=1e-5)
    order = torch.randperm(40, generator=dice)
    assert torch.equal(assign(-torch.eye(40)[order]), order)


@pytest.mark.parametrize("name", ["Mixtral", *STACKED])
def test_a_group_of_one_expert_in_other_orders_is_that_expert(
    name: str, worlds: dict[str, Path], tmp_path: Path
) -> None:
    """Experts 2 and 3 become expert 1 with its neurons in other orders: merged, all three are expert 1."""
    root = worlds[name]
    base = open_checkpoint(shutil.copytree(root / "base", tmp_path / "base"))
    layer = mixture_layers(base)[0]
    tensors = load_file(base.path / "model.safetensors")
    dice = torch.Generator().manual_seed(0)
    for number in (2, 3):
        order = torch.randperm(len(layer.read(base, 1, "gate")), generator=dice)
        for kind in layer.kinds:
            own, place = layer.read(base, 1, kind), layer.expert(number, kind)
            moved = own if kind == "down_bias" else own[:, order] if kind == "down" else own[order]
            view(place, tensors[parameter_of(place)]).copy_(moved)
    save_file(tensors, base.path / "model.safetensors", {"format": "pt"})
    base = open_checkpoint(base.path)
    measured = measure(base, mixture_layers(base), *texts(root))
    groups = {own.prefix: [[0], [1, 2, 3], [4], [5]] for own in mixture_layers(base)}
    merged = Shrunk(base, mixture_layers(base), groups, measured)
    for kind in layer.kinds:
        place = layer.expert(1, kind)
        found = view(place, torch.cat(list(merged.pieces(parameter_of(place)))))
        torch.testing.assert_close(found, layer.read(base, 1, kind), rtol=1e-6, atol=1e-8)


def test_stacks_of_a_model_of_pictures_transposed_as_on_the_hub(tmp_path: Path) -> None:
    whole = write_picture_mixture(tmp_path, "base", 1)
    (tmp_path / "t.jsonl").write_text('{"text": "w10 w31 w52 w73 w14 w55"}\n')
    out = tm.shrink(tmp_path / "base", tmp_path / "out", 3, str(tmp_path / "t.jsonl"))
    model = AutoModelForImageTextToText.from_pretrained(out, experts_implementation="eager").eval()
    assert model.config.text_config.num_experts == 3
    ((groups,),) = [groups_of(out)]
    kept = [group[0] for group in groups]
    mine, theirs = dict(model.named_parameters()), dict(whole.named_parameters())
    stem = "model.language_model.layers.0.mlp"
    for key in (f"{stem}.experts.gate_up_proj", f"{stem}.experts.down_proj", f"{stem}.gate.weight"):
        assert_same_bits(mine[key], theirs[key][kept])


@pytest.mark.parametrize("plan", ["ream", "hc"])
def test_merged_mixtures_load_and_their_plan_writes_them_again(
    plan: str, worlds: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = worlds["Qwen2-MoE"]
    texts(root)
    words = ["shrink", str(root / "base"), str(tmp_path / "out"), "--experts", "4", "--plan", plan]
    assert main([*words, "--calibration", str(root / "texts.jsonl")]) == 0
    assert "4 experts per layer" in capsys.readouterr().out
    layers = groups_of(tmp_path / "out")
    assert all(len(groups) == 4 and sorted(itertools.chain(*groups)) == list(range(E)) for groups in layers)
    assert bool(logits(load(tmp_path / "out")).isfinite().all())
    file = tmp_path / "out" / "trainmerge_groups.json"
    again = tm.shrink(root / "base", tmp_path / "again", 4, root / "texts.jsonl", str(file))
    for key, own in load_file(tmp_path / "out" / "model.safetensors").items():
        assert_same_bits(load_file(again / "model.safetensors")[key], own)


@pytest.mark.parametrize("name", ["Qwen3-MoE", "DeepSeek-V3", "gpt-oss"])
def test_errors_are_those_of_the_written_models(
    name: str, worlds: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = worlds[name]
    examples, tokenizer = texts(root)
    words = ["shrink", str(root / "base"), str(tmp_path / "learned"), "--experts", "4", "--plan", "ream"]
    assert main([*words, "--calibration", str(root / "texts.jsonl"), "--steps", "60"]) == 0
    assert "relative error of the routed output" in capsys.readouterr().out
    tm.shrink(root / "base", tmp_path / "merged", 4, root / "texts.jsonl", "ream")
    tm.shrink(root / "base", tmp_path / "dropped", 4, root / "texts.jsonl", "reap")
    base = open_checkpoint(root / "base")
    measured = measure(base, mixture_layers(base), examples, tokenizer)
    errors = read_errors(tmp_path / "learned")
    for row in ("dropped", "merged", "learned"):
        model = load(tmp_path / row)
        for prefix, own in measured.items():
            block = model.get_submodule(prefix.rstrip("."))
            router = block.gate if hasattr(block, "gate") else block.router
            count = round(0.75 * len(own.states))
            with torch.no_grad():
                _, weights, experts = router(own.states[count:])
                found = block.experts(own.states[count:], experts, weights)
            want = float((found - own.routed[count:]).norm() / own.routed[count:].norm())
            assert errors[prefix][row] == pytest.approx(want, rel=1e-3)
    assert all(own["learned"] <= own["dropped"] for own in errors.values())
    assert min(own["learned"] / own["dropped"] for own in errors.values()) < 1


@pytest.mark.parametrize("name", ["Mixtral", *STACKED])
def test_inner_products_are_autograds(name: str, worlds: dict[str, Path], tmp_path: Path) -> None:
    root = worlds[name]
    base = open_checkpoint(root / "base")
    layers = mixture_layers(base)
    measured = measure(base, layers, *texts(root))
    groups = {layer.prefix: [[0, 3], [1, 4, 5], [2]] for layer in layers}
    shrunk = Shrunk(base, layers, groups, measured)
    (tmp_path / "config.json").write_text(json.dumps(shrunk_settings("m", base.config, 3)))
    module, names = check_tensors(tmp_path, shrunk.tensors)
    layer, own = layers[0], measured[layers[0].prefix]
    task = _Layer(shrunk, layer, students_of(module, names, layers)[layer.prefix])
    dice = torch.Generator().manual_seed(0)
    experts = torch.rand(len(layer.kinds), 3, 2, generator=dice).requires_grad_(True)
    now = LayerCoefficients(experts.detach())
    stacks = {name: part.requires_grad_(True) for name, part in task.stacks(now).items()}
    task(stacks, now, own.states).square().sum().backward()
    found = task.inner_products({name: part.grad for name, part in stacks.items()}, experts)
    inside = {
        name: part.detach().clone() for name, part in task.stacks(LayerCoefficients(0 * now.experts)).items()
    }
    for (kind, place, number), apart in task.apart.items():
        index = list(layer.kinds).index(kind)
        task._part(inside, place, kind).add_(experts[index, place, number] * apart)
    task(inside, now, own.states).square().sum().backward()
    assert experts.grad is not None
    torch.testing.assert_close(found, experts.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "experts", "words"),
    [
        ("Qwen3-MoE", 1, "gives each token 2"),
        ("Qwen3-MoE", 7, "it has 6 experts"),
        ("DeepSeek-V3", 5, r"2 groups \(n_group\), which need 2 or more"),
        ("DeepSeek-V3", 2, r"2 groups \(n_group\), which need 2 or more"),
    ],
)
def test_impossible_numbers_are_refused_before_work(
    name: str, experts: int, words: str, worlds: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        tm.shrink(worlds[name] / "base", tmp_path / "out", experts, "texts.jsonl")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_shrunk_says_why(worlds: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"1 of 4 groups .* fewer than 3 experts"):
        shrunk_settings("m", {"num_experts": 16, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 1}, 8)
    base = worlds["Qwen3-MoE"] / "base"
    with pytest.raises(ValueError, match="needs texts"):
        tm.shrink(base, tmp_path / "out", 4)
    with pytest.raises(ValueError, match="--plan is 'reaper'"):
        tm.shrink(base, tmp_path / "out", 4, "t.jsonl", "reaper")
    (tmp_path / "t.jsonl").write_text('{"text": "w10"}\n')
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in ("config.json", "model.safetensors"):
        (bare / file).write_bytes((worlds["Qwen2-MoE"] / "base" / file).read_bytes())
    with pytest.raises((ValueError, OSError), match="tokenizer"):
        tm.shrink(bare, tmp_path / "out", 4, str(tmp_path / "t.jsonl"))
    for groups, words in {
        ((0,), (1,)): "it needs 4 groups",
        ((0,), (1,), (2,), (2,)): "every expert at most once",
        ((0,), (1,), (2,), (9,)): "lists of experts 0 to 5",
    }.items():
        layers = {f"model.layers.{i}.mlp.": groups for i in range(2)}
        (tmp_path / "plan.json").write_text(json.dumps({"layers": layers}))
        with pytest.raises(ValueError, match=words):
            tm.shrink(base, tmp_path / "out", 4, plan=str(tmp_path / "plan.json"))
    assert not (tmp_path / "out").exists()


def test_a_plan_keeps_equally_many_of_a_routers_groups(worlds: dict[str, Path], tmp_path: Path) -> None:
    """Of DeepSeek-V3's two groups of four; a plan that does is written as it says."""
    root, file = worlds["DeepSeek-V3"], tmp_path / "plan.json"
    for groups, words in ([[0], [1], [2], [4]], "each needs 2"), ([[1, 0, 7], [2], [6, 3], [4]], ""):
        file.write_text(json.dumps({"layers": {"model.layers.1.mlp.": groups}}))
        if words:
            with pytest.raises(ValueError, match=words):
                tm.shrink(root / "base", tmp_path / "out", 4, str(root / "a.jsonl"), str(file))
            assert not (tmp_path / "out").exists()
        else:
            out = tm.shrink(root / "base", tmp_path / "out", 4, str(root / "a.jsonl"), str(file))
            assert groups_of(out) == [sorted(groups)]
            assert bool(logits(load(out)).isfinite().all())


def test_no_other_folder_is_removed(worlds: dict[str, Path], tmp_path: Path) -> None:
    root, thesis = worlds["Mixtral"], tmp_path / "thesis"
    base = Path(shutil.copytree(root / "base", tmp_path / "base"))
    thesis.mkdir()
    (thesis / "thesis.tex").write_text("all of it")
    for out, words in ((base, "is, or holds, the mixture"), (thesis, "is no folder that")):
        with pytest.raises(ValueError, match=words):
            tm.shrink(base, out, 4, str(root / "texts.jsonl"), overwrite=True)
    assert (thesis / "thesis.tex").exists()
    assert (base / "config.json").exists()
