"""`AdapterSource` → `Adapter`: the tensors of an adapter file as torch tensors.

The bytes are those the source holds, which are the ones that were hashed. Names, pairs,
dtypes, shapes and scalings were settled by the reader in `formats/`.
"""

import torch

from lora_hub.adapter.adapter import Adapter
from lora_hub.adapter.tensor_bytes import to_tensor
from lora_hub.adapter.update import Update
from lora_hub.formats.source import AdapterSource, UpdateSource
from lora_hub.manifest.document import Base
from lora_hub.tensors.file import TensorFile


def load(
    source: AdapterSource,
    *,
    name: str | None = None,
    version: str | None = None,
    digest: str | None = None,
    base: Base | None = None,
) -> Adapter:
    """Return the adapter in memory, its factors in the dtypes of the file."""
    return Adapter(
        updates={
            update.target: load_update(source.tensors, update)
            for update in sorted(source.updates, key=lambda update: update.target)
        },
        name=name,
        version=version,
        digest=digest,
        base=base,
        base_name=source.base_name,
        task_type=source.task_type,
    )


def load_update(file: TensorFile, update: UpdateSource) -> Update:
    """Return one update, for callers that hold one target in memory at a time."""
    return Update(
        a=to_tensor(file.read(update.a.name), update.a.dtype, update.a.shape),
        b=to_tensor(file.read(update.b.name), update.b.dtype, update.b.shape),
        scaling=torch.full((update.rank,), update.scaling, dtype=torch.float64),
    )
