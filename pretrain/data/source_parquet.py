"""Documents of Parquet files, a row each, in the columns `text` and `image`; others are not read.

    text                 image
    string               absent               a text; null or "": nothing
    string               one image            a pair: the image, then the text (no image where it is null)
    string               a list of images     the images, then the text
    list of strings      a list of images     interleaved: of one length, at each place a text or an image, the other
                                              null, as in OBELICS

An image is binary, or the struct<bytes, path> that Hugging Face datasets write. A path without bytes is refused and
never opened: it is that of the machine on which the file was written.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from perilune.pretrain.data.source_file import MAX_DOCUMENT_BYTES, SourceFile, decode, open_path
from perilune.pretrain.data.source_tar import MAX_SAMPLE_BYTES
from perilune.pretrain.errors import InputError
from perilune.vision.image_header import MAX_BYTES as MAX_IMAGE_BYTES

MAX_ROW_GROUP_BYTES = 1 << 32  # uncompressed, of the columns that are read
TEXT_ROWS, IMAGE_ROWS = 1024, 16  # read at once


def parquet_rows(file: SourceFile) -> Iterator[tuple[str, tuple[str | bytes, ...]]]:
    """(document id, its texts and encoded images in order) of each row; rows count from 1.

    Raises InputError naming file and row for damage, limits, other types, and rows that are none of the above.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        with open_path(file.path) as stream, pyarrow.parquet.ParquetFile(stream) as table:
            columns = _columns(table.schema_arrow, file.name)
            leaves = [
                i for i in range(len(table.schema)) if table.schema.column(i).path.partition(".")[0] in set(columns)
            ]
            row = 0
            for group in range(table.num_row_groups):
                size = sum(table.metadata.row_group(group).column(i).total_uncompressed_size for i in leaves)
                if size > MAX_ROW_GROUP_BYTES:
                    raise InputError(
                        f"{file.name}: row group {group} unpacks to {size} bytes of {' and '.join(columns)}; the limit "
                        f"is {MAX_ROW_GROUP_BYTES}. Write it with smaller row groups"
                    )
                rows = IMAGE_ROWS if len(columns) > 1 else TEXT_ROWS
                for batch in table.iter_batches(rows, row_groups=[group], columns=columns):
                    for values in zip(*(batch.column(name) for name in columns), strict=True):
                        row += 1
                        source = f"{file.name}:{row}"
                        yield source, _document(*values, source=source)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{file.name}: not a Parquet file that can be read: {error}") from error


def _columns(schema: Any, name: str) -> list[str]:
    """`text`, and `image` where there is one, once their types are right."""
    import pyarrow

    types = pyarrow.types
    for column in ("text", "image"):
        if schema.names.count(column) > 1:
            raise InputError(f"{name}: {schema.names.count(column)} columns `{column}`; one is the rule")
    if "text" not in schema.names:
        raise InputError(f"{name}: columns {schema.names}; a string column `text` is needed")

    def is_string(kind: Any) -> bool:
        return types.is_string(kind) or types.is_large_string(kind)

    def is_image(kind: Any) -> bool:
        if types.is_struct(kind):
            fields = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)}
            kind = fields["bytes"] if len(fields) == kind.num_fields and "bytes" in fields else kind
        return types.is_binary(kind) or types.is_large_binary(kind)

    text = schema.field("text").type
    if "image" not in schema.names:
        if not is_string(text):
            raise InputError(f"{name}: the column `text` is {text}; it must be a string")
        return ["text"]
    image = schema.field("image").type
    many_texts, many_images = _is_list(text), _is_list(image)
    if not is_string(text.value_type if many_texts else text) or (many_texts and not many_images):
        raise InputError(f"{name}: the column `text` is {text} beside `image` of {image}; it must be a string, or a "
                         "list of strings beside a list of images")  # fmt: skip
    if not is_image(image.value_type if many_images else image):
        raise InputError(f"{name}: the column `image` is {image}; it must be binary, struct<bytes: binary, path: "
                         "string>, or a list of either")  # fmt: skip
    return ["text", "image"]


def _is_list(kind: Any) -> bool:
    import pyarrow

    return pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind)


def _document(text: Any, image: Any = None, *, source: str) -> tuple[str | bytes, ...]:
    """The parts of a row of Arrow scalars."""
    images = [image] if image is not None and image.is_valid else []
    if images and _is_list(image.type):
        images = list(image.values)
    if text.is_valid and _is_list(text.type):
        parts = _interleaved(list(text.values), images, source)
    elif images and not text.is_valid:
        raise InputError(f'{source}: {len(images)} images and no `text`; fill it in, with "" if nothing is to be said')
    else:
        for i, each in enumerate(images):
            if not each.is_valid:
                raise InputError(f"{source}: image {i} of {len(images)} is null. Leave it out of the list")
        parts = [*(_image(each, source) for each in images), _text(text, source)]
    size = sum(len(part) for part in parts)
    if size > MAX_SAMPLE_BYTES:
        raise InputError(f"{source}: {size} bytes in one document; the limit is {MAX_SAMPLE_BYTES}. Cut it up")
    return tuple(part for part in parts if part)


def _interleaved(texts: list[Any], images: list[Any], source: str) -> list[str | bytes]:
    out: list[str | bytes] = []
    if len(texts) != len(images):
        raise InputError(f"{source}: {len(texts)} texts and {len(images)} images; the lists must be of one length")
    for i, (text, image) in enumerate(zip(texts, images, strict=True)):
        if text.is_valid and image.is_valid:
            raise InputError(f"{source}: place {i} holds a text and an image; one of them must be null")
        if image.is_valid:
            out.append(_image(image, source))
        else:
            out.append(_text(text, source))
    return out


def _text(value: Any, source: str) -> str:
    if not value.is_valid:
        return ""
    data = value.as_buffer().to_pybytes()
    if len(data) > MAX_DOCUMENT_BYTES:
        raise InputError(f"{source}: {len(data)} bytes in one document; the limit is {MAX_DOCUMENT_BYTES}. Cut it up")
    return decode(data, source)


def _image(value: Any, source: str) -> bytes:
    import pyarrow

    if pyarrow.types.is_struct(value.type):
        value = value["bytes"]
    size = len(value.as_buffer()) if value.is_valid else 0
    if not size:
        raise InputError(f"{source}: an image without bytes. A path alone is not followed: embed the images")
    if size > MAX_IMAGE_BYTES:
        raise InputError(f"{source}: an image of {size} bytes; the limit is {MAX_IMAGE_BYTES}. Scale it down")
    return value.as_buffer().to_pybytes()
