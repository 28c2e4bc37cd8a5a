"""Captioned pictures as users keep them: shards, lists, files side by side."""

import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from vapi_jax.data import DataConfig
from vapi_jax.data.image_text import source
from vapi_jax.data.pipeline import make_source

COUNT = 24
LAYOUTS = ["tar", "jsonl", "tsv", "parquet", "folder"]


OWN = ("crop", "val_split", "folder_holdout", "max_unreadable")


def config(root, field="", **options):
    """Of a source of these files, and options of it."""
    data = {k: options.pop(k) for k in OWN if k in options}
    if field:
        options["caption_field"] = field
    return DataConfig(
        name="image_text", path=str(root), image_size=4, num_threads=0, flip=False, options=options,
        **data,
    )  # fmt: skip


def fresh(asked):
    """The source as another process opens it."""
    source._open.cache_clear()
    return make_source(asked, "train")


def png(number, size=(12, 9)):
    """A plain image whose red value is its number."""
    encoded = io.BytesIO()
    Image.new("RGB", size, (number, 100, 0)).save(encoded, "PNG")
    return encoded.getvalue()


def pairs(count=COUNT, first=0):
    return [(f"{n:09d}", png(n), f"picture {n}") for n in range(first, first + count)]


def write_tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def members(found, **more):
    """What img2dataset puts into a shard."""
    for key, image, caption in found:
        record = {"key": key, "top_caption": f"BLIP: {caption}", "width": 12, "height": 9, **more}
        yield f"{key}.png", image
        yield f"{key}.txt", caption.encode()
        yield f"{key}.json", json.dumps(record).encode()


def write_parquet(path, found, group=5, **columns):
    """Rows as Hugging Face keeps them; more columns by name."""
    rows = {
        "image": [{"bytes": image, "path": None} for _, image, _ in found],
        "caption": [caption for _, _, caption in found],
        "top_caption": [f"BLIP: {caption}" for _, _, caption in found],
        "score": list(range(len(found))),
        **columns,
    }
    pq.write_table(pa.table(rows), path, row_group_size=group)
    return path


def write(layout, root, found=None):
    """Pairs as a layout keeps them."""
    found = pairs() if found is None else found
    root.mkdir()
    if layout == "tar":
        half = len(found) // 2
        write_tar(root / "00000.tar", members(found[:half]))
        write_tar(root / "00001.tar", members(found[half:]))
        (root / "00000_stats.json").write_text("{}")
        return root
    if layout == "parquet":
        half = len(found) // 2
        for number, part in enumerate((found[:half], found[half:])):
            write_parquet(root / f"train-{number:05d}-of-00002.parquet", part)
        return root
    for key, image, caption in found:
        (root / f"{key}.png").write_bytes(image)
        if layout == "folder":
            (root / f"{key}.txt").write_text(f"{caption}\n")
    if layout == "jsonl":
        lines = [{"image_path": f"{k}.png", "text": [c, f"LLaVA: {c}"]} for k, _, c in found]
        (root / "a.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    if layout == "tsv":
        (root / "a.tsv").write_text("".join(f"{k}.png\t{c}\n" for k, _, c in found))
    return root


FIELDS = {"tar": "txt", "jsonl": "blip", "tsv": "", "parquet": "caption", "folder": ""}
"""The caption of a pair in each layout."""
