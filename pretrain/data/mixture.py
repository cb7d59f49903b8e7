"""The source that a document belongs to, for every table of a mixture."""

from __future__ import annotations

import re

from perilune.pretrain.data.sources import PLAIN

# Of a sample's id, whose key may hold anything: folders of the tar, and colons.
TAR = re.compile(r"(.+?\.tar(?:\?[^:]*)?):", re.IGNORECASE)


def source_of(document: str) -> str:
    """The source of a document by its name, `file`, `file:line` or `file:key`: the file of many, or the folder."""
    if tar := TAR.match(document):
        return tar[1]
    file, colon, line = document.rpartition(":")
    if colon and line.isdecimal():
        return file
    if document.lower().endswith(PLAIN):
        folder = document.rpartition("/")[0]
        return folder or document
    return document
