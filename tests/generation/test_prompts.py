"""Images for prompts: files of every layout, keys of prompt and sample, prompts from every kind of file."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image

from tests.helpers.paths import GOLDEN
from vapi_jax import sample
from vapi_jax.common.images import to_uint8
from vapi_jax.common.paths import PathError
from vapi_jax.generation.loading import load_generator
from vapi_jax.generation.prompt_lists import (
    MOST_PROMPTS,
    PromptError,
    prompts_at,
    read_prompts,
)
from vapi_jax.generation.prompts import request_prompts
from vapi_jax.generation.sampler import decode
from vapi_jax.models import sampling
from vapi_jax.models.conditions import text_condition
from vapi_jax.models.policies import make_policy
from vapi_jax.models.text_encoder import TextEncoder
from vapi_jax.parallel.sharding import make_mesh, replicated, shard_whole
from vapi_jax.weights.names import WeightsError

METADATA = [
    {
        "tag": "single_object",
        "include": [{"class": "dog", "count": 1}],
        "prompt": "A photo of a dog",
    },
    {"tag": "counting", "include": [{"class": "cat", "count": 2}], "prompt": "two cats, 640x480"},
    {"tag": "single_object", "include": [{"class": "cow", "count": 1}], "prompt": "a cow"},
]


@pytest.fixture(scope="module")
def generator():
    """Random weights for captions of 12 features, over the demo's tokenizer."""
    demo = load_generator("demo", make_mesh())
    tokens = demo.facts["policy"]["block_size"]
    policy = make_policy(
        "text", dim=32, n_head=4, n_layer=1, vocab_size=demo.policy.vocab_size, block_size=tokens,
        multiple_of=16, cls_token_num=12, caption_dim=32,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: np.float32(rng.normal(size=leaf.shape) * max(leaf.shape[-1], 4) ** -0.5),
        jax.eval_shape(policy.init, jax.random.key(0)),
    )
    params = jax.device_put(params, replicated(demo.mesh))
    facts = {**demo.facts, "policy": {"kind": "text"}}
    return dataclasses.replace(
        demo,
        policy=policy,
        params=params,
        class_names=None,
        facts=facts,
        condition=policy.condition,
    )


@pytest.fixture
def run(tmp_path, monkeypatch, generator):
    """The command, on that generator."""
    monkeypatch.setattr("vapi_jax.sample.load_generator", lambda *args, **kwargs: generator)

    def command(prompts, *more):
        return sample.main([
            "--ckpt=text", f"--text_encoder={GOLDEN / 't5'}", f"--prompts={prompts}", "--seed=3",
            "--batch=8", f"--out={tmp_path / 'out'}", *more,
        ])  # fmt: skip

    return command


def write_metadata(folder):
    path = folder / "evaluation_metadata.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in METADATA))
    return path


def files_in(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_genevals_folders_hold_samples_whose_keys_are_of_prompt_and_sample(
    run, tmp_path, generator, capsys
):
    path, out = write_metadata(tmp_path), tmp_path / "out"
    flags = ["--layout=geneval", "--cfg=2", "--grid"]
    assert run(path, *flags) == 0
    written = files_in(out)
    pictures = {f"{p:05d}/samples/{s:04d}.png" for p in range(3) for s in range(4)}
    more = {f"{p:05d}/{name}" for p in range(3) for name in ("metadata.jsonl", "grid.png")}
    assert written.keys() == pictures | more | {"recipe.json", "prompts.jsonl", ".lock"}
    for number, line in enumerate(METADATA):
        assert json.loads(written[f"{number:05d}/metadata.jsonl"]) == line
    texts = [line["prompt"] for line in METADATA]
    found = TextEncoder(GOLDEN / "t5", generator.mesh, length=12, width=32)(texts, rows=8)
    rows, samples = np.divmod(np.arange(8), 4)
    condition = shard_whole(
        jax.tree.map(np.asarray, text_condition(found.features[rows], found.left_mask[rows])),
        generator.mesh,
    )
    tokens = sampling.generate(
        generator.policy, generator.params, condition, jax.random.key(3), cfg_scale=2.0,
        sample_ids=np.uint32(samples * MOST_PROMPTS + rows),
    )  # fmt: skip
    want = to_uint8(np.asarray(decode(generator.pixels, generator.frozen, tokens)))
    for row, s, image in zip(rows, samples, want, strict=True):
        got = np.asarray(Image.open(out / f"{row:05d}/samples/{s:04d}.png"))
        assert np.abs(got.astype(int) - image).max() <= 1
    grid = np.asarray(Image.open(out / "00001/grid.png"))
    second = np.asarray(Image.open(out / "00001/samples/0001.png"))
    np.testing.assert_array_equal(grid[: len(second), len(second) :], second)
    fed = [json.loads(line) for line in (out / "prompts.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in fed] == texts
    assert "640" not in fed[1]["fed"]
    facts = json.loads((out / "recipe.json").read_text())["captions"]
    assert (facts["prompts"], facts["per_prompt"], facts["layout"]) == (3, 4, "geneval")
    assert "model.safetensors" in facts["encoder"]["text_encoder"]
    # A killed run goes on: the same command draws what is missing, and it is the same again.
    (out / "00002/samples/0001.png").unlink()
    capsys.readouterr()
    assert run(path, *flags) == 0
    assert "12 samples" in (told := capsys.readouterr().out) and " 4 of them drawn" in told
    again = files_in(out)
    assert {name: again[name] for name in pictures} == {name: written[name] for name in pictures}
    assert run(path, *flags, "--per_prompt=2") == 1
    assert "per_prompt" in capsys.readouterr().err


def test_what_the_encoder_makes_of_odd_prompts_is_said(run, tmp_path, no_model, capsys):
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\n" + "word " * 20 + "\n犬 a dog\n(sic)\n")
    assert run(path, "--per_prompt=1", "--no-clean") == 0
    told = capsys.readouterr().out
    assert "cut: 1\n  prompt 2: word word" in told and "unknown: 2\n  prompt 3: 犬" in told
    assert "other script: 1" in told and "empty" not in told
    fed = [json.loads(x)["fed"] for x in (tmp_path / "out/prompts.jsonl").read_text().splitlines()]
    assert fed[0] == "a cat" and fed[2] == "<unk> a dog"
    assert "word word".startswith(fed[1][:9]) and len(fed[1]) < 60


def test_the_number_of_samples_and_of_prompts_changes_no_key(generator, tmp_path):
    path = write_metadata(tmp_path)
    few = request_prompts(generator, path, 1, "flat", GOLDEN / "t5")
    many = request_prompts(generator, path, 5, "flat", GOLDEN / "t5")
    ids = np.arange(15, dtype=np.uint32)
    assert few.numbers(ids[:3]).tolist() == many.numbers(ids)[::5].tolist() == [0, 1, 2]
    assert len(set(many.numbers(ids).tolist())) == 15
    assert many.numbers(ids).dtype == np.uint32


def test_a_text_alone_and_hps_folders(run, tmp_path, no_model):
    assert run("a red cat", "--per_prompt=2", "--grid", "--no-clean") == 0
    out = tmp_path / "out"
    assert {"images/000000.png", "images/000001.png", "grids/00000.png"} < files_in(out).keys()
    out.rename(tmp_path / "first")
    styles = tmp_path / "benchmark"
    styles.mkdir()
    (styles / "anime.json").write_text('["a cat", "a dog"]')
    (styles / "photo.json").write_text('["a cow"]')
    assert run(styles, "--layout=hps") == 0
    names = {"anime/00000.jpg", "anime/00001.jpg", "photo/00000.jpg"}
    assert names < files_in(out).keys()
    with Image.open(out / "photo/00000.jpg") as image:
        assert (image.format, image.size) == ("JPEG", (32, 32))


@pytest.fixture
def no_model(monkeypatch, generator):
    """Tokens that cost nothing, where only what becomes of the images matters."""
    tokens = generator.policy.num_tokens

    def generate(policy, params, condition, rng, **options):
        rows = jax.tree.leaves(condition)[0]
        return jax.device_put(np.zeros((len(rows), tokens), np.int32), rows.sharding)

    monkeypatch.setattr(sampling, "generate", generate)


@pytest.mark.parametrize(
    "name, content, want",
    [
        ("p.txt", "a cat\nA dog\r\n", ["a cat", "A dog"]),
        ("P.JSONL", '"a"\n"b"\n', ["a", "b"]),
        ("p.jsonl", '"a\\ncat"\n{"prompt": "b"}\n{"Prompt": "c"}\n{"text": "d"}\n', "a\ncat b c d"),
        ("p.json", '["a cat", {"caption": "b"}]', ["a cat", "b"]),
        ("p.tsv", 'Prompt\tCategory\na "red" cat\tx\n', ['a "red" cat']),
        ("p.tsv", 'text\n"a ""red""\ncat"\n"Go" she said\n', ['a "red"\ncat', '"Go" she said']),
        ("p.csv", 'Prompts,Category\n"a cat, red",x\n', ["a cat, red"]),
    ],
)
def test_prompts_are_read_from_every_kind_of_file(name, content, want, tmp_path):
    path = tmp_path / name
    path.write_text(content, newline="")
    found = read_prompts(prompts_at(str(path)), "flat").texts
    assert list(found) == (want.split(" ") if isinstance(want, str) else want)


@pytest.mark.parametrize(
    "name, content, layout, message",
    [
        ("p.jsonl", '"a"\n{"words": "b"}\n', "flat", "line 2"),
        ("p.jsonl", '"a"\n\n"b"\n', "flat", "line 2 is empty"),
        ("p.jsonl", '"a"\n{"prompt: 3}\n', "flat", "line 2: Unterminated string.* at letter 2"),
        ("p.jsonl", '{"prompt": "\\ud800"}\n', "flat", "line 1 has half of a surrogate"),
        ("p.txt", "", "flat", "line 1 is empty"),
        ("p.txt", "a cat\n \nA dog\n", "flat", "line 2 is empty"),
        ("p.csv", "prompt,style\n,x\n", "flat", "prompt 1 is empty"),
        ("p.jsonl", '"a"\nb\n', "flat", "p.jsonl"),
        ("p.jsonl", '"\\ud800"\n', "flat", "surrogate"),
        ("p.json", "3", "flat", "p.json"),
        ("p.json", "[]", "flat", "0 prompts"),
        ("p.tsv", "a\tb\n1\t2\n", "flat", "prompt 1"),
        ("p.txt", "x" * 30_000, "flat", "more than 20000 letters"),
        ("p.txt", "a dog\n", "geneval", "line 1.*tag.*evaluation_metadata"),
        ("p.jsonl", '{"prompt": "a dog"}\n', "geneval", "line 1.*evaluation_metadata"),
        ("p.bin", b"\xff\xfe\xff", "flat", "p.bin"),
    ],
)
def test_files_that_hold_no_prompts_are_refused(name, content, layout, message, tmp_path):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(PromptError, match=message):
        read_prompts(path, layout)


def test_what_is_no_file_is_a_text_unless_it_looks_like_a_file(tmp_path):
    assert prompts_at("a cat // on a mat.") == "a cat // on a mat."
    assert prompts_at("x" * 5000) == "x" * 5000
    for text, wrong in (("", "is empty"), (" ", "is empty"), ("\udcff", "surrogate")):
        with pytest.raises(PromptError, match=f"--prompts: the text .*{wrong}"):
            read_prompts(prompts_at(text), "flat")
    with pytest.raises(PromptError, match="no file absent.jsonl"):
        read_prompts(prompts_at("absent.jsonl"), "flat")
    with pytest.raises(PromptError, match="folder"):
        read_prompts(tmp_path, "flat")
    with pytest.raises(PathError, match="gs://"):
        prompts_at("gs://bucket/prompts.txt")


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--text_encoder=t"], "--prompts"),
        (["--layout=hps"], "--prompts"),
        (["--prompts=a", "--text_encoder=t", "--num=3"], "--num"),
        (["--prompts=a", "--text_encoder=t", "--labels=1"], "--labels"),
        (["--prompts=a", "--text_encoder=t", "--layout=geneval", "--format=npz"], "--format"),
        (["--prompts=a", "--text_encoder=t", "--layout=hps", "--per_prompt=2"], "--per_prompt"),
    ],
)
def test_flags_that_clash_are_named(flags, named, capsys):
    with pytest.raises(SystemExit) as ended:
        sample.parse(["--ckpt=c", "--out=o", *flags])
    assert ended.value.code == 2
    assert named in capsys.readouterr().err.splitlines()[-1]


def test_encoders_and_generators_that_do_not_fit(generator):
    narrow = make_policy(
        "text", dim=32, n_head=4, n_layer=1, vocab_size=64, block_size=16, cls_token_num=12,
        caption_dim=48,
    )  # fmt: skip
    with pytest.raises(WeightsError, match="32, the generator takes 48"):
        request_prompts(
            dataclasses.replace(generator, condition=narrow.condition),
            "a",
            1,
            "flat",
            GOLDEN / "t5",
        )
    with pytest.raises(PromptError, match="--text_encoder"):
        request_prompts(generator, "a", 1, "flat", None)
    with pytest.raises(PromptError, match="'class'"):
        request_prompts(load_generator("demo", make_mesh()), "a", 1, "flat", GOLDEN / "t5")
