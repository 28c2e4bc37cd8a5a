"""The command that writes a recipe's real images, as a user runs it."""

from tests.helpers import commands


def test_the_command_takes_size_split_and_number_from_the_recipe(tmp_path):
    done = commands.module(
        "real_images", "--config=configs/c2i_demo.py:tiny", f"--out={tmp_path / 'real'}"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'real'}: 8 images of test at 32 px\n"
    assert len(list((tmp_path / "real").iterdir())) == 8
    again = commands.module(
        "real_images", "--config=configs/c2i_demo.py:tiny", f"--out={tmp_path / 'real'}"
    )
    assert again.returncode == 1
    assert again.stderr == f"error: {tmp_path / 'real'} exists; choose another place\n"
