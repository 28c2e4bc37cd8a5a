"""The command that encodes a recipe's images, as a user runs it."""

import numpy as np

from tests.helpers import commands


def test_the_command_says_how_to_use_what_it_wrote(tmp_path):
    out = tmp_path / "encoded"
    done = commands.module(
        "encode_dataset", "--config=configs/c2i_demo.py:tiny", f"--out={out}", "--num=12"
    )
    assert done.returncode == 0, done.stderr
    assert f"--config.data.path={out}" in done.stdout
    assert np.load(out / "train" / "tokens.npy").shape == (12, 64)
