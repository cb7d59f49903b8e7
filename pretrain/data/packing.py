"""Which piece of which document goes into which row: best-fit decreasing, then gaps closed by splitting.

Pure: it sees lengths only, and where images stand, since an image is never cut and a row may hold only so many patches.
Rows come out exactly full; what fills none is handed back to join what comes next.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

SIGHT = 256  # pieces tried for one gap: few are waiting, unless patches run out long before tokens do


class Piece(NamedTuple):
    doc: int  # number of the document
    start: int  # its first token's place in the document
    length: int  # tokens, > 0


class Span(NamedTuple):
    """The tokens of an image in a document, marks included."""

    start: int
    end: int
    patches: int


Spans = Mapping[int, Sequence[Span]]  # of the documents that have images: in order, apart from one another


class Limits(NamedTuple):
    """What a row may hold."""

    seq_len: int
    max_patches: int | None = None
    spans: Spans = {}  # noqa: RUF012 (never written to)

    def patches(self, piece: Piece) -> int:
        """Patches of the images of `piece`."""
        if piece.doc not in self.spans:
            return 0
        end = piece.start + piece.length
        return sum(s.patches for s in self.spans[piece.doc] if piece.start <= s.start and s.end <= end)

    def fitting(self, piece: Piece, room: int, patch_room: int | None) -> int:
        """The most tokens of the beginning of `piece` that fit without cutting an image."""
        length = min(piece.length, room)
        for span in self.spans.get(piece.doc, ()):
            if piece.start <= span.start < piece.start + length:
                if patch_room is not None:
                    patch_room -= span.patches
                if span.end > piece.start + length or (patch_room is not None and patch_room < 0):
                    return span.start - piece.start
        return length


class OpenRow:
    """A row with room, and how many patches it may still take (None: any)."""

    __slots__ = ("patch_room", "pieces", "room")

    def __init__(self, limits: Limits) -> None:
        self.pieces: list[Piece] = []
        self.room, self.patch_room = limits.seq_len, limits.max_patches

    def add(self, piece: Piece, patches: int) -> None:
        self.pieces.append(piece)
        self.room -= piece.length
        if self.patch_room is not None:
            self.patch_room -= patches


def plan(
    pieces: Iterable[Piece], seq_len: int, spans: Spans | None = None, max_patches: int | None = None
) -> tuple[list[list[Piece]], list[list[Piece]]]:
    """Arrange `pieces` into rows of exactly `seq_len` tokens; returns (rows, rows with room left).

    What is longer than a row is cut first (`chunks`). Then best-fit decreasing leaves few rows open, and each open row
    costs at most one more split. Without images at most one row stays open. With images a row stays open where nothing
    that is left can be cut to fit. No token is lost: both lists together hold every one, once.
    """
    limits = Limits(seq_len, max_patches, spans or {})
    full: list[list[Piece]] = []
    short: list[Piece] = []
    for piece in pieces:
        for part in chunks(piece, seq_len, limits.spans, max_patches):
            if part.length == seq_len:
                full.append([part])
            else:
                short.append(part)
    packed, still_open = best_fit_decreasing(short, limits)
    filled, rest = close_gaps(still_open, limits)
    return full + packed + filled, rest


def chunks(piece: Piece, seq_len: int, spans: Spans, max_patches: int | None = None) -> list[Piece]:
    """`piece` cut into as few parts as fit a row each; ValueError where one image alone does not fit."""
    limits = Limits(seq_len, max_patches, spans)
    out = []
    while piece.length:
        size = limits.fitting(piece, seq_len, max_patches)
        if not size:
            raise ValueError(f"an image at token {piece.start} does not fit a row")
        out.append(Piece(piece.doc, piece.start, size))
        piece = Piece(piece.doc, piece.start + size, piece.length - size)
    return out


def best_fit_decreasing(pieces: list[Piece], limits: Limits) -> tuple[list[list[Piece]], list[OpenRow]]:
    """Longest first, each into the row with the least room that takes it; returns (full rows, open rows).

    Where patches are limited, pieces with images go first: text then fills whatever room they leave. Rooms that occur
    are kept as the bits of one integer, so the best fit is a shift and its lowest bit.
    """
    open_rows: dict[int, list[OpenRow]] = defaultdict(list)  # room -> rows
    rooms = 0
    full: list[list[Piece]] = []
    patches = {piece: limits.patches(piece) for piece in pieces if piece.doc in limits.spans}
    bounded = limits.max_patches is not None
    order = sorted(pieces, key=lambda p: (-(bounded and patches.get(p, 0) > 0), -p.length, p.doc, p.start))
    least = min((n for n in patches.values() if n), default=0)
    spent: list[OpenRow] = []  # rows that take no more images, kept apart until the text comes
    for piece in order:
        needed = patches.get(piece, 0) if bounded else 0
        if not needed and spent:
            for row in spent:
                open_rows[row.room].append(row)
                rooms |= 1 << row.room
            spent = []
        found = _best(open_rows, rooms >> piece.length, piece.length, needed)
        if found is None:
            row = OpenRow(limits)
        else:
            room, place = found
            row = open_rows[room].pop(place)
            if not open_rows[room]:
                rooms ^= 1 << room
        row.add(piece, needed)
        if row.room == 0:
            full.append(row.pieces)
        elif needed and row.patch_room is not None and row.patch_room < least:
            spent.append(row)
        else:
            open_rows[row.room].append(row)
            rooms |= 1 << row.room
    left = [row for room in sorted(open_rows) for row in open_rows[room]] + spent
    return full, sorted(left, key=lambda row: row.room)


def _best(open_rows: dict[int, list[OpenRow]], fits: int, length: int, patches: int) -> tuple[int, int] | None:
    """(room, place in its list) of the row with the least room that takes the piece; `fits`: rooms from `length` on."""
    while fits:
        bit = fits & -fits
        room = length + bit.bit_length() - 1
        if not patches:
            return room, -1
        rows = open_rows[room]
        for place in range(len(rows) - 1, -1, -1):
            patch_room = rows[place].patch_room
            if patch_room is None or patch_room >= patches:
                return room, place
        fits ^= bit
    return None


def close_gaps(open_rows: list[OpenRow], limits: Limits) -> tuple[list[list[Piece]], list[list[Piece]]]:
    """Fill the fullest rows with the pieces of the emptiest, cutting one piece a row at most.

    `open_rows` stand in order of room, least first, as `best_fit_decreasing` leaves them. Returns (full rows, rows
    with room left); the latter are several only where images keep their pieces whole.
    """
    waiting = deque(open_rows)
    supply: deque[Piece] = deque()
    filled: list[list[Piece]] = []
    unfilled: list[list[Piece]] = []
    while waiting:
        row = waiting.popleft()
        while row.room:
            if not supply and waiting:
                supply.extend(waiting.pop().pieces)
            took = _take(row, supply, limits)
            if not took:
                if not waiting or len(supply) >= SIGHT:
                    break
                supply.extend(waiting.pop().pieces)
        (unfilled if row.room else filled).append(row.pieces)
    while supply:  # what images kept from filling anything; laid out again, row by row
        row = OpenRow(limits)
        while row.room and _take(row, supply, limits):
            pass
        (unfilled if row.room else filled).append(row.pieces)
    return filled, unfilled


def _take(row: OpenRow, supply: deque[Piece], limits: Limits) -> bool:
    """Move into the row the first piece of `supply` that fits or fills it up; else the longest beginning that fits."""
    best, at = 0, 0
    for place, piece in enumerate(islice(supply, SIGHT)):
        size = limits.fitting(piece, row.room, row.patch_room)
        if size > best:
            best, at = size, place
        if size == min(piece.length, row.room):
            best, at = size, place
            break
    if not best:
        return False
    piece = supply[at]
    part = Piece(piece.doc, piece.start, best)
    if best < piece.length:
        supply[at] = Piece(piece.doc, piece.start + best, piece.length - best)
    else:
        del supply[at]
    row.add(part, limits.patches(part))
    return True
