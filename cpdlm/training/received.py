"""Checkpoint folders of torch.distributed.checkpoint, which may come from elsewhere: nothing they hold is executed.

torch reads the index of such a folder, and its entries that are not tensors, with a bare pickle. `shard_names` reads
both restricted first: what it lets pass names only the types that such a folder is made of.
"""

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

_METADATA = "torch.distributed.checkpoint.metadata"
_KNOWN = {
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib._local", "PosixPath"),
    ("pathlib._local", "WindowsPath"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *((_METADATA, name) for name in ("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex")),
    *((_METADATA, name) for name in ("StorageMeta", "TensorProperties", "TensorStorageMetadata")),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
}


class Refused(ValueError):
    """A checkpoint that names what no checkpoint of ours holds; the message says what."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _KNOWN or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise Refused(f"it names {module}.{name}, which no checkpoint needs and which is not executed")


def shard_names(path: Path) -> set[str]:
    """Names of the weights in a sharded checkpoint that torch may open.

    Refused for one that would execute something or reads files elsewhere; EOFError where a shard is shorter than the
    index says.
    """
    with open(path / ".metadata", "rb") as file:
        index = _Unpickler(file).load()
    if not isinstance(index, Metadata):
        raise Refused("its index is of another kind")
    for part in index.storage_data.values():
        if Path(part.relative_path).name != part.relative_path:
            raise Refused(f"its index names the file {part.relative_path}, which is not beside it")
        if (path / part.relative_path).stat().st_size < part.offset + part.length:
            raise EOFError(f"{part.relative_path} is cut off")
    for name, kind in index.state_dict_metadata.items():
        if isinstance(kind, BytesStorageMetadata):
            part = index.storage_data[MetadataIndex(name)]
            with open(path / part.relative_path, "rb") as file:
                file.seek(part.offset)
                content = io.BytesIO(file.read(part.length))
            try:
                torch.load(content, weights_only=True)
            except pickle.UnpicklingError as error:
                raise Refused(f"its entry {name} holds more than numbers, and is not executed") from error
    return {name.removeprefix("state_dict.") for name in index.state_dict_metadata}
