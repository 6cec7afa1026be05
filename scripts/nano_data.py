"""The text that olmoe-nano is trained on: documents of several domains, their tokens, and the batch of a step.

A folder holds, for each domain, ``DOMAIN-train.jsonl.xz`` and likewise ``valid`` and ``test``: JSON lines with one
document each, ``{"text": ...}``. A domain's documents are packed into one stream, each followed by end-of-text.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"


def text_path(folder: Path, domain: str, split: str) -> Path:
    return folder / f"{domain}-{split}.jsonl.xz"


def read_documents(path: Path) -> list[str]:
    with lzma.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


# ------------------------------------------------------------------------------------------------- the tokenizer


def sample_documents(folder: Path, mixture: dict[str, int], size: int) -> Iterable[str]:
    """First training documents of each domain, ``size`` characters in all, shared out as ``mixture`` says."""
    for domain, part in mixture.items():
        left = size * part // sum(mixture.values())
        for document in read_documents(text_path(folder, domain, "train")):
            if left <= 0:
                break
            yield document[:left]
            left -= len(document)


def train_tokenizer(documents: Iterable[str], vocab_size: int, context: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of ``vocab_size`` tokens, the end-of-text token first."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(documents, trainer)
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), END_OF_TEXT)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, model_max_length=context, **special)


def kept_tokenizer(
    work: Path, folder: Path, mixture: dict[str, int], size: int, vocab_size: int, context: int
) -> PreTrainedTokenizerFast:
    """The tokenizer in ``work``; trained and put there if there is none."""
    kept = work / "tokenizer"
    if not kept.exists():
        temporary = work / "tokenizer.tmp"
        train_tokenizer(sample_documents(folder, mixture, size), vocab_size, context).save_pretrained(
            temporary
        )
        os.replace(temporary, kept)
    return AutoTokenizer.from_pretrained(kept)


def bytes_of_tokens(tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """How many bytes of text each token of a byte-level tokenizer stands for (``[V]``); 0 for special tokens.

    In such a vocabulary every byte is written as one character.
    """
    special = set(tokenizer.all_special_ids)
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    return torch.tensor([0 if i in special else len(token) for i, token in enumerate(tokens)])


# --------------------------------------------------------------------------------------------- tokens and batches


def encode_documents(
    tokenizer: PreTrainedTokenizerFast, documents: list[str], progress: bool = False
) -> np.ndarray:
    """Token ids (uint16) of the documents one after the other, each followed by end-of-text."""
    end_of_text = np.array([tokenizer.convert_tokens_to_ids(END_OF_TEXT)], dtype=np.uint16)
    pieces: list[np.ndarray] = []
    for document in tqdm(documents, desc="tokenise", unit="document", disable=not progress, mininterval=5):
        ids = tokenizer.backend_tokenizer.encode(document, add_special_tokens=False).ids
        pieces += [np.array(ids, dtype=np.uint16), end_of_text]
    return np.concatenate(pieces)


def cached_ids(
    tokenizer: PreTrainedTokenizerFast, path: Path, work: Path, progress: bool = False
) -> np.ndarray:
    """``encode_documents`` of a file, kept in ``work`` under a name that says which text and which tokenizer."""
    digest = hashlib.sha256(path.read_bytes() + tokenizer.backend_tokenizer.to_str().encode())
    cache = work / f"tokens-{path.name.removesuffix('.jsonl.xz')}-{digest.hexdigest()[:16]}.npy"
    if not cache.exists():
        temporary = cache.with_suffix(".tmp")
        with temporary.open("wb") as file:
            np.save(file, encode_documents(tokenizer, read_documents(path), progress))
        os.replace(temporary, cache)
    return np.load(cache)


def windows_of_step(ids: np.ndarray, step: int, windows: int, length: int, seed: list[int]) -> np.ndarray:
    """One domain's windows of one step, ``[windows, length + 1]``: a function of (seed, step), without state.

    Each epoch cuts the stream into windows at an offset of its own and visits them in an order of its own.
    """
    per_epoch = ((len(ids) - length - 1) // length) // windows
    if per_epoch < 1:
        raise ValueError(
            f"expected a text of at least {windows + 1} windows of {length} tokens, got {len(ids)} tokens: "
            "use a longer text, or fewer windows a step"
        )
    epoch, within = divmod(step, per_epoch)
    random = np.random.default_rng([*seed, epoch])
    offset = int(random.integers(length))
    order = random.permutation((len(ids) - offset - 1) // length)[within * windows : (within + 1) * windows]
    starts = offset + order * length
    return np.stack([ids[start : start + length + 1] for start in starts])


def batch_of_step(
    streams: dict[str, np.ndarray], mixture: dict[str, int], step: int, length: int, seed: int
) -> Tensor:
    """The windows of one step, ``mixture[domain]`` of each domain, domain after domain: ``[windows, length + 1]``."""
    parts = [
        windows_of_step(streams[domain], step, windows, length, [seed, number])
        for number, (domain, windows) in enumerate(mixture.items())
    ]
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))
