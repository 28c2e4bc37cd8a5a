"""What a person can put right is a sentence; a fault of the program keeps its stack."""

import errno
import importlib
import io
import os
import signal
import subprocess
import sys

import pytest

from tests.helpers import commands
from tests.helpers.messages import assert_mentions
from tests.helpers.paths import CONFIGS, ROOT
from vapi_jax.__main__ import COMMANDS
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
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "/file/a"), "/file/a"),
        (OSError(errno.ENOTCONN, "Transport endpoint is not connected", "/bucket"), "/bucket"),
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


def test_an_interruption_is_said_without_a_stack(capsys):
    assert exit_status(failing(KeyboardInterrupt()), "stopped at the seventh house") == 130
    assert capsys.readouterr() == ("", "\nstopped at the seventh house\n")


@pytest.mark.parametrize("door", [*COMMANDS, "launch/convert_llamagen.py"])
def test_ctrl_c_while_a_command_imports_what_it_needs_is_one_line(door):
    """`-v` tells of every import, and as nobody reads on, the command waits at one of them."""
    words, last = ["-m", f"vapi_jax.{door}"], "import 'vapi_jax' "
    if door not in COMMANDS:
        words, last = [ROOT / door], "import 'vapi_jax.common.files' "
    with subprocess.Popen(
        [sys.executable, "-v", *words],
        env=commands.environment(), cwd=ROOT, stderr=subprocess.PIPE, text=True, pipesize=4096,
    ) as process:  # fmt: skip
        next(line for line in process.stderr if line.startswith(last))
        process.send_signal(signal.SIGINT)
        told = process.stderr.readlines()
    assert told[-2:] == ["\n", "stopped\n"]
    assert not any("Traceback" in line for line in told)
    assert process.returncode == 130


LOST = """
import gc, signal, sys, time
from vapi_jax.common.errors import exit_status, stop_without_a_stack

def collected(phase, info):
    if phase == "start" and not struck:
        struck.append(signal.raise_signal(signal.SIGINT))

struck = []
stop_without_a_stack()
gc.callbacks.append(collected)
gc.collect()
sys.exit(exit_status(lambda: time.sleep(60)))
"""


def test_ctrl_c_where_python_cannot_raise_is_not_lost():
    """JAX has such a callback, and Ctrl-C strikes in it once in a few times."""
    done = commands.python("-c", LOST, timeout=30)
    assert (done.returncode, done.stderr) == (130, "\nstopped\n")


CHECK = ["main", f"--config={CONFIGS / 'demo_base.py'}:tiny", "--check"]


@pytest.mark.parametrize("door", [CHECK, ["main", "--help"], ["sample", "--help"]], ids=" ".join)
def test_output_that_nobody_reads_ends_a_command_in_silence(door):
    """As `| head` does; unbuffered, so that the first line meets the closed pipe."""
    reading, writing = os.pipe()
    os.close(reading)
    env = commands.environment(PYTHONUNBUFFERED="1")
    ways = {"stdout": writing, "stderr": subprocess.PIPE, "capture_output": False}
    done = commands.module(*door, env=env, **ways)
    os.close(writing)
    assert done.returncode != 1
    assert "Traceback" not in done.stderr and "Broken" not in done.stderr


def test_a_command_without_standard_streams_does_its_work(tmp_path):
    """As where cron or a daemon has closed them."""
    real = f"-m vapi_jax.real_images --config={CONFIGS / 'demo_base.py'}:tiny --num=2 --out=real"
    shell = f'"{sys.executable}" {real} <&- >&- 2>&-'
    done = subprocess.run(shell, shell=True, cwd=tmp_path, env=commands.environment(), check=False)
    assert done.returncode == 0
    assert len(list((tmp_path / "real").iterdir())) == 2


DRAW = ["sample", "--ckpt=demo", "--num=1", "--out=absent"]
WRITE = ["real_images", f"--config={CONFIGS / 'demo_base.py'}:tiny", "--num=1", "--out=absent"]


@pytest.mark.parametrize(("door", "platform"), [(CHECK, "cuda"), (DRAW, "tpu"), (WRITE, "cuda")])
def test_devices_that_are_not_there_are_named(door, platform, tmp_path):
    env = commands.environment(JAX_PLATFORMS=platform)
    done = commands.module(*door, env=env, cwd=tmp_path)
    assert done.returncode == 1
    # JAX logs the stack of a plugin that cannot start, and goes on; ours would stand at the end.
    assert done.stderr.splitlines()[-1].startswith(f"error: JAX_PLATFORMS={platform}")
    assert list(tmp_path.iterdir()) == []


ARGPARSE = [
    "sample",
    "evaluate",
    "convert",
    "export",
    "checkpoint",
    "encode captions",
    "score geneval",
    "study",
]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
@pytest.mark.parametrize("name", ARGPARSE)
def test_help_is_shown_whatever_letters_the_terminal_has(name, encoding, monkeypatch):
    shown = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(shown, encoding, write_through=True))
    module, *words = name.split()
    monkeypatch.setattr("sys.argv", [module, *words, "--help"])
    door = importlib.import_module(f"vapi_jax.{module}")
    if hasattr(door, "__path__"):  # a package
        door = importlib.import_module(f"vapi_jax.{module}.__main__")
    with pytest.raises(SystemExit) as ended:
        door.main()
    assert ended.value.code == 0
    assert f"vapi_jax.{name}" in shown.getvalue().decode(encoding)


def test_every_command_reads_its_flags_where_letters_are_forgiven():
    """argparse in `exit_status`, as tried above; absl in `parse_flags`."""
    for name in COMMANDS.keys() - {name.split()[0] for name in ARGPARSE}:
        path = ROOT / "vapi_jax" / ("bench/__main__.py" if name == "bench" else f"{name}.py")
        assert "app.run(main, flags_parser=parse_flags)" in path.read_text(encoding="utf-8")


def test_a_letter_that_the_terminal_lacks_ends_no_command():
    """The plan says VA-π."""
    recipe = f"--config={CONFIGS / 'c2i_demo.py'}:tiny"
    env = commands.environment(PYTHONIOENCODING="ascii")
    done = commands.module("main", recipe, "--check", env=env, encoding="ascii", check=True)
    assert "VA-?" in done.stdout


def test_a_recipe_that_builds_on_an_absent_one_says_which(tmp_path):
    recipe = tmp_path / "c2i_xl.py"
    recipe.write_text((CONFIGS / "c2i_xl.py").read_text().replace('"c2i_xxl"', '"nowhere"'))
    done = commands.module("main", f"--config={recipe}", "--check")
    assert done.returncode == 1
    assert_mentions(done.stderr, recipe, "nowhere.py")
    assert "Traceback" not in done.stderr
