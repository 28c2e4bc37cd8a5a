"""The flags --out and --num of commands that write images of a recipe; importing it defines them."""

from absl import flags

from vapi_jax.common.paths import FOLDER

OUT = flags.DEFINE(
    FOLDER,
    "out",
    None,
    "The directory to write; must not exist, but for what an interrupted call has left",
)
NUM = flags.DEFINE_integer(
    "num", 0, "How many images; 0 for as many as the recipe takes", lower_bound=0
)
