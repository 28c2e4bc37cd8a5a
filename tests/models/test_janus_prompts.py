"""Prompts of Janus: which tokens, which of them stay without a caption, and one length for a batch."""

import json
import shutil

import numpy as np
import pytest
from tokenizers import Tokenizer

from tests.helpers.janus import ASSISTANT, BOI, BOS, PAD, USER, write_tokenizer
from tests.helpers.messages import assert_mentions
from tests.helpers.policies import JANUS
from tests.helpers.tiny import TOKENIZER
from vapi_jax.common.digests import sha256_file
from vapi_jax.methods.generator import make_condition
from vapi_jax.methods.resolve import resolve
from vapi_jax.models.conditions import Prompt
from vapi_jax.models.janus_prompts import PromptTokenizer
from vapi_jax.models.policies import make_policy
from vapi_jax.weights.names import WeightsError

CAPTIONS = ["  Ein ROTER Kreis, 日本 <b>!\n", "", "two  dogs " * 9]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "janus"
    write_tokenizer(path)
    return path


def marks(folder):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return tokenizer, {
        mark: tokenizer.token_to_id(mark) for mark in (BOS, PAD, BOI, USER, ASSISTANT)
    }


def test_prompts_are_the_template_around_a_caption_that_is_left_alone(folder):
    tokenizer, at = marks(folder)
    for caption, ids in zip(CAPTIONS, PromptTokenizer(folder, 300).ids(CAPTIONS), strict=True):
        text = f"<|User|>: {caption.strip()}\n\n<|Assistant|>:<begin_of_image>"
        assert ids == tokenizer.encode(text).ids
        assert ids[:2] == [at[BOS], at[USER]]
        assert ids[-3:] == [at[ASSISTANT], tokenizer.token_to_id(":"), at[BOI]]


@pytest.mark.parametrize("bos_first", [False, True])
@pytest.mark.parametrize("named", [False, True])
def test_the_first_token_begins_the_text_whatever_the_files_forget(
    folder, tmp_path, named, bos_first
):
    write_tokenizer(tmp_path, named=named, bos_first=bos_first)
    ours, wanted = PromptTokenizer(tmp_path, 300), PromptTokenizer(folder, 300)
    assert ours.ids(CAPTIONS) == wanted.ids(CAPTIONS)
    assert ours.pad_id == wanted.pad_id == marks(folder)[1][PAD]


def test_padding_of_another_name_is_what_the_settings_call_it(folder, tmp_path):
    text = (folder / "tokenizer.json").read_text().replace(PAD, "<pad>")
    (tmp_path / "tokenizer.json").write_text(text)
    for file, said in (
        ("special_tokens_map.json", {"pad_token": {"content": "<pad>"}}),
        ("processor_config.json", {"pad_tag": "<pad>"}),
    ):
        (tmp_path / file).write_text(json.dumps(said))
        assert PromptTokenizer(tmp_path, 300).pad_id == marks(folder)[1][PAD]
        (tmp_path / file).unlink()
    with pytest.raises(WeightsError, match="pad"):
        PromptTokenizer(tmp_path, 300)


def test_a_batch_has_one_of_few_lengths_and_is_padded_on_the_left(folder):
    tokenizer = PromptTokenizer(folder, 300)
    alone = tokenizer.ids(CAPTIONS)
    frame = len(alone[1])
    lengths = (64, frame + 1, 200)
    for captions, width in ((CAPTIONS[1:2], frame + 1), (CAPTIONS[:2], 64), (CAPTIONS, 200)):
        tokens, mask, cut = tokenizer(captions, lengths)
        assert tokens.shape == (len(captions), width)
        assert not cut.any()
        for row, seen, caption in zip(tokens, mask, captions, strict=True):
            [ids] = tokenizer.ids([caption])
            assert row[seen].tolist() == ids
            assert seen[-len(ids) :].all() and seen.sum() == len(ids)
            assert set(row[~seen]) <= {tokenizer.pad_id}
    assert tokenizer(CAPTIONS[1:2], lengths, static=True)[0].shape == (1, 200)


def test_what_is_kept_of_a_caption_is_what_its_tokens_say(folder):
    tokenizer = PromptTokenizer(folder, 300)
    caption = f" {'ared' * 20}"
    [whole] = tokenizer.ids([caption])
    assert tokenizer.kept(caption, (8, len(whole))) == caption.strip()
    kept = tokenizer.kept(caption, (len(whole) - 5, 8))
    assert caption.strip().startswith(kept) and len(kept) < len(caption.strip())
    cut, mask, _ = tokenizer([caption], (len(whole) - 5,))
    assert tokenizer.ids([kept])[0] == cut[0][mask[0]].tolist()


def test_a_caption_that_is_too_long_loses_its_end_and_keeps_the_frame(folder, caplog):
    condition = Prompt(
        pad_id=marks(folder)[1][PAD], vocab=300, tokenizer=str(folder), lengths=(32,)
    )
    prompt = condition.prepare(np.array(CAPTIONS))
    [whole] = PromptTokenizer(folder, 300).ids(CAPTIONS[2:])
    tail = whole[-5:]
    assert prompt["tokens"][2].tolist() == whole[:27] + tail
    assert_mentions(caplog.text, "2 of 3", 32, "condition.options.lengths")


def test_without_a_caption_all_but_the_first_and_the_last_token_are_padding_that_is_seen(folder):
    at = marks(folder)[1]
    condition = Prompt(pad_id=at[PAD], vocab=300, tokenizer=str(folder))
    prompt = condition.prepare(np.array(CAPTIONS))
    without = condition.unconditional(prompt)
    np.testing.assert_array_equal(without["mask"], prompt["mask"])
    for row, seen in zip(np.asarray(without["tokens"]), prompt["mask"], strict=True):
        assert row[seen].tolist() == [at[BOS], *[at[PAD]] * (seen.sum() - 2), at[BOI]]


def test_a_recipe_names_the_folder_and_the_generator_says_the_rest(folder):
    at, policy = (
        marks(folder)[1],
        {**JANUS, "kind": "janus", "text_vocab_size": 300, "vocab_size": 16},
    )
    policy |= {"num_tokens": 16, "pad_id": marks(folder)[1][PAD]}
    asked = {"name": "prompt", "options": {"tokenizer": str(folder), "lengths": [40]}}
    config = resolve({
        "name": "x", "method": "vapi", "policy": policy, "condition": asked, "data": {"image_size": 8},
        "tokenizer": TOKENIZER, "rewards": ("mse",),
    })  # fmt: skip
    made = make_condition(config, make_policy(**policy))
    assert made == Prompt(pad_id=at[PAD], vocab=300, tokenizer=str(folder), lengths=(40,))
    assert made.prepare(np.array(CAPTIONS[1:2]))["tokens"].shape == (1, 40)
    assert made.describe()["tokenizer"] == sha256_file(folder / "tokenizer.json")


def test_what_belongs_to_another_model_is_refused(folder, tmp_path):
    at, captions = marks(folder)[1], np.array(["a cat"])
    for condition, told in (
        (Prompt(vocab=300), ("condition.options.tokenizer",)),
        (Prompt(vocab=300, tokenizer=str(folder)), (at[PAD], 100015)),
        (Prompt(pad_id=at[PAD], vocab=200, tokenizer=str(folder)), (200, 260)),
        (Prompt(pad_id=at[PAD], vocab=300, tokenizer=str(folder), lengths=(8,)), ("lengths=(8,)",)),
        (Prompt(vocab=300, tokenizer=str(tmp_path / "none")), ("tokenizer.json",)),
    ):
        with pytest.raises(WeightsError) as error:
            condition.prepare(captions)
        assert_mentions(str(error.value), *told)
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    (other / "processor_config.json").write_text(json.dumps({"image_start_tag": "<start>"}))
    with pytest.raises(WeightsError, match="<start>"):
        PromptTokenizer(other, 300)
