"""Files below a folder, images above all: one list of endings for all commands, and a count of the rest."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

EXTENSIONS = frozenset(
    {
        ".avif", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff",
        ".webp",
    }
)  # fmt: skip
"""Endings of images, in lower case."""

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""What Pillow may take a file for. Named, because it knows formats whose readers start other programs."""

OTHER_FILES = "file(s) ending in"
"""Begins the kinds of files that only have another ending."""

# Made by file servers, archives and operating systems beside what a user put there.
_SYSTEM = frozenset(
    {
        "@eadir", "#recycle", "@recycle", "@recently-snapshot", "$recycle.bin", "__macosx",
        "lost+found", "system volume information",
    }
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ImageFiles:
    """Images, or files of another kind, below a folder.

    Attributes:
      files: their paths, sorted by their parts.
      left_out: kind of entry -> how many of it are not among them.
    """

    files: tuple[str, ...]
    left_out: Mapping[str, int]


def find_images(folder: Path) -> ImageFiles:
    """The images below a folder, linked folders included, each folder once.

    Raises:
      OSError: a folder that cannot be listed.
    """
    return find_files(folder, EXTENSIONS)


def find_files(folder: Path, endings: Collection[str]) -> ImageFiles:
    """As `find_images`, of other endings, in lower case.

    Raises:
      OSError: a folder that cannot be listed.
    """
    left_out: Counter[str] = Counter()
    found = sorted(_walk(folder, endings, left_out), key=lambda path: path.split(os.sep))
    return ImageFiles(tuple(found), dict(left_out))


def _walk(top: Path, endings: Collection[str], left_out: Counter[str]) -> Iterator[str]:
    def refuse(error: OSError) -> None:
        raise error

    seen = set()
    for parent, folders, names in os.walk(top, onerror=refuse, followlinks=True):
        facts = os.stat(parent)
        if (facts.st_dev, facts.st_ino) in seen:
            left_out["folder(s) that links lead to a second time"] += 1
            folders.clear()
            continue
        seen.add((facts.st_dev, facts.st_ino))
        kinds = {name: kind_of_folder(name) for name in folders}
        left_out.update(kind for kind in kinds.values() if kind)
        folders[:] = [name for name in folders if not kinds[name]]
        for name in names:
            if kind := kind_of_file(name, endings):
                left_out[kind] += 1
            else:
                yield os.path.join(parent, name)


def kind_of_folder(name: str) -> str:
    """What a folder is that holds no images of the user's; "" for others."""
    if name.lower() in _SYSTEM:
        return f"folder(s) {name}"
    return "hidden folder(s)" if name.startswith(".") else ""


def kind_of_file(name: str, endings: Collection[str] = EXTENSIONS) -> str:
    """What a file is that is no image, or of none of these endings; "" for others."""
    if name.startswith("."):
        return "hidden file(s)"
    ending = os.path.splitext(name)[1].lower()
    return "" if ending in endings else f"{OTHER_FILES} {ending or 'nothing'}"


def in_words(left_out: Mapping[str, int], most: int = 12) -> str:
    """ "3 file(s) ending in .txt, 1 folder(s) @eaDir", the most frequent first."""
    ranked = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    words = [f"{count} {kind}" for kind, count in ranked[:most]]
    rest = sum(count for _, count in ranked[most:])
    return ", ".join([*words, *([f"{rest} others"] if rest else [])])
