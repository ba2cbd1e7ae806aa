"""The best start and the best method for a configuration, chosen by held-out unlabeled examples."""

from trainmerge.auto.auto import auto_config
from trainmerge.auto.choice import Choice
from trainmerge.auto.preview import Preview, finished_search, preview_auto

__all__ = ["Choice", "Preview", "auto_config", "finished_search", "preview_auto"]
