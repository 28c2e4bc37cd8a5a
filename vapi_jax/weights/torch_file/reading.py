"""Opening checkpoints of either format: the saved object at once, the bytes of a tensor when asked."""

from __future__ import annotations

import contextlib
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from vapi_jax.weights.formats import is_legacy
from vapi_jax.weights.safe_pickle import quoted
from vapi_jax.weights.torch_file.archive import Archive
from vapi_jax.weights.torch_file.legacy import read_legacy
from vapi_jax.weights.torch_file.names import find_storage, interpret
from vapi_jax.weights.torch_file.storage_file import MAX_PICKLE, File, StorageFile, TorchFileError


class TorchFile:
    """An open checkpoint; a context manager that closes it.

    Attributes:
      path: where it lies.
      value: the saved object: dict (also for OrderedDict), list, tuple (also for torch.Size), set,
        text, bytes, numbers, None; a `TorchTensor` for each tensor and parameter; a `Record` for an
        argparse.Namespace; numpy arrays and scalars; "cuda:0" for a torch.device; and, inert,
        `GlobalName("torch.float32")` or `NumpyDtype` for a dtype. It is a tree at most 100 levels
        deep, safe to walk by recursion.
    """

    def __init__(self, path: Path, file: File, *, legacy: bool):
        self.path = path
        self._file = file
        if legacy and is_legacy(StorageFile(path, file).head()):
            self.value = read_legacy(path, file)
        else:
            self.value = _read_archive(path, file)

    def close(self) -> None:
        """Closes the file; its tensors can no longer be read."""
        self._file.close()

    def __enter__(self) -> TorchFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _room(archive: Archive, name: str) -> int:
    entry = archive.entries.get(name)
    if entry is None:
        raise ValueError(f"storage {name.removeprefix('data/')}: the archive has no entry {name}")
    return entry.size


def _read_archive(path: Path, file: File) -> Any:
    """The saved object of a zip archive, its tensors not read yet."""
    archive = Archive(path, file)
    if "byteorder" in archive.entries:
        order = archive.read("byteorder", 16)
        if order != b"little":
            raise archive.error(
                f"its byte order is {quoted(order.decode('latin1'))}, only 'little' is read:"
                " re-save it on a little-endian machine"
            )
    if "data.pkl" not in archive.entries:
        raise archive.error("data.pkl is not at the top of the archive's folder")
    data = archive.read("data.pkl", MAX_PICKLE)
    find = partial(find_storage, archive, {}, partial(_room, archive))
    return interpret(data, archive, "data.pkl", find)


def open_torch_file(path: str | Path, *, legacy: bool = False) -> TorchFile:
    """Opens what `torch.save` of PyTorch 1.6 or later wrote, and checks all of it but the numbers.

    Args:
      path: the file.
      legacy: read the format before PyTorch 1.6 as well, if it is little-endian. That format has no
        checksums, so that damaged numbers are not noticed: compare a digest of the file.

    Raises:
      TorchFileError: no such file, another format (which is named), or a damaged, inconsistent or
        malicious file.
      PickleRefused: an object in the file that is not on the list; nothing was executed.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise TorchFileError(f"{path}: not a regular file")
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(File(path))
        except OSError as error:
            raise TorchFileError(f"{path}: cannot be opened: {error.strerror}") from error
        opened = TorchFile(path, file, legacy=legacy)
        stack.pop_all()
        return opened
