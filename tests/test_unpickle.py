"""The pickle machine: equal to Python's own on plain data, inert on all else, bounded on hostile input."""
from __future__ import annotations

import math
import pickle
import time
from collections import OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.unpickle import Global, Instance, Refused, Storage, TensorRef, find, rebuild_tensor, unpickle

MALFORMED = (ValueError, IndexError, KeyError, TypeError, AttributeError)

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(exclude_categories=["Cs"]))
keys = st.text(st.characters(exclude_categories=["Cs"])) | st.integers(-(2**62), 2**62)
trees = st.recursive(
    scalars,
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(keys, inner) | st.sets(keys, max_size=1),
    max_leaves=20,
)


@settings(max_examples=60, deadline=None)
@given(tree=trees, protocol=st.integers(0, 5))
def test_plain_data_equals_pythons_reading(tree, protocol):
    data = pickle.dumps(tree, protocol)
    assert repr(unpickle(data)) == repr(pickle.loads(data))


def test_shared_parts_and_cycles():
    shared = [1]
    tree = unpickle(pickle.dumps({"a": shared, "b": shared}))
    assert tree["a"] is tree["b"]
    loop: list = []
    loop.append(loop)
    read = unpickle(pickle.dumps(loop))
    assert read[0] is read


@pytest.mark.parametrize("protocol", range(6))
def test_ordered_dict_is_a_dict(protocol):
    assert unpickle(pickle.dumps(OrderedDict(b=1, a=[2]), protocol)) == {"b": 1, "a": [2]}


def test_a_class_becomes_an_instance_with_its_state():
    made = unpickle(b"\x80\x02cmodels.yolo\nModel\n)\x81}X\x01\x00\x00\x00aK\x07sb.")
    assert isinstance(made, Instance)
    assert (made.cls.module, made.cls.name, made.state) == ("models.yolo", "Model", {"a": 7})
    assert made.get("a") == 7
    assert made.get("b") is None


@pytest.mark.parametrize("attribute", ["__class__", "__dict__", "__setstate__", "__reduce__", "cls", "state", "get", "__slots__", "__del__"])
def test_state_never_becomes_attributes(attribute):
    name = attribute.encode()
    made = unpickle(b"\x80\x02cmodels.yolo\nModel\n)\x81}X" + len(name).to_bytes(4, "little") + name + b"K\x07sb.")
    assert type(made) is Instance
    assert isinstance(made.cls, Global)
    assert made.state == {attribute: 7}


@pytest.mark.parametrize(("module", "name"), [("models.yolo", "os.system"), ("torch.nn", "Module.load"), ("__main__", "a.b"), ("models", "x" * 300)])
def test_dotted_and_endless_names_are_refused(module, name):
    with pytest.raises(Refused):
        find(module, name)


@pytest.mark.parametrize("module", ["modelsx", "model", "torch.nnx", "torch", "utilsx.a", " models", "ultralytics2", "torch.nn\0", "", "MODELS"])
def test_packages_are_matched_whole(module):
    with pytest.raises(Refused):
        find(module, "system")


@pytest.mark.parametrize("data", [
    b"", b".", b"\x80\x02", b"N", b"\x80\x02.", b"0.", b"R.", b"N)R.", b"b.", b"Nb.", b"(.", b"s.", b"K\x01K\x02s.", b"(a.", b"}(K\x01u.",
    b"]K\x01e.", b"h\x05.", b"r\xff\xff\xff\xff.", b"Nr\xff\xff\xff\xff.", b"Q.", b"NQ.", b"Pabc\n.", b"]]\x93.",
    b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.", b"\x95\xff", b"\x97.", b"\x98.", b"\x96\x01\x00\x00\x00\x00\x00\x00\x00a.", b"(t", b"\x85.",
    b"N\x86.", b"\x87.", b"1.", b"t.", b"\x90.", b"]\x90.", b"\x91.", b"o.", b"(o.", b"(iabc\n.", b"cos", b"c\n\n.",
    b"I" + b"9" * 5000 + b"\n.", b"X\x03\x00\x00\x00\xed\xa0\x80.", b"\x8c\x01\xff.", b"}]Ns.", b"\x8f(]\x90.",
])  # fmt: skip
def test_malformed_pickles_raise_and_nothing_else(data):
    with pytest.raises((*MALFORMED, Refused)):
        result = unpickle(data)
        assert result == "malformed pickles make nothing", result


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=60))
def test_random_bytes(data):
    try:
        unpickle(data + b".")
    except (*MALFORMED, Refused):
        pass


def deep_tuples(levels: int, step: bytes) -> bytes:
    return b")" + step * levels


@pytest.mark.parametrize("data", [
    b"}" + deep_tuples(200_000, b"\x85") + b"Ns.",  # hashing a tuple that deep overflows the C stack
    b"}" + deep_tuples(200, b"2\x86") + b"Ns.",  # hashing takes 2**200 steps
    b"\x8f(" + deep_tuples(200, b"2\x86") + b"\x90.",
    b"c__builtin__\nset\n](" + deep_tuples(200, b"2\x86") + b"e\x85R.",
    b"ccollections\nOrderedDict\n](" + deep_tuples(200, b"2\x86") + b"N\x86e\x85R.",
    b"}\x8b\x00\x00\x10\x00" + b"\x01" * (1 << 20) + b"Ns.",  # an integer of a million bytes as a key
    b"}G?\xf0\x00\x00\x00\x00\x00\x00Ns.",  # floats and long integers can be made to collide
    b"N0" * 200_000 + b".",
    b"c__builtin__\nlist\nq\x00](" + b"N" * 100_000 + b"e\x85q\x01" + b"h\x00h\x01R0" * 100 + b".",  # a long list copied again and again
    b"Nr\x00\x00\x00\x7f.",
    b"}(" + b"".join(b"J" + (n << 12).to_bytes(4, "little") + b"N" for n in range(20_000)) + b"u.",  # whole numbers collide, too
    b"N" + b"".join(b"r" + (n << 8).to_bytes(4, "little") for n in range(1, 1000)) + b".",  # in the memo likewise
], ids=range(12))  # fmt: skip
def test_bombs_are_refused_in_time(data, monkeypatch):
    monkeypatch.setattr("utils.unpickle.MAX_STEPS", 300_000)
    start = time.perf_counter()
    with pytest.raises(MALFORMED):
        unpickle(data)
    assert time.perf_counter() - start < 10


def test_deep_nesting_is_read_and_freed():
    """Neither reading nor freeing recurses."""
    for step in (b"\x85", b"cmodels\nA\n)\x81"):
        assert unpickle(b")" + step * 50_000 + b".") is not None


def tensor(offset=0, size=(2, 3), stride=(3, 1), numel=6) -> TensorRef:
    return rebuild_tensor(Storage("0", torch.float32, numel), offset, size, stride, False, {})


@pytest.mark.parametrize("change", [
    {}, {"size": (), "stride": ()}, {"size": (0, 5), "stride": (5, 1)}, {"size": (3, 2), "stride": (1, 3)},
    {"offset": 3, "size": (3,), "stride": (1,)}, {"numel": 0, "size": (0,), "stride": (1,)},
])  # fmt: skip
def test_tensors_inside_their_storage(change):
    ref = tensor(**change)
    assert math.prod(ref.size) <= ref.storage.numel


@pytest.mark.parametrize("change", [
    {"offset": -1}, {"offset": 1}, {"offset": 2**70}, {"offset": None}, {"offset": 0.0}, {"offset": True}, {"size": (2, -3)}, {"size": (2,)},
    {"size": 6}, {"size": (2, 3.0)}, {"size": (2**62, 2**62)}, {"size": (1,) * 17, "stride": (1,) * 17},
    {"stride": (3, -1)}, {"stride": (2**63 - 1, 1)}, {"stride": (4, 1)}, {"size": (7,), "stride": (0,)}, {"size": "ab", "stride": "ab"},
    {"size": (10**9, 10**9), "stride": (0, 0)}, {"numel": 5},
])  # fmt: skip
def test_tensors_beyond_their_storage(change):
    with pytest.raises(ValueError):
        tensor(**change)


def test_a_tensor_without_a_storage():
    with pytest.raises(ValueError, match="storage"):
        rebuild_tensor(b"raw", 0, (1,), (1,))


@pytest.mark.parametrize("identity", [
    b"]", b")", b"X\x07\x00\x00\x00storage", b"(X\x07\x00\x00\x00storageNX\x01\x00\x00\x000NK\x01t",
    b"(X\x07\x00\x00\x00storagectorch\nSize\nX\x01\x00\x00\x000NK\x01t", b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nK\x01NK\x01t",
    b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000NJ\xff\xff\xff\xfft",
    b"(X\x06\x00\x00\x00modulectorch\nFloatStorage\nX\x01\x00\x00\x000NK\x01t", b"(NNNNNNNNt",
    b"(X\x07\x00\x00\x00storagecmodels\nFloatStorage\nX\x01\x00\x00\x000NK\x01t",
    b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\xff\x00\x00\x00" + b"0" * 255 + b"NK\x01t",
])  # fmt: skip
def test_odd_persistent_ids(identity):
    with pytest.raises(ValueError):
        unpickle(b"\x80\x02" + identity + b"Q.")
