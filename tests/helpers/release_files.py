"""Files with random weights in the layouts of LlamaGen's releases, at any of their sizes.

    python tests/helpers/release_files.py GPT-XXL /tmp/c2i_XXL_384.pt --image-size 384
    python tests/helpers/release_files.py GPT-B /tmp/b.pt --layout ddp --freqs-cis
    python tests/helpers/release_files.py t2i-XL /tmp/t2i --format sharded

Names, shapes and order come from the PyTorch models of `tests/helpers/torch_models.py`, so that a file owes
nothing to the name tables it is read with. A tensor's values depend on its name and the seed alone.
They are made when they are written: one tensor is in memory at a time.
"""

import argparse
import dataclasses
import itertools
import math
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

if TYPE_CHECKING:
    from torch import nn

MODELS = (
    "GPT-B", "GPT-L", "GPT-XL", "GPT-XXL", "GPT-1B", "GPT-3B", "t2i-XL", "VQ-16", "VQ-8",
)  # fmt: skip
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
LAYOUTS = ("model", "ddp", "fsdp", "module", "state_dict")
FORMATS = ("pt", "safetensors", "sharded")
TEXT_TOKENS = 120
TOKEN_PIXELS = 16  # of the tokenizer that the generators were trained with


def default_layout(model: str) -> str:
    """Of the released file: the large generators were trained with FSDP, which nests nothing."""
    return "fsdp" if model in ("GPT-XXL", "GPT-1B", "GPT-3B") else "model"


@dataclasses.dataclass(frozen=True)
class RandomTensor:
    """A tensor that is made when it is read.

    Attributes:
      name, shape, dtype: as in the state dict.
      seed: of the whole file.
      std: of linear and embedding weights.
      on_read: called after every read.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    seed: int = 0
    std: float = 0.02
    on_read: Callable[[], object] = lambda: None

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """The values, of the size that trained or freshly initialised weights have."""
        rng = np.random.default_rng([self.seed, zlib.crc32(self.name.encode())])
        if self.name.endswith("codebook_used"):
            values = rng.integers(0, 16384, self.shape).astype(np.float32)
        else:
            values = rng.standard_normal(self.shape, np.float32)
            values *= self._scale()
            if self._is_norm():
                values += 1
        self.on_read()
        return values.astype(self.dtype, copy=False)

    def _is_norm(self) -> bool:
        return len(self.shape) == 1 and self.name.endswith("weight")

    def _scale(self) -> np.float32:
        if self._is_norm():
            return np.float32(0.1)
        if len(self.shape) == 4:  # a convolution; fan-in
            return np.float32(math.prod(self.shape[1:]) ** -0.5)
        if self.name.endswith("uncond_embedding"):
            return np.float32(self.shape[-1] ** -0.5)
        return np.float32(1.0 if self.name.startswith("quantize.") else self.std)


def random_tensors(
    module: "nn.Module",
    *,
    dtype: str = "float32",
    seed: int = 0,
    std: float = 0.02,
    on_read: Callable[[], object] = lambda: None,
) -> dict[str, RandomTensor]:
    """Random tensors for the whole state dict of a module (on the "meta" device, best of all)."""
    return {
        name: RandomTensor(name, tuple(tensor.shape), DTYPES[dtype], seed, std, on_read)
        for name, tensor in module.state_dict().items()
    }


def release_module(model: str, image_size: int = 256) -> "nn.Module":
    """The PyTorch model of a release, on the "meta" device. model: one of `MODELS`."""
    import torch

    from tests.helpers import torch_models

    with torch.device("meta"):
        if model in torch_models.VQ_MULTIPLIERS:
            return torch_models.VQ(torch_models.VQArgs(torch_models.VQ_MULTIPLIERS[model]))
        text = model.startswith("t2i-")
        size = torch_models.GPT_SIZES[model.replace("t2i-", "GPT-")]
        args = torch_models.GPTArgs(
            *size,
            model_type="t2i" if text else "c2i",
            cls_token_num=TEXT_TOKENS if text else 1,
            block_size=(image_size // TOKEN_PIXELS) ** 2,
        )
        return torch_models.GPT(args)


def release_tensors(
    model: str,
    image_size: int = 256,
    *,
    freqs_cis: bool = False,
    codebook_used: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """The state dict of a release: name -> an object with `shape`, `dtype` and `read()`.

    Args:
      model: one of `MODELS`.
      image_size: side in pixels of the images that a generator makes; 256 and 384 were released.
      freqs_cis: adds the table of rotations, which old files of generators carry (float32).
      codebook_used: keeps the tokenizer's buffer of past choices.
      options: `dtype`, `seed`, `std`, `on_read` of `random_tensors`.
    """
    module = release_module(model, image_size)
    tensors: dict[str, Any] = random_tensors(module, **options)
    if not codebook_used:
        tensors.pop("quantize.codebook_used", None)
    if freqs_cis and not model.startswith("VQ"):
        import torch

        from tests.helpers.torch_models import rotations

        tensors["freqs_cis"] = torch.view_as_real(rotations(module.args)).numpy()
    return tensors


def nest(tensors: dict[str, Any], layout: str, model: str, image_size: int = 256) -> Any:
    """The state dict as a training script leaves it in a checkpoint.

    layout: "fsdp" (bare), "model", "module", "state_dict" (under that key alone), or "ddp" (under
    "model", beside optimizer, step count and arguments; a tokenizer also beside its discriminator).
    """
    if layout == "fsdp":
        return tensors
    if layout != "ddp":
        return {layout: tensors}
    nested = {
        "model": tensors,
        "optimizer": optimizer_state(next(iter(tensors.values())).shape, len(tensors)),
        "steps": 100,
        "args": training_args(model, image_size),
    }
    if model.startswith("VQ"):
        shape = (64, 3, 4, 4)
        nested["discriminator"] = {"main.0.weight": np.full(shape, 0.02, np.float32)}
        nested["optimizer_disc"] = optimizer_state(shape, 1)
    return nested


def optimizer_state(shape: tuple[int, ...], parameters: int) -> dict[str, Any]:
    """What AdamW saves, with the moments of the first parameter alone, which has this shape."""
    first = {
        "step": np.array(100, np.float32),
        "exp_avg": np.full(shape, 1e-4, np.float32),
        "exp_avg_sq": np.full(shape, 1e-8, np.float32),
    }
    group = {
        "lr": 1e-4,
        "betas": (0.9, 0.95),
        "eps": 1e-8,
        "weight_decay": 0.05,
        "amsgrad": False,
        "foreach": None,
        "fused": True,
        "params": list(range(parameters)),
    }
    return {"state": {0: first}, "param_groups": [group]}


def training_args(model: str, image_size: int) -> argparse.Namespace:
    """Some of a training script's arguments, of every type that occurs."""
    if model.startswith("VQ"):
        family = {"vq_model": model, "vq_ckpt": None, "codebook_size": 16384, "finetune": False}
    else:
        family = {
            "gpt_model": model.replace("t2i-", "GPT-"),
            "gpt_ckpt": None,
            "gpt_type": "t2i" if model.startswith("t2i-") else "c2i",
            "vocab_size": 16384,
            "cls_token_num": TEXT_TOKENS if model.startswith("t2i-") else 1,
            "ema": False,
        }
    return argparse.Namespace(**family, image_size=image_size, lr=1e-4, mixed_precision="bf16")


def write(path: Path, value: Any, file_format: str = "pt", shard_bytes: int = 2 * 10**9) -> int:
    """Writes a file and returns its bytes (of all files, where there are several).

    Args:
      path: the file; for "sharded" a folder, made if absent, that gets `model.safetensors.index.json`
        and its shards (or a single `model.safetensors`, where that is small enough).
      value: what `nest` returned; a bare state dict for the two formats without nesting.
      file_format: one of `FORMATS`.
      shard_bytes: of each shard at most, unless a tensor is larger.
    """
    if file_format == "pt":
        from vapi_jax.weights.torch_file import write_torch_file

        write_torch_file(path, value)
        return path.stat().st_size
    from vapi_jax.weights.tensors import Outgoing, write_safetensors, write_sharded

    def outgoing(name: str, tensor: Any) -> Outgoing:
        read = getattr(tensor, "read", lambda: tensor)
        return Outgoing(name, tensor.shape, tensor.dtype, lambda: iter([read()]))

    tensors = [outgoing(name, tensor) for name, tensor in value.items()]
    if file_format == "safetensors":
        write_safetensors(path, tensors)
        return path.stat().st_size
    path.mkdir(parents=True, exist_ok=True)
    written = write_sharded(path, "model", tensors, shard_bytes)
    return sum((path / name).stat().st_size for name in written)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("out", type=Path, help="file to write; a folder for --format sharded")
    parser.add_argument("--format", choices=FORMATS, default="pt")
    parser.add_argument(
        "--layout", choices=LAYOUTS, help="nesting of a .pt; as released if not given"
    )
    parser.add_argument("--image-size", type=int, default=256, help="pixels (default: %(default)s)")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--freqs-cis", action="store_true", help="add the old rotation table")
    parser.add_argument(
        "--no-codebook-used", action="store_true", help="leave out the tokenizer's buffer"
    )
    parser.add_argument("--shard-mb", type=int, default=2000, help="default: %(default)s")
    args = parser.parse_args(argv)
    if args.layout and args.format != "pt":
        parser.error("--layout is about .pt files: safetensors nest nothing")
    if args.image_size <= 0 or args.image_size % TOKEN_PIXELS:
        parser.error(f"--image-size must be a multiple of {TOKEN_PIXELS}, not {args.image_size}")
    if args.shard_mb <= 0 or args.seed < 0:
        parser.error("--shard-mb must be positive and --seed must not be negative")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    from vapi_jax.common.progress import ProgressBar

    count = itertools.count(1)
    tensors = release_tensors(
        args.model,
        args.image_size,
        freqs_cis=args.freqs_cis,
        codebook_used=not args.no_codebook_used,
        dtype=args.dtype,
        seed=args.seed,
        on_read=lambda: progress.update(next(count)),
    )
    made = [tensor for tensor in tensors.values() if isinstance(tensor, RandomTensor)]
    layout = "fsdp" if args.format != "pt" else args.layout or default_layout(args.model)
    value = nest(tensors, layout, args.model, args.image_size)
    try:
        with ProgressBar(len(made), f"tensors of {args.model}") as progress:
            size = write(args.out, value, args.format, args.shard_mb * 10**6)
    except OSError as error:
        print(f"error: {args.out} cannot be written: {error}", file=sys.stderr)
        return 1
    numbers = sum(math.prod(tensor.shape) for tensor in made)
    print(f"{args.out}: {args.model}, {len(tensors)} tensors, {numbers:,} numbers, {size:,} bytes")
    return 0


if __name__ == "__main__":
    # A script's own folder is on the path, the repository is not.
    sys.path.insert(0, str(Path(__file__).parents[2]))
    sys.exit(main())
