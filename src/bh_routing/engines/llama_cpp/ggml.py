"""llama-cpp-python's libraries seen through ctypes: ggml's tensors, whose layout is verified, and the place of cb_eval.

Shape legend: ne, sizes of a tensor's dimensions, innermost first (the reverse of torch's).
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import MissingDependencyError, UnsupportedModelError
from .shim import GgmlTensor, layout, own_layout

TESTED = ("0.3.36",)

Node = Any  # a pointer to GgmlTensor
Callback = Callable[[GgmlTensor, bool], bool]  # (node, is it only a question) -> whether to compute up to it

_TYPES: dict[int, tuple[Any, torch.dtype]] = {
    0: (np.float32, torch.float32),
    1: (np.float16, torch.float16),
    26: (np.int32, torch.int32),
    30: (np.int16, torch.bfloat16),
}


def modules() -> tuple[Any, Any]:
    """``llama_cpp`` and its low-level module; raises `MissingDependencyError`."""
    try:
        import llama_cpp
        import llama_cpp.llama_cpp as low
    except (ImportError, OSError, RuntimeError) as error:  # RuntimeError: its library cannot be loaded
        raise MissingDependencyError(
            f"routing in llama.cpp needs llama-cpp-python {TESTED[-1]}, which cannot be imported ({error}); "
            "pip install 'bh-routing[llama-cpp]', which takes a C++ compiler."
        ) from error
    return llama_cpp, low


@lru_cache
def base() -> Any:
    """The library that holds ggml's tensors, its functions typed."""
    from llama_cpp._ctypes_extensions import load_shared_library
    from llama_cpp.llama_cpp import _base_path

    lib = load_shared_library("ggml-base", _base_path)
    pointer, node, size = ctypes.c_void_p, ctypes.POINTER(GgmlTensor), [ctypes.c_int64] * 4
    for name, arguments, result in (
        ("ggml_init", [_InitParams], pointer),
        ("ggml_free", [pointer], None),
        ("ggml_new_tensor_4d", [pointer, ctypes.c_int, *size], node),
        ("ggml_view_4d", [pointer, node, *size, *[ctypes.c_size_t] * 4], node),
        ("ggml_mul_mat_id", [pointer, node, node, node], node),
        ("ggml_set_name", [node, ctypes.c_char_p], node),
        ("ggml_get_name", [node], pointer),
        ("ggml_get_data", [node], pointer),
        ("ggml_op_name", [ctypes.c_int], ctypes.c_char_p),
        ("ggml_type_name", [ctypes.c_int], ctypes.c_char_p),
        ("ggml_backend_buffer_is_host", [pointer], ctypes.c_bool),
        ("ggml_backend_buffer_name", [pointer], ctypes.c_char_p),
    ):
        function = getattr(lib, name)
        function.argtypes, function.restype = arguments, result
    return lib


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


def check_layout(lib: ctypes.CDLL | None) -> None:
    """Compare the struct of a tensor, field by field, with tensors that ggml makes and asks about itself.

    Raises
    ------
    UnsupportedModelError
        Naming the first field that lies elsewhere: another ggml than this was written for.
    """
    ggml = base()
    context = ggml.ggml_init(_InitParams(1 << 20, None, False))
    try:
        one = ggml.ggml_new_tensor_4d(context, 0, 6, 5, 4, 3)
        ggml.ggml_set_name(one, b"abcdefgh")
        view = ggml.ggml_view_4d(context, one, 2, 3, 4, 1, 24, 120, 480, 8)
        matrices = ggml.ggml_new_tensor_4d(context, 0, 6, 8, 16, 1)
        inputs = ggml.ggml_new_tensor_4d(context, 0, 6, 1, 7, 1)
        chosen = ggml.ggml_new_tensor_4d(context, 26, 4, 7, 1, 1)
        product = ggml.ggml_mul_mat_id(context, matrices, inputs, chosen)
        a, v, p = one.contents, view.contents, product.contents
        strides = [4, 24, 120, 480]
        holds = {
            "ne": list(a.ne) == [6, 5, 4, 3] and list(p.ne) == [8, 4, 7, 1],
            "nb": list(a.nb) == strides and list(v.nb) == strides,
            "name": a.name == b"abcdefgh"
            and ggml.ggml_get_name(one) == address(one) + GgmlTensor.name.offset,
            "data": a.data == ggml.ggml_get_data(one) and v.data == a.data + 8,
            "view_src": address(v.view_src) == address(one) and v.view_offs == 8,
            "src": [address(p.src[i]) for i in range(3)] == [address(x) for x in (matrices, inputs, chosen)],
            "op": ggml.ggml_op_name(p.op) == b"MUL_MAT_ID",
            "type": ggml.ggml_type_name(chosen.contents.type) == b"i32",
            "size": lib is None or layout(lib) == own_layout(),
        }
    finally:
        ggml.ggml_free(context)
    wrong = [name for name, is_right in holds.items() if not is_right]
    if wrong:
        raise UnsupportedModelError(
            f"this llama.cpp lays ggml's tensors out differently ({', '.join(wrong)}): expected llama-cpp-python "
            f"{TESTED[-1]}; install that version."
        )


def address(node: Node) -> int:
    """Of what a pointer points to; 0 for none."""
    return ctypes.addressof(node.contents) if node else 0


def op(node: Node) -> str:
    """The name of a node's operation."""
    return str(base().ggml_op_name(node.contents.op).decode())


def name_of(node: Node) -> str:
    """A node's name."""
    return str(node.contents.name.decode(errors="replace"))


def is_host(node: Node) -> bool:
    """Whether a tensor's memory can be read by this process; also where it is a view of one that can."""
    t = node.contents
    buffer = t.buffer or (t.view_src.contents.buffer if t.view_src else None)
    return bool(buffer) and bool(base().ggml_backend_buffer_is_host(buffer))


def numbers(tensor: GgmlTensor) -> Tensor:
    """A host tensor's numbers, in torch's order of dimensions, without a copy (bfloat16 as such).

    Raises
    ------
    UnsupportedModelError
        For a type that is no plain number.
    """
    if tensor.type not in _TYPES:
        kind = base().ggml_type_name(tensor.type).decode()
        raise UnsupportedModelError(f"{tensor.name.decode()} holds {kind}: expected f32, f16, bf16 or i32.")
    kind, dtype = _TYPES[tensor.type]
    sizes, strides = list(tensor.ne), list(tensor.nb)
    length = sum((n - 1) * step for n, step in zip(sizes, strides, strict=True)) + np.dtype(kind).itemsize
    if 0 in sizes:
        return torch.zeros(sizes[::-1], dtype=dtype)
    memory = (ctypes.c_char * length).from_address(tensor.data)
    array = np.ndarray(sizes[::-1], kind, memory, strides=strides[::-1])
    held = torch.from_numpy(array)
    return held.view(dtype) if held.dtype != dtype else held


@contextmanager
def injected(function: int, user: int | None) -> Iterator[None]:
    """Contexts that this thread makes in here have this callback: `Llama` has no argument for it."""
    _, low = modules()
    original, here = low.llama_context_default_params, threading.get_ident()
    kind = low.ggml_backend_sched_eval_callback

    def params() -> Any:
        made = original()
        if threading.get_ident() == here:
            made.cb_eval = ctypes.cast(function, kind)
            made.cb_eval_user_data = user
            made.op_offload = False  # a build for GPUs would send large products there all the same
        return made

    with _INJECTING:
        low.llama_context_default_params = params
        try:
            yield
        finally:
            low.llama_context_default_params = original


_INJECTING = threading.Lock()
