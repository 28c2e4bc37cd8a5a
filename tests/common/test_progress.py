"""Progress of one of several processes. The bar itself: tests/training/test_logging.py."""

import io
import logging

import pytest

from vapi_jax.common import progress


@pytest.fixture
def silent(monkeypatch):
    monkeypatch.setattr(progress, "_silent", False)
    logger = logging.getLogger("vapi_jax")
    level = logger.level
    logger.setLevel(logging.INFO)
    yield progress.silence
    logger.setLevel(level)


def shown(capsys):
    stream = io.StringIO()
    with progress.Progress(2, "steps", stream=stream) as bar:
        bar.update(1, 4, {"loss": 1.0})
        bar.update(2, 4, {"loss": 0.5})
    progress.announce("a banner")
    return stream.getvalue(), capsys.readouterr().out


def test_a_silent_process_shows_no_progress_and_warns(silent, capsys, caplog):
    before, banner = shown(capsys)
    assert "2/2" in before
    assert banner == "a banner\n"
    silent()
    assert shown(capsys) == ("", "")
    logging.getLogger("vapi_jax.any").info("going on")
    logging.getLogger("vapi_jax.any").warning("left out")
    assert caplog.messages == ["left out"]
