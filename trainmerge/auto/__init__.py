"""The best start and the best method for a configuration, chosen by held-out unlabeled examples."""

from trainmerge.auto.auto import Choice, auto_config

__all__ = ["Choice", "auto_config"]
