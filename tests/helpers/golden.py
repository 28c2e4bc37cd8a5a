"""Golden arrays of the reference implementation, and its models under our names."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.compare import assert_close_in_norm
from vapi_jax.models import vq
from vapi_jax.models.conditions import text_condition
from vapi_jax.models.llama import LlamaConfig
from vapi_jax.models.policies import make_policy
from vapi_jax.weights.names import from_reference

KINDS = {"gpt_c2i": "class", "gpt_t2i": "text"}


class Golden:
    """A directory of golden arrays: `<name>.npz`, `<name>.safetensors` or `.pt`, `<name>_args.json`."""

    def __init__(self, directory: Path):
        self.directory = directory

    def npz(self, name: str) -> dict[str, np.ndarray]:
        """The arrays of `<name>.npz`; skips the test where the set has no such file."""
        path = self.directory / f"{name}.npz"
        if not path.exists():
            pytest.skip(f"this golden set has no {path.name}")
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}

    def tensors(self, name: str) -> dict[str, np.ndarray]:
        """The reference weights of `<name>.safetensors`, or of `<name>.pt` in a release layout."""
        from safetensors.numpy import load_file

        path = self.directory / f"{name}.safetensors"
        if path.exists():
            return load_file(path)
        torch = pytest.importorskip("torch", reason="a .pt golden file is read with torch")
        state = torch.load(self.directory / f"{name}.pt", weights_only=True, map_location="cpu")
        for key in ("model", "module", "state_dict"):
            state = state.get(key, state)
        return {key: value.numpy() for key, value in state.items() if hasattr(value, "numpy")}

    def with_open_clip_config(self, folder: Path) -> Path:
        """A folder with `clip_open.pt` and the configuration that open_clip would have beside it."""
        args = self.args("clip")
        vision, text = args["vision"], args["text"]
        sizes = {
            "vision_cfg": {
                "width": vision["width"],
                "head_width": vision["width"] // vision["heads"],
            },
            "text_cfg": {"heads": text["heads"]},
            "quick_gelu": args["act"] == "quick_gelu",
        }
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": sizes}))
        path = self.directory / "clip_open.safetensors"
        if path.exists():
            shutil.copy(path, folder / "open_clip_model.safetensors")
        else:
            shutil.copy(self.directory / "clip_open.pt", folder / "open_clip_pytorch_model.bin")
        return folder

    def args(self, name: str) -> dict:
        """The hyper-parameters of `<name>_args.json`."""
        return json.loads((self.directory / f"{name}_args.json").read_text())


def nhwc(array):
    """An array of PyTorch's layout with its channels last."""
    return jnp.asarray(np.moveaxis(array, 1, -1))


def pick(kind, args):
    """Those of the hyper-parameters that a dataclass has."""
    names = {field.name for field in dataclasses.fields(kind)}
    return {key: value for key, value in args.items() if key in names and value is not None}


def assert_golden_gradients(got, arrays, prefix, within):
    """Gradients under the reference's names are those that the arrays have behind a prefix."""
    want = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
    assert_close_in_norm({name: got[name] for name in want}, want, within)


def make_generator(golden, name, weights=None):
    """The generator `name` with its weights or those of another name: (policy, params)."""
    policy = make_policy(KINDS[name], **pick(LlamaConfig, golden.args(name)))
    target = jax.eval_shape(policy.init, jax.random.key(0))
    tensors = golden.tensors(weights or name)
    return policy, from_reference(tensors, target, policy.name_rules, policy.ignored_names)


def read_condition(name, arrays):
    """The classes or captions among some arrays, as our generator `name` takes them."""
    if KINDS[name] == "class":
        return jnp.asarray(arrays["class_ids"], jnp.int32)
    masks = arrays["emb_masks"] if "emb_masks" in arrays else arrays["emb_mask"]
    return text_condition(arrays["caption"], masks)


def make_tokenizer(golden, training=False):
    """The tokenizer, as it was trained or as it is: (model, params, arrays)."""
    arrays, options = golden.npz("vq"), pick(vq.VQConfig, golden.args("vq"))
    if training:
        for name in ("commit_loss_beta", "entropy_loss_ratio", "entropy_temperature"):
            options[name] = float(arrays[f"train_{name}"])
    model = vq.VQModel(vq.VQConfig(**options))
    image = jax.ShapeDtypeStruct(nhwc(arrays["image"]).shape, jnp.float32)
    target = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
    params = from_reference(golden.tensors("vq"), target, vq.NAME_RULES, vq.IGNORED_NAMES)
    return model, params, arrays
