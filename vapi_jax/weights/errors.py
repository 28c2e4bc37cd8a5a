"""What is wrong with weights; without JAX, which readers of files do without."""

from vapi_jax.common.errors import ExpectedError


class WeightsError(ExpectedError, ValueError):
    """Weights that do not fit the model, with every misfit listed by name."""
