"""The zip archive of a checkpoint: its directory, checked before anything in it is believed."""

from __future__ import annotations

import re
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np

from vapi_jax.weights.formats import what_it_is
from vapi_jax.weights.safe_pickle import quoted
from vapi_jax.weights.torch_file.storage_file import MAX_ENTRIES, Entry, File, StorageFile

_BLOCK = 2**20
LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_ENCRYPTED, _UTF8_NAME = 0x1, 0x800


class Archive(StorageFile):
    """A zip file whose whole directory is checked when it is opened."""

    def __init__(self, path: Path, file: File):
        super().__init__(path, file)
        self._intact: set[str] = set()
        self._check_format()
        self.entries = self._directory()

    def _check_format(self) -> None:
        """Names what a file is that does not begin as a zip archive does."""
        head = self.head()
        if head.startswith(b"PK\3\4"):
            return
        if reason := what_it_is(head):
            raise self.error(reason)
        raise self.error("not a PyTorch checkpoint: it does not begin as a zip archive does")

    def _directory(self) -> dict[str, Entry]:
        try:
            with zipfile.ZipFile(self._file) as archive:
                infos, end = archive.infolist(), archive.start_dir
        except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
            raise self.error(
                f"the zip directory at its end is missing or damaged ({error}), as after an"
                " incomplete download: fetch the file again"
            ) from error
        if len(infos) > MAX_ENTRIES:
            raise self.error(f"{len(infos)} entries, at most {MAX_ENTRIES} are read")
        names = [info.orig_filename for info in infos]
        if any(re.search(r"/(constants\.pkl$|code/)", name) for name in names):
            raise self.error(
                "a TorchScript program, not a checkpoint. In PyTorch, save its weights alone:"
                " torch.save(torch.jit.load(path).state_dict(), new_path)"
            )
        if not any(name.endswith("/data.pkl") for name in names):
            raise self.error("a zip archive without data.pkl: torch.save did not write it")
        stem = names[0].split("/")[0]
        entries: dict[str, Entry] = {}
        start = 0
        for info in sorted(infos, key=lambda info: info.header_offset):
            entry = self._entry(info, stem, start, end)
            if entry.name in entries:
                raise self.error(f"two entries are named {quoted(info.orig_filename)}")
            entries[entry.name] = entry
            start = entry.offset + entry.size
        return entries

    def _entry(self, info: zipfile.ZipInfo, stem: str, start: int, end: int) -> Entry:
        """Checks one entry, which has to lie between two byte positions of the file."""
        name = info.orig_filename
        what = f"entry {quoted(name)}"
        folder, *parts = name.split("/")
        plain = bool(parts) and not {"", ".", ".."} & {folder, *parts}
        if folder != stem or not plain or re.search(r"[\\\0]", name):
            raise self.error(f"{what} is not a plain name in the one folder of the archive")
        if info.flag_bits & _ENCRYPTED:
            raise self.error(f"{what} is encrypted: decrypt the file first")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise self.error(f"{what} is compressed, which torch.save never does")
        header = bytearray(LOCAL_HEADER.size + len(name) * 4)
        offset = info.header_offset
        header = header[: self.fill(header, offset)] if start <= offset < end else bytearray()
        if len(header) < LOCAL_HEADER.size:
            raise self.error(f"{what} overlaps another one or lies outside the file")
        signature, _, flags, method, *_, name_size, extra_size = LOCAL_HEADER.unpack_from(header)
        encoded = name.encode("utf-8" if info.flag_bits & _UTF8_NAME else "cp437")
        if (
            signature != b"PK\3\4"
            or method != zipfile.ZIP_STORED
            or flags & _ENCRYPTED
            or header[LOCAL_HEADER.size :][:name_size] != encoded
        ):
            raise self.error(f"{what} is described differently in the directory and in its place")
        offset += LOCAL_HEADER.size + name_size + extra_size
        if offset + info.file_size > end:
            raise self.error(f"{what} runs past the end of the data: {info.file_size} bytes")
        return Entry("/".join(parts), offset, info.file_size, info.CRC)

    def read(self, name: str, limit: int) -> bytes:
        """All bytes of an entry that may not be larger than `limit`."""
        entry = self.entries[name]
        if entry.size > limit:
            raise self.error(f"{name} has {entry.size} bytes, at most {limit} are read")
        buffer = np.empty(entry.size, np.uint8)
        self.read_into(name, 0, buffer)
        return buffer.tobytes()

    def read_into(self, name: str, start: int, out: np.ndarray) -> None:
        """As `StorageFile` does; the first read of an entry checks its CRC-32.

        A part needs a pass over the whole entry for that.
        """
        entry = self.entries[name]
        whole = (start, out.size) == (0, entry.size)
        if not whole and entry.name not in self._intact:
            crc, block = 0, np.empty(_BLOCK, np.uint8)
            for position in range(0, entry.size, _BLOCK):
                part = block[: entry.size - position]
                self.read_exactly(entry, position, part)
                crc = zlib.crc32(part.data, crc)
            self._check_crc(entry, crc)
        self.read_exactly(entry, start, out)
        if whole:
            self._check_crc(entry, zlib.crc32(out.data))

    def _check_crc(self, entry: Entry, crc: int) -> None:
        # torch.save can be told not to compute these, and then writes 0 everywhere.
        if entry.crc not in (0, crc):
            raise self.error(
                f"{entry.name} is damaged: its CRC-32 is {crc:08x}, the archive says"
                f" {entry.crc:08x}. Fetch the file again"
            )
        self._intact.add(entry.name)
