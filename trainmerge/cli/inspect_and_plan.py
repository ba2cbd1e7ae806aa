"""The commands `inspect` and `plan`, which change no run; heavy imports happen inside them."""

from pathlib import Path
from typing import Literal

from trainmerge.system.ranges import check_option


def inspect(
    path: str,
    every: bool = False,
    weights: Literal["auto", "yes", "no"] = "auto",
    suggest: str | None = None,
    output: str | None = None,
    forecast: int | None = None,
    out: str = "merged",
) -> None:
    """Show a merge before or after its fit: sizes, groups, unmerged parameters, and possible problems.

    For a configuration, also the memory and time of its fit, and what the fit would refuse; with `--suggest`,
    what `auto` would do. Ends with exit code 1 if there is an error among the findings, which stops a fit,
    and with 0 otherwise.

    Examples: trainmerge inspect configs/adamerging.yaml
              trainmerge inspect configs/adamerging.yaml --suggest mine.yaml
              trainmerge inspect configs/demo.yaml --forecast 16
              trainmerge inspect runs/first --weights no

    Args:
        path: A configuration, a run folder, or an exported checkpoint.
        every: List every parameter instead of a summary.
        weights: Read the weights too, to find near-duplicate experts, outliers and protected attention;
            `auto` reads up to 2 GiB.
        suggest: Write a suggested configuration, with its reasons, to this YAML file, and say what
            `trainmerge auto` would do, or what it chose.
        output: Write everything to this JSON file too.
        forecast: Run each expert on so many examples, and say what a merge will lose.
        out: With --suggest: the folder that `trainmerge auto` would write.
    """
    check_option("forecast", forecast, int | None, "[0, inf)")
    if forecast and not Path(path).is_file():
        raise ValueError(
            f"{path} is no configuration, and a forecast is made before a fit: name the YAML file"
        )
    from tempfile import TemporaryDirectory

    from trainmerge.cli.fit import Rehearsal
    from trainmerge.inspection import closing_words, inspect_path

    file, config = Path(suggest) if suggest else None, Path(path)
    with TemporaryDirectory() as place:
        fit = Rehearsal(config, Path(place))
        findings = inspect_path(config, every, weights, file, Path(output) if output else None, fit.findings)
        errors = [finding for finding in findings if finding.level == "error"]
        planned = fit.show_plan() if config.is_file() and not errors else None
    if forecast and not errors:
        from trainmerge.fitting.forecast_fit import forecast_config
        from trainmerge.inspection.forecast import print_forecast

        print_forecast(forecast_config(path, forecast))
    if file is not None and config.is_file() and not errors:
        from trainmerge.cli.auto_preview import print_preview

        print_preview(path, out, file, planned)
    if file is not None or config.is_file():
        print(closing_words(file))
    if errors:
        raise ValueError(f"{len(errors)} error{'s' * (len(errors) > 1)}, listed above")


def plan(
    model: str,
    experts: int,
    batch: int = 1,
    length: int | None = None,
    devices: int = 1,
    device: str = "here",
    recompute: bool = False,
    vectors: Literal["auto", "device", "host", "file"] = "auto",
    gathered_ahead: int = 1,
) -> None:
    """Show the memory and time of merging a model, from its config.json alone.

    Examples: trainmerge plan path/to/llama-70b 4 --batch 8 --devices 8 --device h100 --recompute
              trainmerge plan path/to/model 8 --length 256

    Args:
        model: A folder with config.json, or an id of the hub; no weights are needed.
        experts: The number of full experts.
        batch: Examples per expert and step, over all devices.
        length: Tokens per example; by default 1024, or the model's positions if it has fewer.
        devices: The number of devices that share the model and the examples.
        device: The device's speeds: `here` is measured, `a100`, `h100`, `h200`, `l4` are from data sheets.
        recompute: Activation checkpointing: recompute blocks in the backward.
        vectors: Where base and task vectors are held; `auto` fills a device from the table, then host memory.
        gathered_ahead: Blocks that devices which share the model gather ahead of the one that runs.
    """
    from trainmerge.plan.devices import device_named
    from trainmerge.plan.micro_batches import StepSchedule
    from trainmerge.plan.plan_model import plan_model, print_plan

    schedule = StepSchedule(recompute=True) if recompute else None
    given = batch, length, device_named(device), devices, schedule
    print_plan(plan_model(model, experts, *given, vectors, gathered_ahead))
