"""Documents of a Megatron dataset, `NAME.idx` beside `NAME.bin`: token ids as they stand there.

The index, as Megatron-core's `indexed_dataset` writes it: magic, version 1, a code for the type of the ids, numbers of
sequences and documents, then lengths (int32) and byte places (int64) of the sequences, and the first sequence of each
document (int64, one more than there are documents).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np

from perilune.pretrain.data.source_file import MAX_DOCUMENT_BYTES, SourceFile, open_path, token_file
from perilune.pretrain.errors import InputError

MAGIC = b"MMIDIDX\x00\x00"
TYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # 6, 7: floating point, never ids


def token_documents(file: SourceFile) -> Iterator[tuple[str, np.ndarray]]:
    """(document id, ids [tokens]) of each document. Raises InputError where index and tokens do not fit together."""
    dtype, lengths, places, bounds = _index(file)
    with open_path(token_file(file.path)) as stream:
        size = stream.seek(0, 2)
        ends = places + lengths.astype(np.int64) * dtype.itemsize
        # A place beyond the file first: its end might wrap around.
        if lengths.size and (min(lengths.min(), places.min()) < 0 or max(places.max(), ends.max()) > size):
            raise InputError(f"{token_file(file.path)}: {size} bytes; the index places sequences from {places.min()} "
                             f"to {ends.max()}. Copy both files again")  # fmt: skip
        for number, (first, last) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
            if int(lengths[first:last].sum()) * dtype.itemsize > MAX_DOCUMENT_BYTES:
                raise InputError(f"{file.name}:{number}: a document beyond the limit of {MAX_DOCUMENT_BYTES} bytes")
            parts = []
            for i in range(first, last):
                stream.seek(int(places[i]))
                data = stream.read(int(lengths[i]) * dtype.itemsize)
                parts.append(np.frombuffer(data, dtype))
            yield f"{file.name}:{number}", np.concatenate(parts) if parts else np.zeros(0, dtype)


def _index(file: SourceFile) -> tuple[np.dtype, np.ndarray, np.ndarray, np.ndarray]:
    with file.open() as stream:
        data = stream.read()
    head = struct.Struct("<9sQBQQ")
    if len(data) < head.size or not data.startswith(MAGIC):
        raise InputError(f"{file.name}: not the index of a Megatron dataset")
    _, version, code, sequences, documents = head.unpack_from(data)
    if version != 1 or code not in TYPES:
        raise InputError(f"{file.name}: version {version}, type {code}; version 1 and types {sorted(TYPES)} are read")
    # A multimodal dataset has one more byte a sequence, which tells its mode.
    if len(data) != head.size + 12 * sequences + 8 * documents:
        raise InputError(f"{file.name}: {len(data)} bytes for {sequences} sequences and {documents} documents; "
                         "it is cut or not an index of text")  # fmt: skip
    lengths = np.frombuffer(data, "<i4", sequences, head.size)
    places = np.frombuffer(data, "<i8", sequences, head.size + 4 * sequences)
    bounds = np.frombuffer(data, "<i8", documents, head.size + 12 * sequences)
    if documents < 1 or bounds[0] != 0 or bounds[-1] != sequences or bool((bounds[1:] < bounds[:-1]).any()):
        raise InputError(f"{file.name}: its documents do not cover its {sequences} sequences; it is damaged")
    return np.dtype(TYPES[code]), lengths, places, bounds
