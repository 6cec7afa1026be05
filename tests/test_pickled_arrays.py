"""Arrays out of pickles without unpickling: files of both numpys, and 10^5 damaged ones."""

from __future__ import annotations

import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from bh_routing.calibration.pickled_arrays import LARGEST, arrays_of, read_arrays
from bh_routing.errors import CalibrationFileError

FILES = sorted((Path(__file__).parent / "fixtures" / "kde").glob("*.pkl"))


def test_files_of_numpy_1_and_2_in_every_protocol_are_there():
    assert [path.stem for path in FILES] == [f"numpy{v}-protocol{p}" for v in (1, 2) for p in range(6)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_is_read_as_numpy_wrote_it(path):
    arrays = read_arrays(path)
    assert sorted(arrays) == ["bandwidth", "cdf", "x"]
    np.testing.assert_array_equal(arrays["x"], np.linspace(-2, 2, 9))
    np.testing.assert_array_equal(arrays["cdf"], np.linspace(0, 1, 9))
    assert arrays["x"].dtype == np.float64
    assert arrays["bandwidth"] == 0.5


@pytest.mark.parametrize("dtype", ["<f8", ">f8", "<f4", "<f2", ">i4", "u1", "<i8"])
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_every_number_type_and_order(dtype, protocol):
    array = np.arange(12).reshape(3, 4).astype(dtype)
    content = pickle.dumps({"c": array, "f": np.asfortranarray(array), "none": array[:0]}, protocol=protocol)
    arrays = arrays_of(content, "file")
    np.testing.assert_array_equal(arrays["c"], array)
    np.testing.assert_array_equal(arrays["f"], array)
    assert arrays["none"].shape == (0, 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps({"x": np.array(["a"])}), "an array of something else than numbers"),
        (pickle.dumps({"x": np.array([1j])}), "an array of something else than numbers"),
        (pickle.dumps({1: np.zeros(2)}), "a key that is no string"),
        (pickle.dumps({"x": np.zeros(4)}).replace(b"\x85", b"\x86", 1), "cannot be read"),
        (b"\x80\x04}\x8c\x01xcnumpy\nndarray\n(K\x05tRs.", "a call of something that is no function"),
        (b"\x80\x05\x97.", "it uses the opcode NEXT_BUFFER"),
        (b"\x80\x02P1\n.", "it uses the opcode PERSID"),
    ],
)
def test_what_is_no_dict_of_numbers(content, message):
    with pytest.raises(CalibrationFileError, match=message):
        arrays_of(content, "file")


def test_a_file_over_the_limit(tmp_path):
    path = tmp_path / "large.pkl"
    with path.open("wb") as file:
        file.truncate(LARGEST + 1)
    with pytest.raises(CalibrationFileError, match=f"was refused: expected at most {LARGEST} bytes"):
        read_arrays(path)


def test_the_same_bytes_made_again_and_again():
    text = b"X" + (1 << 20).to_bytes(4, "little") + b"a" * (1 << 20)
    again = b"c_codecs\nencode\n(h\x00X\x06\x00\x00\x00latin1tR"
    with pytest.raises(CalibrationFileError, match=f"more than {LARGEST} bytes of arrays"):
        arrays_of(b"\x80\x02" + text + b"q\x00" + again * 100 + b".", "file")


def mutations(count: int):
    """Damaged copies of the fixtures: bytes changed, cut, doubled, moved; opcodes strewn in."""
    random = np.random.default_rng(20261125)
    sources = [path.read_bytes() for path in FILES]
    opcodes = np.frombuffer(bytes(range(256)), dtype=np.uint8)
    for _ in range(count):
        content = bytearray(sources[random.integers(len(sources))])
        for _ in range(int(random.integers(1, 6))):
            at, other = (int(i) for i in random.integers(len(content) + 1, size=2))
            kind = random.integers(4)
            if kind == 0 and at < len(content):
                content[at] = int(random.choice(opcodes))
            elif kind == 1:
                del content[min(at, other) : min(at, other) + int(random.integers(1, 9))]
            elif kind == 2:
                content[at:at] = content[min(at, other) : max(at, other)]
            else:
                content[at:at] = bytes(random.choice(opcodes, size=int(random.integers(1, 4))))
            if not content:
                break
        yield bytes(content)


@pytest.mark.parametrize(
    "count", [3000, pytest.param(100_000, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])]
)
def test_damaged_files_end_in_one_error_and_in_little_memory(count):
    tracemalloc.start()
    refused = 0
    try:
        for content in mutations(count):
            try:
                arrays_of(content, "file")
            except CalibrationFileError:
                refused += 1
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert refused > count / 2
    assert peak < 32 << 20  # bytes: the largest mutation has some 40 kB
