"""A refused resume names the configuration's keys, also where the manifest has only a digest."""

import json
from pathlib import Path

import pytest

from trainmerge.fitting.begin import by_key
from trainmerge.run.folder import RunFolder

BEFORE = "model:\n  initial: 0.3\n  clip: 0.0\ntrainer:\n  max_steps: 5\n"
NOW = "model:\n  initial: 0.5\n  clip: 0.0\ntrainer:\n  max_steps: 9\n"


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path)
    made = {"start": "3f", "experts": [], "checksums": {}, "recipe": {}, "calibration": {}, "data": {}}
    folder.manifest.write_text(json.dumps(made))
    folder.coefficients.touch()
    return folder


def test_the_key_with_its_old_and_new_value_is_shown(folder: RunFolder) -> None:
    folder.config.write_text(BEFORE)
    keys = by_key(folder, NOW)
    assert keys == "  model.initial: 0.3 then, 0.5 now"  # not max_steps, which may change
    with pytest.raises(
        ValueError, match=r"start: .*\nIn the configuration:\n  model\.initial: 0\.3 then, 0\.5 now"
    ):
        folder.check({"start": "4a"}, keys)
    folder.check({"start": "3f"}, keys)


@pytest.mark.parametrize("content", [None, "", "a: [", "\x00", "NaN", "[]"])
def test_without_a_usable_configuration_nothing_is_added(folder: RunFolder, content: str | None) -> None:
    if content is not None:
        folder.config.write_text(content)
    assert by_key(folder, NOW) == ""
    assert by_key(folder, None) == ""
