"""The pickle reader gives what pickle gives for plain data, and refuses everything else."""

import builtins
import io
import os
import pickle
import struct
import subprocess
import warnings

import numpy as np
import pytest

from vapi_jax.weights.safe_pickle import (
    NUMPY,
    PickleRefused,
    Record,
    Vocabulary,
    check_tree,
    load,
    loads,
)

ARRAYS = {
    "a": np.arange(12, dtype=np.float32).reshape(3, 4),
    "fortran": np.asfortranarray(np.arange(6, dtype=np.int64).reshape(2, 3)),
    "big endian": np.array([1.5, -2.0], dtype=">f8"),
    "flags": np.array([True, False]),
    "empty": np.zeros((0, 3), np.float16),
    "number": np.array(7, np.uint8),
}


@pytest.mark.parametrize("protocol", [3, 4])
def test_plain_data_round_trips(protocol, tmp_path):
    shared = [1, 2.5, None]
    data = {
        "nested": ARRAYS,
        "list": [shared, shared, (), (1,), (1, 2, 3, 4)],
        "text": "é",
        3: b"x",
    }
    data["large"] = [-1, 255, 65536, 2**40, -(2**70), True, False]
    path = tmp_path / "weights.pkl"
    path.write_bytes(pickle.dumps(data, protocol))
    got = load(path, NUMPY)
    for key, array in ARRAYS.items():
        # numpy's own loading turns foreign byte order into the machine's.
        assert got["nested"][key].dtype == array.dtype.newbyteorder("=")
        np.testing.assert_array_equal(got["nested"][key], array)
    assert {k: v for k, v in got.items() if k != "nested"} == {
        k: v for k, v in data.items() if k != "nested"
    }
    assert got["list"][0] is got["list"][1]


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    "function, argument",
    [
        (os.system, "touch {}"),
        (builtins.eval, "open('{}', 'w')"),
        (subprocess.call, ["touch", "{}"]),
    ],
)
def test_calls_are_refused_and_not_made(function, argument, protocol, tmp_path):
    trace = tmp_path / "was_here"
    fill = str(trace).join
    argument = (
        fill(argument.split("{}"))
        if isinstance(argument, str)
        else [fill(part.split("{}")) for part in argument]
    )
    data = pickle.dumps({"weights": [Call(function, argument)]}, protocol)
    with pytest.raises(PickleRefused) as error:
        loads(data, NUMPY, source="evil.ckpt")
    message = str(error.value)
    assert "evil.ckpt" in message and function.__name__ in message and "not allowed" in message
    assert "safetensors" in message
    assert not trace.exists()


def array_pickle(shape, raw=b"\0" * 16, code="f4", order="<"):
    """A hand-written stream that builds one array with any claims about itself."""

    def text(s):
        return b"X" + struct.pack("<I", len(s)) + s.encode()

    def number(n):
        return b"\x8a\x09" + n.to_bytes(9, "little", signed=True)

    return (
        b"\x80\x03cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85C\x01b\x87R"
        + b"(K\x01("
        + b"".join(map(number, shape))
        + b"tcnumpy\ndtype\n"
        + text(code)
        + b"\x89\x88\x87R(K\x03"
        + text(order)
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb\x89B"
        + struct.pack("<I", len(raw))
        + raw
        + b"tb."
    )


def test_handwritten_array_is_accepted():
    np.testing.assert_array_equal(loads(array_pickle((2, 2)), NUMPY), np.zeros((2, 2), np.float32))


@pytest.mark.parametrize(
    "data, message",
    [
        (array_pickle((2**40, 2**40)), "needs .* bytes, 16 are there"),
        (array_pickle((2**62, 4)), "needs"),
        (array_pickle((-4,)), "not a tuple of up to 32 sizes"),
        (array_pickle((1,) * 33, b"\0" * 4), "not a tuple of up to 32 sizes"),
        (array_pickle((2,), code="O8"), "numpy dtype 'O8'"),
        (array_pickle((2,), code="V8"), "numpy dtype 'V8'"),
        (array_pickle((4,), order="?"), "plain number"),
        (b"\x80\x03cnumpy\ndtype\n.", "GlobalName"),
        (b"\x80\x03cnumpy\nndarray\n)R.", "not called"),
        (b"\x80\x03cnumpy\nload\n.", "numpy.load"),
        (b"\x80\x04\x8c\x05numpy\x8c\x0bndarray.all\x93.", "ndarray.all"),
        (b"\x80\x03}K\x01b.", "state for an object of type dict"),
        (b"\x80\x03K\x01K\x02\x86K\x03R.", "not an allowed global"),
        (b"\x80\x03(ios\nsystem\n.", "opcode INST"),
        (b"\x80\x02cos\nsystem\n)\x81.", "os.system"),
        (b"\x80\x02)\x81.", "opcode NEWOBJ"),
        (b"\x80\x02\x82\x01.", "opcode EXT1"),
        (b"\x80\x02K\x01Q.", "opcode BINPERSID"),
        (b"\x80\x05\x97.", "opcode NEXT_BUFFER"),
        (b"\xff\x00.", "opcode b'\\\\xff' unknown|refused at byte 0"),
        (b"\x80\x02h\x05.", "memo entry 5"),
        (b"\x80\x02q\x05.", "nothing to put"),
        (b"\x80\x02.", "0 objects"),
        (b"\x80\x02K\x01K\x02.", "2 objects"),
        (b"\x80\x02(.", "objects are left|stack"),
        (b"\x80\x02t.", "no mark"),
        (b"\x80\x02}K\x01s.", "expected|empty"),
        (b"\x80\x02}(K\x01u.", "key without a value"),
        (b"\x80\x02}K\x01\x85K\x02s.", "dictionary key of type tuple"),
        (b"\x80\x02K\x01K\x02a.", "a list was expected"),
        (b"\x8d" + struct.pack("<Q", 2**63) + b"x.", "refused at byte"),
        (b"\x8e" + struct.pack("<Q", 2**50) + b"x.", "refused at byte"),
        (b"", "refused"),
    ],
)
def test_attacks_and_damage(data, message):
    with pytest.raises(PickleRefused, match=message):
        loads(data, NUMPY, source="file.ckpt")


def test_every_truncation_is_refused():
    data = pickle.dumps({"a": ARRAYS["a"], "b": [1, "two", 3.0]}, 3)
    loads(data, NUMPY)
    for length in range(len(data)):
        with pytest.raises(PickleRefused):
            loads(data[:length], NUMPY)


def test_every_flipped_byte_gives_data_or_a_refusal():
    data = pickle.dumps({"a": ARRAYS["a"], "b": [1, "two", 3.0]}, 4)
    refused = 0
    for position in range(len(data)):
        altered = bytearray(data)
        altered[position] ^= 0xFF
        try:
            loads(bytes(altered), NUMPY)
        except PickleRefused:
            refused += 1
    assert refused > len(data) // 4


def test_memo_bombs_cost_nothing():
    # 2^200 leaves by pairing a memoised tuple with itself: never walked, hashed or printed.
    stream = b"\x80\x02]K\x01q\x01a"
    for _ in range(200):
        stream += b"h\x01h\x01\x86q\x01a"
    result = loads(stream + b".", NUMPY)
    assert len(result) == 201
    with pytest.raises(PickleRefused, match="tuple"):
        loads(stream + b"}h\x01K\x01s\x86.", NUMPY)
    with pytest.raises(PickleRefused, match="not named by text"):
        loads(stream + b"cnumpy\ndtype\nh\x01\x85R\x86.", NUMPY)
    with pytest.raises(PickleRefused, match="not text"):
        loads(stream.replace(b"\x80\x02", b"\x80\x04") + b"h\x01h\x01\x93\x86.", NUMPY)
    # Deep nesting must not exhaust the stack of the interpreter.
    loads(b"\x80\x02)" + b"\x85" * 200_000 + b".", NUMPY)


def test_many_arrays_cannot_share_one_buffer_into_a_huge_result():
    raw = b"\0" * 1000
    one = pickle.dumps([np.frombuffer(raw, np.uint8).copy() for _ in range(3)], 3)
    loads(one, NUMPY)
    body = array_pickle((1000,), raw, code="u1")[2:-1]
    start = body.index(b"B" + struct.pack("<I", 1000))
    first = body[:start] + body[start : start + 1005] + b"q\x07" + body[start + 1005 :]
    again = body[:start] + b"h\x07" + body[start + 1005 :]
    loads(b"\x80\x03](" + first + b"e.", NUMPY)
    with pytest.raises(PickleRefused, match="bytes of array data asked for"):
        loads(b"\x80\x03](" + first + again * 20 + b"e.", NUMPY)


def test_a_vocabulary_can_be_extended():
    """Other formats bring a table of names and a way to resolve persistent ids."""

    def ordered_dict(arguments, budget):
        assert arguments == ()
        return {}

    class Pickler(pickle.Pickler):
        def persistent_id(self, item):
            return ("storage", 4) if item == "tensor" else None

    def storage(reference, budget):
        assert reference[0] == "storage"
        budget.spend(reference[1])
        return b"\0" * reference[1]

    vocabulary = Vocabulary({"collections.OrderedDict": ordered_dict}, persistent=storage)
    stream = io.BytesIO()
    Pickler(stream, 2).dump({"weight": "tensor"})
    assert loads(stream.getvalue(), vocabulary) == {"weight": b"\0" * 4}
    with pytest.raises(PickleRefused, match="4 bytes"):
        loads(stream.getvalue(), vocabulary, max_array_bytes=3)
    assert loads(b"\x80\x02ccollections\nOrderedDict\n)RK\x01K\x02s.", vocabulary) == {1: 2}


OBJECTS = Vocabulary(
    {"m.function": None},
    classes=frozenset({"m.Class"}),
    reasons={"m.old": "use m.Class"},
)
NEW = b"cm\nClass\n)\x81"


def test_objects_of_allowed_classes_become_records():
    stream = b"\x80\x02](" + NEW + b"q\x01}X\x01\0\0\0ah\x01sb" + NEW + b"e."
    first, second = loads(stream, OBJECTS)
    assert type(first) is Record and first.name == "m.Class"
    assert first.fields["a"] is first
    assert second == Record("m.Class", {})
    with pytest.raises(AttributeError):
        first.name = "other"


@pytest.mark.parametrize(
    "data, message",
    [
        (b"cm\nClass\n)R", "not called"),
        (b"cm\nClass\n", "contains a GlobalName"),
        (b"cm\nfunction\n)\x81", "not an allowed class"),
        (b"K\x01)\x81", "not an allowed class"),
        (b"cm\nClass\n(K\x01t\x81", "m.Class that is made with arguments"),
        (b"cm\nClass\n]\x81", "m.Class that is made with arguments"),
        (b"cm\nClass\n)}\x92", "opcode NEWOBJ_EX"),
        (NEW + b")b", "attributes of a m.Class that are not a dictionary"),
        (NEW + b"}K\x01K\x02sb", "whose name is not text"),
        (NEW + b"}X\x01\0\0\0acm\nfunction\nsb", "contains a GlobalName"),
        (NEW + b"}(" + b"".join(b"X\x01\0\0\0%cN" % n for n in range(97, 123)) + b"uq\x01b"
         + b"h\x01b" * 20, "array data asked for"),
        (b"cm\nold\n", r"'m.old' is not allowed \(use m.Class\)"),
        (b"cm\nother\n", r"'m.other' is not allowed \(allowed: m.Class, m.function\)"),
    ],
)  # fmt: skip
def test_records_stay_within_their_rules(data, message):
    with pytest.raises(PickleRefused, match=message):
        loads(b"\x80\x02" + data + b".", OBJECTS)


def test_wide_integers_are_no_keys_because_they_can_be_made_to_collide():
    def key(n):
        raw = n.to_bytes(16, "little", signed=True)
        return b"\x80\x02}\x8a\x10" + raw + b"Ns."

    assert loads(key(2**64 - 1), NUMPY) == {2**64 - 1: None}
    assert hash(2**64 + 3) == hash(2**64 + 3 + 2**61 - 1)
    for n in (2**64, -(2**64), 2**61 * (2**61 - 1)):
        with pytest.raises(PickleRefused, match="64 bits"):
            loads(key(n), NUMPY)


def test_errors_stay_short_whatever_the_file_contains():
    name = b"c" + b"x" * 10**6 + b"\ny\n."
    number = b"F" + b"x" * 10**6 + b"\n."
    dtype = b"cnumpy\ndtype\nX" + struct.pack("<I", 10**6) + b"x" * 10**6 + b"\x85R."
    for data in (name, number, dtype):
        with pytest.raises(PickleRefused) as error:
            loads(b"\x80\x02" + data, NUMPY)
        assert len(str(error.value)) < 2000
    many = Vocabulary({f"module.name{n}": None for n in range(50)})
    with pytest.raises(PickleRefused, match="not allowed"):
        loads(b"\x80\x02cos\nsystem\n.", many)


@pytest.mark.parametrize("action", ["ignore", "error"])
def test_a_stream_that_the_decoder_warns_of_is_refused(action):
    with warnings.catch_warnings():
        warnings.simplefilter(action)
        with pytest.raises(PickleRefused):
            loads(b"\x80\x02S'\\q'\n.", NUMPY)


def test_a_tree_may_share_but_not_nest_without_end():
    shared = [1, 2]
    check_tree(
        {"a": (shared, [shared], Record("m.Class", {"b": shared}))}, max_depth=4, max_items=12
    )
    with pytest.raises(ValueError, match="more than 11 items"):
        check_tree({"a": (shared, [shared], Record("m", {"b": shared}))}, max_depth=4, max_items=11)
    with pytest.raises(ValueError, match="more than 3 levels"):
        check_tree({"a": (shared, [shared])}, max_depth=3, max_items=100)
    cyclic = Record("m.Class", {})
    cyclic.fields["self"] = [cyclic]
    with pytest.raises(ValueError, match="within itself"):
        check_tree(cyclic, max_depth=50, max_items=10**6)
    for _ in range(200):
        shared = [shared, shared]
    with pytest.raises(ValueError, match="more than 1000 items"):
        check_tree(shared, max_depth=1000, max_items=1000)
