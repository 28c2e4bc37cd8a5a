"""The one trainer: plan, state and step, loop, checkpoints and resume."""
