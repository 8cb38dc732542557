"""A private copy of the block around a router: what of it is the experts', and that the model is not touched."""

import copy
import functools
import gc
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sere_compile.experts.trial_block import ExpertSlices, Settings, TrialBlock, fingerprint

EXPERTS, HIDDEN = 4, 6


class Block(nn.Module):
    def __init__(self, dtype=torch.bfloat16):
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False, dtype=dtype)
        self.stacked = nn.Parameter(torch.zeros(EXPERTS, 3, HIDDEN, dtype=dtype))
        self.flat = nn.Parameter(torch.zeros(EXPERTS * 5, 3, dtype=dtype))
        self.mlps = nn.ModuleList(nn.Linear(HIDDEN, 2, dtype=dtype) for _ in range(EXPERTS))
        self.listed = nn.ParameterList(nn.Parameter(torch.zeros(3, dtype=dtype)) for _ in range(EXPERTS))
        self.longer = nn.Parameter(torch.zeros(EXPERTS + 1, 3, HIDDEN, dtype=dtype))  # one that computes nothing
        self.norm = nn.LayerNorm(HIDDEN, dtype=dtype)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Block()
        self.head = nn.Linear(HIDDEN, 1000)
        self.block.__dict__["parent"] = self  # as models that keep a reference to themselves do


def trial(model):
    return TrialBlock(model.block, model.block.gate.weight, model, EXPERTS, EXPERTS + 1)


def test_the_copy_has_random_float32_parameters_and_the_model_keeps_its_own():
    model = Model()
    block = trial(model)
    assert block.module is not model.block
    assert block.weight is block.module.gate.weight
    assert {p.dtype for p in block.module.parameters()} == {torch.float32}
    assert bool((block.module.stacked != 0).all())
    assert bool((model.block.stacked == 0).all())
    assert model.block.stacked.dtype == torch.bfloat16


def test_modules_outside_the_block_are_not_copied():
    model = Model()
    assert trial(model).module.parent.head is model.head


def test_a_process_group_is_shared():
    """Layers made for several devices hold theirs, in objects of their own; it cannot be copied."""
    model = Model()
    store = torch.distributed.HashStore()
    model.block.dispatcher = SimpleNamespace(group=torch.distributed.ProcessGroup(store, 0, 1), sizes=[1])
    copied = trial(model).module.dispatcher
    assert copied.group is model.block.dispatcher.group
    assert copied.sizes is not model.block.dispatcher.sizes
    with pytest.raises(TypeError, match="ProcessGroup"):  # elsewhere as before
        copy.deepcopy(copied)


def test_candidates_are_told_by_their_sizes():
    found = {(one.name, one.dim, one.by_turns) for one in trial(Model()).candidates()}
    assert found == {
        ("stacked", 0, False),
        ("flat", 0, False),
        ("flat", 0, True),
        ("longer", 0, False),
        ("mlps.*.weight", None, False),
        ("mlps.*.bias", None, False),
        ("listed.*", None, False),
    }


def test_parts_in_a_row_and_by_turns():
    """As peft has the two factors that it adds to stacked weights."""
    first, second = torch.arange(8.0).view(8, 1), torch.arange(8.0).view(1, 8)
    in_a_row, by_turns = ExpertSlices("a", (first,), 0), ExpertSlices("b", (second,), 1, by_turns=True)
    assert [part.flatten().tolist() for part in in_a_row.parts(4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert [part.flatten().tolist() for part in by_turns.parts(4)] == [[0, 4], [1, 5], [2, 6], [3, 7]]
    by_turns.parts(4)[1].zero_()
    assert second.flatten().tolist() == [0, 0, 2, 3, 4, 0, 6, 7]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.bfloat16])
def test_buffers_of_few_bits(dtype):
    """They are drawn as others are: torch compares no FP8 numbers with 0."""
    block = Block()
    block.register_buffer("few", torch.ones(4, 2).to(dtype))
    drawn = TrialBlock(block, block.gate.weight, block, 4, 4).module.few
    assert (drawn.dtype, bool((drawn > 0).all())) == (torch.float32, True)


@pytest.mark.parametrize("way", ["add_", "data", "size", "norm", "replaced"])
def test_buffers_come_back_and_tell_that_they_were_written(way):
    """Also where no version counter does."""
    block = nn.BatchNorm1d(4)
    block.weight = nn.Parameter(torch.ones(4))
    trial = TrialBlock(block, block.weight, block, 4, 4)
    before = {name: buffer.clone() for name, buffer in trial.module.named_buffers()}
    changes = {
        "add_": lambda module: module.running_var.add_(1),
        "data": lambda module: module.running_var.data.add_(1),
        "size": lambda module: setattr(module.running_var, "data", torch.zeros(2, 4)),
        "norm": lambda module: module(torch.randn(3, 4)),
        "replaced": lambda module: module.register_buffer("running_var", torch.zeros(4)),
    }
    with torch.no_grad(), trial.state_restored() as written:
        assert written() == []
        changes[way](trial.module)
        assert len(written()) == (3 if way == "norm" else 1)
    assert all(torch.equal(buffer, before[name]) for name, buffer in trial.module.named_buffers())


def test_exchanged_parameters_come_back():
    block = trial(Model())
    slices = [one for one in block.candidates() if not one.by_turns]
    before = [[part.clone() for part in one.parts(EXPERTS)] for one in slices]
    with block.exchanged(slices, {0: 2, 3: 1}):
        for one, parts in zip(slices, before, strict=True):
            for expert, source in enumerate((2, 1, 2, 1)):
                assert torch.equal(one.parts(EXPERTS)[expert], parts[source])
    for one, parts in zip(slices, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.parts(EXPERTS), parts, strict=True))


def test_zeroed_parameters_come_back():
    block = trial(Model())
    slices = block.candidates()
    before = [[part.clone() for part in one.parts(EXPERTS)] for one in slices]
    with block.zeroed(slices[:1]):
        assert not any(part.any() for part in slices[0].parts(EXPERTS))
        assert all(part.any() for part in slices[-1].parts(EXPERTS))
    for one, parts in zip(slices, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.parts(EXPERTS), parts, strict=True))


def test_disturbing_changes_one_expert_for_a_while():
    block = trial(Model())
    [stacked] = [one for one in block.candidates() if one.name == "stacked"]
    before = block.module.stacked.detach().clone()
    with block.disturbed(stacked, 1):
        changed = (block.module.stacked != before).flatten(1).any(1)
        assert changed.tolist() == [False, True, False, False]
    assert torch.equal(block.module.stacked, before)


def test_a_variance_stays_above_zero():
    """Below, all that experts compute would be NaN, also of tokens that do not name them."""
    block = trial(Model())
    variances = [torch.tensor([0.5, 2.0]) for _ in range(EXPERTS)]
    with block.disturbed(ExpertSlices("of norms", tuple(variances), None), 1):
        assert [bool((one > 0).all()) for one in variances] == [True] * EXPERTS
        assert [one.tolist() != [0.5, 2.0] for one in variances] == [False, True, False, False]


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_whole_numbers_are_disturbed_too(dtype):
    """Packed weights are some."""
    model = Model()
    model.block.packed = nn.Buffer(torch.zeros(EXPERTS, 7, dtype=dtype))
    block = trial(model)
    [packed] = [one for one in block.candidates() if one.name == "packed"]
    with block.disturbed(packed, 1):
        assert [bool(row.any()) for row in block.module.packed] == [False, True, False, False]
    assert not block.module.packed.any()


def test_a_nan_is_no_change():
    """Memory that is filled later may hold some."""
    block = nn.BatchNorm1d(4)
    block.running_var.fill_(float("nan"))
    trial = TrialBlock(block, block.weight, block, 4, 4)
    trial.module.running_var.fill_(float("nan"))
    with torch.no_grad(), trial.state_restored() as written:
        assert written() == []
        trial.module.running_var.data[0] = 1
        assert len(written()) == 1
    assert trial.module.running_var.isnan().all()


def test_a_fingerprint_leaves_out_places_and_numbers_in_tensors():
    first, second = Block(), Block()
    first.layer_idx, second.layer_idx = 0, 7
    with torch.no_grad():
        second.stacked.add_(1)
    assert fingerprint(first) == fingerprint(second)
    second.scale = 2.0
    assert fingerprint(first) != fingerprint(second)


class Reading(nn.Module):
    """Its code reads some attributes, one of them in a function of its own, and counts its calls."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.scales, self.offline, self.calls, self.unread = [1.0, 1.0], set(), 0, 0

    def forward(self, x):
        self.calls += 1
        return [self.linear(x) * scale for scale in self.scales if (lambda: not self.offline)()]


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (lambda block: block.inner.scales.append(2.0), False),
        (lambda block: block.inner.offline.add(1), False),
        (lambda block: setattr(block.inner, "scales", (1.0, 2.0)), False),
        (lambda block: delattr(block.inner, "offline"), False),
        (lambda block: block.inner.linear.register_forward_hook(lambda *given: None), False),
        (lambda block: setattr(block.inner, "scales", [1.0, 1.0]), True),
        (lambda block: setattr(block.inner, "calls", 7), True),
        (lambda block: setattr(block.inner, "unread", 7), True),
        (lambda block: setattr(block.inner.linear, "in_features", 7), True),
        (lambda block: block.inner.linear.weight.data.zero_(), True),
    ],
)
def test_settings_are_what_code_reads_and_no_call_writes(change, same):
    block = nn.Module()
    block.inner = Reading()
    settings = Settings(block, frozenset({"inner.calls"}))
    assert settings.are_the_same()
    change(block)
    assert settings.are_the_same() is same


LIMIT, COUNT = 3, 0


class Config:
    """As transformers' models have one."""

    def __init__(self):
        self.capacity, self.unread, self.nested = 7, 7, [7]


class ReadingElsewhere(nn.Module):
    """Its code reads an object that it holds, and globals, one of which it counts in."""

    def __init__(self, config):
        super().__init__()
        self.config = config

    def forward(self, x):
        global COUNT
        COUNT += 1
        return x[: min(self.config.capacity, LIMIT)], COUNT, self.config.nested


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (lambda patch, config: patch.setattr(config, "capacity", 1), False),
        (lambda patch, config: patch.delattr(config, "capacity"), False),
        (lambda patch, config: patch.setitem(globals(), "LIMIT", 1), False),
        (lambda patch, config: patch.setitem(globals(), "COUNT", 9), True),
        (lambda patch, config: patch.setattr(config, "unread", 1), True),
        (lambda patch, config: config.nested.append(1), True),
    ],
    ids=["an attribute", "one that is gone", "a global", "a count", "what nobody reads", "a list that calls may write"],
)
def test_settings_elsewhere(change, same, monkeypatch):
    config = Config()
    block = nn.Sequential(ReadingElsewhere(config))
    settings, before = Settings(block, frozenset()), fingerprint(block)
    assert settings.are_the_same()
    change(monkeypatch, config)
    assert settings.are_the_same() is same
    assert (fingerprint(block) == before) is same


def test_an_object_that_holds_the_block_is_none_of_settings():
    """It would be kept alive by them."""
    config = Config()
    block = ReadingElsewhere(config)
    config.owner = block
    settings = Settings(block, frozenset())
    config.capacity = 1
    assert settings.are_the_same()


@pytest.mark.parametrize("made", [lambda: lambda x: x, lambda: slice(2), Config, lambda: functools.partial(print)])
def test_an_object_that_is_gone_leaves_its_address_and_not_its_identity(made):
    """What is made next stands where it stood, and is another function or configuration."""
    block = ReadingElsewhere(None)
    for _ in range(20):
        block.config = made()
        before, settings = fingerprint(block), Settings(block, frozenset())
        assert (fingerprint(block), settings.are_the_same()) == (before, True)
        block.config = None
        block.config = made()
        assert fingerprint(block) != before
        assert not settings.are_the_same()
        block.config = None


def test_a_setting_that_is_not_a_number():
    """It would have the heap scanned in every call."""
    block = nn.Sequential(Reading())
    block[0].scales = [float("nan")]
    settings = Settings(block, frozenset())
    block[0].scales = [float("nan")]
    assert settings.are_the_same()
    block[0].scales = [1.0]
    assert not settings.are_the_same()


def test_settings_keep_no_block_alive():
    settings = Settings(Reading(), frozenset())
    gc.collect()
    assert not settings.are_the_same()


@pytest.mark.parametrize(
    "change",
    [
        lambda block: setattr(block, "_scales", [1.0, 2.0]),
        lambda block: block.offline.add(2),
        lambda block: block.limits["by expert"].append(3),
        lambda block: block.register_forward_hook(lambda *given: given[-1] * 2),
        lambda block: block.register_forward_pre_hook(lambda *given: None),
    ],
    ids=["an attribute of its own", "a set", "a list in a dictionary", "a hook", "a hook ahead"],
)
def test_a_fingerprint_tells_what_code_may_depend_on(change):
    first, second = Block(), Block()
    for block in (first, second):
        block.offline, block.limits, block._scales = {1}, {"by expert": [1, 2]}, [1.0, 1.0]
    assert fingerprint(first) == fingerprint(second)
    change(second)
    assert fingerprint(first) != fingerprint(second)


def scaling(factor, log):
    return lambda module, given, result: log.append(result) or result * factor


def test_what_each_layer_has_of_its_own_tells_none_apart():
    """Objects in private attributes and of hooks, but no number there."""
    layers = [Block() for _ in range(3)]
    for layer, factor in zip(layers, (1.0, 1.0, 2.0), strict=True):
        layer._cache = {"last": torch.zeros(2)}
        layer.register_forward_hook(scaling(factor, [torch.zeros(2)]))
        layer.register_forward_pre_hook(SimpleNamespace().__init__)
    assert fingerprint(layers[0]) == fingerprint(layers[1]) != fingerprint(layers[2])
