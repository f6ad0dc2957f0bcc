"""A checkpoint folder as a `BaseView`, and what a manifest says about it.

No torch: bytes are hashed as the files hold them. Digests are kept between runs by
`digest_cache.py`; `narrow.py` recognises values that were widened.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

from lora_hub import digest, strict_json
from lora_hub.base import digest_cache
from lora_hub.base.narrow import narrow
from lora_hub.base.stored import Stored, stored
from lora_hub.base.view import WIDER, BaseView, digests, root_of, struct_of
from lora_hub.errors import FitError, InputError
from lora_hub.manifest.document import Base, BaseConfig, BaseTarget, Tokenizer
from lora_hub.tensors.checkpoint import STEM, Checkpoint, Shard
from lora_hub.tensors.file import Identity

TOKENIZER_NAME = "tokenizer.json"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
CHAT_TEMPLATE_NAME = "chat_template.jinja"

MAX_TOKENIZER_BYTES = 256 << 20  # the largest known have 35 MB


class FolderBase:
    """The base in a checkpoint folder; closing it closes the checkpoint.

    Args:
        checkpoint: an open checkpoint.
        cache: folder where digests are kept between runs; None keeps none.
    """

    def __init__(self, checkpoint: Checkpoint, cache: Path | None = None) -> None:
        self.checkpoint = checkpoint
        self.where = checkpoint.where
        self.folder = checkpoint.folder
        self.config = config_of(checkpoint.config)
        self.tensors: Mapping[str, tuple[str, tuple[int, ...]]] = {
            name: (info.dtype, info.shape) for name, info in checkpoint.tensors.items()
        }
        self._cache = cache
        self._known = {
            identity: digest_cache.load(cache, identity) if cache else {}
            for identity in map(_identity, checkpoint.shards)
        }
        self._fresh: set[Identity] = set()

    @classmethod
    def open(cls, folder: Path, cache: Path | None = None, stem: str = STEM) -> Self:
        """Return the base in a folder; arguments and errors as `Checkpoint.open`."""
        return cls(Checkpoint.open(folder, stem), cache)

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(info.size_bytes for info in self.checkpoint.tensors.values())

    def digest(self, name: str, as_dtype: str | None = None) -> str | None:
        """Return the digest of a tensor, see `BaseView.digest`.

        `name` may be a weight that the folder keeps in several tensors (`stored.py`).

        Raises:
            KeyError: the folder keeps none of this name; one asks `tensors` first.
        """
        place = stored(self.tensors, self.config, name)
        if place is None:
            raise KeyError(name)
        wanted = as_dtype or place.dtype
        if wanted != place.dtype and place.dtype not in WIDER.get(wanted, ()):
            return None
        if len(place.parts) > 1:
            return self._hash(place.parts, place.dtype, wanted)
        (name,) = place.parts
        identity = _identity(self.checkpoint.shard_of(name))
        known = self._known[identity].setdefault(wanted, {})
        if name not in known:
            found = self._hash(place.parts, place.dtype, wanted)
            if found is None:
                return None
            known[name] = found
            self._fresh.add(identity)
        return known[name]

    def close(self) -> None:
        for identity in self._fresh if self._cache else ():
            assert self._cache is not None
            digest_cache.save(self._cache, identity, self._known[identity])
        self._fresh.clear()
        self.checkpoint.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _hash(self, names: Sequence[str], dtype: str, wanted: str) -> str | None:
        chunks = (
            chunk
            for name in names
            for chunk in self.checkpoint.shard_of(name).file.chunks(name)
        )
        if wanted == dtype:
            return digest.of_chunks(chunks)
        try:
            return digest.of_chunks(_narrowed(chunks, dtype, wanted))
        except _Inexact:
            return None


class _Inexact(Exception):
    pass


def _narrowed(chunks: Iterable[memoryview], dtype: str, to: str) -> Iterator[memoryview]:
    # Chunks hold whole elements: their size is a power of two.
    for chunk in chunks:
        piece = narrow(chunk, dtype, to)
        if piece is None:
            raise _Inexact
        yield piece


def _identity(shard: Shard) -> Identity:
    assert shard.file.identity is not None  # a checkpoint's files are on disk
    return shard.file.identity


class BaseInFolder(BaseView, Protocol):
    """A base whose files are at hand."""

    @property
    def folder(self) -> Path: ...


def describe(view: BaseInFolder, targets: Iterable[str], also: Iterable[str] = ()) -> Base:
    """Return what a manifest says about a base, hints, licence and policy left to add.

    Args:
        view: the base; all its tensors are hashed.
        targets: modules the adapter modifies by their weight, in the order wanted.
        also: names of further tensors that change: biases, parameters of experts, what
            is replaced.

    Raises:
        FitError: one of them is not in the base.
    """
    wanted: dict[str, tuple[str, str | None]] = {}
    for module in targets:
        wanted[f"{module}.weight"] = (module, None)
    for name in also:
        module, _, last = name.rpartition(".")
        wanted.setdefault(
            name, (module or name, None if module and last == "weight" else name)
        )
    places = {name: _place(view, name) for name in wanted}
    found = digests(
        view,
        [
            (place.parts[0] if len(place.parts) == 1 else name, None)
            for name, place in places.items()
        ],
    )
    root = root_of(view)
    assert root is not None  # None is for narrowed tensors
    return Base(
        root=root,
        struct=struct_of(view),
        targets=tuple(
            BaseTarget(
                module=wanted[name][0],
                shape=place.shape,
                dtype=place.dtype,
                sha256=sha256,
                tensor=wanted[name][1],
            )
            for (name, place), sha256 in zip(places.items(), found, strict=True)
            if sha256 is not None  # as with the root
        ),
        config=view.config,
        tokenizer=tokenizer_of(view.folder),
    )


def _place(view: BaseInFolder, name: str) -> Stored:
    place = stored(view.tensors, view.config, name)
    if place is None:
        raise FitError(f"the base has no tensor {name}", where=view.where)
    return place


# Field of the manifest → its type, and how families of models spell it.
_CONFIG: Mapping[str, tuple[type, tuple[str, ...]]] = {
    "model_type": (str, ("model_type",)),
    "hidden_size": (int, ("hidden_size", "n_embd", "d_model")),
    "num_layers": (int, ("num_hidden_layers", "n_layer", "num_layers")),
    "num_heads": (int, ("num_attention_heads", "n_head", "num_heads")),
    "num_kv_heads": (int, ("num_key_value_heads",)),
    "vocab_size": (int, ("vocab_size",)),
    "tie_word_embeddings": (bool, ("tie_word_embeddings",)),
    "rope_theta": (float, ("rope_theta",)),
}


def config_of(config: Mapping[str, Any]) -> BaseConfig:
    """Return the fields of a `config.json` that a person wants to hear about.

    Values of an unexpected type are left out. Models of text and images keep theirs
    under `text_config`, and transformers 5 keeps rope's under `rope_parameters`.
    """
    places = [config]
    for inner in ("text_config", "rope_parameters"):
        places += [
            place[inner] for place in places if isinstance(place.get(inner), Mapping)
        ]
    fields: dict[str, Any] = {}
    for field, (kind, spellings) in _CONFIG.items():
        for value in (place.get(word) for place in places for word in spellings):
            # bool is an int to isinstance
            if type(value) is kind:
                fields[field] = value
                break
            if kind is float and type(value) is int:
                fields[field] = float(value)
                break
    architectures = config.get("architectures")
    if isinstance(architectures, (list, tuple)):
        fields["architectures"] = tuple(a for a in architectures if isinstance(a, str))
    return BaseConfig(**fields)


def tokenizer_of(folder: Path) -> Tokenizer | None:
    """Return the tokenizer in a folder, None where it holds no `tokenizer.json`.

    The chat template is that of `chat_template.jinja`, else the one text in
    `tokenizer_config.json`.

    Raises:
        DocumentError: `tokenizer.json` or `tokenizer_config.json` is malformed.
        InputError: a file cannot be read.
    """
    path = folder / TOKENIZER_NAME
    if not path.exists():
        return None
    data = _read(path)
    document = strict_json.decode_object(
        data, where=str(path), max_bytes=MAX_TOKENIZER_BYTES
    )
    template = _chat_template(folder)
    return Tokenizer(
        sha256=digest.of_bytes(data),
        chat_template_sha256=None if template is None else digest.of_bytes(template),
        vocab_size=_vocab_size(document),
    )


def _chat_template(folder: Path) -> bytes | None:
    if (folder / CHAT_TEMPLATE_NAME).exists():
        return _read(folder / CHAT_TEMPLATE_NAME)
    if not (folder / TOKENIZER_CONFIG_NAME).exists():
        return None
    text = strict_json.read_object(folder / TOKENIZER_CONFIG_NAME).get("chat_template")
    return text.encode(errors="surrogatepass") if isinstance(text, str) else None


def _vocab_size(tokenizer: Mapping[str, Any]) -> int | None:
    """Return how many ids a tokenizer has, added tokens counted once."""
    model = tokenizer.get("model")
    vocab = model.get("vocab") if isinstance(model, Mapping) else None
    if isinstance(vocab, Mapping):
        ids = list(vocab.values())
    elif isinstance(vocab, list):  # Unigram: (piece, score) pairs, the place is the id
        ids = list(range(len(vocab)))
    else:
        return None
    added = tokenizer.get("added_tokens")
    for token in added if isinstance(added, list) else ():
        if isinstance(token, Mapping):
            ids.append(token.get("id"))
    return len({number for number in ids if isinstance(number, int)})


def _read(path: Path) -> bytes:
    try:
        # A named pipe would wait for its writer.
        if not path.is_file():
            raise InputError("is no regular file", where=str(path))
        with path.open("rb") as stream:
            return stream.read(MAX_TOKENIZER_BYTES + 1)
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from error
