"""Files of the released sizes through the commands, within the memory that is promised."""

import json
import os
import sys

import numpy as np
import pytest
from safetensors import safe_open

from tests.helpers import commands, release_files
from tests.helpers.janus import SIZES, write_full_size
from tests.helpers.messages import assert_mentions
from vapi_jax.weights.tensors import open_tensors

MEASURED = (
    "import resource, subprocess, sys\n"
    "code = subprocess.run(sys.argv[1:]).returncode\n"
    "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)\n"
    "sys.exit(code)\n"
)


def run(*arguments):
    """Runs a command; its output, and the peak of its resident memory in bytes."""
    done = commands.python("-c", MEASURED, sys.executable, *arguments, timeout=3600)
    assert done.returncode == 0, done.stderr
    *output, peak = done.stdout.splitlines()
    unit = 1 if sys.platform == "darwin" else 1024
    return "\n".join(output), int(peak) * unit


@pytest.mark.slow
def test_the_smallest_release_goes_in_and_out_within_bounded_memory(tmp_path):
    """GPT-B as DDP saves it, and VQ-16, with everything that is no parameter beside them."""
    make = "tests/helpers/release_files.py"
    run(make, "GPT-B", tmp_path / "c2i_B_256.pt", "--layout", "ddp", "--freqs-cis")
    run(make, "VQ-16", tmp_path / "vq_ds16_c2i.pt", "--layout", "ddp")
    sizes = {path.name: path.stat().st_size for path in tmp_path.glob("*.pt")}
    assert sizes["c2i_B_256.pt"] > 440e6
    out = tmp_path / "c2i_b"
    told, peak = run(
        "launch/convert_llamagen.py", "--gpt", tmp_path / "c2i_B_256.pt",
        "--vq", tmp_path / "vq_ds16_c2i.pt", "--out", out,
    )  # fmt: skip
    assert_mentions(
        told, "GPT-B", "c2i", "12 layers", "12 heads", 768, "16384 codes", "16x16", "VQ-16"
    )
    largest = 16384 * 768 * 4
    assert peak < largest + 1e9
    manifest = json.loads((out / "manifest.json").read_text())
    assert set(manifest["ignored"]["gpt"]) == {"optimizer", "steps", "args"}
    assert manifest["buffers"] == {"gpt": ["freqs_cis"], "vq": ["quantize.codebook_used"]}
    again = tmp_path / "again.safetensors"
    _, peak = run("launch/export_llamagen.py", "--ckpt", out, "--out", again)
    assert peak < largest + 1e9
    with (
        open_tensors(tmp_path / "c2i_B_256.pt") as source,
        safe_open(again, framework="numpy") as copy,
    ):
        assert set(copy.keys()) == source.tensors.keys()
        for name, tensor in source.tensors.items():
            np.testing.assert_array_equal(copy.get_tensor(name), tensor.read(), err_msg=name)


@pytest.mark.slow
@pytest.mark.skipif(
    "VAPI_FULL_SIZE" not in os.environ, reason="writes 17 GB: set VAPI_FULL_SIZE=1 to run it"
)
def test_the_largest_generator_of_the_paper_stays_within_bounded_memory(tmp_path):
    file, out = tmp_path / "c2i_XXL_384.pt", tmp_path / "c2i_xxl"
    value = release_files.nest(
        release_files.release_tensors("GPT-XXL", 384), "fsdp", "GPT-XXL", 384
    )
    release_files.write(file, value)
    _, peak = run("launch/convert_llamagen.py", "--gpt", file, "--out", out)
    assert peak < 16384 * 1536 * 4 + 1e9
    assert len(list(out.glob("model-*-of-00002.safetensors"))) == 2
    again = tmp_path / "again.pt"
    _, peak = run("launch/export_llamagen.py", "--ckpt", out, "--out", again)
    assert peak < 16384 * 1536 * 4 + 1e9
    with open_tensors(file) as source, open_tensors(again) as copy:
        assert copy.tensors.keys() == source.tensors.keys()
        for name, tensor in source.tensors.items():
            np.testing.assert_array_equal(copy.tensors[name].read(), tensor.read(), err_msg=name)


@pytest.mark.slow
@pytest.mark.skipif(
    "VAPI_FULL_SIZE" not in os.environ, reason="writes up to 45 GB: set VAPI_FULL_SIZE=1 to run it"
)
@pytest.mark.parametrize("size", SIZES)
def test_janus_of_the_released_sizes_goes_in_and_out_within_bounded_memory(tmp_path, size):
    src, out, again = (tmp_path / name for name in ("published", "converted", "again"))
    write_full_size(src, size)
    told, peak = run("launch/convert_janus.py", "--src", src, "--out", out, "--understanding")
    assert_mentions(told, f"Janus-Pro-{size}", "24x24", "VQ-16", "102400", "16384 codes")
    largest = 102400 * SIZES[size][0] * 4
    assert peak < largest + 1e9
    _, peak = run("launch/export_janus.py", "--ckpt", out, "--out", again)
    assert peak < largest + 1e9
    with open_tensors(src) as source, open_tensors(again) as copy:
        assert copy.tensors.keys() == source.tensors.keys()
        for name, tensor in source.tensors.items():
            np.testing.assert_array_equal(
                copy.tensors[name].read().view(np.uint16),
                tensor.read().view(np.uint16),
                err_msg=name,
            )
