"""What a search of `auto` found."""

import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainmerge.auto.trials import Trial, trial_of
from trainmerge.system.json_file import read_json

REMEDY = "Run trainmerge auto again: what was judged is kept."


@dataclass(frozen=True)
class Choice:
    """What `auto_config` found: the best trial of every row, and the run folder of the best."""

    rows: Mapping[str, Trial]  # name -> its best trial
    best: str
    run: Path  # an ordinary run folder
    learned: Mapping[str, Path]  # rows that were learned -> their run folders

    def to_json(self) -> dict[str, Any]:
        """As auto.json has it."""
        rows = {name: {**asdict(t), "mean": t.mean, "worst": t.worst} for name, t in self.rows.items()}
        return {"best": self.best, "run": self.run.name, "rows": rows}

    @staticmethod
    def read(place: Path) -> "Choice":
        """The choice in the folder `place`, without the run folders of rows that were not chosen.

        Raises:
            ValueError: its auto.json is damaged.
        """
        file = place / "auto.json"
        content = read_json(file, REMEDY)
        rows, best, run = (content.get(key) for key in ("rows", "best", "run"))
        if not (
            isinstance(rows, Mapping) and isinstance(best, str) and best in rows and isinstance(run, str)
        ):
            raise ValueError(f"{file}: has no rows, or none that is the best. {REMEDY}")
        return Choice(
            {name: trial_of(row, file) for name, row in rows.items()}, best, place / Path(run).name, {}
        )


def warn_if_none(best: Trial) -> None:
    """Warn if the best merge recovers nothing of the experts, or less than nothing of one."""
    if best.mean <= 0:
        warnings.warn(
            "no merge is closer to the experts than the base itself on the held-out examples: they do not "
            "merge by these methods. Keep the experts apart, or check that they share this base",
            stacklevel=2,
        )
    elif best.worst < 0:
        warnings.warn(
            "the best merge is further from one of its experts than the base is: leave that expert out, or "
            "give it a higher weight",
            stacklevel=2,
        )
