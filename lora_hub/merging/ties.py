"""One tensor that serves as embedding and as head: what a merge may do to it.

A file holds such a tensor once. An adapter that changes both uses alike is merged into it.
One that changes a single use would change the other as well: that is refused, unless the
two are to be untied, so that the result holds a tensor for each.
"""

from dataclasses import dataclass
from typing import Literal

from lora_hub.base.folder import FolderBase
from lora_hub.embeddings import HEADS, INPUTS, last_part
from lora_hub.errors import FitError
from lora_hub.formats.source import AdapterSource, Replacement, ScaleSource, UpdateSource

# An embedding's path → the head that a model with a tensor for each keeps beside it
# (`_tied_weights_keys` in transformers 5.23.0). GPT-NeoX's files say embed_out.
_HEAD_OF = {
    "model.embed_tokens": "lm_head",
    "model.language_model.embed_tokens": "lm_head",
    "model.text_model.embed_tokens": "lm_head",
    "transformer.wte": "lm_head",
    "transformer.word_embeddings": "lm_head",
    "gpt_neox.embed_in": "embed_out",
}
# Models of these have no head that could share the tensor, whatever their config says.
_WITHOUT_HEAD = (
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
)

Source = UpdateSource | ScaleSource | Replacement


@dataclass(frozen=True, slots=True)
class Tie:
    """A tensor with two uses.

    Attributes:
        tensors: the names in the files that may be its own; one where it is certain.
        head: what the head's own tensor is called; None where that is not known.
        has_head: whether the files hold that tensor beside the other, though it is tied.
        is_undone: whether the result is to have a tensor for each use.
    """

    tensors: tuple[str, ...]
    head: str | None
    has_head: bool = False
    is_undone: bool = False

    @property
    def uses(self) -> tuple[str, ...]:
        """The tensors of the result that both uses stand in."""
        own = (self.head,) if self.head and (self.has_head or self.is_undone) else ()
        return (*self.tensors, *own)


def tie_of(base: FolderBase, *, untie: bool) -> Tie | None:
    """Return the tied embedding of a base, None where it has none.

    Args:
        base: the base.
        untie: whether the result is to have a tensor for each use.

    Raises:
        FitError: it is to be untied, and nobody knows how this model is.
    """
    config = base.checkpoint.config
    said = config.get("tie_word_embeddings")
    heads = [name for name in base.tensors if _use(name) == "head"]
    # Left out where it is the architecture's own default.
    if said is False or (said is None and heads):
        return None
    architectures = base.config.architectures
    if architectures and all(name.endswith(_WITHOUT_HEAD) for name in architectures):
        return None
    embeddings = [name for name in base.tensors if _use(name) == "embedding"]
    if not embeddings:
        return Tie(tuple(heads), None) if heads else None
    module = embeddings[0].removesuffix(".weight")
    usual = _HEAD_OF.get(module, _HEAD_OF.get(f"transformer.{module}"))
    known = heads[0] if heads else f"{usual}.weight" if usual else None
    tie = Tie(
        tuple(embeddings),
        known if len(embeddings) == 1 and len(heads) <= 1 else None,
        has_head=bool(heads),
        is_undone=untie,
    )
    if untie and (tie.head is None or not config):
        raise FitError(
            "it is not known how a model of this kind is told of a head of its own"
            if config
            else "there is no config.json that could say that the two are untied",
            where=base.where,
            hint="load the base, untie the two and save it; then merge into that",
        )
    return tie


def places(
    name: str, what: Source, source: AdapterSource, tie: Tie | None
) -> tuple[str, ...]:
    """Return the tensors of the result that a change goes to; () where another says it.

    Args:
        name: the tensor of the files that the change is for.
        what: an update, scales or a replacement of that weight.
        source: the adapter that it is of.
        tie: the base's tied embedding.

    Raises:
        FitError: it would change one of two uses, or each in another way.
    """
    use = _use(_own(what))
    if tie is None or use is None or name not in (*tie.tensors, tie.head):
        return (name,)
    if len(tie.tensors) > 1:
        raise _one_tensor(what, tie, "and it is not known which embedding that is")
    partner = next(
        (each for each in _like(what, source) if _use(_own(each)) not in (use, None)), None
    )
    if partner is not None and not _are_equal(what, partner, source):
        if not tie.is_undone:
            raise _one_tensor(what, tie, "the adapter changes each in its own way")
    elif partner is not None:
        return tie.uses if use == "embedding" else ()
    elif _is_tied(what, use, source):
        if isinstance(what, UpdateSource) and what.magnitude is not None:
            raise FitError(
                "the adapter ties its embedding and its head, and DoRA scales each by "
                "norms of its own; it says those of one",
                where=_own(what),
            )
        return tie.uses
    elif not tie.is_undone:
        raise _one_tensor(what, tie, "the adapter changes one")
    assert tie.head is not None  # known where it is undone
    return (tie.head,) if use == "head" else tie.tensors


def _one_tensor(what: Source, tie: Tie, adapter: str) -> FitError:
    untied = "untie the two in the merge (--untie), or " if tie.head else ""
    return FitError(
        "the base keeps one tensor for its embedding and its head; merging would change "
        f"both alike, {adapter}",
        where=what.name if isinstance(what, Replacement) else what.target,
        hint=f"{untied}attach the adapter instead",
    )


def _use(name: str) -> Literal["embedding", "head"] | None:
    module = name.removesuffix(".weight")
    if module == name:
        return None
    last = last_part(module)
    return "embedding" if last in INPUTS else "head" if last in HEADS else None


def _own(what: Source) -> str:
    return what.name if isinstance(what, Replacement) else what.weight


def _is_tied(what: Source, use: str, source: AdapterSource) -> bool:
    """Return whether a change of one use is meant for the other as well.

    PEFT ties rows of the input embedding unasked, those of a head never; updates of the
    input embedding, and weights that were trained whole, where the adapter asks for it.
    One that was saved along is the base's own tensor.
    """
    if not isinstance(what, Replacement):
        return source.ties_weights and use == "embedding"
    if what.rows is not None:
        return use == "embedding"
    return source.ties_weights or what.role == "embedding"


def _is_rows(what: Source) -> bool:
    return isinstance(what, Replacement) and what.rows is not None


def _like(what: Source, source: AdapterSource) -> tuple[Source, ...]:
    """Return what the adapter does of the same kind."""
    if isinstance(what, UpdateSource):
        return source.updates
    if isinstance(what, ScaleSource):
        return source.scales
    return tuple(each for each in source.replacements if _is_rows(each) == _is_rows(what))


def _are_equal(one: Source, other: Source, source: AdapterSource) -> bool:
    """Return whether both uses change alike, bit for bit."""
    if isinstance(one, UpdateSource) and isinstance(other, UpdateSource):
        embedding, head = (one, other) if one.layer == "embedding" else (other, one)
        return (
            one.magnitude is other.magnitude is None
            and embedding.scaling == head.scaling
            and _transposed(source, head.a.name) == _bytes(source, embedding.b.name)
            and _transposed(source, head.b.name) == _bytes(source, embedding.a.name)
        )
    if isinstance(one, Replacement) and isinstance(other, Replacement):
        return (
            one.rows == other.rows
            and one.tensor.dtype == other.tensor.dtype
            and _bytes(source, one.tensor.name) == _bytes(source, other.tensor.name)
        )
    return False


def _bytes(source: AdapterSource, name: str) -> bytes:
    return bytes(source.tensors.read(name))


def _transposed(source: AdapterSource, name: str) -> bytes:
    import numpy as np

    info = source.tensors.info(name)
    size = info.size_bytes // max(1, info.elements)
    held = np.frombuffer(source.tensors.read(name), dtype=f"V{size}").reshape(info.shape)
    return held.T.tobytes()
