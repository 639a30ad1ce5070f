"""Measuring what attention methods cost in accuracy. Not imported by `losart` itself."""

from losart.eval.evaluation import Cell, EvalConfig, check_config, evaluate
from losart.eval.tasks import TASKS, Task

__all__ = ["TASKS", "Cell", "EvalConfig", "Task", "check_config", "evaluate"]
