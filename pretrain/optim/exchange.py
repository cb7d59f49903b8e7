"""Matrices from the pieces that ranks hold of them, and their updates back into the pieces.

Data parallelism (ZeRO-1), tensor parallelism and copies on several ranks are one case here: each rank names the
rectangles of matrices that it holds, each matrix gets one rank that puts it together, and all ranks know who sends what
to whom. What several ranks hold is sent by one of them and comes back to all, so copies stay copies to the bit.

n matrices of one shape, m <= M the sides of a matrix, on whichever dim.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from perilune.pretrain.optim.matrices import Box, Name

LIMIT = 1 << 26  # elements of matrices that a rank puts together at once, on average
_Sides = tuple[int, int]


@dataclass
class Round:
    """What this rank does for some of the matrices, all ranks at the same time."""

    mine: dict[_Sides, list[Name]] = field(default_factory=lambda: defaultdict(list))  # that it puts together
    out: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))  # rank -> pieces that go there
    into: dict[int, list[Box]] = field(default_factory=lambda: defaultdict(list))  # rank -> boxes that come from it
    back: dict[int, list[Box]] = field(default_factory=lambda: defaultdict(list))  # rank -> boxes that return there
    home: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))  # rank -> pieces that return from it
    travels: bool = False  # anything, from any rank to another


class Exchange:
    """The plan over a process group, and its two transports. Made on all ranks of `group`.

    `pieces` are the boxes that this rank holds, `shapes` the matrices that they are of. Raises ValueError on every rank
    where they do not cover each matrix exactly once (copies aside).
    """

    def __init__(self, pieces: Sequence[Box], shapes: Mapping[Name, _Sides], group: dist.ProcessGroup) -> None:
        self._group, self.rank, self.size = group, group.rank(), group.size()
        self._pieces = list(pieces)
        held: list[tuple[list[Box], dict[Name, _Sides]]] = [([], {})] * self.size
        dist.all_gather_object(held, (self._pieces, dict(shapes)), group=group)
        self.shapes: dict[Name, _Sides] = {}
        holders: dict[Name, dict[Box, list[int]]] = defaultdict(dict)
        for rank, (boxes, sizes) in enumerate(held):
            self.shapes.update(sizes)
            for box in boxes:
                holders[box.name].setdefault(box, []).append(rank)
        for name, whole in holders.items():
            _check(name, self.shapes[name], list(whole))
        self.rounds = self._plan(holders)

    def _plan(self, holders: dict[Name, dict[Box, list[int]]]) -> list[Round]:
        number = {box: index for index, box in enumerate(self._pieces)}
        # The largest first, and equal ones together: what is batched has one shape.
        ordered = sorted(holders, key=lambda name: (-_work(self.shapes[name]), _sides(self.shapes[name]), name))
        found: list[Round] = []
        elements, load = LIMIT * self.size + 1, [0.0] * self.size
        for name in ordered:
            shape = self.shapes[name]
            if elements > LIMIT * self.size:
                found.append(Round())
                elements, load = 0, [0.0] * self.size
            elements += shape[0] * shape[1]
            owner = _owner(holders[name], load, _work(shape))
            load[owner] += _work(shape)
            one = found[-1]
            if owner == self.rank:
                one.mine[_sides(shape)].append(name)
            for box, ranks in sorted(holders[name].items()):
                source = owner if owner in ranks else ranks[0]
                one.travels |= ranks != [owner]
                if source == self.rank:
                    one.out[owner].append(number[box])
                if owner == self.rank:
                    one.into[source].append(box)
                for rank in ranks:
                    if owner == self.rank:
                        one.back[rank].append(box)
                    if rank == self.rank:
                        one.home[owner].append(number[box])
        return found

    def together(
        self, one: Round, piece: Callable[[int], torch.Tensor], wire: torch.dtype, device: torch.device
    ) -> dict[_Sides, torch.Tensor]:
        """This rank's matrices of a round, `[n, m, M]` a shape in the order of `one.mine`, in the type `wire`.

        `piece(i)` gives the values of this rank's piece i.
        """
        whole = {sides: torch.empty(len(names), *sides, dtype=wire, device=device) for sides, names in one.mine.items()}
        place = self._places(one, whole)
        for box, index in zip(one.into[self.rank], one.out[self.rank], strict=True):
            place(box).copy_(piece(index))
        if one.travels:
            sent = self._sent(one.out, lambda index: self._pieces[index], piece, wire, device)
            for box, values in self._received(one.into, lambda box: box, *sent):
                place(box).copy_(values)
        return whole

    def apart(
        self, one: Round, whole: dict[_Sides, torch.Tensor], wire: torch.dtype, device: torch.device
    ) -> list[tuple[int, torch.Tensor]]:
        """(i, what has come of this rank's piece i) from the matrices of a round as `together` gave them."""
        place = self._places(one, whole)
        boxes, indices = one.back[self.rank], one.home[self.rank]
        found = [(index, place(box)) for box, index in zip(boxes, indices, strict=True)]
        if one.travels:
            sent = self._sent(one.back, lambda box: box, place, wire, device)
            found += self._received(one.home, lambda index: self._pieces[index], *sent)
        return found

    def _places(self, one: Round, whole: dict[_Sides, torch.Tensor]) -> Callable[[Box], torch.Tensor]:
        slots = {name: (sides, index) for sides, names in one.mine.items() for index, name in enumerate(names)}

        def place(box: Box) -> torch.Tensor:
            sides, index = slots[box.name]
            matrix = whole[sides][index]
            rows, columns = self.shapes[box.name]
            matrix = matrix.mT if rows > columns else matrix
            return matrix[box.row : box.row + box.rows, box.column : box.column + box.columns]

        return place

    def _sent[Item](
        self,
        to: dict[int, list[Item]],
        box_of: Callable[[Item], Box],
        values: Callable[[Item], torch.Tensor],
        wire: torch.dtype,
        device: torch.device,
    ) -> tuple[torch.Tensor, list[int]]:
        """(all that goes to other ranks, how many elements to each)."""
        items = [[] if rank == self.rank else to[rank] for rank in range(self.size)]
        sizes = [sum(box_of(item).rows * box_of(item).columns for item in part) for part in items]
        buffer, at = torch.empty(sum(sizes), dtype=wire, device=device), 0
        for item in (item for part in items for item in part):
            box = box_of(item)
            buffer[at : at + box.rows * box.columns].view(box.rows, box.columns).copy_(values(item))
            at += box.rows * box.columns
        return buffer, sizes

    def _received[Item](
        self, of: dict[int, list[Item]], box_of: Callable[[Item], Box], sent: torch.Tensor, sizes: list[int]
    ) -> list[tuple[Item, torch.Tensor]]:
        items = [[] if rank == self.rank else of[rank] for rank in range(self.size)]
        comes = [sum(box_of(item).rows * box_of(item).columns for item in part) for part in items]
        buffer, at = sent.new_empty(sum(comes)), 0
        dist.all_to_all_single(buffer, sent, comes, sizes, group=self._group)
        found = []
        for item in (item for part in items for item in part):
            box = box_of(item)
            found.append((item, buffer[at : at + box.rows * box.columns].view(box.rows, box.columns)))
            at += box.rows * box.columns
        return found


def _sides(shape: _Sides) -> _Sides:
    return min(shape), max(shape)


def _work(shape: _Sides) -> float:
    """Of Newton-Schulz steps, relative: two products of m x M by M x m, and one of m x m by m x m."""
    m, M = _sides(shape)
    return m * m * (2.0 * M + m)


def _owner(boxes: Mapping[Box, list[int]], load: list[float], work: float) -> int:
    """The rank that puts a matrix together: of those that hold some of it the one with least to do, unless another has
    less by more than this matrix."""
    holders = sorted({rank for ranks in boxes.values() for rank in ranks})
    nearest, idlest = min(holders, key=lambda rank: load[rank]), min(range(len(load)), key=lambda rank: load[rank])
    return idlest if load[nearest] - load[idlest] > work else nearest


def _check(name: Name, shape: _Sides, boxes: list[Box]) -> None:
    """Raises ValueError unless `boxes` tile the matrix."""
    if not _tiled(shape, boxes):
        covered = sum(box.rows * box.columns for box in boxes)
        raise ValueError(
            f"{name}: ranks hold {covered} elements of its {shape[0]} x {shape[1]} in {len(boxes)} pieces that do not "
            "tile it: a weight is split in a way that Muon does not know"
        )


def _tiled(shape: _Sides, boxes: list[Box]) -> bool:
    """Whether at each row, from top to bottom, the boxes there stand side by side from the first column to the last."""
    left = sorted(boxes, key=lambda box: box.row, reverse=True)
    here: list[Box] = []
    row = 0
    while row < shape[0]:
        here = [box for box in here if box.row + box.rows > row]
        while left and left[-1].row <= row:
            here.append(left.pop())
        here.sort(key=lambda box: box.column)
        ends = [0, *(box.column + box.columns for box in here)]
        if [box.column for box in here] != ends[:-1] or ends[-1] != shape[1]:
            return False
        row = min(box.row + box.rows for box in here)
        if left and left[-1].row < row:
            row = left[-1].row
    return not left and all(box.row + box.rows <= shape[0] for box in here)
