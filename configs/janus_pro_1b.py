"""The paper's recipe on Janus-Pro-1B, captioned images at 384 px (Table 7).

    python -m vapi_jax.main --config=configs/janus_pro_1b.py --workdir=runs/janus_pro_1b \\
        --config.data.path=FLUX_REASON_6M --config.data.options.caption_field=caption_original

Hardware: 8 x A100 80 GB. Time: ours not measured yet.
Published: GenEval 0.725 -> 0.744 (Table 3), with guidance 5. Not run with this code yet.

weights/janus_pro_1b is a conversion of the published folder (launch/convert_janus.py), the tokenizer of
prompts included; the extra "text" is needed. docs/janus.md goes from that folder to GenEval's table and back
to a folder. Masters are float32, products bfloat16: at this learning rate bfloat16 weights would not move.

`--config.preset=reference` is the released trainer: it scores a token where that token itself has been fed,
counts positions through padding on the right, and feeds noise alone (rate 1). Samples are drawn as ever.
":lora" trains adapters over a frozen generator, for one GPU; its learning rate is a guess.
":tiny" runs the same path in seconds on a CPU: drawn scenes, the demo's tokenizer, a generator from scratch.
"""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from ml_collections import ConfigDict

from vapi_jax.common.recipes import load_recipe

PRESETS = {
    "paper": {"vapi": {"noise_rate": 0.95}},
    "equations": {"vapi": {"noise_rate": 0.95}},
    "reference": {
        # One forward computes what the release's many do: Janus has no dropout.
        "vapi": {"noise_rate": 1.0, "fused": True, "update_dropout": False, "monitor_kl": False},
        "policy": {"alignment": "same_position", "padding": "counted"},
        "condition": {"options": {"side": "right"}},
    },
}


def get_config(variant: str = "") -> ConfigDict:
    """The recipe; variants "lora" and "tiny"."""
    return make_config("janus_pro_1b", 100002, variant)


def make_config(name: str, pad_id: int, variant: str, **sizes: int) -> ConfigDict:
    """The recipe of one of the two models.

    Args:
      name: of the recipe and of the directory of its weights.
      pad_id: of its tokenizer.
      variant: "", "lora" or "tiny".
      sizes: of the generator, where they are not the 1B's.
    """
    config = ConfigDict(load_recipe(__file__, "c2i_xxl").get_config().to_dict())
    config.update({"name": name, "presets": PRESETS})
    del config.vapi.noise_rate  # the presets have it
    config.data = ConfigDict(
        {
            "name": "image_text",
            "path": "",
            "image_size": 384,
            "crop": "center",
            "flip": False,  # "left of" would be wrong
            "options": {"caption_field": ""},
            "num_threads": 16,
            "prefetch": 16,
        }
    )
    config.policy = ConfigDict(
        {"kind": "janus", **sizes, "pad_id": pad_id, "dtype": "bfloat16", "remat": "full"}
    )
    weights = f"weights/{name}"
    config.condition = ConfigDict({"name": "prompt", "options": {"tokenizer": weights}})
    config.init.gpt = config.init.vq = weights
    config.optimizer.learning_rate = 1e-7
    if variant == "tiny":
        _shrink(config)
    elif variant == "lora":
        config.policy.lora = ConfigDict({"rank": 16, "alpha": 32.0})
        config.optimizer.learning_rate = 1e-5
        config.microbatch_size = 16
    elif variant:
        raise ValueError(f"configs/{name}.py:{variant}: known variants are '', 'lora', 'tiny'")
    return config


# --- ":tiny" --------------------------------------------------------------------------------------

MARKS = ("<｜begin▁of▁sentence｜>", "<begin_of_image>", "<｜▁pad▁｜>", "<|User|>", "<|Assistant|>")


def _shrink(config: ConfigDict) -> None:
    config.update({"steps": 2, "batch_size": 8, "cpu_devices": 8, "rewards": ({"name": "mse"},)})
    config.mesh.update({"data": 2, "fsdp": 4})
    config.data.update({"name": "scenes", "image_size": 32, "num_threads": 1, "prefetch": 2})
    config.data.options = ConfigDict()
    config.tokenizer.update(load_recipe(__file__, "c2i_demo").get_config().tokenizer)
    sizes = {"dim": 64, "n_layer": 2, "n_head": 4, "hidden_dim": 128}
    text = {"text_vocab_size": 256 + len(MARKS), "pad_id": 256 + MARKS.index("<｜▁pad▁｜>")}
    config.policy = ConfigDict(
        {"kind": "janus", **sizes, **text, "dtype": "bfloat16", "remat": "full"}
    )
    config.condition.options = ConfigDict({"tokenizer": str(_made()), "lengths": (128,)})
    config.init.update({"vq": "demo", "gpt": ""})
    config.vapi.update({"group_size": 4})
    config.optimizer.update({"learning_rate": 1e-3})  # it starts from scratch
    config.eval.update({"every": 2, "images": 8, "grid_classes": 4})
    config.checkpoint.update({"every": 2})


def _made() -> Path:
    """A folder with a tokenizer, made once and kept where other caches are."""
    from vapi_jax.common.paths import cache_folder

    version = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    root = cache_folder() / f"janus_tiny_{version}"
    if not root.exists():
        root.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=root.parent))
        write_tokenizer(folder)
        try:
            os.rename(folder, root)
        except OSError:  # another process was faster
            shutil.rmtree(folder)
    return root


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer that merges nothing, with Janus-Pro's marks."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens([AddedToken(mark, normalized=False) for mark in MARKS])
    tokenizer.save(str(folder / "tokenizer.json"))
