"""What one decode shows of a model: which nodes route, in which order, and whether this library knows what to do with them.

llama.cpp's node names and their order are no interface. So they are read from the graph itself, before anything is routed,
and a model whose graph is not as expected is refused in one sentence.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import Tensor

from ...decision.types import RouteNorm
from ...errors import UnsupportedModelError
from ...policies import RoutingContext
from .ggml import Node, address, base, is_host, name_of, numbers, op
from .hook import Hook
from .shim import MOST_EXPERTS, MOST_SLOTS, GgmlTensor


@dataclass(frozen=True)
class Architecture:
    """A tested architecture: where transformers has the routers and experts of a block."""

    model_type: str  # in transformers
    router: str = "model.layers.{}.mlp.gate"
    experts: str = "model.layers.{}.mlp.experts"


# general.architecture of a GGUF file; a row is added with a test in tests/llama_cpp/test_llama_families.py.
ARCHITECTURES: Mapping[str, Architecture] = {
    "olmoe": Architecture("olmoe"),
    "qwen3moe": Architecture("qwen3_moe"),
    "gpt-oss": Architecture("gpt_oss", router="model.layers.{}.mlp.router"),
    "llama": Architecture("mixtral"),
    "qwen2moe": Architecture("qwen2_moe"),
    "deepseek2": Architecture("deepseek_v2"),
}

# What may follow from the router's choice and weights before their product; all of it works row by row.
_BY_ROW = {"MUL_MAT_ID", "ADD_ID", "GLU", "UNARY", "MUL", "CLAMP", "SCALE", "ADD"}
_PRODUCTS = re.compile(r"ffn_moe_(up|gate|down)-\d+")


@dataclass(frozen=True, kw_only=True)
class Structure:
    """What routes in one model.

    Attributes
    ----------
    architecture : str
        A key of `ARCHITECTURES`.
    blocks : tuple of int
        Numbers of the blocks that route.
    experts, slots, hidden : int
        E, K, H.
    logits, weights, outputs : str
        Nodes, without the block's number: the router's logits; its last weights; what the experts computed, one row for each slot.
    score_func, route_norm : str
        As in `bh_routing.policies.RoutingContext`.
    expert_numbers : int
        How many numbers one expert's weights are.
    """

    architecture: str
    blocks: tuple[int, ...]
    experts: int
    slots: int
    hidden: int
    logits: str
    weights: str
    outputs: str
    score_func: str
    route_norm: RouteNorm
    expert_numbers: int

    def path(self, block: int) -> str:
        """transformers' module path of a block's router."""
        return ARCHITECTURES[self.architecture].router.format(block)

    def experts_path(self, block: int) -> str:
        """transformers' module path of a block's experts."""
        return ARCHITECTURES[self.architecture].experts.format(block)

    def contexts(self) -> dict[int, RoutingContext]:
        """By block: every router as it is, where what is dropped is compensated or only looked at."""
        return {
            block: RoutingContext(
                path=self.path(block),
                index=index,
                num_experts=self.experts,
                empty=self.experts,
                top_k=self.slots,
                route_norm="none",
                score_func=self.score_func,
            )
            for index, block in enumerate(self.blocks)
        }


def check_architecture(name: str) -> None:
    """Raise `UnsupportedModelError` for an architecture that is not in the table."""
    if name not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"models of llama.cpp's architecture {name!r} have not been compared with transformers: expected one of "
            f"{', '.join(ARCHITECTURES)} (docs/llama_cpp.md)."
        )


def read_structure(llm: Any, hook: Hook, architecture: str) -> tuple[Structure, dict[int, list[Tensor]]]:
    """Run one token and read the graph that llama.cpp made for it.

    Returns
    -------
    structure : Structure
    routers : dict of block number to list of Tensor
        The weights [E, H] of each router, and its bias [E] where it has one: copies.

    Raises
    ------
    UnsupportedModelError
        For a model without routed experts, or one whose graph is not as expected.
    """
    asked: list[int] = []

    def watch(node: GgmlTensor, ask: bool) -> bool:
        asked.append(ctypes.addressof(node))
        return False

    hook.to_python(watch)
    try:
        llm._batch.set_batch(
            batch=[llm.token_bos() if llm.token_bos() >= 0 else 0], n_past=0, logits_all=False
        )
        llm._ctx.decode(llm._batch)
        hook.raise_error()
        return _read(asked, architecture)  # while the graph is there
    finally:
        hook.to_nobody()
        llm._ctx.kv_cache_clear()


def _read(asked: list[int], architecture: str) -> tuple[Structure, dict[int, list[Tensor]]]:
    nodes = [ctypes.pointer(GgmlTensor.from_address(at)) for at in asked]
    names = [name_of(node) for node in nodes]
    blocks = sorted(int(m[1]) for m in map(re.compile(r"ffn_moe_weighted-(\d+)").fullmatch, names) if m)
    if not blocks:
        raise UnsupportedModelError(
            f"this model ({architecture}) has no routed experts: llama.cpp computed no node ffn_moe_weighted."
        )
    read = {block: _Block(block, nodes, names) for block in blocks}
    found = {block: one.structure() for block, one in read.items()}
    first = found[blocks[0]]
    for block, one in found.items():
        if one != first:
            wrong = next(name for name in first if first[name] != one[name])
            raise UnsupportedModelError(
                f"blocks {blocks[0]} and {block} route differently: {wrong} is {first[wrong]!r} in one and {one[wrong]!r} "
                "in the other; models of this kind are not supported."
            )
    made = Structure(architecture=architecture, blocks=tuple(blocks), **first)
    return made, {block: one.router() for block, one in read.items()}


class _Block:
    """One block's routing nodes, found backwards from the product of outputs and weights."""

    def __init__(self, block: int, nodes: list[Node], names: list[str]) -> None:
        self.block, self.nodes = block, nodes
        self.order = {address(node): i for i, node in enumerate(nodes)}
        self.weighted = self._named("weighted", names)
        self.topk = self._named("topk", names)
        self.weights = _unwrapped(self.weighted.contents.src[1])
        *self.chain, rows = _until_rows(self.weights)
        if rows is None:
            self._refuse("its weights are not taken from its scores")
        if address(rows.contents.src[1]) != address(self.topk):
            self._refuse("its weights are not those of the experts that it chose")
        scores = _unwrapped(rows.contents.src[0])
        self.scores, self.logits = scores, scores
        self.kind = "softmax"
        if op(scores) == "SOFT_MAX":
            self.logits = scores.contents.src[0]
        elif op(scores) == "UNARY":
            lib = base()
            lib.ggml_unary_op_name.restype = ctypes.c_char_p
            self.kind = lib.ggml_unary_op_name(lib.ggml_get_unary_op(scores)).decode().lower()
            self.logits = scores.contents.src[0]
            if self.kind != "sigmoid":
                self._refuse(f"its scores are the {self.kind} of its logits")
        elif not any(op(node) == "SOFT_MAX" for node in self.chain):
            self._refuse("its scores are neither a softmax nor a sigmoid")

    def _refuse(self, what: str) -> NoReturn:
        raise UnsupportedModelError(f"block {self.block}: {what}; models of this kind are not supported.")

    def _named(self, what: str, names: list[str]) -> Node:
        name = f"ffn_moe_{what}-{self.block}"
        if name not in names:
            self._refuse(f"llama.cpp computed no node {name}")
        return self.nodes[names.index(name)]

    def _at(self, node: Node) -> int:
        if address(node) not in self.order:
            self._refuse(f"the node {name_of(node)} is not computed")
        return self.order[address(node)]

    def structure(self) -> dict[str, Any]:
        """The fields of `Structure` that all blocks share."""
        followers = list(self._followers())
        products = [node for node in followers if op(node) == "MUL_MAT_ID"]
        self._check_choice()
        self._check_followers(followers, products)
        order = [self.logits, self.topk, self.weights, products[0], self.weighted]
        if sorted(order, key=self._at) != order:
            self._refuse(
                "its nodes are computed in another order than expected: logits, choice, weights, experts"
            )
        for node in order:
            if not is_host(node):
                self._refuse(f"{name_of(node)} lies in a device's memory: expected n_gpu_layers=0")
        experts, slots = self.logits.contents.ne[0], self.topk.contents.ne[0]
        if experts > MOST_EXPERTS or slots > MOST_SLOTS:
            self._refuse(f"{slots} of {experts} experts are more than {MOST_SLOTS} of {MOST_EXPERTS}")
        renormalised = any(op(node) in ("DIV", "SOFT_MAX") for node in self.chain)
        return {
            "experts": experts,
            "slots": slots,
            "hidden": self.weighted.contents.ne[0],
            "logits": self._plain(self.logits),
            "weights": self._plain(self.weights),
            "outputs": self._plain(self.weighted.contents.src[0]),
            "score_func": self.kind,
            "route_norm": "renormalised" if renormalised else "none",
            "expert_numbers": sum(
                p.contents.src[0].contents.ne[0] * p.contents.src[0].contents.ne[1] for p in products
            ),
        }

    def _plain(self, node: Node) -> str:
        name, suffix = name_of(node), f"-{self.block}"
        if not name.startswith("ffn_moe_") or not name.endswith(suffix):
            self._refuse(f"a node of its router is called {name!r}")
        return name.removesuffix(suffix)

    def _check_choice(self) -> None:
        chosen = self.topk.contents.view_src or self.topk
        if address(_unwrapped(chosen.contents.src[0])) != address(self.scores):
            self._refuse("it chooses by something else than its scores (groups of experts, or a bias)")

    def _followers(self) -> Iterator[Node]:
        """The nodes that follow from the weights or the choice, up to their product."""
        after = {address(self.topk), address(self.weights)}
        for node in self.nodes[self._at(self.weights) + 1 : self._at(self.weighted) + 1]:
            if any(address(node.contents.src[i]) in after for i in range(3)):
                after.add(address(node))
                yield node

    def _check_followers(self, followers: list[Node], products: list[Node]) -> None:
        slots = self.topk.contents.ne[0]
        if not products or address(followers[-1]) != address(self.weighted):
            self._refuse("its experts do not follow from its choice")
        for node in followers:
            t, name = node.contents, name_of(node)
            reshaped = op(node) == "RESHAPE" and address(t.src[0]) == address(self.weights)
            if op(node) == "VIEW" or name.startswith("ffn_moe_gate_up"):
                self._refuse("gate and up of its experts are one tensor")
            if not reshaped and op(node) not in _BY_ROW:
                self._refuse(f"{name} is a {op(node)} between its weights and their product")
            if list(t.ne)[1:] != [slots, 1, 1]:
                self._refuse(f"{name} has the shape {list(t.ne)}, expected {slots} rows")
            if op(node) == "MUL_MAT_ID" and not _PRODUCTS.fullmatch(name):
                self._refuse(
                    "there are more products with its experts than up, gate and down (a LoRA of experts)"
                )

    def router(self) -> list[Tensor]:
        """Weights, and a bias where there is one."""
        node, found = self.logits, []
        if op(node) == "ADD":
            if op(node.contents.src[1]) != "NONE":
                self._refuse("its logits are more than a product and a bias (a LoRA of the router)")
            found.append(node.contents.src[1])
            node = node.contents.src[0]
        found.insert(0, node.contents.src[0])
        return [numbers(one.contents).squeeze(0).squeeze(0).float().clone() for one in found]


def _unwrapped(node: Node) -> Node:
    """What a reshaped node holds."""
    while op(node) == "RESHAPE" and not name_of(node).startswith("ffn_moe_weights_softmax-"):
        node = node.contents.src[0]
    return node


def _until_rows(node: Node) -> Iterator[Node | None]:
    """From the last weights back to where the chosen scores are taken; None last if that is not found."""
    for _ in range(12):
        if not node:
            break
        yield node
        if op(node) == "GET_ROWS":
            return
        node = node.contents.src[0]
    yield None
