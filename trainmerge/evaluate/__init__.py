"""A run folder or a checkpoint -> scores on every task, with baselines."""

from trainmerge.evaluate.checkpoints import evaluate_checkpoint
from trainmerge.evaluate.comparison import Comparison, compare
from trainmerge.evaluate.evaluation import Evaluation
from trainmerge.evaluate.measure import metric_of
from trainmerge.evaluate.runs import evaluate_run
from trainmerge.evaluate.tasks import load_tasks
from trainmerge.run.sources import recipe_of, text_length

__all__ = [
    "Comparison",
    "Evaluation",
    "compare",
    "evaluate_checkpoint",
    "evaluate_run",
    "load_tasks",
    "metric_of",
    "recipe_of",
    "text_length",
]
