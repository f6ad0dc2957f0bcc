"""The closed list of tasks: the first part of `task.id`.

These are the pipeline tags of the Hugging Face Hub that language and image adapters use,
so that an export there loses nothing. The part behind the slash is free.
"""

TASKS = frozenset(
    {
        "audio-classification",
        "automatic-speech-recognition",
        "feature-extraction",
        "fill-mask",
        "image-classification",
        "image-segmentation",
        "image-text-to-text",
        "image-to-image",
        "image-to-text",
        "image-to-video",
        "object-detection",
        "question-answering",
        "reinforcement-learning",
        "sentence-similarity",
        "summarization",
        "table-question-answering",
        "text-classification",
        "text-generation",
        "text-ranking",
        "text-to-audio",
        "text-to-image",
        "text-to-speech",
        "text-to-video",
        "token-classification",
        "translation",
        "visual-question-answering",
        "zero-shot-classification",
        "zero-shot-image-classification",
    }
)
