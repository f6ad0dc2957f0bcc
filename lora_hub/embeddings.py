"""What models call their embeddings, and the layers that turn hidden states into words.

Only names tell these from other linear layers: in many files their factors look alike, a
base that ties the two holds one of them, and a vocabulary that was resized changes both.
Each is the last part of a module's path, of transformers 5.23.0 and older checkpoints.
"""

# Embeddings of words, with which a head may share its weight.
INPUTS = frozenset(
    {
        "embed_in",
        "embed_tokens",
        "shared",
        "tok_embeddings",
        "word_embedding",
        "word_embeddings",
        "wte",
    }
)
HEADS = frozenset({"embed_out", "lm_head"})

# CLIP's embedding of words; no head turns anything into them.
_WITHOUT_HEAD = frozenset({"token_embedding"})
_POSITIONS = frozenset(
    {"embed_positions", "position_embedding", "position_embeddings", "wpe"}
)

# Modules whose weight is stored and updated as an embedding's.
EMBEDDINGS = INPUTS | _WITHOUT_HEAD | _POSITIONS
# Modules whose weight has a row for each word.
VOCABULARY = INPUTS | _WITHOUT_HEAD | HEADS


def last_part(module: str) -> str:
    """Return what a module is called within the one around it."""
    return module.rpartition(".")[2]
