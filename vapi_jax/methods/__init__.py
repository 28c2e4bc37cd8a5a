"""What can be trained: each task is a config, a conditioning and a loss for the one trainer."""

from jax.sharding import Mesh

from vapi_jax.methods.config import TrainConfig
from vapi_jax.methods.generator import BaseTask, VAPiTask
from vapi_jax.methods.task import HealthError, Task
from vapi_jax.methods.tokenizer import TokenizerTask

__all__ = ["HealthError", "Task", "make_task"]

_TASKS: dict[str, type[Task]] = {"vapi": VAPiTask, "tokenizer": TokenizerTask, "base": BaseTask}


def make_task(config: TrainConfig, mesh: Mesh) -> Task:
    """The task that `config.task` names, on these devices."""
    return _TASKS[config.task](config, mesh)
