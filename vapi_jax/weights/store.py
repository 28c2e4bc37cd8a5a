"""Parameters in safetensors files under our own names, and the ones that ship with the package."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from vapi_jax.common.digests import digest_of, sha256_file
from vapi_jax.common.files import new_file
from vapi_jax.common.trees import Params, flatten, unflatten
from vapi_jax.weights.formats import open_safetensors
from vapi_jax.weights.names import WeightsError

_ASSETS = Path(__file__).parent.parent / "assets"


DEMO, SCENES = "demo", "scenes"

SHIPPED = {
    name: {kind: _ASSETS / f"{name}_{kind}.safetensors" for kind in ("tokenizer", "policy")}
    for name in (DEMO, SCENES)
}
"""What a recipe calls a model that ships with the package -> its networks.

configs/demo_tokenizer.py and demo_base.py trained one of photographs, scenes_tokenizer.py and scenes_base.py
one of drawn scenes, whose encoder of captions is a folder.
"""
SHIPPED[SCENES]["encoder"] = _ASSETS / "scenes_encoder"

DIGESTS = _ASSETS / "digests.json"
"""SHA-256 of each of their files."""


def save_safetensors(
    path: str | Path,
    params: Params,
    metadata: Mapping[str, Any] | None = None,
    dtype: Any = None,
) -> str:
    """Writes a parameter tree with our "/"-joined names, atomically; returns its SHA-256.

    Args:
      path: the file to write; a half-written one never carries this name.
      params: nested dict of arrays (fetched from devices one by one).
      metadata: JSON-able facts stored in the file's header under "vapi_jax".
      dtype: storage dtype, for instance `np.float16`; None keeps each array's own.
    """
    path = Path(path)
    arrays = {
        name: np.asarray(jax.device_get(leaf), dtype=dtype, order="C")
        for name, leaf in flatten(params).items()
    }
    header = {"vapi_jax": json.dumps(dict(metadata or {}), sort_keys=True)}
    with new_file(path) as partial:
        save_file(arrays, partial, metadata=header)
    return sha256_file(path)


def load_safetensors(path: str | Path, dtype: Any = None) -> dict[str, Any]:
    """Reads what `save_safetensors` wrote as a nested dict of numpy arrays.

    Raises:
      WeightsError: if the file is missing, truncated or not safetensors.
    """
    with open_safetensors(path) as file:
        flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if dtype is not None:
        flat = {name: array.astype(dtype) for name, array in flat.items()}
    return unflatten(flat)


def resolve_shipped(kind: str, model: str = DEMO) -> Path:
    """The file or folder of a network that ships with the package.

    Args:
      kind: "tokenizer", "policy" or "encoder".
      model: of `SHIPPED`.

    Raises:
      WeightsError: if a file is absent or is not the one that was shipped.
    """
    place = SHIPPED[model][kind]
    digests = json.loads(DIGESTS.read_text(encoding="utf-8"))
    names = [name for name in digests if name.split("/")[0] == place.name]
    for name in names or [place.name]:
        shipped = place.parent / name
        if not shipped.exists():
            raise WeightsError(f"{shipped} is missing: reinstall the package")
        wanted, found = digests[name], digest_of(shipped)
        if found != wanted:
            raise WeightsError(
                f"{shipped} is damaged: its SHA-256 is {found}, {DIGESTS.name} says {wanted}. Reinstall "
                "the package, or bring the file back from version control"
            )
    return place


def load_metadata(path: str | Path) -> dict[str, Any]:
    """The facts that `save_safetensors` stored in the file's header.

    Raises:
      WeightsError: if the file is missing, truncated or not safetensors.
    """
    with open_safetensors(path) as file:
        return json.loads((file.metadata() or {}).get("vapi_jax", "{}"))
