"""PyTorch checkpoint files, read and written without PyTorch.

A checkpoint is a zip archive: `<stem>/data.pkl` is a pickle of the saved object, in which a tensor is
a shape, strides and an offset into a storage; `<stem>/data/<key>` holds the bytes of one storage.
Files from before PyTorch 1.6 are plain pickles with the storages behind them; they are read on
request.

Reading trusts no part. The pickle is interpreted by `safe_pickle` with a table of names (`names`).
Every entry of the archive must be stored as it is, under a plain name, inside the file and apart
from all others (`archive`); a tensor must lie inside its storage (`tensors`). All this is checked
when a file is opened. The bytes of a tensor are read when it is asked for: one tensor at a time is
in memory, and what nobody asks for (the state of an optimizer, say) is never read.

Writing makes what `torch.save` makes by default, readable by `torch.load(path, weights_only=True)`,
with `mmap=True` as well.
"""

from vapi_jax.weights.safe_pickle import Record
from vapi_jax.weights.torch_file.reading import TorchFile, open_torch_file
from vapi_jax.weights.torch_file.storage_file import TorchFileError
from vapi_jax.weights.torch_file.tensors import TorchTensor
from vapi_jax.weights.torch_file.writing import write_torch_file

__all__ = [
    "Record",
    "TorchFile",
    "TorchFileError",
    "TorchTensor",
    "open_torch_file",
    "write_torch_file",
]
