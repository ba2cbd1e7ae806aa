"""The best start and the best method for a configuration, chosen by held-out unlabeled examples."""

from trainmerge.auto.auto import auto_config
from trainmerge.auto.search import Choice

__all__ = ["Choice", "auto_config"]
