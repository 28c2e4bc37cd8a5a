"""resume.py, lock.py and preemption.py without a training: what may change, who may run, who stops."""

import dataclasses
import errno
import os
import signal
import time
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.messages import assert_mentions
from tests.helpers.tiny import make_tiny_config
from vapi_jax.common import locks
from vapi_jax.data import make_dataset
from vapi_jax.methods.config import TrainConfig
from vapi_jax.methods.next_token import NextToken
from vapi_jax.methods.tokenizer import TokenizerTraining
from vapi_jax.parallel.preemption import Stopped, StopRequest
from vapi_jax.training import resume
from vapi_jax.training.checkpoint import CheckpointError

BASE = TrainConfig(name="run", method="base", options=NextToken.Options(), section="base")


def changed(config, **changes):
    """A configuration with options changed by their dotted path."""
    for path, value in changes.items():
        head, _, rest = path.partition("__")
        inner = changed(getattr(config, head), **{rest: value}) if rest else value
        config = dataclasses.replace(config, **{head: inner})
    return config


def lines(old, new):
    return resume.config_changes(resume.config_facts(old), new)


def test_the_same_configuration_has_no_changes():
    assert lines(BASE, BASE) == []


def test_changes_are_listed_by_path_with_both_values():
    other = changed(
        BASE,
        seed=3,
        optimizer__learning_rate=0.5,
        policy={"dim": 8},
        tokenizer__encoder_ch_mult=(1, 1, 2, 2, 8),
    )
    assert lines(BASE, other) == [
        "optimizer.learning_rate: 1e-06 -> 0.5",
        "policy.dim: nothing -> 8",
        "seed: 0 -> 3",
        "tokenizer.encoder_ch_mult: [1, 1, 2, 2, 4] -> [1, 1, 2, 2, 8]",
    ]
    assert "policy.dim: 8 -> nothing" in lines(other, BASE)


@pytest.mark.parametrize(
    "change",
    [
        {"mesh__fsdp": 4},
        {"cpu_devices": 8},
        {"microbatch_size": 16},
        {"decode_chunk": 2},
        {"checkpoint__every": 7},
        {"checkpoint__keep_every": 7},
        {"log_every": 5},
        {"eval__every": 3},
        {"eval__controls": True},
        {"on_nonfinite": "skip"},
        {"max_skipped": 3},
        {"data__num_threads": 1},
        {"steps": 200},
    ],
)
def test_what_does_not_change_the_training_may_change(change):
    assert lines(BASE, changed(BASE, **change)) == []


@pytest.mark.parametrize(
    "change",
    [
        {"batch_size": 64},
        {"eval__split": "test"},
        {"eval__images": 8},
        {"steps": 50},
        {"name": "x"},
    ],
)
def test_what_does_is_a_change(change):
    assert len(lines(BASE, changed(BASE, **change))) == 1


def test_more_steps_are_a_change_where_their_number_shapes_the_run():
    cosine = changed(BASE, optimizer__schedule="cosine")
    assert lines(cosine, changed(cosine, steps=200)) == ["steps: 100 -> 200"]
    options = TokenizerTraining.Options(restart_below=0.1)
    restarts = changed(BASE, method="tokenizer", options=options, section="tokenizer_training")
    assert lines(restarts, changed(restarts, steps=200)) == ["steps: 100 -> 200"]


def test_an_option_younger_than_the_checkpoint_had_its_default():
    facts = resume.config_facts(BASE)
    del facts["on_nonfinite"], facts["base"]["label_dropout"]
    assert resume.config_changes(facts, BASE) == []
    assert resume.config_changes(facts, changed(BASE, options__label_dropout=0.2)) == [
        "base.label_dropout: 0.1 -> 0.2"
    ]


def test_the_code_is_known_by_its_versions_and_its_source():
    facts = resume.code_facts()
    assert len(facts["source_sha256"]) == 64
    assert facts.keys() >= {"vapi_jax", "jax", "jaxlib", "orbax-checkpoint", "python"}
    assert facts == resume.code_facts()


def test_replaced_weights_are_noticed():
    frozen = {"tokenizer": {"kernel": jnp.ones(3)}}
    began = resume.origin_facts(frozen, None)
    assert began["start"] is None
    resume.check_origin(began, resume.origin_facts(frozen, {"a": jnp.ones(1)}), False)
    other = resume.origin_facts({"tokenizer": {"kernel": jnp.ones(3).at[1].set(2.0)}}, None)
    with pytest.raises(CheckpointError, match="tokenizer.*reward"):
        resume.check_origin(began, other, False)
    resume.check_origin(began, other, True)


def test_another_cut_of_the_batch_is_told_where_the_numbers_depend_on_it(tmp_path, caplog):
    def told(method, there=None, **changes):
        config = make_tiny_config(method, image_size=16)
        facts = resume.facts_of(
            config, resume.Progress(step=2), {}, {**resume.code_facts(), **(there or {})}
        )
        saver = SimpleNamespace(
            latest_step=lambda: 2, restore=lambda *_: (2, facts), directory=tmp_path
        )
        caplog.clear()
        resume.read_facts(saver, changed(config, **changes))
        return [x for x in caplog.messages if "the run is another" in x]

    (line,) = told("base", microbatch_size=8, mesh__fsdp=2)
    assert_mentions(line, "base", "step 2", "microbatch_size: 0 -> 8", "mesh.fsdp: 1 -> 2")
    (line,) = told("tokenizer", {"devices": "3"})
    assert_mentions(line, "devices: 3 -> 8")
    assert told("base", decode_chunk=3) == told("base") == []
    for method in ("vapi", "sft", "ar_grpo"):
        assert told(method, {"devices": "3"}, microbatch_size=8) == []


def test_what_is_computed_of_files_is_known_by_them_and_not_by_its_last_bits():
    def facts(bits, prompts, kernel=1.0):
        found = {"prompts": jnp.full(3, bits), "vision": jnp.full(2, kernel)}
        return resume.origin_facts(
            {"rewards": {"clip": found}}, None, computed={"rewards/clip/prompts": [prompts, "ab"]}
        )

    began = facts(0.1, ["a cat"])
    resume.check_origin(began, facts(0.1001, ["a cat"]), False)
    for other in (facts(0.1, ["a dog"]), facts(0.1, ["a cat"], kernel=2.0)):
        with pytest.raises(CheckpointError, match="reward networks or prompts"):
            resume.check_origin(began, other, False)
    before = resume.origin_facts({"rewards": {"clip": {"prompts": jnp.full(3, 0.1)}}}, None)
    resume.check_origin(before, began, False)  # has digests of another kind


def test_a_replaced_encoder_of_captions_is_noticed_and_another_version_of_a_library_is_not():
    said = {"text_encoder": {"model.safetensors": "ab"}, "libraries": {"tokenizers": "0.21"}}
    began = resume.origin_facts({}, None, said)
    resume.check_origin(began, resume.origin_facts({}, None, said | {"libraries": {}}), False)
    other = resume.origin_facts({}, None, said | {"text_encoder": {"model.safetensors": "cd"}})
    with pytest.raises(CheckpointError, match="captions"):
        resume.check_origin(began, other, False)


@pytest.mark.parametrize("processes", [1, 2])
def test_the_data_go_on_where_they_were(processes):
    """A count of images consumed by all means the same place under any number of processes."""
    config = changed(BASE, batch_size=8, data__image_size=8, data__num_threads=0)

    def batches(process=0):
        size = config.batch_size // processes
        return iter(make_dataset(config.data, "train", size, 0, process, processes))

    for process in range(processes):
        undisturbed, later = batches(process), batches(process)
        wanted = [next(undisturbed)["image"] for _ in range(4)]
        resume.seek(later, 3 * config.batch_size, config)
        np.testing.assert_array_equal(next(later)["image"], wanted[3])
        resume.seek(later, 0, config)
        np.testing.assert_array_equal(next(later)["image"], wanted[0])


# --- lock -----------------------------------------------------------------------------------------


def test_a_lock_says_who_holds_it_and_opens_again(tmp_path):
    folder = tmp_path / "run"
    with locks.hold(folder):
        with pytest.raises(locks.LockedError) as error, locks.hold(folder):
            pass
        assert_mentions(str(error.value), folder, os.getpid())
    with locks.hold(folder):
        pass


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": "x"}', '{"pid": 1}'])
def test_a_lock_file_with_anything_in_it_locks_nobody_out(content, tmp_path):
    (tmp_path / locks.LOCK).write_text(content)
    with locks.hold(tmp_path):
        (tmp_path / locks.LOCK).write_text(content)
        with (
            pytest.raises(locks.LockedError, match="process"),
            locks.hold(tmp_path),
        ):
            pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_warned_about(number, tmp_path, monkeypatch, caplog):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    with locks.hold(tmp_path):
        assert f"{tmp_path} cannot be locked" in caplog.text
        assert os.listdir(tmp_path) in ([], [locks.LOCK])


# --- preemption -----------------------------------------------------------------------------------


def wait_until(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_signal_is_answered_at_the_next_question(capfd):
    before = signal.getsignal(signal.SIGINT)
    stop = StopRequest()

    def train():
        with stop.listening(), stop.unsaved():
            assert not stop.asked(1)
            os.kill(os.getpid(), signal.SIGINT)
            wait_until(lambda: stop.asked(2))

    with pytest.raises(Stopped, match="SIGINT"):
        train()
    assert signal.getsignal(signal.SIGINT) is before
    assert "finishing the step and saving" in capfd.readouterr().err


def test_nobody_asks_who_does_not_listen():
    stop = StopRequest()
    with stop.unsaved():
        assert not stop.asked(1)
