"""Compiler flags as functions of strings; and that the installed library knows those we set."""

from pathlib import Path

import jaxlib
import pytest

from tests.helpers import commands
from tests.helpers.observations import observe
from vapi_jax.parallel import compiler
from vapi_jax.parallel.compiler import FLAGS, apply, guess_platform, known_flags, merge

LIBRARY = Path(jaxlib.__file__).parent / "libjax_common.so"


@pytest.mark.parametrize(
    ("current", "wanted", "merged"),
    [
        ("", {"xla_a": "1"}, "--xla_a=1"),
        ("", {}, ""),
        ("--xla_a=false", {"xla_a": "true"}, "--xla_a=false"),
        ("--xla_ab=3", {"xla_a": "true"}, "--xla_ab=3 --xla_a=true"),
        ("  --xla_b   -xla_a=2 ", {"xla_a": "1", "xla_b": "1", "xla_c": "1"},
         "--xla_b -xla_a=2 --xla_c=1"),
        ("--xla_dump_to=/x/xla_a", {"xla_a": "1"}, "--xla_dump_to=/x/xla_a --xla_a=1"),
    ],
)  # fmt: skip
def test_what_the_user_has_set_stays(current, wanted, merged):
    assert merge(current, wanted) == merged


def test_merging_twice_is_merging_once():
    once = merge("--xla_gpu_enable_triton_gemm=true", FLAGS["gpu"]["XLA_FLAGS"])
    assert merge(once, FLAGS["gpu"]["XLA_FLAGS"]) == once
    assert once.count("triton_gemm") == 1


CUDA = ["jax_cuda13_plugin"]


@pytest.mark.parametrize(
    ("environment", "packages", "devices", "platform"),
    [
        ({}, CUDA, ["/dev/nvidiactl"], "gpu"),
        ({}, CUDA, [], "cpu"),  # the plugin without a driver
        ({}, [], ["/dev/nvidiactl"], "cpu"),  # a GPU that this installation cannot use
        ({}, ["libtpu"], ["/dev/vfio/0"], "tpu"),
        ({}, ["libtpu", *CUDA], ["/dev/nvidiactl"], "gpu"),
        ({"JAX_PLATFORMS": "cpu"}, CUDA, ["/dev/nvidiactl"], "cpu"),
        ({"JAX_PLATFORMS": "cuda,cpu"}, [], [], "gpu"),
        ({"JAX_PLATFORMS": "TPU"}, [], [], "tpu"),
        ({"JAX_PLATFORMS": ""}, CUDA, ["/dev/nvidiactl"], "gpu"),
    ],
)
def test_the_platform_is_the_one_that_jax_will_choose(environment, packages, devices, platform):
    assert guess_platform(environment, packages, devices) == platform


@pytest.fixture
def library(tmp_path):
    """A file that knows two flags of ours."""
    path = tmp_path / "reader.so"
    known = b"\0".join([b"xla_gpu_enable_triton_gemm", b"xla_gpu_enable_latency_hiding_scheduler"])
    path.write_bytes(
        b"\x7fELF junk \0" + known + b"\0xla_gpu_all_gather_combine_threshold_bytes_v2\0"
    )
    return path


def test_flags_that_a_library_does_not_know_are_left_out(library, tmp_path):
    names = list(FLAGS["gpu"]["XLA_FLAGS"])
    found = known_flags(names, [library])
    assert found == {"xla_gpu_enable_triton_gemm", "xla_gpu_enable_latency_hiding_scheduler"}
    other = tmp_path / "plugin.so"
    other.write_bytes(b"..xla_gpu_enable_triton_gemm\0")
    assert known_flags(names, [library, other]) == {"xla_gpu_enable_triton_gemm"}
    assert known_flags(names, []) == set()


def test_settings_of_a_gpu(library):
    environment = {"XLA_FLAGS": "--xla_gpu_enable_triton_gemm=true", "HOME": "/root"}
    changed = apply(environment, "gpu", [library])
    assert environment == {
        "XLA_FLAGS": "--xla_gpu_enable_triton_gemm=true --xla_gpu_enable_latency_hiding_scheduler=true",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9",
        "HOME": "/root",
    }
    assert changed == {name: environment[name] for name in ("XLA_FLAGS", *changed)}
    assert apply(environment, "gpu", [library]) == {}


def test_a_memory_share_of_the_users_stays():
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}
    assert apply(environment, "gpu", []) == {}
    assert environment == {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}


def test_nothing_is_set_on_a_cpu():
    environment: dict[str, str] = {}
    assert apply(environment, "cpu", [LIBRARY]) == {}
    assert environment == {}


def test_the_installed_library_knows_every_flag_of_ours_for_gpus():
    names = set(FLAGS["gpu"]["XLA_FLAGS"])
    assert known_flags([*names, "xla_gpu_of_our_dreams"], [LIBRARY]) == names


def test_the_module_is_applied_before_jax_and_imports_none():
    code = (
        "import sys; from vapi_jax.parallel import compiler; compiler.apply_here(); "
        "print('jax' in sys.modules)"
    )
    done = commands.python("-c", code, check=True)
    assert done.stdout.strip() == "False"


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


def test_the_docstring_names_every_flag():
    text = compiler.__doc__.replace(
        "xla_gpu_{all_gather,reduce_scatter,all_reduce}_combine_threshold_bytes",
        " ".join(
            f"xla_gpu_{kind}_combine_threshold_bytes"
            for kind in ("all_gather", "reduce_scatter", "all_reduce")
        ),
    )
    for variables in FLAGS.values():
        for variable, flags in variables.items():
            assert variable in text
            for name in flags:
                assert name in text


@pytest.mark.parametrize("module", ["main", "sample", "evaluate", "encode_dataset", "bench"])
def test_every_command_applies_the_settings_before_jax_is_imported(module, tmp_path):
    code = f"""
import runpy, sys
import vapi_jax.parallel.compiler as settings
def apply_here():
    print("jax" in sys.modules)
    raise SystemExit(7)
settings.apply_here = apply_here
sys.argv = [{module!r}, *sys.argv[1:]]
runpy.run_module("vapi_jax.{module}", run_name="__main__")
"""
    arguments = {
        "sample": ["--ckpt", "demo", "--num", "1", "--out", str(tmp_path)],
        "evaluate": ["--samples", str(tmp_path), "--reference", str(tmp_path)],
        "main": ["--config=configs/c2i_demo.py:tiny", f"--workdir={tmp_path}"],
        "encode_dataset": ["--config=configs/c2i_demo.py:tiny", f"--out={tmp_path}"],
        "bench": ["--config=configs/c2i_demo.py:tiny"],
    }[module]
    done = commands.python("-c", code, *arguments)
    assert (done.returncode, done.stdout.strip()) == (7, "False"), done.stderr


def test_a_run_keeps_what_it_compiles_in_its_workdir(tmp_path):
    code = """
import pathlib, sys, jax
from vapi_jax import main
from vapi_jax.training import run
run.run = lambda *args, **kwargs: print(jax.config.jax_compilation_cache_dir)
sys.exit(main.execute(None, pathlib.Path(sys.argv[1])))
"""
    done = commands.python("-c", code, tmp_path, env=uncached(), check=True)
    assert done.stdout.strip() == str(tmp_path / "compilation_cache")
