"""Every option that is a path: a bucket is refused by name, and `~` is the user's home."""

import ast
import collections.abc
import re
import typing
from pathlib import Path

import pytest

from tests.helpers import commands
from tests.helpers.paths import CONFIGS, ROOT
from tests.methods.test_options_are_read import all_options
from vapi_jax.__main__ import COMMANDS
from vapi_jax.common.options import hints_of
from vapi_jax.common.paths import PathError, is_local, local_folder, local_path
from vapi_jax.methods.config import to_dict
from vapi_jax.methods.resolve import examine
from vapi_jax.rewards import make_terms

RECIPE = f"--config={CONFIGS / 'demo_base.py'}:tiny"
BUCKET = "gs://bucket/run"

# Command -> (what else it must be given, its options that are paths).
DOORS = {
    "main": ([RECIPE], ["--workdir"]),
    "sample": (
        ["--ckpt=demo", "--out=out"],
        ["--ckpt", "--out", "--labels", "--conditions", "--prompts", "--text_encoder"],
    ),
    "evaluate": (
        ["--samples=s", "--reference=r"],
        ["--samples", "--reference", "--inception", "--out"],
    ),
    "evaluate --precompute": (["--reference=r"], ["--precompute"]),
    "evaluate --verify": ([], ["--verify"]),
    "study": (["--study=demo"], ["--workdir", "--results"]),
    "score geneval": (
        ["--detections=d", "--metadata=m", "--out=o.jsonl"],
        ["--detections", "--metadata", "--out", "--against", "--samples"],
    ),
    "score clip": (
        ["--weights=w", "--images=i", "--prompts=p", "--out=o.jsonl"],
        ["--weights", "--images", "--prompts", "--tokenizer", "--out"],
    ),
    "score colors": (
        ["--weights=w", "--images=i", "--detections=d", "--metadata=m", "--out=o.jsonl"],
        ["--detections", "--metadata"],
    ),
    "score aesthetic": (
        ["--weights=w", "--images=i", "--head=h", "--out=o.jsonl"],
        ["--head"],
    ),
    "score scenes": (["--images=i", "--metadata=m", "--out=o.jsonl"], ["--images"]),
    "encode captions": (
        ["--text_encoder=t", "--captions=c", "--out=o.npz"],
        ["--text_encoder", "--captions", "--out"],
    ),
    "encode dataset": ([RECIPE], ["--out"]),
    "real_images": ([RECIPE], ["--out"]),
    "checkpoint inspect": ([], [""]),
    "checkpoint verify": ([], [""]),
    "bench": ([RECIPE], ["--json"]),
    "bench --sweep": ([RECIPE], ["--docs"]),
    "bench --mode": (["--mode=evaluate", RECIPE], ["--inception"]),
    "convert": (["--out=o"], ["--gpt", "--vq", "--out", "--args", "--vq-args", "--classes"]),
    "convert janus": (["--src=s", "--out=o"], ["--src", "--out"]),
    "export": (["--ckpt=c", "--out=o.pt"], ["--ckpt", "--out"]),
    "export janus": (["--ckpt=c", "--out=o"], ["--ckpt", "--out", "--source"]),
    "launch/ship.py": ([], [""]),
}
CASES = [(door, option) for door, (_, options) in DOORS.items() for option in options]


def run(door, *arguments, **more):
    if door.startswith("launch/"):
        return commands.python(ROOT / door, *arguments, **more)
    name, *sub = [part for part in door.split() if not part.startswith("--")]
    return commands.module(name, *sub, *arguments, **more)


@pytest.mark.parametrize("door, option", CASES)
def test_a_bucket_is_refused_by_name_and_nothing_is_made(door, option, tmp_path):
    given = f"{option}={BUCKET}" if option else BUCKET
    done = run(door, *DOORS[door][0], given, cwd=tmp_path)
    assert done.returncode in (1, 2)
    told = done.stdout + done.stderr
    assert re.search(option.lstrip("-") or "DIR|RUN", told)
    assert BUCKET in told
    assert re.search("mount .* copy", " ".join(told.split()))
    assert "Traceback" not in told
    assert list(tmp_path.iterdir()) == []


# Options that are texts and no paths.
_PROCESSES = {"--coordinator", "--cluster_detection_method"}
TEXTS = {
    "main": {*_PROCESSES, "--target"},
    "encode": _PROCESSES,
    "real_images": _PROCESSES,
    "convert": {"--entry", "--vq-entry"},
    "evaluate": {"--features", "--metrics"},
    "bench": {"--features", "--vary"},
    "study": {"--study"},
}
_READ_AS_PATHS = {"local_path", "local_text", "local_folder", "prompts_at", "PATH", "FOLDER"}
_SHARED = {
    "output_flags": "common/output_flags.py",
    "process_flags": "common/process_flags.py",
    "several": "common/process_flags.py",
}


def options_of(path):
    """(options that are read as paths, options that are plain texts), of argparse and absl calls."""
    paths, texts = set(), set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        how, given = ast.unparse(call.func).rpartition(".")[2], list(call.args)
        named = {word.arg: word.value for word in call.keywords}
        if how == "DEFINE":
            kind, name = ast.unparse(given[0]), f"--{given[1].value}"
        elif how in ("DEFINE_string", "DEFINE_multi_string"):
            kind, name = "", f"--{given[0].value}"
        elif how in ("add", "add_argument") and not named.keys() & {"action", "choices"} and given:
            kind, name = ast.unparse(named.get("type", ast.Name(""))), ast.unparse(given[0])
            name = {"'directory'": "", "'runs'": ""}.get(name, name.strip("f'"))
        else:
            continue
        if kind in _READ_AS_PATHS:
            paths.add(name)
        elif not kind:
            texts.add(name)
    for line in map(str.strip, ast.unparse(tree).splitlines()):
        if line.startswith("flags.adopt_module_key_flags(") and (name := line[29:-1]) in _SHARED:
            more = options_of(ROOT / "vapi_jax" / _SHARED[name])
            paths, texts = paths | more[0], texts | more[1]
    return paths, texts


@pytest.mark.parametrize("door", [*COMMANDS, "launch/ship.py"])
def test_every_option_is_read_as_a_path_or_known_to_be_none(door):
    """So what is said of paths here, a bucket and `~` above all, holds for every one of them."""
    path = ROOT / door if "/" in door else ROOT / "vapi_jax" / f"{door}.py"
    paths, texts = options_of(path if path.exists() else path.with_suffix("") / "__main__.py")
    assert paths == {option for name, option in CASES if name.split()[0] == door}
    assert texts == TEXTS.get(door, set())


# Options of recipes that are texts and no paths: names in tables, of variants, of features.
NAMES = {
    ("TrainConfig", "name"), ("TrainConfig", "preset"), ("TrainConfig", "method"), ("DataConfig", "name"),
    ("DataConfig", "dataset"), ("DataConfig", "train_split"), ("DataConfig", "val_split"),
    ("DataConfig", "test_split"), ("DataConfig", "image_feature"), ("DataConfig", "label_feature"),
    ("ConditionConfig", "name"), ("RewardSpec", "name"), ("HTTP", "url"),
    *((kind, "template") for kind in ("CLIPScore", "HPSv2", "PickScore", "HTTP")),
}  # fmt: skip


def test_every_text_in_a_recipe_is_read_as_a_path_or_known_to_be_none():
    plain = {
        (kind.__name__, name)
        for kind in all_options()
        for name, hint in hints_of(kind).items()
        if hint is str or str in typing.get_args(hint)
        if typing.get_origin(hint) not in (typing.Annotated, collections.abc.Mapping)
    }
    assert plain == NAMES


RECIPES = {
    "data.path": lambda path: {"data": {"path": path}},
    "data.classes": lambda path: {"data": {"classes": path}},
    "init.gpt": lambda path: {"init": {"gpt": path}},
    "init.vq": lambda path: {"init": {"vq": path}},
    "rewards.lpips.files": lambda path: {
        "rewards": [{"name": "lpips", "options": {"files": (path, "b.pth")}}]
    },
    "rewards.gan.weights": lambda path: {
        "rewards": [{"name": "gan", "options": {"weights": path}}]
    },
    "rewards.clip.weights": lambda path: {
        "rewards": [{"name": "clip", "options": {"weights": path}}]
    },
    "rewards.hpsv2.tokenizer_path": lambda path: {
        "rewards": [{"name": "hpsv2", "options": {"weights": "w", "tokenizer_path": path}}]
    },
    "rewards.pickscore.prompts": lambda path: {
        "rewards": [{"name": "pickscore", "options": {"weights": "w", "prompts": path}}]
    },
    "rewards.aesthetic.head": lambda path: {
        "rewards": [{"name": "aesthetic", "options": {"weights": "w", "head": path}}]
    },
    "text_base.encoder": lambda path: {"method": "text_base", "text_base": {"encoder": path}},
    "tokenizer_training.perceptual_files": lambda path: {
        "method": "tokenizer", "tokenizer_training": {"perceptual_files": (path, "b.pth")},
    },
}  # fmt: skip
POLICY = {"kind": "class", "dim": 32, "n_head": 4, "n_layer": 1}


@pytest.mark.parametrize("option", RECIPES)
def test_a_bucket_in_a_recipe_is_refused_with_all_else_that_is_wrong(option):
    recipe = {"name": "x", "method": "vapi", "policy": POLICY, "steps": 0}
    _, errors = examine(recipe | RECIPES[option](BUCKET))
    assert any(line.startswith(f"{option}=") and BUCKET in line for line in errors)
    assert any(line.startswith("steps=") for line in errors)


def test_home_is_expanded_where_files_are_written_and_read(tmp_path):
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    env = commands.environment(HOME=str(home))
    (home / "recipe.py").write_bytes((CONFIGS / "demo_tokenizer.py").read_bytes())
    done = commands.module(
        "real_images", "--config=~/recipe.py:tiny", "--num=2", "--out=~/real",
        cwd=here, env=env, check=True,
    )  # fmt: skip
    assert sorted(path.name for path in (home / "real").iterdir()) == ["000000.png", "000001.png"]
    assert str(home / "real") in done.stdout
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("option", RECIPES)
def test_home_is_expanded_in_a_recipe(option, monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    recipe = {"name": "x", "method": "vapi", "policy": POLICY}
    config, errors = examine(recipe | RECIPES[option]("~/a"))
    assert not errors.concern(option)
    # The options of a reward are read where it is made; the configuration keeps them as they came.
    found = make_terms(config.rewards) if option.startswith("rewards.") else to_dict(config)
    assert "'/somewhere/a'" in str(found)
    assert "~" not in str(found)


# --- the rule -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["gs://b/a", "s3://b", "gs:/b/a", "hdfs://h/a", "file:///a", "az://c/a"]
)
def test_what_has_a_scheme_is_no_path_here(text):
    assert not is_local(text)
    assert not is_local(Path(text))
    with pytest.raises(PathError, match="mount"):
        local_path(text)


@pytest.mark.parametrize("text", ["a", "./a:b", "/a/gs:/b", "runs/12:30", "c:/a", "a b/c", "demo"])
def test_what_has_none_stays_as_it_is(text):
    assert local_path(text) == Path(text)


def test_an_empty_text_and_the_home_of_nobody_are_refused():
    with pytest.raises(PathError, match="empty"):
        local_path("")
    with pytest.raises(PathError, match="~nobody_of_this_name"):
        local_path("~nobody_of_this_name/a")


def test_a_folder_below_or_in_place_of_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "a" / "b"):
        with pytest.raises(PathError, match="is a file"):
            local_folder(path)
    assert local_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert not (tmp_path / "a").exists()
