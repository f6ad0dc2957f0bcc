"""Writing a safetensors file as a stream: the header first, then each tensor in pieces.

No tensor is held whole. `chunks_of` gives the bytes, so that a caller can hash them or
hand them to a store; `write_tensors` puts them into a file that is there whole or not.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from lora_hub import atomic
from lora_hub.errors import TensorFileError
from lora_hub.tensors.header import encode_header

# name, dtype, shape
Spec = tuple[str, str, tuple[int, ...]]
Chunks = Callable[[str], Iterable[bytes | memoryview]]

# What transformers and PEFT ask of the files they load.
TORCH_METADATA: Mapping[str, str] = {"format": "pt"}


def chunks_of(
    tensors: Sequence[Spec], chunks: Chunks, metadata: Mapping[str, str] = TORCH_METADATA
) -> Iterator[bytes | memoryview]:
    """Give the bytes of a file, one piece after another.

    Args:
        tensors: in the order in which they are to lie in the file. A reader in place may
            want those of wide dtypes first, as the safetensors library puts them.
        chunks: called with each name in that order; gives the tensor's bytes, row-major
            and little endian. A piece is used before the next is asked for, so one
            buffer may serve all.
        metadata: free text for the header.

    Raises:
        TensorFileError: the header cannot be written, or a tensor is given more or fewer
            bytes than its dtype and shape take.
    """
    head, header = encode_header(tensors, metadata)
    yield head
    for name, _, _ in tensors:
        info = header.tensors[name]
        given = 0
        for chunk in chunks(name):
            given += memoryview(chunk).nbytes
            if given > info.size_bytes:
                break
            yield chunk
        if given != info.size_bytes:
            more = "more than" if given > info.size_bytes else f"{given} of"
            raise TensorFileError(
                f"{more} the {info.size_bytes} bytes were given that {info.dtype} of shape "
                f"{list(info.shape)} takes",
                where=name,
            )


def write_tensors(
    path: Path,
    tensors: Sequence[Spec],
    chunks: Chunks,
    metadata: Mapping[str, str] = TORCH_METADATA,
) -> None:
    """Write the file, taking the place of one that has the name; arguments as `chunks_of`.

    Raises:
        TensorFileError: as `chunks_of`; the old file is untouched.
        StoreError: the disk refuses.
    """
    atomic.replace(path, chunks_of(tensors, chunks, metadata))
