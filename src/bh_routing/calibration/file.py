"""Reading and writing calibrations.

A calibration file is a file of tensors (`bh_routing._files.tensors`); its header holds model, layers, settings, text.
Tensors: ``hist.<statistic>.<set>.<layer>`` integer counts [E, B] in the narrowest type that holds them; ``moments.*``;
``reservoir.*``; ``linear.*`` (A in bfloat16); ``token_sizes.*``; ``fingerprint``;
``document_digests``; ``text_profile.*`` beside a certificate. What each of them must be is said beside the fields
(`bh_routing.calibration.data`); what must agree with what, here.

Shape legend: L routed layers, E experts, B bins, D projections, H hidden size, J = 2E, N tokens kept, K slots.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from .._files.checks import checks_of, listed, mapping, optional, record, unique, whole
from .._files.tensors import COUNTS, INTEGERS, Expected, expected_of, read_tensors, write_tensors
from ..errors import CalibrationError, CalibrationFileError
from ..stats.histogram import FIRST_BIN, LAST_BIN, Histogram
from . import certificate
from .certificate import QUANTILES, TextProfile
from .data import CalibratedLayer, CalibrationData, Data, Reservoir, sound_choice, stack_layers
from .linear_maps import LinearMaps
from .moments import Moments
from .token_sizes import TokenSizes

FORMAT, FORMAT_VERSION = (
    "bh-routing calibration",
    2,
)  # 1: without linear.*, token_sizes.*, reservoir.document and document_digests
READABLE = (1, FORMAT_VERSION)

RENAMED = {"compensation_strength": "compensation_scale"}  # of older files
PARTS: dict[str, type[Any]] = {
    "": CalibrationData,
    "moments": Moments,
    "reservoir": Reservoir,
    "linear": LinearMaps,
    "token_sizes": TokenSizes,
    "text_profile": TextProfile,
}
# 1 GiB of one set in memory; a model of 58 layers and 256 experts needs a quarter at most
MOST_COUNTS = 1 << 27
KINDS, SETS = ("logit", "logprob"), ("unselected", "selected", "trimmed")


def _keys(part: str) -> dict[str, str]:
    """Field -> key in the file: ``mean_LEH`` of the moments is ``moments.mean``."""
    return {name: f"{part}.{name.rpartition('_')[0]}".lstrip(".") for name in expected_of(PARTS[part])}


# Key -> what it must be; each part as a whole may be absent. Router logits, D, are as many as experts, but for the fingerprint.
TENSORS = {
    key: replace(must, dims=must.dims.replace("D", "E") if part else must.dims)
    for part, kind in PARTS.items()
    for key, must in zip(_keys(part).values(), expected_of(kind).values(), strict=True)
}
TOGETHER = (  # keys that stand in a file together or not at all
    ("moments.tokens", "moments.square", "moments.mean_square"),
    ("moments.sensitivity_tokens", "moments.sensitivity"),
    ("moments.gram", "moments.cross"),
    ("reservoir.hash", "reservoir.logits", "reservoir.experts"),
    *(tuple(_keys(part).values()) for part in ("linear", "token_sizes", "text_profile")),
)
_OWN = {name: check for name, check in checks_of(CalibrationData).items() if not isinstance(check, Expected)}
_LATER = ("compensation_scale", "linear_scale", "left_out")  # not in older files
HEADER = record(
    {
        "layers": listed(record(checks_of(CalibratedLayer)), 1, 1 << 12),
        "starts": mapping(whole(FIRST_BIN, LAST_BIN)),
        **{name: check for name, check in _OWN.items() if name not in _LATER},
    },
    {"certificate": optional(certificate.HEADER)} | {name: _OWN[name] for name in _LATER},
)


def save(data: CalibrationData, path: str | os.PathLike[str]) -> None:
    """Write a calibration; nothing half-written stays if it is interrupted.

    Raises
    ------
    CalibrationError
        For one whose nulls come from outside.
    OSError
        If the folder cannot be written to.
    """
    if data.given is not None:
        raise CalibrationError(
            f"nulls from outside ({data.given.source}) are not written to a calibration file, which holds counts, tokens "
            "and module paths; keep the pickles, or calibrate the model."
        )
    tensors: dict[str, Tensor] = {}
    starts: dict[str, int] = {}
    for kind, sets in data.histograms.items():
        for name, held in sets.items():
            for layer in range(data.num_layers):
                used = Histogram(held.start, held.counts_LEB[layer : layer + 1]).trimmed_to_use()
                key = f"hist.{kind}.{name}.{layer}"
                tensors[key], starts[key] = _narrow(used.counts_LEB[0]), used.start
    for part in PARTS:
        for name, key in _keys(part).items():
            if (value := getattr(getattr(data, part) if part else data, name, None)) is not None:
                tensors[key] = value.to(TENSORS[key].dtypes[0])
    header = {name: getattr(data, name) for name in _OWN}
    header |= {"layers": [asdict(layer) for layer in data.layers], "starts": starts}
    if data.certificate is not None:
        header["certificate"] = data.certificate.header()
    write_tensors(path, FORMAT, FORMAT_VERSION, header, tensors)


def _narrow(counts: Tensor) -> Tensor:
    """The counts in the narrowest integer type that holds them."""
    largest = int(counts.max()) if counts.numel() else 0
    for dtype in (torch.uint8, torch.int16, torch.int32):
        if largest <= torch.iinfo(dtype).max:
            return counts.to(dtype)
    return counts


def load(path: str | os.PathLike[str], kind: type[Data]) -> Data:
    """Read a calibration as an object of this class, and check that it is whole and sound.

    Raises
    ------
    CalibrationFileError
        If it does not exist, is damaged or edited, is something else, or of a newer format, or if anything in it is
        no such thing as a calibration holds.
    """
    advice = f"make one with `bh-routing calibrate MODEL --text FILE -o {path}`"
    _, header, tensors = read_tensors(
        path, FORMAT, READABLE, _expect, CalibrationFileError, what="calibration", advice=advice
    )
    try:
        return kind(**_fields(header, tensors))
    except ValueError as error:
        raise CalibrationFileError(f"{path} holds no sound calibration: {error}; {advice}.") from None


def _expect(header: Any, keys: Collection[str]) -> tuple[dict[str, Any], dict[str, Expected], dict[str, int]]:
    """The header checked, in today's words; what every tensor must be; the sizes that are known."""
    if isinstance(header, dict) and isinstance(header.get("layers"), list):
        layers = [_renamed(layer) if isinstance(layer, dict) else layer for layer in header["layers"]]
        header = {RENAMED.get(key, key): value for key, value in header.items()} | {"layers": layers}
    held: dict[str, Any] = HEADER(header)
    num_layers, num_experts = len(held["layers"]), held["num_experts"]
    unique((layer["path"] for layer in held["layers"]), "the paths of the layers")
    if not re.fullmatch("[0-9a-f]{32}", held["text_digest"]):
        raise ValueError("text_digest must be 32 hexadecimal digits")
    slots = max(layer["top_k"] for layer in held["layers"])
    if slots > num_experts:
        raise ValueError(f"a layer chooses {slots} of {num_experts} experts")
    counts = {f"hist.{kind}.{name}.{i}" for kind in KINDS for name in SETS for i in range(num_layers)}
    if set(held["starts"]) != counts:
        odd = sorted(set(held["starts"]) ^ counts)[0]
        raise ValueError(
            f"starts must name the counts of every layer and no others, got or lacks {odd[:80]!r}"
        )
    expected = {key: replace(COUNTS, dtypes=INTEGERS, dims="E*") for key in sorted(counts)}
    present = [key for key in TENSORS if key in keys]
    for group in TOGETHER:
        if 0 < len(set(group) & set(present)) < len(group):
            raise ValueError(f"{' and '.join(group)} must be there together")
    parts = [key.split(".")[0] for key in present]
    if "moments" in parts and "moments.tokens" not in present:
        raise ValueError("moments.tokens must be there with the other moments")
    expected |= {key: TENSORS[key] for key in {"fingerprint", *present}}
    return (
        held,
        expected,
        {"L": num_layers, "E": num_experts, "J": 2 * num_experts, "K": slots, "Q": len(QUANTILES)},
    )


def _renamed(layer: dict[str, Any]) -> dict[str, Any]:
    """A layer's header with today's words; older files say ``score`` and ``convention``, and "raw" for "none"."""
    if not {"convention", "score"} <= set(layer):
        return layer
    kept = {key: value for key, value in layer.items() if key not in ("score", "convention")}
    norm = "none" if layer["convention"] == "raw" else layer["convention"]
    return kept | {"score_func": layer["score"], "route_norm": norm}


def _fields(header: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The fields of `CalibrationData` from a file's header and tensors.

    Raises
    ------
    ValueError
        If they do not agree with one another.
    """
    layers = [CalibratedLayer(**layer) for layer in header["layers"]]
    histograms = {
        kind: {
            name: _histogram(
                [f"hist.{kind}.{name}.{i}" for i in range(len(layers))], header["starts"], tensors
            )
            for name in SETS
        }
        for kind in KINDS
    }
    found: dict[str, Any] = {key: value for key, value in header.items() if key != "starts"}
    for part, kind_of_part in PARTS.items():
        held: dict[str, Any] = {name: tensors.get(key) for name, key in _keys(part).items()}
        if not part:
            found |= held
        elif any(value is not None for value in held.values()):
            if part == "moments":  # float32 in the file, where no sums are made of them
                held = {
                    n: v.double() if v is not None and v.is_floating_point() else v for n, v in held.items()
                }
            found[part] = kind_of_part(**held)
    _check_counts(histograms, layers, header["num_experts"])
    if "moments" in found:
        _check_moments(found["moments"])
    if "linear" in found and int(found["linear"].rank_L.max()) > found["linear"].whiten_LDR.shape[-1]:
        raise ValueError("linear.rank must be at most the width of linear.whiten")
    if (certified := header.get("certificate")) is not None:
        found["certificate"] = certificate.check(certified, tensors["fingerprint"])
    if "reservoir" in found:
        _check_reservoir(found["reservoir"], layers, header)
    documents_C = found["document_digests_C"]
    if documents_C is not None and bool((documents_C.diff() <= 0).any()):
        raise ValueError("document_digests must ascend, each of them once")
    return found | {
        "left_out": tuple(header.get("left_out", ())),
        "layers": tuple(layers),
        "histograms": histograms,
    }


def _histogram(keys: list[str], starts: dict[str, int], tensors: dict[str, Tensor]) -> Histogram:
    """The counts of all layers over their common bins, where that is no more than memory should be taken for."""
    widths = [tensors[key].shape[1] for key in keys]
    ends = [starts[key] + width for key, width in zip(keys, widths, strict=True)]
    if min(widths) < 1 or max(ends) > LAST_BIN + 1:
        raise ValueError(f"{keys[0][:-2]} has no bins, or some beyond the last")
    cells = len(keys) * tensors[keys[0]].shape[0] * (max(ends) - min(starts[key] for key in keys))
    if cells > MOST_COUNTS:
        raise ValueError(f"{keys[0][:-2]} would take {cells:,} counts, at most {MOST_COUNTS:,} are read")
    return stack_layers([Histogram(starts[key], tensors[key].long().unsqueeze(0)) for key in keys])


def _check_counts(
    histograms: dict[str, dict[str, Histogram]], layers: Sequence[CalibratedLayer], num_experts: int
) -> None:
    """Every token chooses top-k experts and passes the others over, but for those that are masked, in both statistics."""
    for i, layer in enumerate(layers):
        sums = {
            (kind, name): int(histograms[kind][name].counts_LEB[i].sum()) for kind in KINDS for name in SETS
        }
        chosen, passed = sums["logit", "selected"], sums["logit", "unselected"]
        if chosen % layer.top_k or passed * layer.top_k > chosen * (num_experts - layer.top_k):
            raise ValueError(
                f"{layer.path} chose {chosen:,} experts and passed {passed:,} over, which are not {layer.top_k} and "
                f"{num_experts - layer.top_k} a token"
            )
        if any(sums["logit", name] != sums["logprob", name] for name in ("selected", "unselected")):
            raise ValueError(f"the counts of the two statistics differ in {layer.path}")
        if max(sums["logit", "trimmed"], sums["logprob", "trimmed"]) > chosen + passed:
            raise ValueError(f"{layer.path} has more trimmed logits than logits")


def _check_moments(moments: Moments) -> None:
    # Not compared with the counts: a calibration that was fitted anew while training counts other tokens than its moments.
    if bool((moments.tokens_LE < 0).any()):
        raise ValueError("moments.tokens must be numbers of tokens, 0 or more")
    if bool((moments.mean_square_LE > moments.square_LE * 1.001 + 1e-12).any()):
        raise ValueError("moments.mean_square must be at most moments.square")
    if moments.mean_LEH is not None and not torch.allclose(
        moments.mean_LEH.square().sum(-1), moments.mean_square_LE, rtol=1e-3, atol=1e-9
    ):
        raise ValueError("moments.mean_square must be the square of moments.mean")
    if moments.gram_LJJ is not None:
        bound_LJ = moments.gram_LJJ.diagonal(dim1=1, dim2=2)
        if bool((bound_LJ < 0).any()):
            raise ValueError("moments.gram must hold sums of squares in its diagonal")
        bound_LJJ = (bound_LJ.unsqueeze(1) * bound_LJ.unsqueeze(2)).sqrt() * 1.001 + 1e-6
        if not torch.equal(moments.gram_LJJ, moments.gram_LJJ.mT) or bool(
            (moments.gram_LJJ.abs() > bound_LJJ).any()
        ):
            raise ValueError("moments.gram must be a matrix of products")


def _check_reservoir(kept: Reservoir, layers: Sequence[CalibratedLayer], header: dict[str, Any]) -> None:
    if kept.num > header["reservoir_size"] or bool((kept.hash_N.diff() < 0).any()):
        raise ValueError(
            f"the reservoir must hold at most {header['reservoir_size']:,} tokens in order of their hashes"
        )
    for i, layer in enumerate(layers):
        if not sound_choice(kept.experts_NLK[:, i], layer.top_k, header["num_experts"]):
            raise ValueError(
                f"the kept experts of {layer.path} must be {layer.top_k} of {header['num_experts']}"
            )
