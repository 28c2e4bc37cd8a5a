"""Compiler options for each platform, accepted by its compiler; and the cache of compiled programs."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tests.helpers import commands
from tests.helpers.compilers import optimised
from tests.helpers.observations import observe
from vapi_jax.models import sampling
from vapi_jax.models.layers import conv2d
from vapi_jax.models.policies import make_policy
from vapi_jax.parallel import compiler
from vapi_jax.parallel.sharding import make_mesh


def known(platform):
    """A platform's options by the names that the installed XLA has for them."""
    newer = jax.__version_info__ >= (0, 11)
    return dict(
        compiler.RENAMED[name] if newer and name in compiler.RENAMED else (name, value)
        for name, value in compiler.OPTIONS[platform].items()
    )


@pytest.fixture
def gpu_options_on_cpu(monkeypatch):
    """XLA reads the options of all platforms on each: the GPU's stand for some that this one has."""
    monkeypatch.setitem(compiler.OPTIONS, "cpu", compiler.OPTIONS["gpu"])
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")


def one():
    return make_mesh(devices=jax.devices()[:1])


def test_convolutions_of_the_one_device_of_a_cpu_are_xlas_where_its_library_leaves_cores_idle():
    old = jax.__version_info__ < (0, 11)
    options = compiler.options(one())
    assert options == compiler.options({"a": jnp.ones(2)}) == known("cpu")
    assert bool(options) == old
    assert compiler.options(make_mesh()) == {}

    def calls_library(options):
        maps, kernel = jnp.ones((16, 32, 32, 64)), jnp.ones((3, 3, 64, 64))
        program = jax.jit(partial(conv2d, padding=1), compiler_options=options)
        text = program.lower(maps, kernel).compile().as_text()
        assert "convolution" in text
        return "ynn_fusion" in text

    with optimised():
        assert calls_library({})
        assert calls_library(options) != old


@pytest.mark.usefixtures("gpu_options_on_cpu")
def test_options_are_those_of_the_devices_of_a_mesh_or_of_arrays():
    assert compiler.options(one()) == known("gpu")
    assert compiler.options({"a": jnp.ones(2), "b": np.ones(2)}) == known("gpu")
    assert compiler.options({"b": np.ones(2)}) == {}


def test_an_option_that_this_xla_lacks_is_left_out_or_called_by_its_later_name(monkeypatch):
    fast, width = "xla_cpu_enable_fast_math", "xla_cpu_prefer_vector_width"
    asked = {"xla_old": True, fast: False, "xla_gone": 3, "xla_gone_as_well": True}
    monkeypatch.setitem(compiler.OPTIONS, "cpu", asked)
    monkeypatch.setitem(compiler.RENAMED, "xla_old", (width, 128))
    monkeypatch.setitem(compiler.RENAMED, "xla_gone", ("xla_gone_again", 4))
    monkeypatch.setitem(compiler.RENAMED, fast, ("xla_not_there_yet", 1))
    assert compiler.options(one()) == {width: 128, fast: False}
    monkeypatch.setenv("XLA_FLAGS", f"--{width}=256")
    assert compiler.options(one()) == {fast: False}
    monkeypatch.setenv("XLA_FLAGS", "--xla_old=true")
    assert compiler.options(one()) == {fast: False}


def test_a_value_that_the_compiler_refuses_is_not_hidden(monkeypatch):
    monkeypatch.setitem(compiler.OPTIONS, "cpu", {"xla_cpu_prefer_vector_width": "wide"})
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_cpu_prefer_vector_width"):
        compiler.options(one())


@pytest.mark.usefixtures("gpu_options_on_cpu")
@pytest.mark.parametrize("variable", ["XLA_FLAGS", "LIBTPU_INIT_ARGS"])
def test_what_the_user_has_set_stays(variable, monkeypatch):
    monkeypatch.setenv(variable, "--xla_x=1 --xla_gpu_enable_triton_gemm=true --xla_y=z")
    left = known("gpu")
    del left["xla_gpu_enable_triton_gemm"]
    assert compiler.options(one()) == left
    monkeypatch.setenv(variable, "--xla_dump_to=/x/xla_gpu_enable_triton_gemm")
    assert compiler.options(one()) == known("gpu")


@pytest.mark.usefixtures("gpu_options_on_cpu")
def test_samples_can_be_drawn_inside_another_program():
    """JAX refuses options of an inner `jax.jit`, which therefore has none."""
    policy = make_policy(
        "class", dim=16, n_head=2, n_layer=1, vocab_size=11, block_size=4, multiple_of=16,
        num_classes=3,
    )  # fmt: skip
    rng, labels = jax.random.key(0), jnp.arange(3)
    params = policy.init(rng)
    alone = sampling.generate(policy, params, labels, rng)
    inside = jax.jit(lambda *given: sampling.generate(policy, *given))(params, labels, rng)
    closed_over = jax.jit(lambda labels: sampling.generate(policy, params, labels, rng))(labels)
    np.testing.assert_array_equal(alone, inside)
    np.testing.assert_array_equal(alone, closed_over)


@pytest.mark.parametrize("name", compiler.OPTIONS["gpu"])
def test_the_installed_compiler_knows_every_option_for_gpus(name):
    """By this name or its later one: an option that XLA has dropped would do nothing, unseen."""

    def compiled(options):
        return jax.jit(lambda x: x + 1, compiler_options=options)(1)

    wanted = [(name, compiler.OPTIONS["gpu"][name]), compiler.RENAMED.get(name)]
    [option] = {*known("gpu").items()} & {*wanted}
    assert compiled(dict([option])) == 2
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        compiled({f"{name}_of_our_dreams": True})


@pytest.mark.targets("compile-tpu")
def test_the_compiler_for_tpus_knows_every_option_for_tpus(monkeypatch):
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")  # looks for no machine of Google's
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
    mesh = Mesh(np.array(devices), ("x",))
    options = compiler.options(mesh)
    assert options == known("tpu")
    rows = jax.ShapeDtypeStruct(
        (64, 8), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("x"))
    )
    jax.jit(jnp.sum, compiler_options=options).lower(rows).compile()
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        jax.jit(jnp.sum, compiler_options={"xla_tpu_x": True}).lower(rows).compile()


def uncached():
    """The environment of a user who has not said where compiled programs go."""
    environment = commands.environment()
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    return environment


CACHED = """
import sys, pathlib, jax, jax.numpy as jnp
from vapi_jax.parallel.compiler import enable_compilation_cache
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
print(enable_compilation_cache(pathlib.Path(sys.argv[1])))
jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((4, 4))).block_until_ready()
"""


@pytest.mark.parametrize("given", [False, True], ids=["ours", "the user's"])
def test_compiled_programs_are_kept_where_the_user_or_else_the_run_wants_them(tmp_path, given):
    ours, theirs = tmp_path / "run" / "cache", tmp_path / "theirs"
    environment = uncached()
    if given:
        environment["JAX_COMPILATION_CACHE_DIR"] = str(theirs)
    done = commands.python("-c", CACHED, ours, env=environment, check=True)
    assert done.stdout.strip() == ("None" if given else str(ours))
    assert (theirs if given else ours).is_dir()
    assert not (ours if given else theirs).exists()


COMPUTED = (
    CACHED
    + """
print(jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((4, 4))).tolist())
"""
)


@pytest.mark.parametrize("damage", ["altered in 8 bytes", "truncated", "emptied"])
def test_a_damaged_compiled_program_is_compiled_again(tmp_path, damage):
    environment = uncached()

    def run():
        done = commands.python("-c", COMPUTED, tmp_path, env=environment, check=True)
        return done.stdout, done.stderr

    first, _ = run()
    entries = list(tmp_path.glob("*-cache"))
    assert entries
    for path in entries:
        content = bytearray(path.read_bytes())
        middle = len(content) // 2
        content[middle : middle + 8] = bytes(byte ^ 0xFF for byte in content[middle : middle + 8])
        kept = {"altered in 8 bytes": content, "truncated": content[:middle], "emptied": b""}
        path.write_bytes(kept[damage])
    again, said = run()
    assert again == first
    assert "Error reading persistent compilation cache entry" in said
    observe(
        f"compiled program: {damage}",
        "JAX warns, and compiles it again; the same values",
    )


def test_a_run_keeps_what_it_compiles_in_its_workdir(tmp_path):
    code = """
import pathlib, sys, jax
from vapi_jax.training import command, run
run.run = lambda *args, **kwargs: print(jax.config.jax_compilation_cache_dir)
sys.exit(command.execute(None, pathlib.Path(sys.argv[1])))
"""
    done = commands.python("-c", code, tmp_path, env=uncached(), check=True)
    assert done.stdout.strip() == str(tmp_path / "compilation_cache")
