"""The source that a document belongs to, for every table of a mixture."""

from __future__ import annotations

from perilune.pretrain.data.sources import PLAIN


def source_of(document: str) -> str:
    """The source of a document by its name, `file` or `file:line`: the file of many documents, or the folder."""
    file, colon, line = document.rpartition(":")
    if colon and line.isdecimal():
        return file
    if document.lower().endswith(PLAIN):
        folder = document.rpartition("/")[0]
        return folder or document
    return document
