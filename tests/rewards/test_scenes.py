"""What a drawn picture is worth under captions that are true of it, in part or not at all."""

import jax
import numpy as np
import pytest

from vapi_jax.common.images import to_uint8
from vapi_jax.data.config import DataError
from vapi_jax.data.scenes.drawing import Thing, draw
from vapi_jax.rewards import make_terms, parse
from vapi_jax.rewards.geneval import parse_prompt
from vapi_jax.rewards.scenes import SceneReward, read
from vapi_jax.weights.names import WeightsError

RED_CIRCLE = Thing("circle", "red", 0.25, 0.5, 0.2)
BLUE_STAR = Thing("star", "blue", 0.75, 0.5, 0.2)


def picture(*things):
    return np.float32(draw(things, 64, np.random.default_rng(0)) / 127.5 - 1)


@pytest.mark.parametrize(
    ("caption", "right", "share"),
    [
        ("a photo of a circle", 1, 1),
        ("a blue star", 1, 1),
        ("a blue circle", 0, 0),
        ("a picture of a red circle and a blue star", 1, 1),
        ("a red circle and a red star", 0, 1 / 2),
        ("a photo of a blue circle and a red star", 0, 0),
        ("a ring and a star", 0, 1 / 2),
        ("a circle left of a star", 1, 1),
        ("a photo of a circle right of a star", 0, 1 / 2),
        ("two circles", 0, 1 / 2),
        ("two rings", 0, 1 / 2),
    ],
)
def test_worth_of_a_red_circle_left_of_a_blue_star(caption, right, share):
    image = to_uint8(picture(RED_CIRCLE, BLUE_STAR))
    prompt = parse_prompt(read(caption), caption)
    assert SceneReward().worth(prompt, image) == right
    assert SceneReward(graded=True).worth(prompt, image) == share


def test_captions_go_through_a_compiled_step_to_their_own_samples():
    [term] = make_terms(parse([{"name": "scenes", "options": {"graded": True}}], []))
    group = [picture(RED_CIRCLE, BLUE_STAR), picture(RED_CIRCLE), picture()]
    pixels = np.stack([group, group])
    captions = np.array(["a red circle and a blue star", "a photo of a star"])
    asked = term.reward.prepare(captions)
    assert asked.shape == term.reward.example(2).shape
    found = jax.jit(lambda x, b: term.reward({}, x, b))(pixels, {"prompt": asked})
    np.testing.assert_array_equal(found, [[1, 0.5, 0], [1, 0, 0]])


def test_other_captions_labels_and_small_images_are_refused():
    with pytest.raises(DataError, match="a photo of a dog"):
        SceneReward().prepare(np.array(["a circle", "a photo of a dog"]))
    with pytest.raises(WeightsError, match="int32"):
        SceneReward().prepare(np.zeros(2, np.int32))
    assert "32" in SceneReward().problems(16)[0]
    assert not SceneReward().problems(32)
