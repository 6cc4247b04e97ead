"""Schedules against a slow search of what depends on what."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leadline.cluster.schedule import Schedule, Unit


@st.composite
def graphs(draw):
    """Units that need things which earlier ones make, several making the same; and which of them fail."""
    n = draw(st.integers(1, 25))
    things = draw(st.integers(1, 8))
    units = []
    for i in range(n):
        needs = draw(st.lists(st.integers(0, things - 1), max_size=3))
        made = draw(st.integers(0, things - 1))
        # No circles: a unit makes things of a higher number than it needs.
        needs = tuple((f"thing {thing}",) for thing in needs if thing < made)
        warm = draw(st.sampled_from([None, ("a",), ("b",)]))
        units.append(Unit("do", (), str(i), needs, ((f"thing {made}",),), draw(st.integers(0, 2)), warm))
    return units, draw(st.sets(st.integers(0, n - 1), max_size=3))


def hindered(units, failing):
    """Units that fail, or need what one of these makes, by going round until nothing changes."""
    lost = {unit for unit in units if int(unit.name) in failing}
    while True:
        gone = {thing for unit in lost for thing in unit.makes}
        more = {unit for unit in units if gone.intersection(unit.needs)} - lost
        if not more:
            return lost
        lost |= more


@given(graphs(), st.integers(0, 1000), st.booleans())
def test_every_unit_is_done_after_what_it_needs_and_failures_cost_what_depends_on_them(graph, seed, at_once):
    units, failing = graph
    schedule, chance = Schedule(), random.Random(seed)
    added = units if at_once else sorted(units, key=lambda unit: unit.makes)  # makers before what needs the thing
    set_aside = []
    for some in [added] if at_once else [[unit] for unit in added]:
        set_aside += schedule.add(some)
    taken, done = [], []
    while schedule:
        while (unit := schedule.take(chance.choice([None, ("a",), ("b",)]), held=[("a",)])) is not None:
            taken.append(unit)
        assert taken, "nothing is ready, and nothing is under way"
        unit = taken.pop(chance.randrange(len(taken)))
        if int(unit.name) in failing:
            set_aside += schedule.fail(unit)
            continue
        for other in units:
            if set(other.makes) & set(unit.needs):
                assert other in done
        schedule.done(unit)
        done.append(unit)
    lost = hindered(units, failing)
    # A unit that was doomed may have failed before it was known to be.
    assert set(set_aside) == lost and len(set_aside) == len(lost)
    assert set(done) == set(units) - lost and len(done) == len(set(done))


def test_a_unit_that_fails_is_replaced_by_its_parts_of_which_one_may_fail_alone():
    parts = tuple(Unit("embed", (), f"part {i}", makes=((i,),)) for i in (1, 2))
    whole = Unit("embed", (), "both", makes=((1,), (2,)), instead=parts)
    after = [Unit("vote", (), f"vote {i}", needs=((i,),)) for i in (1, 2)]
    schedule = Schedule()
    schedule.add([whole, *after])
    assert schedule.fail(schedule.take()) == [] and len(schedule) == 4
    first, second = schedule.take(), schedule.take()
    assert (first, second) == parts and schedule.take() is None
    assert schedule.fail(first) == [parts[0], after[0]]
    schedule.done(second)
    assert schedule.take() is after[1]


def test_a_worker_goes_on_with_what_it_has_ready_and_leaves_to_others_what_they_have():
    units = [
        Unit("vote", (), f"{bank}{i}", warm=(bank,), group=group) for group, bank in enumerate("ab") for i in (0, 1)
    ]
    schedule = Schedule()
    schedule.add(units)
    assert schedule.take().name == "a0"
    assert schedule.take(held=[("a",)]).name == "b0"
    assert schedule.take(warm=("b",), held=[("a",)]).name == "b1"
    assert schedule.take(warm=("b",), held=[("a",)]).name == "a1"  # rather than nothing


def test_units_that_roam_go_before_those_of_some_groups_before_theirs():
    schedule = Schedule(ahead=2)
    schedule.add(Unit("embed", (), f"e{group}", group=group) for group in range(2))
    schedule.add(Unit("train", (), f"t{group}", group=group, roams=True) for group in range(1, 5))
    taken = [schedule.take().name for _ in range(6)]
    assert taken == ["t1", "e0", "t2", "e1", "t3", "t4"]


def test_units_are_given_to_workers_at_the_home_of_their_group_and_can_be_added_anew():
    near = [
        Unit("train", (), "t", makes=(("net",),), group=1, roams=True),
        Unit("embed", (), "e", needs=(("net",),), makes=(("bank",),), group=1),
        Unit("vote", (), "v", needs=(("bank",),), group=1),
    ]
    schedule = Schedule()
    schedule.add(near)
    schedule.done(schedule.take(place="there", is_full=True))  # what roams is done anywhere
    assert schedule.take(place="there", is_full=True) is None
    schedule.settle(1, "here")
    assert schedule.take(place="there") is None and schedule.at_home("here") == [1]
    schedule.done(schedule.take(place="here", is_full=True))
    assert schedule.left(1) == 1
    # The place is lost, and the bank with it.
    schedule.drop(1)
    assert not schedule and schedule.home(1) is None
    schedule.add(near[1:])
    schedule.settle(1, "there")
    assert schedule.take(place="here") is None
    schedule.done(schedule.take(place="there"))
    schedule.done(schedule.take(place="there"))
    assert schedule.at_home("there") == []


@pytest.mark.parametrize("which", ["again", "fail"])
def test_a_unit_may_be_taken_again(which):
    unit = Unit("do", (), "it")
    schedule = Schedule()
    schedule.add([unit])
    taken = schedule.take()
    if which == "fail":
        assert schedule.fail(taken) == [unit] and not schedule
    else:
        schedule.again(taken)
        assert schedule.take() is unit and len(schedule) == 1
