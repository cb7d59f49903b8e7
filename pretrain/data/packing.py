"""Which piece of which document goes into which row: best-fit decreasing, then gaps closed by splitting.

Pure: it sees lengths only. Rows come out exactly full; what cannot fill a row is handed back to join what comes next.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable
from typing import NamedTuple


class Piece(NamedTuple):
    doc: int  # number of the document
    start: int  # its first token's place in the document
    length: int  # tokens, > 0


def plan(pieces: Iterable[Piece], seq_len: int) -> tuple[list[list[Piece]], list[Piece]]:
    """Arrange `pieces` into rows of exactly `seq_len` tokens; returns (rows, rest), rest holding < seq_len tokens.

    What is longer than a row fills whole rows first. The remains are placed by best-fit decreasing, which leaves few
    rows open; each open row then costs at most one split. No token is lost: rows and rest hold every one, once.
    """
    rows: list[list[Piece]] = []
    short: list[Piece] = []
    for piece in pieces:
        whole = piece.length // seq_len * seq_len
        rows += [[Piece(piece.doc, piece.start + at, seq_len)] for at in range(0, whole, seq_len)]
        if piece.length > whole:
            short.append(Piece(piece.doc, piece.start + whole, piece.length - whole))
    full, still_open = best_fit_decreasing(short, seq_len)
    filled, rest = close_gaps(still_open, seq_len)
    return rows + full + filled, rest


def best_fit_decreasing(pieces: list[Piece], seq_len: int) -> tuple[list[list[Piece]], list[list[Piece]]]:
    """Longest first, each into the row with the least room that takes it; returns (full rows, open rows).

    Rooms that occur are kept as the bits of one integer, so the best fit is a shift and its lowest bit.
    """
    open_rows: dict[int, list[list[Piece]]] = defaultdict(list)  # room -> rows
    rooms = 0
    full: list[list[Piece]] = []
    for piece in sorted(pieces, key=lambda p: (-p.length, p.doc, p.start)):
        fits = rooms >> piece.length
        if fits:
            room = piece.length + (fits & -fits).bit_length() - 1
            row = open_rows[room].pop()
            if not open_rows[room]:
                rooms ^= 1 << room
        else:
            room, row = seq_len, []
        row.append(piece)
        room -= piece.length
        if room == 0:
            full.append(row)
        else:
            open_rows[room].append(row)
            rooms |= 1 << room
    return full, [row for room in sorted(open_rows) for row in open_rows[room]]


def close_gaps(open_rows: list[list[Piece]], seq_len: int) -> tuple[list[list[Piece]], list[Piece]]:
    """Fill the fullest rows with the pieces of the emptiest, cutting one piece a row at most.

    `open_rows` stand in order of room, least first, as `best_fit_decreasing` leaves them.
    """
    waiting = deque(open_rows)
    supply: deque[Piece] = deque()
    filled: list[list[Piece]] = []
    while waiting:
        row = waiting.popleft()
        room = seq_len - sum(piece.length for piece in row)
        while room:
            if not supply:
                if not waiting:
                    return filled, row
                supply.extend(waiting.pop())
            piece = supply.popleft()
            if piece.length > room:
                supply.appendleft(Piece(piece.doc, piece.start + room, piece.length - room))
                piece = Piece(piece.doc, piece.start, room)
            row.append(piece)
            room -= piece.length
        filled.append(row)
    return filled, list(supply)
