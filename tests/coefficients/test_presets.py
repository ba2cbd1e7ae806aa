"""Coefficients from rules: their formulas, and that a fit of no steps merges by them.

Legend: `K` experts, `N` texts.
"""

from math import log
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import trainmerge as tm
from tests.world import languages_recipe, write_languages
from trainmerge.cli import main
from trainmerge.coefficients.measured_presets import posterior, t3_coefficients
from trainmerge.run.config import read_settings
from trainmerge.run.recipe_files import calibration_files


@pytest.fixture(scope="module")
def languages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_languages(tmp_path_factory.mktemp("languages"))


def layout(depth: int, granularity: str = "tensor") -> tm.Layout:
    names = ["embed.weight", *(f"layers.{i}.weight" for i in range(depth)), "norm.weight"]
    return tm.Grouping(granularity).layout({name: torch.Size([4, 4]) for name in names})


def test_layer_swap_is_the_papers_32_layers() -> None:
    values = tm.LayerSwap("language", "maths")(["maths", "language"], layout(32))
    maths, language = values
    assert torch.equal(maths + language, torch.ones(34))
    blocks = language[1:33]
    assert blocks.tolist() == [1.0] * 5 + [0.5] + [0.0] * 23 + [0.5] + [1.0] * 2
    assert language[[0, 33]].tolist() == [1.0, 1.0]
    alone = tm.LayerSwap("language", "maths", bottom=32, top=0, transition=0)(
        ["maths", "language"], layout(32)
    )
    assert alone.tolist() == [[0.0] * 34, [1.0] * 34]


def test_layer_swap_says_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="6 blocks are too few"):
        tm.LayerSwap("a", "b")(["a", "b"], layout(6))
    with pytest.raises(ValueError, match="no expert"):
        tm.LayerSwap("a", "c")(["a", "b"], layout(32))
    with pytest.raises(ValueError, match="one coefficient per block, or a finer"):
        tm.LayerSwap("a", "b")(["a", "b"], layout(32, "task"))


def test_metrics_weighted() -> None:
    losses = {"first": 4.0, "second": 2.0, "third": 1.0}
    weigh = lambda **settings: tm.MetricsWeighted(losses, **settings)(list(losses), layout(2))[:, 0]  # noqa: E731
    torch.testing.assert_close(weigh(), torch.tensor([1 / 7, 2 / 7, 4 / 7]))
    torch.testing.assert_close(weigh(power=0.0), torch.full((3,), 1 / 3))
    torch.testing.assert_close(weigh(power=200.0), torch.tensor([0.0, 0.0, 1.0]))
    torch.testing.assert_close(weigh(best="highest"), torch.tensor([4 / 7, 2 / 7, 1 / 7]))
    ten = tm.MetricsWeighted({name: 10 * loss for name, loss in losses.items()}, power=1.5)
    torch.testing.assert_close(ten(list(losses), layout(2))[:, 0], weigh(power=1.5))  # no unit of loss
    with pytest.raises(ValueError, match="a metric above 0 for each of"):
        tm.MetricsWeighted({"first": 1.0})(list(losses), layout(2))


def test_posterior() -> None:
    even = posterior(torch.full((3, 5), -7.0), 0.3)
    torch.testing.assert_close(even, torch.full((3,), 1 / 3))
    sure = posterior(torch.tensor([[-1e4] * 40, [-1.0] * 40]), 0.3)
    torch.testing.assert_close(sure, torch.tensor([0.0, 1.0]), atol=1e-5, rtol=0)
    one = posterior(torch.tensor([[log(0.1)], [log(0.3)]]), 0.3)
    torch.testing.assert_close(one, torch.tensor([0.7 * 0.5 + 0.3 * 0.25, 0.7 * 0.5 + 0.3 * 0.75]))


def test_t3() -> None:
    divergences = torch.tensor([0.0, log(2) / 2, log(2)], dtype=torch.float64)
    published = t3_coefficients(divergences, centred=False)
    assert published.tolist() == pytest.approx([0.5, 0.5432, 0.5858], abs=1e-4)  # a narrow range
    wide = t3_coefficients(divergences, 0.2, 0.8, gamma=8.0)
    assert wide.tolist() == pytest.approx([0.2002, 0.5, 0.7998], abs=1e-4)


def merged(preset: tm.Preset, root: Path, run: Path, **changes: object) -> tuple[Tensor, dict[str, Tensor]]:
    merge = languages_recipe(root, **changes)
    module = tm.MergeModule(merge, initial=preset, workspace=str(run / "workspace"))
    data = tm.Calibration(calibration_files(merge), merge.base, max_length=16)
    trainer = tm.make_trainer(run, max_steps=0, accelerator="cpu", enable_progress_bar=False)
    tm.fit(module, data, trainer, run)
    return module.coefficients().detach(), load_file(tm.export_run(run, run / "out") / "model.safetensors")


@pytest.mark.parametrize("name", ["t3", "branch-train-merge"])
def test_the_example_configurations_merge_from_the_command_line(
    name: str, languages: Path, tmp_path: Path
) -> None:
    """With small models and short texts in place of those that `make data-lm` fetches."""
    config = read_settings(Path(__file__).parents[2] / "configs" / f"{name}.yaml")
    config["recipe"]["base"] = str(languages / "base")
    experts = config["recipe"]["experts"].values()
    for small, expert in zip("ab", experts, strict=False):  # T3's is one
        expert |= {key: str(languages / f"{small}{end}") for key, end in FILES.items() if key in expert}
    config["recipe"]["experts"] = dict(zip("ab", experts, strict=False))
    config["model"]["initial"]["init_args"]["texts"] = str(languages / "a.jsonl")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", str(tmp_path / "config.yaml"), "--run", str(tmp_path / "run")]) == 0
    values = load_file(tmp_path / "run" / "coefficients.safetensors")["coefficients"]
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    if name == "t3":
        assert 0 < values.unique().item() < 1
    else:
        torch.testing.assert_close(values.sum(0), torch.ones(values.shape[1]))
        assert values[0].min() > 0.5  # the texts are the first expert's own


FILES = {"path": "", "calibration": ".jsonl", "test": "-test.jsonl"}


def test_swapped_layers_are_the_donors_bit_for_bit(languages: Path, tmp_path: Path) -> None:
    _, got = merged(tm.LayerSwap("a", "b", bottom=1, top=0, transition=0), languages, tmp_path / "run")
    donors = {n: load_file(languages / n / "model.safetensors") for n in "ab"}
    for name, tensor in got.items():
        assert torch.equal(tensor, donors["b" if "layers.1." in name else "a"][name])


def test_the_posterior_of_an_experts_own_text_prefers_it(languages: Path, tmp_path: Path) -> None:
    texts = str(languages / "a.jsonl")
    got, _ = merged(tm.DomainPosterior(texts), languages, tmp_path / "run")
    sums = []
    for name in "ab":
        model = AutoModelForCausalLM.from_pretrained(languages / name)
        data = tm.Calibration({"a": texts}, str(languages / "base"), max_length=64)
        inputs = [data.tokenize.encode([example]).inputs for example in data.examples[0]]
        with torch.no_grad():
            sums.append(
                [
                    -float(model(**i, labels=i["input_ids"]).loss) * (i["input_ids"].shape[1] - 1)
                    for i in inputs
                ]
            )
    want = posterior(torch.tensor(sums, dtype=torch.float64), 0.3)
    torch.testing.assert_close(got, want[:, None].expand_as(got), rtol=1e-4, atol=1e-5)
    assert got.sum(0)[0].item() == pytest.approx(1.0)


def test_t3_takes_the_more_of_an_expert_the_more_it_differs(languages: Path, tmp_path: Path) -> None:
    merge = languages_recipe(languages)
    one = {"experts": {"a": merge.experts["a"]}}
    preset = tm.T3(str(languages / "a.jsonl"), gamma=4.0)
    got, _ = merged(preset, languages, tmp_path / "run", **one)
    models = [AutoModelForCausalLM.from_pretrained(languages / name) for name in ("base", "a")]
    data = tm.Calibration({"a": str(languages / "a.jsonl")}, str(languages / "base"), max_length=64)
    found = []
    for example in data.examples[0]:
        inputs = data.tokenize.encode([example]).inputs
        p, q = (model(**inputs).logits[0, :-1].detach().double().softmax(-1) for model in models)
        m = (p + q) / 2
        found.append((p * (p / m).log() + q * (q / m).log()).sum(-1).mean() / 2)
    want = t3_coefficients(torch.stack(found), gamma=4.0).mean()
    assert got.unique().item() == pytest.approx(want.item(), rel=1e-5)
    with pytest.raises(ValueError, match="one expert against its base"):
        merged(preset, languages, tmp_path / "two")
