"""What is often found under the name of a safetensors file, told by its first bytes.

Pickles and archives are named and refused; nothing here opens them.
"""

from lora_hub.errors import TensorFileError

# How names of pickles end, and how those of protocols 2 to 5 begin. Opening one runs code
# of its author.
PICKLE_SUFFIXES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
PICKLE_HEADS = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
LFS_HEAD = b"version https://git-lfs"

_FOREIGN = (
    (b"PK\x03\x04", "a zip archive, as torch.save writes it"),
    *((head, "a Python pickle") for head in PICKLE_HEADS),
    (LFS_HEAD, "a Git LFS pointer, not the file itself"),
    (b"GGUF", "a GGUF file"),
    (b"\x93NUMPY", "a numpy array"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"<!DOCTYPE", "a web page"),
    (b"<html", "a web page"),
    (b"{", "a JSON document"),
)
_HINTS = {
    "a Git LFS pointer, not the file itself": "fetch the content with `git lfs pull`",
    "a web page": "the download answered with an error page; fetch the file again",
}


def refuse_foreign(head: bytes | memoryview, where: str) -> None:
    """Raise `TensorFileError` if the first bytes are those of a known other kind."""
    for prefix, what in _FOREIGN:
        if bytes(head[: len(prefix)]) == prefix:
            raise TensorFileError(
                f"this is {what}; expected a safetensors file",
                where=where,
                hint=_HINTS.get(
                    what, "pickles and archives are never opened; convert to safetensors"
                ),
            )
