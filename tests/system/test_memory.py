"""What a container's limits leave."""

from pathlib import Path

from trainmerge.system.memory import available, group_rooms


def test_limits_of_control_groups_and_their_parents(tmp_path: Path) -> None:
    two, one = tmp_path / "pod" / "inner", tmp_path / "memory" / "job"
    for folder in (two, one):
        folder.mkdir(parents=True)
    (two / "memory.max").write_text("max\n")  # the parent's counts
    (two / "memory.current").write_text("5\n")
    (two.parent / "memory.max").write_text("1000\n")
    (two.parent / "memory.current").write_text("400\n")
    (one / "memory.limit_in_bytes").write_text("300\n")
    (one / "memory.usage_in_bytes").write_text("350\n")
    groups = tmp_path / "cgroup"
    groups.write_text("4:cpu,cpuacct:/job\n3:memory:/job\n0::/pod/inner\n")
    assert group_rooms(tmp_path, groups) == [0, 600]
    assert group_rooms(tmp_path, tmp_path / "none") == []


def test_this_machine_has_room() -> None:
    found = available()
    assert found is not None
    assert found > 0
