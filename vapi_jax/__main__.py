"""All commands under one name: `vapi-jax COMMAND ...` is `python -m vapi_jax.COMMAND ...`."""

import runpy
import sys

from vapi_jax.common.errors import stop_without_a_stack

COMMANDS = {
    "main": "train what a recipe describes",
    "sample": "draw images from a checkpoint",
    "study": "train and judge several recipes under one protocol",
    "evaluate": "measure generated images",
    "score": "score generated images by a detector's boxes or by a reward model",
    "convert": "turn released weights into a directory that recipes load",
    "export": "write a trained model under LlamaGen's names",
    "encode": "turn captions into features, or the images of a recipe into tokens, once",
    "real_images": "write real images of a recipe's data, to evaluate against",
    "checkpoint": "look into the checkpoints of a run",
    "bench": "time and count a step, sampling or evaluation",
}


def main() -> int:
    """Hands over to the command that is named first; 2 where none is."""
    stop_without_a_stack()
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in COMMANDS:
        asked = name in ("-h", "--help")
        rows = "".join(f"  {command:<16}{text}\n" for command, text in COMMANDS.items())
        usage = f"usage: vapi-jax COMMAND ...\n\n{rows}\nvapi-jax COMMAND --help tells what each takes.\n"
        (sys.stdout if asked else sys.stderr).write(usage)
        return 0 if asked else 2
    sys.argv[1:2] = []
    if not sys.flags.safe_path:
        # Where one stands, last: a recipe's "module:Class" is found there, as with `python -m`. A script's
        # own folder is all that Python looks into otherwise.
        sys.path.append("")
    runpy.run_module(f"vapi_jax.{name}", run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
