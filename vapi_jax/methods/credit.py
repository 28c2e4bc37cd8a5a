"""Beyond the paper: which token earned a reward, and a reward that does not sharpen.

Both start from inner products <y_g - x, y_j - x> of a group's decoded samples y and their image x, in a space
where the squared distance is Σ weight · loss over the rewards (pixels joined with LPIPS's features), pooled
to C cells: C = 1 for a whole image, C = T for the grid of tokens. `Reward.inner` gives them.

Spatial credit. The tokens of a sample are independent given the context, so each may be rewarded by what it
alone does to the image. The decoder is nearly local: the loss in a token's own cell is that, up to what
leaks into it from its neighbours, and leaves the noise of all other tokens out.

Energy score. A reward -D(y, x) is no proper scoring rule: its best answer to an uncertain future is the one
medoid. The energy score ES(P, x) = E D(Y, x) - ½ E D(Y, Y') is proper (Gneiting and Raftery 2007) for
D = sqrt(Σ weight · loss), a Euclidean distance. Since ∇ ½ E D(Y, Y') = E D(Y, Y') ∇ log π(Y), the reward is
-D(y_g, x) + mean_j D(y_g, y_j).
"""

import jax.numpy as jnp
from jaxtyping import Array, Float


def losses(inner: Float[Array, "B G G C"]) -> Float[Array, "B G C"]:
    """Squared distance of each sample to its image, by cell."""
    return jnp.moveaxis(jnp.diagonal(inner, axis1=1, axis2=2), -1, 1)


def energy_rewards(inner: Float[Array, "B G G C"], baseline: bool = False) -> Float[Array, "B G C"]:
    """-D(y_g, x) + Σ_{j≠g} D(y_g, y_j) / (G - 1), by cell.

    Args:
      inner: inner products of the samples' differences from their image.
      baseline: for advantages. Subtracting a group's mean takes the share 1/G from the first term and 2/G
        from the second, in which each sample occurs twice; dividing that by G - 2 makes both G/(G - 1) too
        small, so that the gradient stays that of the energy score. Wants G >= 3.
    """
    own = losses(inner)
    squares = own[:, :, None] + own[:, None] - 2.0 * inner
    group = inner.shape[1]
    others = ~jnp.eye(group, dtype=bool)[None, :, :, None]
    # Rounding may leave less than nothing of two equal samples.
    apart = jnp.sqrt(jnp.where(others, jnp.maximum(squares, 0.0), 0.0)).sum(axis=2)
    return -jnp.sqrt(jnp.maximum(own, 0.0)) + apart / (group - (2 if baseline else 1))
