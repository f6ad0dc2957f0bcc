"""`lorahub.json`, the manifest of a package, as types.

The manifest says what an adapter is, which base it belongs to (by content, not by
name), and the digest of every other file. Its own SHA-256 is the package digest.
`schemas/manifest-v1.json` is made from these types; a test keeps the two equal.

Fields are marked in their comments: D derived by the packer from the files, C claimed by
the author. Everything else is the author's to state.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from lora_hub.scaling import ScalingRule

MANIFEST_NAME = "lorahub.json"
MANIFEST_VERSION = "1.0"

# An 80-layer model with seven targets a layer needs about 200 KiB.
MAX_MANIFEST_BYTES = 4 << 20


def spelt(pattern: str, description: str | None = None) -> Meta:
    """Return the constraint that the whole text is spelt so.

    Python's `$` also matches before a final newline, other languages' does not; the
    lookahead makes them one.
    """
    return Meta(pattern=rf"^(?:{pattern})$(?!\n)", description=description)


Sha256 = Annotated[str, spelt("sha256:[0-9a-f]{64}")]
FullName = Annotated[
    str,
    spelt(
        "[a-z0-9][a-z0-9-]{0,61}[a-z0-9]/[a-z0-9][a-z0-9-]{0,61}[a-z0-9]",
        "namespace/name, lower-case letters, digits and single hyphens",
    ),
]
Version = Annotated[
    str,
    spelt(
        r"(0|[1-9][0-9]{0,8})(\.(0|[1-9][0-9]{0,8})){2}"
        r"(-(alpha|beta|rc)\.(0|[1-9][0-9]{0,8}))?",
        "what SemVer 2 and PEP 440 both accept: 1.2.0 or 1.2.0-rc.1",
    ),
]
Timestamp = Annotated[
    str,
    spelt("[0-9]{4}(-[0-9]{2}){2}T[0-9]{2}(:[0-9]{2}){2}Z", "RFC 3339, UTC"),
]
# A line break in a text of strangers could show a line that nobody printed.
_ONE_LINE = spelt(r"[^\x00-\x1f\x7f]*", "one line of text")
Line = Annotated[str, Meta(max_length=300), _ONE_LINE]
NonEmpty = Annotated[str, Meta(min_length=1, max_length=500), _ONE_LINE]
Count = Annotated[int, Meta(ge=0)]
Rank = Annotated[int, Meta(ge=1)]
Shape = Annotated[tuple[Annotated[int, Meta(ge=0)], ...], Meta(max_length=8)]
FileName = Annotated[
    str,
    spelt("[A-Za-z0-9_][A-Za-z0-9._-]{0,119}", "flat: no folders, no leading dot"),
]
Policy = Literal["exact", "targets", "struct"]
Kind = Annotated[
    str,
    spelt(
        r"(lora|rslora|dora)(\+modules)?(\+tokens)?",
        "how weights change; with whole tensors of the base, with rows of tokens",
    ),
]
# What kind of layer a target is, which decides the shapes of its factors.
Layer = Literal["linear", "embedding", "conv", "experts"]
# Why a tensor of the base is replaced: a whole module was trained, a bias was, or the
# embedding is saved along; "token_delta" replaces some rows.
Role = Literal["modules_to_save", "bias", "embedding", "token_delta"]


class Document(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    omit_defaults=True,
    forbid_unknown_fields=False,
):
    """What is written to disk. Defaults are left out, so absent and default are one."""


class Author(Document, frozen=True, kw_only=True):
    name: NonEmpty
    url: Line | None = None


class SourceCode(Document, frozen=True, kw_only=True):
    repo: NonEmpty
    commit: Annotated[str, spelt("[0-9a-f]{40}")] | None = None


class BaseHint(Document, frozen=True, kw_only=True):
    """Where the base may be found. Never its identity."""

    hub: Annotated[str, spelt("[a-z0-9-]+", "hf, pypi, …")]
    repo: NonEmpty
    revision: Line | None = None


class BaseTarget(Document, frozen=True, kw_only=True):
    """One tensor of the base that the adapter modifies. D"""

    module: NonEmpty
    shape: Shape
    dtype: NonEmpty
    sha256: Sha256  # of the tensor's bytes as the checkpoint stores them
    tensor: NonEmpty | None = None  # its name; `{module}.weight` by default

    @property
    def name(self) -> str:
        """The name of the tensor, as the adapter calls it."""
        return self.tensor or f"{self.module}.weight"


class BaseConfig(Document, frozen=True, kw_only=True):
    """What a person wants to hear about a base, from its `config.json`. D"""

    architectures: tuple[str, ...] = ()
    model_type: str | None = None
    hidden_size: int | None = None
    num_layers: int | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    vocab_size: int | None = None
    tie_word_embeddings: bool | None = None
    rope_theta: float | None = None


class Tokenizer(Document, frozen=True, kw_only=True):
    """The tokenizer of the base. A wrong one loses quality in silence. D"""

    sha256: Sha256  # of tokenizer.json
    chat_template_sha256: Sha256 | None = None
    vocab_size: Count | None = None


class BaseVariant(Document, frozen=True, kw_only=True):
    """Another base the adapter may be used on."""

    root: Sha256
    relation: Literal["quantized-of", "cast-of"]
    dtype: NonEmpty
    tested: bool = False


class Base(Document, frozen=True, kw_only=True):
    """Which model the adapter changes, told by content."""

    root: Sha256  # D  all tensors: names, dtypes, shapes, bytes; see base/identity.py
    struct: Sha256  # D  all tensors: names and shapes only
    targets: Annotated[tuple[BaseTarget, ...], Meta(min_length=1)]  # D
    config: BaseConfig  # D
    tokenizer: Tokenizer | None = None  # D  None: the base folder held no tokenizer.json
    hints: tuple[BaseHint, ...] = ()
    license: Line | None = None
    variants: tuple[BaseVariant, ...] = ()
    policy: Policy = "targets"


class Module(Document, frozen=True, kw_only=True):
    """One target with its own rank, alpha and shapes: no patterns left to expand. D"""

    module: NonEmpty
    rank: Rank
    alpha: float
    scaling: ScalingRule
    dtype: NonEmpty
    a: Shape  # (rank, in_features); see formats/source.py for the other layers
    b: Shape  # (out_features, rank)
    bias: bool = False  # a bias beside the factors (PEFT's lora_bias)
    layer: Layer = "linear"
    magnitude: bool = False  # DoRA
    # Experts: `a` counts experts first and ranks within, `b` ranks first. Never inferred.
    layout: Literal["a expert-major, b rank-major"] | None = None
    experts: Rank | None = None

    @property
    def weight(self) -> str:
        """The name of the base's tensor that changes."""
        return self.module if self.layer == "experts" else f"{self.module}.weight"


class ExtraTensor(Document, frozen=True, kw_only=True):
    """A tensor of the base that the package brings anew. Nothing travels unlisted. D"""

    name: NonEmpty  # of the base's tensor
    role: Role
    shape: Shape  # of what the package holds: with rows, as many as there are
    dtype: NonEmpty
    rows: tuple[Count, ...] | None = None  # which rows are replaced; all by default


class AdapterSummary(Document, frozen=True, kw_only=True):
    """Facets for search and for engines that want a maximum rank. D"""

    max_rank: Rank
    ranks: tuple[Rank, ...]
    parameters: Count
    target_names: tuple[NonEmpty, ...]  # last parts: q_proj, v_proj
    layers: Count


class ModuleStats(Document, frozen=True, kw_only=True):
    """Norms of one delta as decimal strings: the document holds no rounded floats."""

    module: NonEmpty
    frobenius: NonEmpty
    spectral: NonEmpty
    stable_rank: NonEmpty
    zero_b: bool = False


class AdapterInfo(Document, frozen=True, kw_only=True):
    format: Literal["peft-safetensors"]
    modules: Annotated[tuple[Module, ...], Meta(min_length=1)]
    extra_tensors: tuple[ExtraTensor, ...] = ()
    summary: AdapterSummary
    stats: tuple[ModuleStats, ...] = ()
    alora_invocation_tokens: tuple[Count, ...] = ()  # acts from their last occurrence on
    ties_weights: bool = False  # PEFT's ensure_weight_tying


class Prompt(Document, frozen=True, kw_only=True):
    chat_template_file: FileName | None = None
    trigger_words: tuple[Line, ...] = ()
    system: str | None = None


class Task(Document, frozen=True, kw_only=True):
    id: Annotated[
        str,
        spelt(
            "[a-z0-9]+(-[a-z0-9]+)*(/[a-z0-9]+(-[a-z0-9]+)*)?",
            "a known task, then a free part: text-generation/verse",
        ),
    ]
    labels: tuple[Line, ...] = ()
    languages: tuple[Annotated[str, spelt("[a-z]{2,3}")], ...] = ()  # ISO 639
    modalities: tuple[Line, ...] = ()


class Lineage(Document, frozen=True, kw_only=True):
    rel: Literal["continued-from", "merged-from", "distilled-from", "converted-from"]
    package: Sha256
    weight: float | None = None


class Dataset(Document, frozen=True, kw_only=True):
    id: NonEmpty
    revision: Line | None = None
    sha256: Sha256 | None = None
    license: Line | None = None


class Training(Document, frozen=True, kw_only=True):
    """C, unless an in-toto provenance accompanies it (`attested`)."""

    datasets: tuple[Dataset, ...] = ()
    method: Line | None = None
    steps: Count | None = None
    epochs: float | None = None
    learning_rate: float | None = None
    seed: int | None = None
    code: SourceCode | None = None
    hardware: Line | None = None
    framework: dict[str, str] = {}
    attested: bool = False


class Harness(Document, frozen=True, kw_only=True):
    name: NonEmpty
    commit: Line | None = None


class Evaluation(Document, frozen=True, kw_only=True):
    """C. An adapter is judged against its base, so `base_value` is not optional."""

    suite: NonEmpty
    metric: NonEmpty
    value: float
    base_value: float
    suite_version: Line | None = None
    n: Count | None = None
    harness: Harness | None = None
    date: Line | None = None
    by: Line | None = None


class Runtime(Document, frozen=True, kw_only=True):
    """Ranges of versions that are known to load the package."""

    peft: Line | None = None
    vllm: Line | None = None
    min_max_lora_rank: Rank | None = None


class Chunks(Document, frozen=True, kw_only=True):
    size: Rank
    sha256: tuple[Sha256, ...]


class File(Document, frozen=True, kw_only=True):
    """One file of the package other than the manifest and the signature. D"""

    path: FileName
    role: Literal["weights", "config", "card", "license", "tokenizer"]
    size: Count
    sha256: Sha256
    chunks: Chunks | None = None


class Manifest(Document, frozen=True, kw_only=True):
    """The whole of `lorahub.json`."""

    manifest_version: Annotated[str, spelt(r"[0-9]{1,4}\.[0-9]{1,4}")]
    name: FullName
    version: Version
    kind: Kind  # D
    summary: Line
    created: Timestamp
    license: NonEmpty  # an SPDX expression
    base: Base
    adapter: AdapterInfo
    task: Task
    files: Annotated[tuple[File, ...], Meta(min_length=1)]  # D
    description_file: FileName | None = None
    authors: tuple[Author, ...] = ()
    homepage: Line | None = None
    source: SourceCode | None = None
    prompt: Prompt | None = None
    lineage: tuple[Lineage, ...] = ()
    training: Training | None = None
    evaluation: tuple[Evaluation, ...] = ()
    runtime: Runtime | None = None
    ext: dict[str, Any] = {}
