"""Files and folders that a careful attacker or a careless disk would make: only the library's own errors, nothing half-written.

The mutations are seeded. `make test` tries a few hundred of each, `make reliability` ten thousand.
"""

from __future__ import annotations

import ast
import copy
import json
import os
import random
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import bh_routing
from bh_routing import BHRoutingError
from bh_routing._files import append_line, write_atomically, write_folder
from bh_routing._files.checks import listed, mapping, number, one_of, optional, read_json, record, text, whole
from bh_routing._files.tensors import tensors_digest
from bh_routing.calibration.calibration import Calibration
from bh_routing.errors import CalibrationFileError, ResultsError, RoutingLogError
from bh_routing.evaluation.report import make_report
from bh_routing.evaluation.results import ResultsFolder, ResultsWarning, check_result, check_run
from bh_routing.evaluation.routing_log import RoutingLog
from report_cases import make_result, make_results, make_run

SOURCE = Path(bh_routing.__file__).parent
TRIED = [
    pytest.param(150, id="few"),
    pytest.param(10_000, id="many", marks=[pytest.mark.slow, pytest.mark.timeout(3600)]),
]

# What a field may be turned into, whatever it was.
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**64), 10**400, 0.5, -1e308, 1e308, float("nan"), float("inf"), "", "x", "\ud800",
    "../../etc", "a\0b", "{{body}}", "<script>", [], {}, [[]], [None], {"a": 1}, [1e308] * 3, list(range(300)), "9" * 5000,
]  # fmt: skip


def mutated(value: Any, generator: random.Random) -> Any:
    """The same JSON value with one place changed, left out, doubled or added."""
    value = copy.deepcopy(value)
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                walk(node[key])

    walk(value)
    node, key = generator.choice(places)
    match generator.randrange(4):
        case 0 if isinstance(node, dict):
            del node[key]
        case 1 if isinstance(node, dict):
            node[generator.choice(["odd", "", "\ud800", key + "x"])] = generator.choice(ODD)
        case 2 if isinstance(node, list):
            node.insert(key, copy.deepcopy(node[key]))
        case _:
            node[key] = generator.choice(ODD)
    return value


def mutated_tensors(tensors: dict[str, torch.Tensor], generator: random.Random) -> dict[str, torch.Tensor]:
    """The same with one tensor of another type, shape, name or content."""
    tensors = dict(tensors)
    key = generator.choice(sorted(tensors))
    held = tensors[key]
    match generator.randrange(7):
        case 0:
            del tensors[key]
        case 1:
            tensors[key + generator.choice(["", ".x", "0"])] = held.clone().reshape(-1)
        case 2:
            kinds = [
                torch.float16,
                torch.bfloat16,
                torch.float32,
                torch.float64,
                torch.int8,
                torch.int64,
                torch.bool,
            ]
            tensors[key] = held.to(generator.choice(kinds))
        case 3:
            tensors[key] = held[: generator.randrange(2)].clone()
        case 4:
            tensors[key] = held.unsqueeze(0).clone()
        case _:
            changed = held.clone().flatten()
            if changed.numel():
                odd = [0, -1, 1, 100] + (
                    [float("nan"), float("inf"), -1e30, 6e4] if held.is_floating_point() else [30_000 % 127]
                )
                changed[generator.randrange(changed.numel())] = generator.choice(odd)
            tensors[key] = changed.view(held.shape)
    return tensors


def mutated_bytes(content: bytes, generator: random.Random) -> bytes:
    """The same with some bytes changed, cut or repeated, mostly at the beginning, where the structure is."""
    changed = bytearray(content)
    for _ in range(generator.choice([1, 1, 2, 8])):
        place = generator.randrange(min(len(changed), generator.choice([8, 200, 4000, len(changed)])))
        match generator.randrange(4):
            case 0:
                del changed[place : place + generator.choice([1, 10, 10_000])]
            case 1:
                changed[place:place] = changed[place : place + 20]
            case _:
                changed[place] = generator.randrange(256)
        if not changed:
            return b""
    return bytes(changed)


def write_mutated(path: Path, whole_file: Path, generator: random.Random) -> None:
    """Half of the files are damaged, half are well made of unsound content, with a digest that fits."""
    if generator.random() < 0.5:
        path.write_bytes(mutated_bytes(whole_file.read_bytes(), generator))
        return
    with safe_open(str(whole_file), framework="pt") as file:
        metadata = file.metadata()
    header, tensors = json.loads(metadata["header"]), load_file(whole_file)
    if generator.random() < 0.5:
        header = mutated(header, generator)
    else:
        tensors = mutated_tensors(tensors, generator)
    said = json.dumps(header)
    save_file(tensors, path, metadata | {"header": said, "digest": tensors_digest(said, tensors)})


def only_our_errors(action: Callable[[], Any], error: type[BHRoutingError], seed: int) -> bool:
    """Whether it was refused; any other exception fails the test, with the seed that makes it again."""
    try:
        action()
        return False
    except error:
        return True
    except Exception as raised:
        raise AssertionError(f"mutation {seed}: {type(raised).__name__}: {raised}") from raised


# ----------------------------------------------------------------------------------- kind 11: our own files


@pytest.mark.parametrize("tried", TRIED)
def test_mutated_calibrations(synthetic_calibration: Any, tmp_path: Path, tried: int) -> None:
    """Refused with our own error, or sound: a table, a budget and compensations follow, all finite."""
    sound, path = tmp_path / "sound.safetensors", tmp_path / "odd.safetensors"
    synthetic_calibration(tokens=200, experts=8, top_k=2, reservoir=50).save(sound)
    refused = 0
    for seed in range(tried):
        write_mutated(path, sound, random.Random(seed))

        def use() -> None:
            held = Calibration.load(path)
            assert bool(torch.isfinite(held.table(0.3).offset_LE).all())
            assert all(
                bool(torch.isfinite(c.matrix_JH if hasattr(c, "matrix_JH") else torch.zeros(1)).all())
                for c in held.compensations().values()
            )
            repr(held)

        refused += only_our_errors(use, BHRoutingError, seed)
    assert refused > tried / 2


@pytest.mark.parametrize("tried", TRIED)
def test_mutated_routing_logs(synthetic_calibration: Any, tmp_path: Path, tried: int) -> None:
    sound, path = tmp_path / "sound.safetensors", tmp_path / "odd.safetensors"
    RoutingLog.from_calibration(synthetic_calibration(tokens=100, experts=8, top_k=2, reservoir=30)).save(
        sound
    )
    refused = 0
    for seed in range(tried):
        write_mutated(path, sound, random.Random(seed))

        def use() -> None:
            log = RoutingLog.load(path)
            log.score_ratios()
            repr(log)

        refused += only_our_errors(use, RoutingLogError, seed)
    assert refused > tried / 2


@pytest.mark.parametrize("tried", TRIED)
def test_mutated_results(tmp_path: Path, tried: int) -> None:
    """A damaged line is skipped with a warning, a damaged run.json is an error of ours."""
    folder = ResultsFolder(tmp_path)
    line, run = json.dumps(make_result("full", 8.0, 0.0, 1)).encode(), json.dumps(make_run()).encode()
    for seed in range(tried):
        generator = random.Random(seed)
        for path, content in ((folder.results_path, line), (folder.run_path, run)):
            odd = mutated_bytes(content, generator)
            if generator.random() < 0.5:
                odd = json.dumps(mutated(json.loads(content), generator)).encode()
            path.write_bytes(odd)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResultsWarning)
            assert not only_our_errors(folder.results, ResultsError, seed)
        only_our_errors(folder.run, ResultsError, seed)


@pytest.mark.parametrize(
    "tried",
    [
        pytest.param(12, id="few"),
        pytest.param(300, id="many", marks=[pytest.mark.slow, pytest.mark.timeout(3600)]),
    ],
)
def test_mutated_report_input(tried: int) -> None:
    """A page, or an error of ours; never script from the results. (A page takes a second: fewer than of the others.)"""
    for seed in range(tried):
        generator = random.Random(seed)
        results, run = mutated(make_results(), generator), mutated(make_run(), generator)

        def use(results: Any = results, run: Any = run) -> None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert "<script>window" not in make_report(results, run)

        only_our_errors(use, BHRoutingError, seed)


def test_what_is_sound_passes() -> None:
    """The checks refuse nothing that the library writes."""
    for result in make_results():
        assert check_result(json.loads(json.dumps(result))) == json.loads(json.dumps(result))
    assert check_run(make_run()) == make_run()


@pytest.mark.parametrize(
    ("check", "value", "sentence"),
    [
        (whole(1, 4), 5, "must be a whole number of at least 1 and at most 4, got 5"),
        (whole(), True, "must be a whole number of at least 0, got True"),
        (whole(), 1.0, "must be a whole number of at least 0, got 1.0"),
        (number(0.0, 1.0), float("nan"), "must be a finite number at least 0 and at most 1, got nan"),
        (number(above=0.0), 0, "must be a finite number above 0, got 0"),
        (number(), 10**400, "must be a finite number"),
        (text(), "\ud800", "must be text that UTF-8 can hold"),
        (text(3), "long", "must be text, got 'long'"),
        (one_of(1), True, "must be 1, got True"),
        (optional(text()), 3, "must be text, got 3"),
        (listed(whole()), [1, -1], "[1] must be a whole number of at least 0, got -1"),
        (listed(whole(), 2, 2), [1], "must be a list of 2, got list of 1"),
        (mapping(whole()), {"a": "b"}, "['a'] must be a whole number of at least 0, got 'b'"),
        (record({"a": listed(record({"b": whole()}))}), {"a": [{"b": -1}]}, "a[0].b must be a whole number"),
        (record({"a": whole()}), {"a": 1, "c": 2}, "'c' is no field of it"),
        (record({"a": whole()}), {}, "a is missing"),
    ],
)
def test_checks(check: Any, value: Any, sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        check(value)
    assert str(caught.value).startswith(sentence)


@pytest.mark.parametrize(
    "content", ["[" * 100_000 + "]" * 100_000, "NaN", "[Infinity]", "{", "", '"\\ud8', "9" * 5000]
)
def test_json_that_is_none(content: str) -> None:
    with pytest.raises(ValueError):
        read_json(content)


def test_an_edited_log_is_refused(synthetic_calibration: Any, tmp_path: Path) -> None:
    path = tmp_path / "log.safetensors"
    RoutingLog.from_calibration(synthetic_calibration(tokens=100, experts=8, top_k=2, reservoir=30)).save(
        path
    )
    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors["weights"][0, 0, 0] = 0.125
    save_file(tensors, path, metadata)
    with pytest.raises(RoutingLogError, match="its digest does not match its content"):
        RoutingLog.load(path)


def test_counts_far_apart_take_no_memory(synthetic_calibration: Any, tmp_path: Path) -> None:
    """Two numbers of a small header would ask for a tensor of many gigabytes."""
    path = tmp_path / "c.safetensors"
    synthetic_calibration(tokens=100, experts=8, top_k=2, reservoir=10).save(path)
    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata()
    header, tensors = json.loads(metadata["header"]), load_file(path)
    header["starts"]["hist.logit.selected.0"] = 10**12
    said = json.dumps(header)
    save_file(tensors, path, metadata | {"header": said, "digest": tensors_digest(said, tensors)})
    with pytest.raises(
        CalibrationFileError, match=r"starts\['hist.logit.selected.0'\] must be a whole number"
    ):
        Calibration.load(path)


# ------------------------------------------------------------------------------- kind 13: disk and signals


def test_nothing_else_opens_a_file_for_writing() -> None:
    """`bh_routing._files.plain` is the only writer: no open(..., "w"), write_text, write_bytes, save_file or json.dump elsewhere."""
    found = []
    for path in SOURCE.rglob("*.py"):
        if path == SOURCE / "_files" / "plain.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            modes = [
                a.value
                for a in [*node.args[:2], *(k.value for k in node.keywords if k.arg == "mode")]
                if isinstance(a, ast.Constant)
            ]
            writing = name in ("open", "fdopen") and any(
                isinstance(m, str) and set(m) & set("wax+") and len(m) <= 3 for m in modes
            )
            savefig = name == "savefig" and not (node.args and getattr(node.args[0], "id", "") == "buffer")
            if writing or savefig or name in ("write_text", "write_bytes", "save_file", "dump"):
                found.append(f"{path.relative_to(SOURCE)}:{node.lineno}: {name}")
    assert found == []


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("number", [28, 122, 5, 30])  # no space, quota, a broken disk, a read-only one
def test_a_disk_that_fails_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: Any, number: int) -> None:
    path = tmp_path / "a.json"
    path.write_text("before")

    def fails(_descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        write_atomically(path, "after")
    assert caught.value.filename == str(path)
    with pytest.raises(OSError, match=os.strerror(number)):
        append_line(path, "more")
    assert path.read_text() == "before"
    assert names(tmp_path) == ["a.json"]


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError) as caught:
        write_atomically(tmp_path / "file" / "a", "x")
    assert caught.value.filename == str(tmp_path / "file" / "a")


@pytest.mark.skipif(sys.platform == "win32", reason="links and names as on POSIX")
def test_links_long_names_and_devices(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    target, link = tmp_path / "real" / "a", tmp_path / "link"
    link.symlink_to(target)
    write_atomically(link, "through")  # a link that points nowhere yet
    write_atomically(link, "again")
    assert link.is_symlink()
    assert target.read_text() == "again"
    longest = tmp_path / ("n" * 255)
    write_atomically(longest, "long")
    assert longest.read_text() == "long"
    with pytest.raises(OSError, match="File name too long"):
        write_atomically(tmp_path / ("n" * 256), "too long")
    write_atomically("/dev/null", "nothing")
    assert not Path("/dev/null").is_file()
    with pytest.raises(IsADirectoryError):
        write_atomically(tmp_path / "real", "x")
    assert names(tmp_path) == ["link", "n" * 255, "real"]


def test_many_writers_of_one_path(tmp_path: Path) -> None:
    """What is read is always the whole of what somebody wrote; no temporary file stays."""
    path, contents = tmp_path / "a", [str(i) * 50_000 for i in range(8)]
    write_atomically(path, contents[0])
    torn, done = [], threading.Event()

    def read() -> None:
        while not done.is_set():
            if path.read_text() not in contents:
                torn.append(1)

    reader = threading.Thread(target=read)
    reader.start()
    writers = [
        threading.Thread(target=lambda c=c: [write_atomically(path, c) for _ in range(20)]) for c in contents
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    done.set()
    reader.join()
    assert torn == []
    assert names(tmp_path) == ["a"]


def test_many_appenders_to_one_file(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    threads = [
        threading.Thread(target=lambda i=i: [append_line(path, f"{i}" * 3000) for _ in range(25)])
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = path.read_text().splitlines()
    assert sorted(lines) == sorted(f"{i}" * 3000 for i in range(8) for _ in range(25))


def test_a_folder_is_there_when_it_is_complete(tmp_path: Path) -> None:
    def half(folder: Path) -> None:
        write_atomically(folder / "one", "1")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "out", half)
    assert names(tmp_path) == []
    write_folder(tmp_path / "out", lambda folder: write_atomically(folder / "one", "1"))
    assert names(tmp_path / "out") == ["one"]


WRITES = """
import os, signal, sys, threading
import bh_routing._files as files
from bh_routing.cli import main
import bh_routing.cli.families as command

def run(args):
    def slow(descriptor):  # the content is written, the name is not yet there
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait(30)
    os.fsync = slow
    files.write_atomically(sys.argv[1], "new")

command.run = run
sys.exit(main(["families"]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="SIGTERM as on POSIX")
def test_a_signal_in_a_write(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    done = subprocess.run(
        [sys.executable, "-c", WRITES, str(path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert done.stderr == "bh-routing families: ended by a signal.\n"
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a"]
