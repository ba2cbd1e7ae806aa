"""Plans against hand-computed numbers and real steps; schedules that change memory and nothing else."""

import json
from dataclasses import astuple, replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

import trainmerge as tm
from tests.bounds import SCORE, fitted_bound
from tests.checkpoints.test_places import ELEVEN
from tests.fitting.test_fit import build, learned
from tests.mixture_world import write_mixture
from tests.model_families import FAMILIES
from tests.picture_world import vit
from tests.world import bert, languages_recipe, recipe, write_languages, write_world
from trainmerge.data.batch import Batch
from trainmerge.fitting.plan_fit import plan_fit
from trainmerge.fitting.plan_steps import cut_steps
from trainmerge.model.activation_checkpointing import recompute_blocks
from trainmerge.model.forward import forward
from trainmerge.objectives import Alignment, Entropy, Objective
from trainmerge.plan.devices import STATED, Device, device_named
from trainmerge.plan.dry_run import DryRun, dry_run
from trainmerge.plan.fastest import MARGIN
from trainmerge.plan.ledger import Ledger
from trainmerge.plan.micro_batches import StepSchedule, rounds, smaller_schedules
from trainmerge.plan.plan_model import plan_model
from trainmerge.system.memory import parse_size

H100 = STATED["h100"]


@pytest.fixture(scope="module")
def languages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_languages(tmp_path_factory.mktemp("languages"))


def write_llama(folder: Path, **sizes: int) -> Path:
    config = LlamaConfig(dtype="bfloat16", **sizes)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    return folder


# Llama 2 7B and 70B, as published.
SEVEN = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
SEVENTY = {
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
    "num_key_value_heads": 8,
}  # fmt: skip


def test_a_7b_model_by_hand(tmp_path: Path) -> None:
    tokens, experts = 32, 3
    plan = plan_model(write_llama(tmp_path, **SEVEN), experts, 1, tokens, H100)
    weights = 6_738_415_616
    assert plan.sizes.parameters == weights
    assert 0 <= plan.sizes.weights - 2 * weights < 1024  # bfloat16, and a buffer of frequencies
    assert plan.sizes.gradient == 32000 * 4096 * 2
    assert plan.sizes.vectors == (experts + 1) * 2 * weights
    assert plan.read == plan.sizes.vectors * (1 + experts)  # a merge, and a backward a task
    assert plan.sizes.coefficients == experts * (32 * 9 + 3)
    embedding, norms = 32000 * 4096, 65 * 4096
    products = 6 * tokens * (weights - embedding - norms)
    attention = 7 * 2 * tokens**2 * 4096 * 32  # two products forwards, five backwards
    assert plan.dry_run.flops == experts * (products + attention)
    assert plan.total == plan.memory.total == sum(astuple(plan.memory))
    assert plan.memory.vectors == plan.sizes.vectors  # everything fits
    assert plan.memory.prefetched == 0
    assert plan.total <= 0.9 * 80e9
    assert plan.seconds["merge and coefficient gradient"] == plan.read / 3.35e12
    once = replace(plan, vectors="file")
    assert once.residency.sent == experts * plan.sizes.vectors  # a pass per backward, and none for the merge
    sent = replace(once, one_pass=False)
    assert sent.residency.sent == plan.read
    assert sent.seconds["merge and coefficient gradient"] == plan.read / 64e9  # over PCIe
    block = 2 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096)
    own, one = sent.seconds["forward and backward"], plan.sizes.vectors / 64e9  # three of each; four passes
    assert sent.step_seconds == pytest.approx(own + 4 * one - (own / 9 + 3 * own * 2 / 9))
    assert once.step_seconds == pytest.approx(own + 3 * one - 3 * own * 2 / 9 + plan.sizes.vectors / 3.35e12)
    together = replace(sent, schedule=StepSchedule(3), backwards=1)
    assert together.step_seconds == pytest.approx(own + 2 * one - own)
    assert plan.step_seconds == pytest.approx(sum(plan.seconds.values()))  # nothing is sent
    assert (sent.memory.vectors, sent.memory.prefetched) == (0, 2 * (experts + 1) * block)
    assert sent.needed == sent.total
    with pytest.raises(ValueError, match="are free on the device: set model"):
        replace(plan, vectors="device", limit=plan.sizes.vectors).total  # noqa: B018


def test_a_plan_of_more_experts_than_anyone_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"experts must be in \[1, 10000\], not 1000000000000"):
        plan_model(tmp_path, 10**12)


def test_a_70b_model_on_eight_devices(tmp_path: Path) -> None:
    folder = write_llama(tmp_path, **{**SEVENTY, "num_hidden_layers": 2})  # of 80, to be quick
    one = plan_model(folder, 2, 8, 64, H100)
    many = plan_model(folder, 2, 8, 64, H100, devices=8)
    weights, block = one.sizes.weights, 855_654_400 * 2  # a layer of 8192 x (2 + 2/8) x 8192 + 3 x MLP, norms
    assert many.sizes.block == block
    assert many.memory.model == -(-weights // 8)
    assert many.memory.gathered == 2 * block
    for ahead in (0, 3):
        other = plan_model(folder, 2, 8, 64, H100, devices=8, gathered_ahead=ahead)
        gathered = min((1 + ahead) * block, weights)  # of two layers
        assert other.memory == replace(many.memory, gathered=gathered)
    assert replace(one, ahead=3).memory == one.memory  # one device gathers nothing
    assert many.exchanged == 3 * 2 * weights * 7 // 8
    assert many.read == one.read // 8
    assert one.dry_run.flops == 8 * many.dry_run.flops
    assert one.exchanged == 0


def real_step(folder: Path, inputs: dict[str, torch.Tensor], objective: Objective) -> DryRun:
    """The same forward and backward with numbers, its tensors counted."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    batch = Batch(0, inputs, inputs["attention_mask"].bool(), torch.arange(2))
    ledger = Ledger([*model.parameters(), *model.buffers()])
    with ledger:
        loss = objective(forward(model, batch, None), batch).mean()
        held = ledger.now
        loss.backward()
    return DryRun(held, ledger.peak, ledger.flops)


def test_a_dry_run_counts_what_a_real_step_holds(languages: Path) -> None:
    inputs = {"input_ids": torch.full((2, 30), 5), "attention_mask": torch.ones(2, 30, dtype=torch.int64)}
    inputs["attention_mask"][0, 20:] = 0  # with numbers, a mask of ones would be dropped
    want = real_step(languages / "base", inputs, Entropy())
    got = dry_run_of(languages / "base", inputs, Entropy())
    assert got.flops == want.flops > 0
    assert got.activations == pytest.approx(want.activations, rel=0.01)
    assert got.peak == pytest.approx(want.peak, rel=0.01)


def dry_run_of(
    folder: Path,
    inputs: dict[str, torch.Tensor],
    objective: Objective,
    recompute: bool = False,
    recorded: int = 0,
) -> DryRun:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).eval()
    if recompute:
        assert recompute_blocks(model) == 2
    batch = Batch(0, inputs, inputs["attention_mask"].bool(), torch.arange(2))
    names = [name for name, _ in model.named_parameters()]
    return dry_run(model, names, [[batch]], objective, recorded=recorded)


def test_a_dry_run_of_tasks_that_take_turns(languages: Path) -> None:
    """No backward holds a whole model of gradients that wait for the other tasks'."""
    inputs = dict.fromkeys(("input_ids", "attention_mask"), torch.ones(2, 9, dtype=torch.int64))
    found = []
    for turns in (False, True):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(languages / "base")).eval()
        batch = Batch(0, inputs, inputs["attention_mask"].bool(), torch.arange(2))
        names = [name for name, _ in model.named_parameters()]
        found.append(dry_run(model, names, [[batch] * 3], Entropy(), turns=turns))
    apart, together = found
    assert together.flops == apart.flops
    assert together.activations == apart.activations
    assert together.peak < apart.peak


def test_dry_runs_know_recomputation_teachers_and_what_is_not_trained(languages: Path) -> None:
    inputs = dict.fromkeys(("input_ids", "attention_mask"), torch.ones(2, 30, dtype=torch.int64))
    plain = dry_run_of(languages / "base", inputs, Entropy())
    saving = dry_run_of(languages / "base", inputs, Entropy(), recompute=True)
    assert saving.activations < 0.5 * plain.activations
    assert 1.2 < saving.flops / plain.flops < 4 / 3
    few = dry_run_of(languages / "base", inputs, Alignment(hidden=1.0, layers=(1, 2)), recorded=5)
    every = dry_run_of(languages / "base", inputs, Alignment(hidden=1.0, layers=(1, 2)))
    assert every.activations - few.activations == 60 * (
        20 * 4 - 5 * 8 - 4
    )  # V = 20 probabilities, or 5 with tokens and tail


@pytest.mark.parametrize("text", ["8", "GiB", "8 parsecs", "-3GB", ""])
def test_a_size_needs_a_number_and_a_unit(text: str) -> None:
    with pytest.raises(ValueError, match="such as 8GiB"):
        parse_size(text)


def test_rounds_cover_every_example_once() -> None:
    inputs = {"input_ids": torch.arange(10).view(5, 2)}
    step = [Batch(k, inputs, inputs["input_ids"] >= 0, torch.arange(5)) for k in range(3)]
    whole = [[batch.expert for batch in batches] for batches in rounds(step, StepSchedule(2))]
    assert whole == [[0, 1], [2]]
    cut = [part for parts in rounds(step, StepSchedule(1, 2)) for part in parts]
    assert [len(part.ids) for part in cut] == [2, 2, 1] * 3
    assert sum(part.share for part in cut) == pytest.approx(3)
    assert torch.equal(torch.cat([part.inputs["input_ids"] for part in cut[:3]]), inputs["input_ids"])
    assert [str(e) for e in smaller_schedules(StepSchedule(4, keep=True), 4, separable=True)] == [
        "4 tasks per backward, gradients accumulated",
        "4 tasks per backward",
        "1 task per backward",
        "1 task per backward, blocks recomputed",
        "1 task per backward, 2 examples per forward, blocks recomputed",
        "1 task per backward, 1 example per forward, blocks recomputed",
    ]
    assert len(list(smaller_schedules(StepSchedule(1), 4, separable=False))) == 2


def test_schedules_learn_the_same(tmp_path: Path) -> None:
    write_world(tmp_path)
    found, losses = {}, {}
    cut = StepSchedule(1, 2, recompute=True)
    for schedule in (
        StepSchedule(1),
        StepSchedule(3),
        StepSchedule(1, recompute=True),
        cut,
        StepSchedule(1, 2, keep=True),
    ):
        run = tmp_path / f"run{len(found)}"
        module, data = build(tmp_path, run, objective=Entropy(agreement=1.0))
        module.schedule = schedule
        trainer = tm.make_trainer(run, max_steps=2, accelerator="cpu", enable_progress_bar=False)
        tm.fit(module, data, trainer, run)
        found[schedule] = learned(run)
        lines = (run / "metrics.jsonl").read_text().splitlines()
        losses[schedule] = [json.loads(line)["loss"] for line in lines]
    for schedule, values in found.items():
        assert losses[schedule] == pytest.approx(losses[StepSchedule(1)], rel=SCORE), schedule
        difference = (values - found[StepSchedule(1)]).abs()
        # Adam's first steps make 0.02 of a gradient of rounding.
        assert difference.median() < fitted_bound(2, 0.02), schedule


def test_gradients_kept_are_planned(tmp_path: Path) -> None:
    write_world(tmp_path)
    module, data = build(tmp_path, tmp_path / "run", keep_gradients=True)
    kept, plain = (plan_fit(module, data, schedule=e) for e in (None, StepSchedule(1)))
    merged = sum(module.opened.base.tensors[name].nbytes for name in module.opened.layout.groups)
    assert kept.memory.summed_gradients == merged
    assert kept.read == 2 * kept.sizes.vectors
    assert plain.read == (1 + plain.backwards) * plain.sizes.vectors
    with pytest.raises(ValueError, match="set only one of them"):
        build(tmp_path, tmp_path / "rule", keep_gradients=True, combine=torch.nn.Identity())


def test_fixed_parameters_have_no_gradient_in_the_plan(tmp_path: Path) -> None:
    write_world(tmp_path)
    whole = build(tmp_path, tmp_path / "run", keep_gradients=True)
    grouping = tm.Grouping("chunk", chunks={"*": 1, "*query*": 0})
    merge = replace(recipe(tmp_path), grouping=grouping)
    module, data = build(tmp_path, tmp_path / "run", recipe=merge, keep_gradients=True)
    every, plan = plan_fit(*whole), plan_fit(module, data)
    layout, tensors = module.opened.layout, module.opened.base.tensors
    left = [name for name in layout.groups if name not in layout.learned]
    assert left
    assert len(left) < len(layout.groups)
    saved = sum(tensors[name].nbytes for name in left)
    assert every.memory.summed_gradients - plan.memory.summed_gradients == saved
    assert plan.sizes.gradient == max(tensors[name].nbytes for name in layout.learned)
    assert plan.sizes.vectors == every.sizes.vectors  # they are merged all the same
    assert plan.read == plan.sizes.vectors + plan.sizes.learned


def test_a_budget_is_kept_or_refused(
    tmp_path: Path, languages: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    module, data = build(tmp_path, run, recipe=languages_recipe(languages), tasks_per_backward=2)
    plan = plan_fit(module, data, device=Device("none", 1.0, 1.0))
    tighter = plan_fit(module, data, device=Device("none", 1.0, 1.0), schedule=StepSchedule(1))
    assert tighter.dry_run.peak < plan.dry_run.peak
    assert (plan.backwards, tighter.backwards) == (1, 2)
    trainer = tm.make_trainer(run, max_steps=1, accelerator="cpu", enable_progress_bar=False)
    with pytest.raises(ValueError, match=r"more than the 100\.0 MiB.*\n(.*\n)+.*data.max_length"):
        tm.fit(module, data, trainer, run, memory="100MiB")
    assert not run.exists()
    monkeypatch.setattr(
        "trainmerge.fitting.plan_fit.anonymous", lambda: 0
    )  # else megabytes hide the difference
    plan, tighter = (plan_fit(module, data, schedule=e) for e in (StepSchedule(2), StepSchedule(1)))
    limit = int(MARGIN * (plan.total + tighter.total) / 2)
    cut_steps(module, data, trainer, limit)
    assert module.schedule == StepSchedule(1)
    assert "planned, of" in capsys.readouterr().out


def test_a_classifier_of_pictures_from_its_configuration(tmp_path: Path) -> None:
    """Activations grow with the number of pictures, and its 16 patches and class token with the size."""
    vit().config.save_pretrained(tmp_path)
    config, needs = json.loads((tmp_path / "config.json").read_text()), {}
    for size in (32, 64):
        architectures = {"architectures": ["ViTForImageClassification"]}
        (tmp_path / "config.json").write_text(json.dumps({**config, "image_size": size, **architectures}))
        for batch in (1, 3):
            plan = plan_model(tmp_path, 2, batch=batch, device=Device("none", 1.0, 1.0))
            needs[size, batch] = plan.dry_run.flops
    assert needs[32, 3] == 3 * needs[32, 1]
    assert needs[64, 1] > 3 * needs[32, 1]  # 65 positions in place of 17


def test_a_plan_has_no_more_tokens_than_the_model_has_positions(tmp_path: Path) -> None:
    bert().config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["BertForMaskedLM"]}))
    here = Device("none", 1.0, 1.0)
    with pytest.raises(ValueError, match="BertForMaskedLM has 32 positions, and --length is 33: set"):
        plan_model(tmp_path, 2, length=33, device=here)
    most, given = (plan_model(tmp_path, 2, length=length, device=here) for length in (32, None))
    assert given.dry_run == most.dry_run


def test_devices_are_stated_or_measured() -> None:
    here = device_named("here")
    assert here.flops > 0
    assert here.bandwidth > 0
    with pytest.raises(ValueError, match="choose one of here, a100"):
        device_named("abacus")


@pytest.mark.parametrize("family", ELEVEN)
def test_a_dry_run_of_a_mixture_counts_what_a_real_step_holds(family: str, tmp_path: Path) -> None:
    FAMILIES[family].build().save_pretrained(tmp_path)
    inputs = {"input_ids": torch.full((2, 30), 5), "attention_mask": torch.ones(2, 30, dtype=torch.int64)}
    inputs["attention_mask"][0, 20:] = 0
    want = real_step(tmp_path, inputs, Entropy())
    got = dry_run_of(tmp_path, inputs, Entropy())
    assert got.flops == want.flops > 0
    assert got.activations == pytest.approx(want.activations, rel=0.05)
    assert got.peak == pytest.approx(want.peak, rel=0.05)


@pytest.mark.parametrize("family", ["Qwen3-MoE", "DeepSeek-V3", "gpt-oss"])
def test_the_plan_of_a_mixture_has_the_bytes_that_a_fit_holds(family: str, tmp_path: Path) -> None:
    write_mixture(tmp_path, family)
    experts = {n: tm.Expert(str(tmp_path / n), str(tmp_path / f"{n}.jsonl")) for n in "ab"}
    module, data = build(tmp_path, tmp_path / "run", recipe=tm.Recipe(str(tmp_path / "base"), experts))
    plan = plan_fit(module, data, device=Device("none", 1.0, 1.0))
    module.load(data)
    merged = module.resident.merged
    held = [*merged.module.parameters(), *merged.module.buffers()]
    assert plan.sizes.weights == sum(tensor.nbytes for tensor in held)
    learned = [p for p in merged.module.parameters() if p.requires_grad]
    assert plan.sizes.gradient == max(p.nbytes for p in learned)
    assert plan.sizes.gradients == sum(p.nbytes for p in learned)
    assert plan.sizes.vectors == sum(delta.nbytes for delta in merged.task_vectors.deltas.values())
