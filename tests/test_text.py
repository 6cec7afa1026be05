"""Text files as documents, and documents as windows."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from functools import partial

import pytest
import torch

from bh_routing.errors import DatasetError, InvalidInputError, InvalidParameterError, InvalidTypeError
from bh_routing.stats.divergence import kl_divergence
from bh_routing.text import TextFile, cut_windows, evenly, iter_windows, spans, token_ids

OPENERS = {"": open, ".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open}


@pytest.mark.parametrize("suffix", OPENERS)
def test_json_lines_are_documents(tmp_path, suffix):
    rows = [
        {"text": "one\ntwo", "source": "books"},
        {"text": "trois é", "more": 3},
        {"text": "four", "source": None},
    ]
    path = tmp_path / f"some.jsonl{suffix}"
    with OPENERS[suffix](path, "wt", encoding="utf-8") as file:
        file.write("\n".join(json.dumps(row) for row in rows) + "\n\n")
    read = TextFile(path, piece=3)
    assert list(read) == list(read) == ["one\ntwo", "trois é", "four"]  # twice; no document is cut or joined
    assert list(read.with_sources()) == [("books", "one\ntwo"), ("some", "trois é"), ("some", "four")]
    assert read.read() == "one\ntwo\n\ntrois é\n\nfour"


@pytest.mark.parametrize("suffix", OPENERS)
def test_text_is_read_as_it_is(tmp_path, suffix):
    with OPENERS[suffix](tmp_path / f"a.txt{suffix}", "wt", encoding="utf-8") as file:
        file.write("one\n\ntwo é\n")
    read = TextFile(tmp_path / f"a.txt{suffix}", None)
    assert read.read() == "one\n\ntwo é\n"
    assert list(read.with_sources()) == [("a", "one\n\n"), ("a", "two é\n")]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.txt", b"", r"expected text in \S+a\.txt, got an empty file\."),
        ("a.txt", b" \n\n", r"expected text in \S+a\.txt, got an empty file\."),
        ("a.jsonl", b"\n", r"expected text in \S+a\.jsonl, got an empty file\."),
        ("a.txt", b"\xff\xfe\xfa", r"expected UTF-8 text in \S+a\.txt, got other bytes; convert the file\."),
        ("a.txt", b"ELF\0\0\1", r"expected UTF-8 text in \S+a\.txt, got other bytes; convert the file\."),
        ("a.txt", gzip.compress(b"text", mtime=0), r"expected UTF-8 text in \S+a\.txt, got other bytes; convert the file\."),
        *(
            (f"a{suffix}", content, rf"expected \{suffix} data in \S+a\{suffix}, got damaged or other bytes; compress the text again\.")
            for suffix, whole in ((".xz", lzma.compress), (".gz", partial(gzip.compress, mtime=0)), (".bz2", bz2.compress))
            for content in (b"plain text", whole(b"text " * 1000)[:-20], whole(b"text" * 1000)[:12] + b"x" * 40)
        ),
        ("a.jsonl", b'{"text": "a"}\n{"text": 3}', r'expected \{"text": "\.\.\."\} in every line of \S+, got something else in line 2\.'),
        ("a.jsonl", b"plain", r'expected \{"text": "\.\.\."\} in every line of \S+, got something else in line 1\.'),
        ("a.jsonl", b"[" * 100_000, r'expected \{"text": "\.\.\."\} in every line of \S+, got something else in line 1\.'),
    ],
)  # fmt: skip
def test_bad_files_get_one_sentence(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DatasetError, match=f"^{sentence}$"):
        TextFile(tmp_path / name).read()


def test_spans_with_and_without_overlap():
    assert [(w.begin, w.end, w.score) for w in spans(7, 3)] == [
        (0, 3, 1),
        (3, 6, 4),
    ]  # the last token alone: no loss
    assert [(w.begin, w.end, w.score) for w in spans(7, 3, 2)] == [(0, 3, 1), (2, 5, 3), (4, 7, 5)]
    with pytest.raises(InvalidInputError, match=r"^expected a text of at least two tokens, got 1\.$"):
        spans(1, 4)
    with pytest.raises(InvalidParameterError, match="a stride of 1 to its length, got 4 and 5"):
        spans(9, 4, 5)


def test_evenly():
    assert evenly(range(10), 3) == [0, 3, 6]
    assert list(evenly(range(2), 3)) == list(evenly(range(2), None)) == [0, 1]


def test_windows_never_cross_documents(nano_tokenizer):
    texts = ["The old man walked to the door. " * 3, "", "And so it was."]
    ids = [token_ids(nano_tokenizer, text).tolist() for text in texts]
    windows = list(iter_windows(nano_tokenizer, texts, 8))
    expected = [part[first : first + 8] for part in ids for first in range(0, len(part), 8)]
    assert [w.tolist() for w in windows] == expected
    assert all(w.dtype == torch.int64 for w in windows)
    cut = cut_windows(nano_tokenizer, texts, 8)
    assert [w[0].tolist() for w in cut] == [part for part in expected if len(part) >= 2]


@pytest.mark.parametrize("document", [torch.tensor([5, 6, 7]), [5, 6, 7], (5, 6, 7)])
def test_token_ids_are_documents_too(document):
    assert token_ids(None, document).tolist() == [5, 6, 7]
    assert [w.tolist() for w in cut_windows(None, [document], 3)] == [[[5, 6, 7]]]


def test_what_is_no_document():
    with pytest.raises(InvalidTypeError, match="texts are strings but no tokenizer was given"):
        token_ids(None, "text")
    with pytest.raises(InvalidTypeError, match=r"flat sequence of token ids, got list of shape \(1, 2\)"):
        token_ids(None, [[1, 2]])


def test_kl_divergence_is_that_of_scipy():
    from scipy.special import rel_entr

    generator = torch.Generator().manual_seed(0)
    log_p, log_q = (
        torch.randn(4, 7, 50, dtype=torch.float64, generator=generator).log_softmax(-1) for _ in range(2)
    )
    expected = torch.from_numpy(rel_entr(log_p.exp().numpy(), log_q.exp().numpy()).sum(-1))
    torch.testing.assert_close(kl_divergence(log_p, log_q), expected, rtol=1e-12, atol=1e-14)
    assert torch.equal(kl_divergence(log_p, log_p), torch.zeros(4, 7, dtype=torch.float64))
