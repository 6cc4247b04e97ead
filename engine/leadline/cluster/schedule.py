"""Which units can be done now: what each needs, what it makes, and what is lost with one that fails.

Nothing here knows of Ray or files. A unit needs *things* and makes things; a thing is whole when every unit that makes
it is done, and a thing that no unit makes is there already. So there are no stages to wait for: a unit is ready as soon
as what it needs is whole.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

Thing = tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Unit:
    """The smallest piece of work that is done whole or not at all.

    stage: the kind of its work; arguments: what it is done for. name: for people. group: where it belongs; units of
    lower groups are done first. warm: what a worker that has done such a unit has ready for the next one. instead:
    units that together make what this one makes, for when it fails: each may fail alone. roams: any worker may do it,
    wherever its group is at home.
    """

    stage: str
    arguments: tuple[Any, ...]
    name: str
    needs: tuple[Thing, ...] = ()
    makes: tuple[Thing, ...] = ()
    group: int = 0
    warm: Thing | None = None
    instead: tuple["Unit", ...] = ()
    roams: bool = False


class Schedule:
    """Units that are not done yet. Memory grows with them alone: add a group when there is room for it.

    ahead: by how many groups units that roam go before the others. Those are long and cannot be shared out, so one that
    is begun late has all other workers wait for it.
    """

    def __init__(self, ahead: int = 0) -> None:
        self._ahead = ahead
        self._makers: dict[Thing, int] = {}  # of a thing that is not whole: units that make it and are not done
        self._waiting: dict[Thing, list[Unit]] = {}
        self._missing: dict[Unit, int] = {}  # of a unit that is not ready: things that it needs and are not whole
        self._ready: dict[tuple[int, Thing], deque[Unit]] = {}  # by group, and what a worker has ready for them
        self._lost: set[Thing] = set()
        self._left: dict[int, int] = {}
        self._homes: dict[int, str] = {}

    def __len__(self) -> int:
        return sum(self._left.values())

    def left(self, group: int) -> int:
        """Units of a group that are neither done nor set aside."""
        return self._left.get(group, 0)

    def home(self, group: int) -> str | None:
        """The place whose workers alone may do a group's units; None: it has none yet."""
        return self._homes.get(group)

    def settle(self, group: int, place: str) -> None:
        """Give a group a home."""
        self._homes[group] = place

    def at_home(self, place: str) -> list[int]:
        """The groups that are at home at a place and not done."""
        return [group for group, home in self._homes.items() if home == place]

    def add(self, units: Iterable[Unit]) -> list[Unit]:
        """Take in units, and all that make what they need. Returns those set aside at once: what they need is lost."""
        added = list(units)
        for unit in added:
            self._left[unit.group] = self._left.get(unit.group, 0) + 1
            for thing in unit.makes:
                self._makers[thing] = self._makers.get(thing, 0) + 1
        lost: list[Unit] = []
        for unit in added:
            missing = [thing for thing in dict.fromkeys(unit.needs) if thing in self._makers or thing in self._lost]
            if self._lost.intersection(missing):
                lost.append(unit)
            elif missing:
                self._missing[unit] = len(missing)
                for thing in missing:
                    self._waiting.setdefault(thing, []).append(unit)
            else:
                self._make_ready(unit)
        return [other for unit in lost for other in self._lose(unit)]

    def take(
        self, warm: Thing | None = None, held: Iterable[Thing] = (), place: str = "", is_full: bool = False
    ) -> Unit | None:
        """A unit for a worker, None where it has to wait for others.

        warm: what it has ready, units of which it is given first; held: what other workers have ready, units of which
        are left to them if there are others. place: where the worker is: units of groups that are at home elsewhere are
        not for it, unless they roam, nor, if its place is full, those of groups without a home. Otherwise lower groups
        first, with those that roam as if theirs were `ahead` lower, and then those that were ready first.
        """
        others = set(held)
        best: tuple[tuple[bool, bool, int], tuple[int, Thing]] | None = None
        for bucket, queue in self._ready.items():
            group, kind = bucket
            home = self._homes.get(group)
            if not queue[0].roams and (is_full if home is None else home != place):
                continue
            rank = (kind != warm, kind in others, group - self._ahead * queue[0].roams)
            if best is None or rank < best[0]:
                best = rank, bucket
        if best is None:
            return None
        queue = self._ready[best[1]]
        unit = queue.popleft()
        if not queue:
            del self._ready[best[1]]
        return unit

    def done(self, unit: Unit) -> None:
        """What was taken is done."""
        self._end(unit)
        for thing in unit.makes:
            self._makers[thing] -= 1
            if not self._makers[thing]:
                del self._makers[thing]
                for other in self._waiting.pop(thing, ()):
                    if other in self._missing:
                        self._missing[other] -= 1
                        if not self._missing[other]:
                            del self._missing[other]
                            self._make_ready(other)

    def again(self, unit: Unit) -> None:
        """What was taken is to be done once more, before all that is like it."""
        self._ready.setdefault(_bucket(unit), deque()).appendleft(unit)

    def fail(self, unit: Unit) -> list[Unit]:
        """What was taken cannot be done: its `instead` take its place, else what it makes is lost.

        Returns the units that are set aside: none, or this one and all that need what is lost.
        """
        if not unit.instead:
            return self._lose(unit)
        self.add(unit.instead)
        self._end(unit)
        for thing in unit.makes:
            self._makers[thing] -= 1  # its stand-ins make it now
        return []

    def drop(self, group: int) -> list[Unit]:
        """Forget the units of a group, none of which is taken: those still to be done are added anew at once.

        Returns those that were not done.
        """
        dropped = [unit for unit in self._missing if unit.group == group]
        for unit in dropped:
            del self._missing[unit]
        for bucket in [bucket for bucket in self._ready if bucket[0] == group]:
            dropped += self._ready.pop(bucket)
        for unit in dropped:
            self._end(unit)
            for thing in unit.makes:
                self._makers[thing] -= 1
                if not self._makers[thing]:
                    del self._makers[thing]
        return dropped

    def _make_ready(self, unit: Unit) -> None:
        self._ready.setdefault(_bucket(unit), deque()).append(unit)

    def _end(self, unit: Unit) -> None:
        self._left[unit.group] -= 1
        if not self._left[unit.group]:
            del self._left[unit.group]
            self._homes.pop(unit.group, None)

    def _lose(self, unit: Unit) -> list[Unit]:
        lost, todo = [], [unit]
        while todo:
            one = todo.pop()
            lost.append(one)
            self._end(one)
            for thing in one.makes:
                self._lost.add(thing)
                for other in self._waiting.pop(thing, ()):
                    if self._missing.pop(other, None) is not None:
                        todo.append(other)
        return lost


def _bucket(unit: Unit) -> tuple[int, Thing]:
    return unit.group, unit.warm or (unit.stage,)
