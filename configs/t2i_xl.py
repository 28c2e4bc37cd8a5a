"""The paper's text-conditional recipe on LlamaGen-XL (775M), captioned images at 256 px (Table 7).

    python -m vapi_jax.main --config=configs/t2i_xl.py --workdir=runs/t2i_xl \\
        --config.data.path=DIR_WITH_SHARDS --config.data.options.caption_field=json:top_caption

Hardware: 8 x A100 80 GB. Time: ours not measured yet.
Published: GenEval 0.306 -> 0.339 (Table 3), with guidance 7.5. Not run with this code yet.

weights/t2i_xl is a conversion of t2i_XL_stage1_256.pt and vq_ds16_t2i.pt, weights/flan-t5-xl the folder of
Hugging Face; the extra "text" is needed. docs/text.md goes from captions to GenEval's table.

":precomputed" reads images, tokens and features that `python -m vapi_jax.encode dataset` has written to
data.path, and takes the same steps without an encoder.
":tiny" runs the same path in a minute on a CPU: captioned crops of photographs, a generator from scratch,
and a random T5 with a tokenizer of its own, all made here.
"""

import hashlib
import io
import json
import os
import shutil
import tarfile
import tempfile
from pathlib import Path

from ml_collections import ConfigDict

from vapi_jax.common.recipes import load_recipe


def get_config(variant: str = "") -> ConfigDict:
    """The recipe; variants "precomputed" and "tiny"."""
    config = ConfigDict(load_recipe(__file__, "c2i_xxl").get_config().to_dict())
    config.update({"name": "t2i_xl", "steps": 200})
    config.data = ConfigDict(
        {
            "name": "image_text",
            "path": "",
            "image_size": 256,
            "crop": "center",
            "flip": False,  # "left of" would be wrong
            "options": {"caption_field": ""},
            "num_threads": 16,
            "prefetch": 16,
        }
    )
    config.policy = ConfigDict(
        {"kind": "text", "size": "GPT-XL", "dtype": "bfloat16", "remat": "full"}
    )
    config.condition = ConfigDict(
        {"name": "caption", "options": {"encoder": "weights/flan-t5-xl", "dtype": "bfloat16"}}
    )
    config.init.gpt = config.init.vq = "weights/t2i_xl"
    config.vapi.noise_rate = 0.5
    if variant == "precomputed":
        config.condition.options, config.data.options = ConfigDict(), ConfigDict()
        config.data.update({"name": "encoded", "shuffle": False})
    elif variant == "tiny":
        _shrink(config)
    elif variant:
        raise ValueError(
            f"configs/t2i_xl.py:{variant}: known variants are '', 'precomputed', 'tiny'"
        )
    return config


# --- ":tiny" --------------------------------------------------------------------------------------

TOKENS, WIDTH = 24, 32


def _shrink(config: ConfigDict) -> None:
    config.update({"steps": 2, "batch_size": 8, "cpu_devices": 8, "rewards": ({"name": "mse"},)})
    config.mesh.update({"data": 2, "fsdp": 4})
    root = _made()
    config.data.update({"path": str(root / "images"), "image_size": 32, "folder_holdout": 0.5})
    config.data.update({"options": {"caption_field": "txt"}, "num_threads": 1, "prefetch": 2})
    demo = load_recipe(__file__, "c2i_demo").get_config()
    config.tokenizer.update(demo.tokenizer)
    sizes = {"dim": 64, "n_layer": 2, "n_head": 4, "multiple_of": 64}
    text = {"kind": "text", "cls_token_num": TOKENS, "caption_dim": WIDTH}
    config.policy = ConfigDict({**sizes, **text, "dtype": "bfloat16", "remat": "full"})
    config.condition.options.encoder = str(root / "t5")
    config.init.update({"vq": "demo", "gpt": ""})
    config.vapi.update({"group_size": 4})
    config.optimizer.update({"learning_rate": 1e-3})  # it starts from scratch
    config.eval.update({"every": 2, "images": 8, "grid_classes": 4})
    config.checkpoint.update({"every": 2})


def _made() -> Path:
    """A folder with "t5" and "images", made once and kept where other caches are."""
    from vapi_jax.common.paths import cache_folder

    version = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    root = cache_folder() / f"t2i_tiny_{version}"
    if not root.exists():
        root.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=root.parent))
        write_encoder(folder / "t5")
        _write_images(folder / "images")
        try:
            os.rename(folder, root)
        except OSError:  # another process was faster
            shutil.rmtree(folder)
    return root


def _names() -> list[str]:
    from vapi_jax.data.photos import PHOTOS

    return [photo.name for photo in PHOTOS]


def write_encoder(folder: Path, width: int = WIDTH) -> None:
    """A T5 v1.1 of two layers, drawn at random, and a tokenizer that knows words of the captions."""
    import numpy as np
    import tokenizers
    from safetensors.numpy import save_file
    from tokenizers import models, pre_tokenizers

    from vapi_jax.common.trees import flatten
    from vapi_jax.models import t5
    from vapi_jax.weights.names import origin_of

    folder.mkdir()
    words = sorted({word for name in _names() for word in f"a photograph of {name}".split()})
    letters = "abcdefghijklmnopqrstuvwxyz0123456789-"
    pieces = ["<pad>", "</s>", "<unk>", "▁", *letters, *(f"▁{word}" for word in words)]
    scores = [(piece, -2.0 if len(piece) > 1 else -8.0) for piece in dict.fromkeys(pieces)]
    tokenizer = tokenizers.Tokenizer(models.Unigram(scores, 2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.save(str(folder / "tokenizer.json"))
    sizes = {"d_model": width, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    config = t5.T5Config(**sizes, vocab_size=len(scores))
    rng, tensors = np.random.default_rng(0), {}
    for path, leaf in flatten(t5.shapes(config)).items():
        origin = origin_of(path, leaf, t5.NAME_RULES)
        for name in origin.names:
            shape = origin.their_shape(leaf.shape)
            drawn = 1.0 if path.endswith("scale") else 0.2 * rng.standard_normal(shape)
            tensors[name] = np.full(shape, drawn, np.float32)
    save_file(tensors, folder / "model.safetensors")
    kind = {"model_type": "t5", "feed_forward_proj": "gated-gelu"}
    (folder / "config.json").write_text(json.dumps({**kind, **sizes, "vocab_size": len(scores)}))


def _write_images(folder: Path) -> None:
    """Crops of photographs with captions, in a shard as img2dataset writes it."""
    import numpy as np
    from PIL import Image

    from vapi_jax.common.images import to_uint8
    from vapi_jax.data import DataConfig
    from vapi_jax.data.photos import PhotoSource

    folder.mkdir()
    source, names = PhotoSource(DataConfig(flip=False), "train"), _names()
    with tarfile.open(folder / "00000.tar", "w") as shard:
        for i in range(16 * len(names)):
            name, encoded = names[i % len(names)], io.BytesIO()
            pixels = to_uint8(source.sample(i, np.random.default_rng(i))["image"])
            Image.fromarray(pixels).save(encoded, "PNG")
            for ending, data in (
                ("png", encoded.getvalue()),
                ("txt", f"a photograph of {name}".encode()),
            ):
                member = tarfile.TarInfo(f"{i:09d}.{ending}")
                member.size = len(data)
                shard.addfile(member, io.BytesIO(data))
