"""Files in chunks, for a machine that takes a few MiB at a time."""

import tarfile
from collections.abc import Mapping
from pathlib import Path

CHUNK = 15 * 2**20


def write_chunks(item: str, named: Mapping[str, Path], folder: Path) -> list[Path]:
    """Files as ITEM.NUMBER-of-COUNT in `folder`. named: the path that each is unpacked to."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f"{item}.*"):
        old.unlink()
    whole = folder / f"{item}.tar"
    with tarfile.open(whole, "w") as tar:
        for name, path in named.items():
            tar.add(path.resolve(), name, recursive=False)
    content = whole.read_bytes()
    whole.unlink()
    pieces = [content[begin : begin + CHUNK] for begin in range(0, len(content), CHUNK)]
    chunks = [folder / f"{item}.{number}-of-{len(pieces)}" for number in range(1, len(pieces) + 1)]
    for chunk, piece in zip(chunks, pieces, strict=True):
        chunk.write_bytes(piece)
    return chunks


def unpack(folder: Path, root: Path, kept: Path) -> set[str]:
    """Items that are complete, each unpacked into `root` once. kept: where chunks of several calls are gathered."""
    kept.mkdir(parents=True, exist_ok=True)
    for chunk in sorted(folder.glob("*.*-of-*")) if folder.is_dir() else []:
        (kept / chunk.name).write_bytes(chunk.read_bytes())
    there = set()
    for first in sorted(kept.glob("*.1-of-*")):
        item, _, count = first.name.partition(".1-of-")
        chunks = [kept / f"{item}.{number}-of-{count}" for number in range(1, int(count) + 1)]
        if not all(chunk.is_file() for chunk in chunks):
            continue
        there.add(item)
        if (mark := kept / f"{item}.unpacked").is_file():
            continue
        whole = kept / f"{item}.tar"
        whole.write_bytes(b"".join(chunk.read_bytes() for chunk in chunks))
        with tarfile.open(whole) as tar:
            tar.extractall(root, filter="data")
        whole.unlink()
        mark.touch()
    return there
