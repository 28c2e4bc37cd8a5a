"""What fails on the host, in the middle of a compiled program on several devices, comes out as itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from vapi_jax.common.host_calls import on_host, raise_failure
from vapi_jax.parallel.sharding import make_mesh


class Broken(Exception):
    pass


def test_one_device_s_failure_keeps_no_other_waiting():
    broken = [3.0]

    def double(x):
        if x[0] in broken:
            raise Broken(f"at {x[0]}")
        return 2 * np.asarray(x)

    def doubled(x):
        found = on_host(double, jax.ShapeDtypeStruct(x.shape, jnp.float32), x)
        return found, jax.lax.psum(found, "data")

    mesh, x = make_mesh(8, 1), jnp.arange(8.0)
    step = jax.jit(
        jax.shard_map(doubled, mesh=mesh, in_specs=P("data"), out_specs=(P("data"), P()))
    )
    found, total = step(x)
    assert np.isnan(found[3]) and np.isnan(total).all()
    with pytest.raises(Broken, match="at 3"):
        raise_failure()
    raise_failure()  # once is enough
    broken.clear()
    found, total = step(x)
    np.testing.assert_array_equal(found, 2 * x)
    assert total == 56.0
