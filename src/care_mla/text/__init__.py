"""Text: what a SPEC names, its documents read in pieces, tokens and windows. Used by calibration, evaluation and healing."""

from care_mla.text.documents import joined, load_text, stream_documents
from care_mla.text.tokens import embedding_rows, load_tokenizer
from care_mla.text.windows import TokenWindows, make_windows

__all__ = [
    "TokenWindows",
    "embedding_rows",
    "joined",
    "load_text",
    "load_tokenizer",
    "make_windows",
    "stream_documents",
]
