"""What a person can put right is a sentence; a fault of the program keeps its stack."""

import errno

import pytest

from tests.helpers import commands
from tests.helpers.paths import CONFIGS
from vapi_jax.common.errors import ExpectedError, exit_status


def failing(error):
    def command():
        raise error

    return command


def test_a_command_that_goes_well_gives_its_status(capsys):
    assert exit_status(lambda: None) == 0
    assert exit_status(lambda: 3) == 3
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ExpectedError("no house number 7 in this street"), "no house number 7 in this street"),
        (OSError(errno.ENOSPC, "No space left on device", "/runs/a"), "/runs/a"),
    ],
)
def test_what_can_be_put_right_is_said_without_a_stack(error, said, capsys):
    assert exit_status(failing(error)) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert said in err


@pytest.mark.parametrize(
    "fault",
    [
        FileNotFoundError(errno.ENOENT, "No such file or directory", "a"),
        ModuleNotFoundError("No module named 'a'"),
        ValueError("a"),
    ],
)
def test_a_fault_of_the_program_keeps_its_stack(fault):
    with pytest.raises(type(fault)):
        exit_status(failing(fault))


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_letter_that_the_terminal_lacks_ends_no_command(encoding):
    """The plan says VA-π."""
    recipe = f"--config={CONFIGS / 'c2i_demo.py'}:tiny"
    env = commands.environment(PYTHONIOENCODING=encoding)
    done = commands.module("main", recipe, "--check", env=env, encoding=encoding, check=True)
    assert "VA-?" in done.stdout


def test_a_recipe_that_builds_on_an_absent_one_says_which(tmp_path):
    recipe = tmp_path / "c2i_xl.py"
    recipe.write_bytes((CONFIGS / "c2i_xl.py").read_bytes())
    done = commands.module("main", f"--config={recipe}", "--check")
    assert done.returncode == 1
    assert str(tmp_path / "c2i_xxl.py") in done.stderr
    assert "Traceback" not in done.stderr
