"""What a block keeps in attributes and globals is told, compared and put back."""

import collections
import contextvars
import dataclasses
import functools
import json
import logging
import random
import sys
import threading
import types

import numpy
import pytest
import torch
from torch import nn

from sere_compile.compiler.kept_aside import (
    KeptAside,
    _by_name,
    _called,
    _functions,
    _globals_of,
    _is_kept,
    _is_own_class,
    _is_users,
    _members,
    _modules_in,
    _named,
    _snapshot,
    _Variable,
    alike,
    content,
    outline,
    remember_generators,
)

COUNTS, LAST = (contextvars.ContextVar(name) for name in ("counts", "last"))
COUNTS.set([])
LAST.set(0)
NUMBERS = iter(range(100))
LOADS = json.loads
SEEN = []
OF_HELPERS = []
CALLS = 0
TRACKED = collections.defaultdict(list)
ELSEWHERE = types.ModuleType("elsewhere")
ELSEWHERE.names = []


def helper(x):
    another_helper(x)


def another_helper(x):
    OF_HELPERS.append(x)


def counting():
    """A function with state of its own."""
    calls, seen = 0, []

    def count(x):
        nonlocal calls
        calls += 1
        seen.extend([calls for _ in range(1)])
        return calls

    return count, seen


class Tracker:
    """A user's object that gathers statistics."""

    def __init__(self):
        self.load = torch.zeros(3)
        self.names = {"a"}


class Statistics:
    """Gathered for all by a class; nobody makes an object of it."""

    calls = 0
    log: list = []  # noqa: RUF012 - as programs have it

    @classmethod
    def note(cls, x):
        cls.calls += 1
        cls.log.append(x)


class Slotted:
    """Has no dictionary of attributes."""

    __slots__ = ("last", "log")

    def __init__(self):
        self.log = []

    def note(self, x):
        self.log.append(x)
        self.last = x


class Dispatcher:
    """No module, with methods that a module's code calls: what these name is reached as well."""

    def note(self, x):
        OF_METHODS.append(x)


def noting(x, heard=[], *, known={}):  # noqa: B006 - as programs have it
    """A function that remembers."""
    heard.append(x)
    known[len(known)] = x
    noting.calls += 1


noting.calls = 0
OF_METHODS = []
TRACKER = Tracker()
SLOTTED = Slotted()
TENSOR = torch.zeros(2)
ARRAY = numpy.zeros(2)


class Subclass(torch.Tensor):
    """A tensor of a class that copies may not know."""


class Keeping(nn.Module):
    """Keeps what it is called with in every place that a program may use."""

    everyone: list = []  # noqa: RUF012 - shared by all modules of the class, as programs have it
    total = 0

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.last = None
        self.log, self.queue = [], collections.deque()
        self.nested = {"by name": [1]}
        self.load = torch.zeros(3)
        self.count, self.counted = counting()
        self.array, self.dispatcher = numpy.zeros(2), Dispatcher()

    def forward(self, x, places):
        for place in places:
            getattr(self, place)(x)
        return x

    def attribute(self, x):
        self.last = x

    def new_attribute(self, x):
        self.never_seen_before = x

    def in_module(self, x):
        self.inner.last = x

    def in_list(self, x):
        self.log.append(x)

    def in_queue(self, x):
        self.queue.append(x)

    def deep(self, x):
        self.nested["by name"].append(x)

    def in_place(self, x):
        self.load += 1

    def in_global(self, x):
        SEEN.append(x)

    def in_global_dictionary(self, x):
        TRACKED["load"].append(x)

    def in_class(self, x):
        self.everyone.append(x)

    def in_object(self, x):
        TRACKER.load += 1
        TRACKER.names.add("b")

    def by_a_helper(self, x):
        helper(x)

    def by_a_helper_of_a_module(self, x):
        this_module.another_helper(x)

    def in_a_variable(self, x):
        global CALLS
        CALLS += 1

    def in_an_array(self, x):
        self.array += 1

    def in_a_global_tensor(self, x):
        TENSOR[0] += 1

    def in_a_global_array(self, x):
        ARRAY[0] += 1

    def in_a_number_of_its_class(self, x):
        type(self).total += 1

    def in_another_class(self, x):
        Statistics.note(x)

    def in_slots(self, x):
        SLOTTED.note(x)

    def by_a_method_of_an_object(self, x):
        self.dispatcher.note(x)

    def in_a_context(self, x):
        COUNTS.get().append(x)

    def in_a_variable_of_a_context(self, x):
        LAST.set(x)

    def in_defaults(self, x):
        noting(x)


this_module = sys.modules[__name__]
PLACES = {
    "by_a_helper": ("OF_HELPERS",),
    "by_a_helper_of_a_module": ("OF_HELPERS",),
    "in_a_variable": ("CALLS",),
    "attribute": ("last",),
    "new_attribute": ("never_seen_before",),
    "in_module": ("inner.last",),
    "in_list": ("log",),
    "in_queue": ("queue",),
    "deep": ("nested",),
    "in_place": ("load",),
    "in_global": ("SEEN",),
    "in_global_dictionary": ("TRACKED",),
    "in_class": ("Keeping.everyone",),
    "in_object": ("TRACKER",),
    "in_an_array": ("array",),
    "in_a_global_tensor": ("TENSOR",),
    "in_a_global_array": ("ARRAY",),
    "in_a_number_of_its_class": ("Keeping.total",),
    "in_another_class": ("Statistics.calls", "Statistics.log"),
    "in_slots": ("SLOTTED",),
    "by_a_method_of_an_object": ("OF_METHODS",),
    "in_a_context": ("COUNTS",),
    "in_a_variable_of_a_context": ("LAST",),
    "in_defaults": ("heard", "known", "noting"),
}


@pytest.mark.parametrize("place", PLACES)
def test_what_a_call_keeps_is_told_and_put_back(place):
    module = Keeping()
    aside = KeptAside(module)
    before = aside.content()
    with aside.restored() as changed:
        assert changed() == {}
        module(torch.ones(2), [place])
        assert set(changed()) == set(PLACES[place])
    after = aside.content()
    assert before.keys() == after.keys()
    assert all(alike(after[name], before[name]) for name in before)


def test_everything_at_once():
    module = Keeping()
    lists = module.log, module.nested["by name"]
    aside = KeptAside(module)
    with aside.restored() as changed:
        module(torch.ones(2), list(PLACES))
        assert set(changed()) == {name for names in PLACES.values() for name in names}
    assert (module.log, module.nested["by name"]) == ([], [1])
    assert (module.log is lists[0], module.nested["by name"] is lists[1]) == (True, True)
    assert not hasattr(module, "never_seen_before")
    assert SEEN == []
    assert not TRACKED
    assert TRACKER.names == {"a"}
    assert TRACKER.load.tolist() == module.load.tolist() == [0, 0, 0]
    assert (TENSOR.tolist(), ARRAY.tolist(), module.array.tolist()) == ([0, 0], [0, 0], [0, 0])
    assert (Statistics.calls, Statistics.log, Keeping.total) == (0, [], 0)
    assert (SLOTTED.log, hasattr(SLOTTED, "last"), OF_METHODS) == ([], False, [])
    assert (noting.calls, noting.__defaults__, noting.__kwdefaults__) == (0, ([],), {"known": {}})


def test_what_a_closure_keeps():
    module = Keeping()
    with KeptAside(module).restored() as changed:
        assert module.count(0) == 1
        assert {"calls", "counted"} <= set(changed())
    assert module.counted == []
    assert module.count(0) == 1


def reads_what_is_imported(name):
    return sys.modules[name]


class Recorder:
    """Hooks of it gather what modules give."""

    def __init__(self):
        self.seen = []

    def record(self, *given):
        self.seen.append(given[-1])

    def __call__(self, *given):
        self.record(*given)


class Owner(nn.Module):
    """Keeps what others give, in attributes and a buffer."""

    def __init__(self):
        super().__init__()
        self.part, self.log = nn.Identity(), []
        self.part.last = None
        self.register_buffer("count", torch.zeros(()))

    def keep(self, x):
        self.log.append(x)
        self.count += 1
        self.part.last = x


def test_what_hooks_keep():
    """Whatever they are bound to: an object, an object that is called, arguments, or a closure."""
    module, recorders, stats = nn.Identity(), [Recorder() for _ in range(3)], {}
    module.register_forward_hook(recorders[0].record)
    module.register_forward_hook(recorders[1])
    module.register_forward_pre_hook(functools.partial(Recorder.record, recorders[2]))
    module.register_forward_hook(lambda *given: stats.update(last=given[-1]))
    with KeptAside(module).restored() as changed:
        module(torch.ones(2))
        assert set(changed()) == {"Recorder", "Recorder (2)", "Recorder (3)", "stats"}
    assert (stats, [recorder.seen for recorder in recorders]) == ({}, [[], [], []])


RECORDER = Recorder()
NOTE = functools.partial(RECORDER.record, "noted")


class Noting(nn.Module):
    """Records by what its attributes are bound to, and by a global that is."""

    def __init__(self, recorders):
        super().__init__()
        self.record, self.record_twice = recorders[0].record, functools.partial(recorders[1].record, 1)

    def forward(self, x):
        for call in (self.record, self.record_twice, NOTE):
            call(x)
        return x


def test_what_attributes_and_globals_are_bound_to():
    """A method of an object, or a partial of it: the object's list is kept aside."""
    recorders = [Recorder(), Recorder()]
    module = Noting(recorders)
    with KeptAside(module).restored() as changed:
        module(torch.ones(2))
        assert set(changed()) == {"Recorder", "Recorder (2)", "NOTE"}
    assert [recorder.seen for recorder in (*recorders, RECORDER)] == [[], [], []]


def hook_of(owner):
    return lambda module, given, result: owner.keep(result)


@pytest.mark.parametrize("referring", ["by an attribute", "in a list", "in a closure", "by a hook"])
def test_what_modules_outside_keep(referring):
    """A layer may know the model that gathers its statistics, and be no part of it here."""
    module, owner = nn.Identity(), Owner()
    match referring:
        case "by an attribute":
            vars(module)["owner"] = owner
        case "in a list":
            module.owner = [owner]
        case "in a closure":
            module.register_forward_hook(hook_of(owner))
        case _:
            module.register_forward_pre_hook(functools.partial(Owner.keep, owner))
    with KeptAside(module).restored() as changed:
        owner.keep(torch.ones(2))
        assert {name.split(".", 1)[1] for name in changed()} == {"log", "buffers", "part.last"}
    assert (owner.log, owner.part.last, float(owner.count)) == ([], None, 0.0)


def test_what_only_a_closure_holds():
    """No attribute, and no assignment in the function, names it as well."""
    module, seen = nn.Identity(), [0]
    module.remember = lambda x: seen.append(x)
    with KeptAside(module).restored() as changed:
        assert changed() == {}
        module.remember(1)
        assert set(changed()) == {"seen"}
    assert seen == [0]


def test_what_code_inside_a_function_or_another_module_of_the_users_holds():
    module = nn.Identity()
    module.inside = lambda x: [(lambda: SEEN.append(x))()]
    module.elsewhere = lambda x: ELSEWHERE.names.append(x)
    with KeptAside(module).restored() as changed:
        module.inside(1)
        module.elsewhere(1)
        assert set(changed()) == {"SEEN", "names"}
    assert SEEN == ELSEWHERE.names == []


def test_two_globals_of_one_name_are_told_apart():
    first, second = [1], [2]
    assert _by_name([("seen", first), ("seen", second), ("seen", first)]) == {"seen": first, "seen (2)": second}


def test_what_cannot_be_copied_is_left_alone():
    module = nn.Identity()
    module.lock, module.helper, module.loop = threading.Lock(), len, []
    module.loop.append(module.loop)
    with KeptAside(module).restored() as changed:
        assert changed() == {}


def test_globals_are_those_of_the_users_own_code():
    """Not what classes of torch hold, whatever module of it they are in."""
    found = dict(_globals_of(Keeping()))
    assert found["Keeping.everyone"].get() is Keeping.everyone
    assert (found["SEEN"], found["TRACKED"], found["TRACKER"]) == (SEEN, TRACKED, TRACKER)
    of_attributes = {"array", "attribute", "inner.last", "last", "load", "log", "nested", "never_seen_before", "queue"}
    assert set(found) == {"calls", "seen"} | {name for names in PLACES.values() for name in names} - of_attributes
    assert list(_globals_of(nn.LSTM(2, 2))) == []


def test_contents_that_are_alike():
    value = torch.tensor([1.0, float("nan")])
    assert alike(content({"a": [value, 2.0, {3}]}), content({"a": [value * (1 + 1e-6), 2.0 + 1e-7, {3}]}))
    assert alike(content(numpy.arange(3)), content(numpy.arange(3)))
    assert alike(content(float("nan")), content(float("nan")))


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (torch.zeros(2), torch.zeros(3)),
        (torch.zeros(2), torch.zeros(2).double()),
        (torch.tensor([1, 2]), torch.tensor([1, 3])),
        (torch.tensor([1.0]), torch.tensor([1.001])),
        ([1, 2], (1, 2)),
        ([1], [1, 1]),
        ({"a": 1}, {"b": 1}),
        (1, True),
        (1.0, 1.1),
        (1.0, float("inf")),
        (torch.tensor([1.0, float("inf")]), torch.tensor([2.0, float("inf")])),
        (numpy.arange(3), numpy.arange(3) + 1),
        (None, torch.zeros(1)),
        (Tracker(), Tracker),
        (threading.Lock(), threading.Lock()),
        ([[[[[1]]]]], [[[[[1, 2]]]]]),
    ],
)
def test_contents_that_differ(left, right):
    assert not alike(content(left), content(right))


def test_what_is_remembered_is_put_back_when_it_is_asked_for():
    module = Keeping()
    remembered = KeptAside(module).remember()
    module(torch.ones(2), ["attribute", "in_list", "deep"])
    assert set(remembered.changed()) == {"last", "log", "nested"}
    assert remembered.is_all_known()
    remembered.put_back()
    assert (module.last, module.log, module.nested) == (None, [], {"by name": [1]})
    assert remembered.changed() == {}


@pytest.mark.parametrize("nested", [False, True])
def test_large_tensors_are_told_apart_and_not_copied(nested):
    module = Keeping()
    large = torch.zeros((1 << 20) + 1)
    module.load = {"a": [large]} if nested else large
    remembered = KeptAside(module).remember()
    module(torch.ones(2), ["in_list"])
    assert remembered.is_all_known()
    large += 1
    assert not remembered.is_all_known()


@pytest.mark.parametrize("holder", ["attribute", "list", "global"])
def test_iterators_cannot_be_put_back(holder):
    """Nobody can tell either whether one has moved on."""
    module = Keeping()
    if holder == "global":
        module.count = lambda x: next(NUMBERS)
    else:
        module.numbers = NUMBERS if holder == "attribute" else [NUMBERS]
    remembered = KeptAside(module).remember()
    assert remembered.has_uncopied
    assert not remembered.is_all_known()
    assert not KeptAside(Keeping()).remember().has_uncopied


class TestByHand:
    """What tells two states of a value apart, and what puts one back."""

    @pytest.mark.parametrize("value", [True, 3, 2.5, 1j, "a", b"a", None, torch.float32, torch.device("cpu")])
    def test_plain_values_are_their_own_content(self, value):
        assert content(value) == value

    def test_tensors_are_copied(self):
        value = torch.ones(2, requires_grad=True)
        copied = content(value)
        assert torch.equal(copied, value)
        assert not copied.requires_grad
        assert copied.data_ptr() != value.data_ptr()

    @pytest.mark.parametrize(
        "value",
        [torch.empty(5, device="meta"), Subclass([1.0, 2.0]), torch.zeros(1, dtype=torch.int8).expand((1 << 20) + 1)],
        ids=["without numbers", "of another class", "large"],
    )
    def test_tensors_that_are_not_copied(self, value):
        """They are known by who they are, and by how often they were written to."""
        before = content(value)
        assert before == content(value) == ["not copied", id(value), value._version]
        assert before != content(value.clone())

    def test_as_many_numbers_as_are_copied(self):
        assert isinstance(content(torch.zeros(1, dtype=torch.int8).expand(1 << 20)), torch.Tensor)

    def test_members(self):
        """By name or place, of what holds any; code and plain values hold none."""
        assert _members({"a": 1}) == [("a", 1)]
        assert _members({3, 1, 2}) == [(None, 1), (None, 2), (None, 3)]
        assert _members((5, 6)) == [(0, 5), (1, 6)]
        assert _members(collections.deque([5])) == [(0, 5)]
        assert [name for name, _ in _members(Tracker())] == ["load", "names"]
        for value in (3, "a", len, Tracker, nn.Linear(1, 1), torch.zeros(1), threading.Lock()):
            assert _members(value) is None
        assert len(_members([0] * 2001)) == 2001
        assert _members([0] * ((1 << 20) + 1)) is None
        assert _members(set(range(2001))) is None
        assert len(_members([0] * (1 << 20))) == 1 << 20
        assert _members({"a", 1}) == [(None, 1), (None, "a")]
        assert _members(functools.partial(helper, 1)) == []  # what C holds nobody can set

    def test_names_that_are_tuples(self):
        """By layer and kind, as statistics are kept."""
        assert alike(content({(0, "load"): 1}), content({(0, "load"): 1}))
        assert not alike(content({(0, "load"): 1}), content({(1, "load"): 1}))

    def test_of_many_members_the_last_are_looked_at(self):
        """They are counted, and a call adds at the end."""
        assert len(content([0] * 2001)) == 2002
        assert alike(content([1] + [0] * 2000), content([0] * 2001))
        assert not alike(content([0] * 2000 + [1]), content([0] * 2001))
        assert not alike(content([0] * 2001), content([0] * 2002))
        assert content(set(range(2001))) == ["list", 2001]

    def test_long_lists_are_put_back(self):
        log, last = [0] * 3000, [1]
        log.append(last)
        restore = _snapshot({"log": log})
        last.append(2)
        log += [3]
        restore()
        assert (log, log[-1] is last) == ([0] * 3000 + [[1]], True)

    def test_what_may_be_kept_in_a_global(self):
        for value in ({}, [], set(), collections.deque(), Tracker(), torch.zeros(1), numpy.zeros(1)):
            assert _is_kept(value)
        for value in (3, "a", (1,), frozenset(), None, nn.Linear(1, 1), len, Tracker, threading):
            assert not _is_kept(value)

    def test_how_near_numbers_are(self):
        """Relative to the largest number of a tensor, or to the number itself."""
        right = torch.tensor([100.0, 0.0])
        assert alike(right + 0.009, right)
        assert not alike(right + 0.011, right)
        assert alike(right + 0.9, right, tolerance=0.01)
        assert alike(torch.zeros(0), torch.zeros(0))
        assert alike(torch.tensor([1, 2]), torch.tensor([1, 2]))
        assert not alike(torch.tensor([1.0, float("nan")]), torch.tensor([float("nan"), 1.0]))
        assert alike(100.009, 100.0)
        assert not alike(100.011, 100.0)
        assert alike(-100.009, -100.0)
        assert alike(float("inf"), float("inf"))
        assert not alike(float("nan"), 1.0)
        assert not alike(1.0, float("nan"))
        assert alike([[100.9]], [[100.0]], tolerance=0.01)
        assert alike(0.0, 0.0)
        assert not alike(1.0, 1)
        assert not alike(1, 1.0)
        assert not alike([1], 1)
        assert not alike([1, 2], [1])
        assert not alike(torch.zeros(1), [0.0])

    def test_what_is_put_back(self):
        """Each container itself, with its own members; of a tensor its numbers, where its sizes are the same."""
        inner, tracker = [1], Tracker()
        holder = {"list": inner, "set": {1}, "deque": collections.deque([1]), "tuple": ([2],), "object": tracker}
        holder["tensor"] = torch.zeros(2)
        before = content(holder)
        restore = _snapshot(holder)
        inner[0] = 5
        inner.append(6)
        holder["set"].add(7)
        holder["deque"].appendleft(8)
        holder["tuple"][0].clear()
        tracker.load, tracker.more = None, 1
        holder["tensor"] += 1
        holder["new"] = holder.pop("list")
        restore()
        assert alike(content(holder), before)
        assert list(holder) == ["list", "set", "deque", "tuple", "object", "tensor"]
        assert holder["list"] is inner
        assert holder["object"] is tracker
        assert not hasattr(tracker, "more")
        assert holder["tensor"].tolist() == [0, 0]

    def test_a_tensor_that_nobody_wrote_to_is_not_written_to(self):
        """Nor one of other sizes."""
        value = torch.zeros(2)
        restore, version = _snapshot(value), value._version
        value.data = torch.ones(2)  # behind the back of its version
        restore()
        assert value.tolist() == [1, 1]
        assert value._version == version
        restore = _snapshot(value)
        value.resize_(3)
        restore()
        assert value.shape == (3,)

    def test_members_of_lists_in_lists(self):
        """Four deep; what is further down is not looked at."""
        lists = [[[[0]]]]
        restore = _snapshot(lists)
        lists[0][0][0][0] = 1
        restore()
        assert lists == [[[[0]]]]

    def test_further_down_only_a_size_is_looked_at(self):
        assert content([[[[[1]]]]]) == [
            "list",
            1,
            [0, ["list", 1, [0, ["list", 1, [0, ["list", 1, [0, ["list", 1]]]]]]]],
        ]
        five = [[[[[0]]]]]
        restore = _snapshot(five)
        five[0][0][0][0][0] = 1
        restore()
        assert five == [[[[[1]]]]]

    def test_arrays_and_numbers_of_numpy(self):
        """Large ones, and what is no array of numbers, are known by who they are."""
        assert content(numpy.float32(0.5)) == 0.5
        assert content(numpy.arange(3)) == [0, 1, 2]
        assert content(numpy.add) == id(numpy.add)
        large = numpy.broadcast_to(numpy.int8(0), ((1 << 20) + 1,))
        assert content(large) == ["not copied", id(large)]
        assert content(numpy.broadcast_to(numpy.int8(0), (1 << 20,))) == [0] * (1 << 20)

    def test_nobody_knows_where_an_iterator_is(self):
        one = iter([1])
        assert not alike(content(one), content(one))
        assert list(one) == [1]

    def test_an_outline_is_without_numbers(self):
        """Types, sizes and names, which two runs with other numbers share."""
        first, other = ({"a": [torch.tensor([x]), x, x > 1]} for x in (1.0, 2.0))
        assert outline(content(first)) == outline(content(other))
        assert outline(torch.zeros(2)) == [torch.float32, (2,)]
        assert outline(["a", 1, [2.5, None]]) == ["a", int, [float, type(None)]]
        assert outline(content([1])) != outline(content([1.0]))
        assert outline(torch.zeros(2)) != outline(torch.zeros(3))
        assert outline(torch.zeros(2)) != outline(torch.zeros(2).double())

    def test_a_set_that_has_grown_long_is_put_back(self):
        numbers = {1, 2}
        restore = _snapshot(numbers)
        numbers.update(range(3000))
        restore()
        assert numbers == {1, 2}
        assert len(_members(set(range(2000)))) == 2000

    def test_names_and_places_are_put_back(self):
        """Though the members are the same objects."""
        one, other = [1], [2]
        for value, change in (
            ({"a": one}, lambda held: held.update(b=held.pop("a"))),
            ([one, other], list.reverse),
            (collections.deque([one, other]), collections.deque.reverse),
        ):
            before, restore = content(value), _snapshot(value)
            change(value)
            assert not alike(content(value), before)
            restore()
            assert alike(content(value), before)

    def test_what_is_put_back_of_objects(self):
        """Frozen ones too, which code may change all the same; attributes and slots that were not there go."""
        frozen, slotted = Frozen(1), Slotted()
        log = slotted.log
        restore, of_slots = _snapshot(frozen), _snapshot(slotted)
        object.__setattr__(frozen, "value", 2)
        slotted.note(1)
        slotted.log = None
        restore()
        of_slots()
        assert frozen.value == 1
        assert slotted.log is log
        assert (log, hasattr(slotted, "last")) == ([], False)

    def test_both_slots_and_attributes(self):
        value = MoreThanSlots()
        value.more, value.last = 1, 2
        assert dict(_members(value)) == {"log": [], "last": 2, "more": 1}

    def test_tensors_that_are_not_put_back(self):
        """Large ones and those of other classes: nobody has copied them."""
        for value in (torch.zeros((1 << 20) + 1, dtype=torch.int8), Subclass([1.0, 2.0])):
            restore = _snapshot(value)
            value += 1
            changed = value.clone()
            restore()
            assert torch.equal(value, changed)
        whole = torch.zeros(1 << 20, dtype=torch.int8)
        restore = _snapshot(whole)
        whole += 1
        restore()
        assert not whole.any()

    def test_arrays_that_nobody_may_write_to(self):
        fixed = numpy.zeros(2)
        fixed.flags.writeable = False
        _snapshot([fixed])()
        assert fixed.tolist() == [0, 0]


@dataclasses.dataclass(frozen=True)
class Frozen:
    """Says that nobody changes it."""

    value: int


class MoreThanSlots(Slotted):
    """Has a dictionary of attributes besides."""


OUTSIDE = Owner()
OUTSIDE_HOOKED = Owner()


def using_outside(x):
    OUTSIDE.keep(x)


class TestWhatIsLookedAt:
    """Of modules, code and classes: each by a name that a reader of the code knows, and once."""

    @staticmethod
    def names(module):
        return list(KeptAside(module).content())

    def test_a_module_outside_is_looked_at_once(self):
        """By the first name that is met; what it refers to of the block itself has its own."""
        module, owner = nn.Sequential(nn.Identity()), Owner()
        module.first, module.second = [owner], {"by name": owner}
        owner.inside = module
        module[0].mark = 0
        assert self.names(module) == [
            *("first", "second", "0.mark", "first.log", "first.part.last", "first.buffers"),
        ]

    def test_a_part_of_two_modules_outside(self):
        first, second, module = Owner(), Owner(), nn.Identity()
        second.part = first.part
        module.owners = [first, second]
        found = self.names(module)
        assert found.count("owners.part.last") == 1
        assert sum(name.startswith("owners.buffers") for name in found) == 1
        aside = KeptAside(module)
        assert [path for path, _ in aside._modules] == ["", "owners", "owners.part", "owners"]

    def test_a_module_that_code_names_is_no_global_of_its_own(self):
        module = nn.Identity()
        module.helper = using_outside
        assert self.names(module) == ["helper", "OUTSIDE.log", "OUTSIDE.part.last", "OUTSIDE.buffers"]

    def test_a_module_without_buffers_has_none_to_look_at(self):
        module = nn.Identity()
        vars(module)["owner"] = nn.Identity()
        assert self.names(module) == ["owner"]

    def test_modules_that_attributes_refer_to(self):
        module, inner = nn.Identity(), [nn.Identity() for _ in range(4)]
        vars(module)["one"] = inner[0]
        module.listed, module.named, module.number = (inner[1], 7), {"a": inner[2], "b": [inner[3]]}, 3
        assert list(_modules_in(module)) == [("one", inner[0]), ("listed", inner[1]), ("named", inner[2])]

    def test_what_is_gone_or_new_and_was_not_copied_cannot_be_put_back(self):
        large = torch.zeros(1, dtype=torch.int8).expand((1 << 20) + 1)
        for before, now in ((large, None), (None, large)):
            module = nn.Identity()
            module.load, module.other = before, 0
            remembered = KeptAside(module).remember()
            module.other = 1
            assert (remembered.is_all_known(), remembered.has_uncopied) == (True, before is large)
            module.load = now
            assert not remembered.is_all_known()

    def test_random_numbers_of_python_and_numpy(self):
        """A trial leaves them where they were."""
        for remember in (remember_generators, lambda: KeptAside(nn.Identity()).remember().put_back):
            put_back = remember()
            drawn = random.random(), numpy.random.rand()
            put_back()
            assert (random.random(), numpy.random.rand()) == drawn

    def test_what_a_class_holds_for_all(self):
        """No code, nothing that acts as an attribute, nothing that Python put there; that of its bases, too."""
        found = dict(_globals_of(Derived()))
        assert list(found) == ["Derived.own", "Based.log", "Based.number"]
        assert found["Based.log"].get() is Based.log

    def test_whose_code_a_module_of_python_is(self):
        assert _is_users({"__name__": "__main__", "__file__": "/program/main.py"})
        assert _is_users({"__name__": "torching"})
        for known in (
            {},
            {"__name__": "torch.nn"},
            {"__name__": "sere_compile.backend"},
            {"__name__": "anything", "__file__": torch.__file__},
            {"__name__": "json", "__file__": json.__file__},
            vars(numpy),
            vars(sys),
        ):
            assert not _is_users(known)

    def test_what_is_imported_is_nothing_that_a_call_keeps(self):
        """transformers' models name `sys.modules`: put back, it would undo what a compile has imported."""
        assert not _is_kept(sys.modules)
        assert all(value is not sys.modules for _, value in _named(reads_what_is_imported))

    def test_whose_class_it_is(self):
        assert _is_own_class(Tracker)
        gone = type("Gone", (), {"__module__": "a module that is gone"})
        for kind in (int, nn.Linear, collections.OrderedDict, gone):
            assert not _is_own_class(kind)

    def test_functions_that_a_call_runs(self):
        """Behind partials, methods, wrappers and properties."""
        wrapper = functools.wraps(helper)(lambda x: helper(x))
        assert _called(helper) == [helper]
        assert _called(Statistics.note) == [vars(Statistics)["note"].__func__]
        assert _called(wrapper) == [wrapper, helper]
        assert _called(functools.partial(wrapper, 1)) == [wrapper, helper]
        assert _called(functools.partial(Recorder().record)) == [Recorder.record]
        assert _called(Recorder().record) == [Recorder.record]
        assert _called(property(helper)) == [helper]
        assert _called(property(helper, another_helper)) == [helper, another_helper]
        wrapping = type("Wrapping", (), {"__wrapped__": helper})
        for value in (None, 3, len, Tracker, Tracker(), wrapping):
            assert _called(value) == []

    def test_endless_wrappers_end(self):
        def one(x):
            return x

        one.__wrapped__ = one
        assert _called(one) == [one] * 4

    def test_functions_of_classes(self):
        """The methods of the user's own, with those of its bases; a module's are looked at as a module's."""
        kinds = set()
        assert _functions(Derived, kinds) == [Based.seen.fget, Based.helper]
        assert kinds == {Derived, Based}
        kinds.clear()
        found = _functions(Sub(), kinds)
        assert set(found) == {Sub.more, Recorder.__init__, Recorder.record, Recorder.__call__}
        assert kinds == {Sub, Recorder}
        for value in (nn.Identity(), Keeping(), 3, "a", [], collections.OrderedDict()):
            kinds = set()
            assert (_functions(value, kinds), kinds) == ([], set())
        assert _functions(helper, kinds) == [helper]

    def test_names_in_a_function(self):
        """Of its module, of another one of the user's, and of none that was installed."""

        def reading(x, given=ARRAY, *, by_name=TENSOR):
            return [SEEN, json.loads, ELSEWHERE.names, never_defined, (lambda: TRACKED)()]  # noqa: F821

        found = list(_named(reading))
        assert [name for name, _ in found] == [
            *("SEEN", "json", "ELSEWHERE", "names", "TRACKED", "given", "by_name"),
        ]
        values = dict(found)
        assert values["names"] is ELSEWHERE.names
        assert (values["given"] is ARRAY, values["by_name"] is TENSOR) == (True, True)

    def test_names_that_a_function_sets(self):
        """It is the place that is put back, of a module or of a closure that is filled."""
        found = list(_named(Keeping.in_a_variable))
        assert [name for name, _ in found] == ["CALLS", "CALLS"]
        assert found[0][1] == _Variable(globals(), "CALLS")
        count, _ = counting()
        assert [name for name, value in _named(count) if isinstance(value, _Variable)] == ["calls"]

        def unfilled():
            return later

        assert list(_named(unfilled)) == []
        later = 1
        assert list(_named(unfilled)) == [("later", later)]

    def test_what_functions_hold_of_their_own(self):
        assert ("noting", noting.__dict__) in list(_named(noting))
        assert list(_named(helper)) == [("another_helper", another_helper)]

    def test_variables(self):
        """A context variable that nobody has set is None, and so is what a class or a module does not hold."""
        unset = contextvars.ContextVar("unset")
        assert [_Variable(holder, "missing").get() for holder in (unset, Derived, {})] == [None] * 3
        number = contextvars.ContextVar("number")
        own = {"number": 1}
        cell = (lambda held: lambda: held)(1).__closure__[0]

        def check():
            number.set(1)
            holder = type("Holder", (), {"number": 1})
            for variable in (_Variable(holder, "number") for holder in (holder, own, cell, number)):
                assert variable.get() == 1
                variable.put(2)
                assert variable.get() == 2
            assert (holder.number, own["number"], cell.cell_contents, number.get()) == (2, 2, 2, 2)

        contextvars.copy_context().run(check)

    def test_a_class_is_looked_at_once(self):
        """Though two functions use it, and also where it has none."""
        module = nn.Identity()
        module.first, module.second = (lambda x: Statistics.note(x)), (lambda x: Statistics.note(-x))
        module.third = lambda x: Methodless.number + x
        names = [name for name, _ in _globals_of(module)]
        assert sorted(names) == ["Methodless.number", "Statistics.calls", "Statistics.log"]

    def test_functions_of_libraries_are_not_followed(self):
        module = nn.Identity()
        module.helper = lambda x: LOADS(x)
        assert list(_globals_of(module)) == []

    def test_numbers_that_a_hook_is_called_with_are_no_globals(self):
        module, recorder = nn.Identity(), Recorder()
        module.register_forward_hook(functools.partial(recorder.record, 3, "a", named=recorder, other=4))
        module.register_forward_hook(functools.partial(functools.partial(Recorder.record, recorder), 5))
        assert self.names(module) == ["Recorder"]

    def test_what_libraries_hold_is_not_kept(self):
        normal = torch.distributions.Normal(0.0, 1.0)
        for value in (logging.getLogger("any"), torch.nn.init, torch.Generator(), json.JSONDecoder, json, normal):
            assert not _is_kept(value)
        for value in (iter([]), numpy.zeros(1), random.Random(), Slotted()):
            assert _is_kept(value)


class Methodless:
    number = 1


class Based(nn.Module):
    """What it holds is its subclasses' as well."""

    log: list = []  # noqa: RUF012 - as programs have it
    number = 0
    inner = Tracker
    library = json

    @property
    def seen(self):
        return 1

    @staticmethod
    def helper(x):
        return x


class Derived(Based):
    own = 1


class Sub(Recorder):
    def more(self):
        return self.record
