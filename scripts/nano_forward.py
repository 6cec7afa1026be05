"""The forward pass of an ``OlmoeForCausalLM`` written out for training on a CPU.

On one core it is several times faster than the modules': one sort per layer for the experts, a cross entropy that never
holds all logits, causal attention that skips what the mask hides, elementwise chains fused by ``torch.compile``. ``tests/test_train_script.py`` holds
it, and its gradients, against the modules' own.

Shapes: B windows, S tokens a window, T = B * S, D hidden width, H heads, E experts, K slots per token, F expert width,
N = T * K rows sorted by expert (and padding), V vocabulary, C rows of a chunk of T.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import OlmoeForCausalLM


class Fused:
    """A function of tensors that runs as written, or through ``torch.compile`` while ``Fused.on`` is set."""

    on = False

    def __init__(self, function: Any) -> None:
        self.function = function
        self.compiled = torch.compile(function, dynamic=False)
        self.__doc__ = function.__doc__

    def __call__(self, *args: Any) -> Any:
        return (self.compiled if Fused.on else self.function)(*args)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


@Fused
def attention_block(
    hidden_BSD: Tensor, weights: tuple[Tensor, ...], cos: Tensor, sin: Tensor, heads: int, eps: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The residual stream after attention, and its normalised copy that router and experts read; both float32."""
    norm, q_w, k_w, v_w, q_norm, k_norm, o_w, after_norm = weights
    B, S, D = hidden_BSD.shape
    x = rms_norm(hidden_BSD, norm, eps).to(dtype).view(B * S, D)

    def split(flat: Tensor) -> Tensor:
        return flat.view(B, S, heads, D // heads).transpose(1, 2)

    q = rotate(split(rms_norm(x @ q_w.to(dtype).t(), q_norm, eps)), cos, sin).to(dtype)
    k = rotate(split(rms_norm(x @ k_w.to(dtype).t(), k_norm, eps)), cos, sin).to(dtype)
    v = split(x @ v_w.to(dtype).t())
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B * S, D)
    hidden_BSD = hidden_BSD + (mixed @ o_w.to(dtype).t()).view(B, S, D).float()
    return hidden_BSD, rms_norm(hidden_BSD, after_norm, eps)


@Fused
def router(x_TD: Tensor, weight_ED: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights [T, K], experts [T, K], and the two losses of this layer: load balancing and router z.

    The balancing loss is E * sum_e load_e * probability_e, with the share of the top-k load and the mean probability
    of each expert (Switch Transformers, eq. 4, for K slots as in OLMoE): 1 where both are uniform.
    """
    logits_TE = x_TD @ weight_ED.t()
    probabilities_TE = logits_TE.softmax(dim=-1)
    weights_TK, experts_TK = probabilities_TE.topk(top_k, dim=-1)
    E = weight_ED.shape[0]
    load_E = F.one_hot(experts_TK, E).sum(dim=(0, 1)).float() / experts_TK.numel()
    balance = E * (load_E * probabilities_TE.mean(dim=0)).sum()
    z = logits_TE.logsumexp(dim=-1).square().mean()
    return weights_TK, experts_TK, balance, z


@Fused
def swiglu(gate_up_N2F: Tensor) -> Tensor:
    gate, up = gate_up_N2F.chunk(2, dim=-1)
    return (F.silu(gate.float()) * up.float()).to(gate_up_N2F.dtype)


@Fused
def swiglu_backward(gate_up_N2F: Tensor, grad_NF: Tensor) -> Tensor:
    gate, up = gate_up_N2F.float().chunk(2, dim=-1)
    grad, sigmoid = grad_NF.float(), gate.sigmoid()
    grad_gate = grad * up * sigmoid * (1 + gate * (1 - sigmoid))
    return torch.cat((grad_gate, grad * gate * sigmoid), dim=-1).to(gate_up_N2F.dtype)


@Fused
def weighted_sum(rows_TKD: Tensor, weights_TK: Tensor) -> Tensor:
    """Each token's weighted sum of its K rows, float32."""
    return (rows_TKD.float() * weights_TK.unsqueeze(-1)).sum(dim=1)


@Fused
def weighted_sum_backward(grad_ND: Tensor, rows_ND: Tensor, weights_N: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``weighted_sum`` with respect to its rows and to its weights, in sorted order."""
    grad = grad_ND.float()
    return (grad * weights_N.unsqueeze(-1)).to(rows_ND.dtype), (grad * rows_ND.float()).sum(dim=-1)


class SortedExperts(torch.autograd.Function):
    """All experts of a layer: sort the (token, slot) rows by expert once, then three small matmuls per expert.

    Each expert's rows are padded to a multiple of ``pad``, because oneDNN prepares a new kernel for each new shape,
    which takes longer than the matmul itself. Padding rows have weight 0.
    """

    pad = 32

    @staticmethod
    def forward(ctx, x_TD, weights_TK, experts_TK, gate_up, down):
        (T, K), E, pad = experts_TK.shape, gate_up.shape[0], SortedExperts.pad
        flat = experts_TK.flatten()
        order = flat.argsort(stable=True)
        counts_E = flat.bincount(minlength=E)
        padded_E = (counts_E + pad - 1) // pad * pad
        shift_E = (padded_E - counts_E).cumsum(0) - (padded_E - counts_E)
        row_of_sorted = torch.arange(T * K) + shift_E[flat[order]]
        N = T * K + E * pad
        token_N = torch.zeros(N, dtype=torch.long).scatter_(0, row_of_sorted, order // K)
        weights_N = torch.zeros(N).scatter_(0, row_of_sorted, weights_TK.flatten()[order])
        row_of_slot = torch.empty_like(order).scatter_(0, order, row_of_sorted)
        ends = padded_E.cumsum(0).tolist()
        spans = [(e, a, b) for e, (a, b) in enumerate(zip([0, *ends], ends, strict=False)) if b > a]

        x_ND = x_TD.index_select(0, token_N)
        gate_up_N2F = x_TD.new_zeros(N, gate_up.shape[1])
        for e, a, b in spans:
            torch.mm(x_ND[a:b], gate_up[e].t(), out=gate_up_N2F[a:b])
        hidden_NF = swiglu(gate_up_N2F)
        rows_ND = torch.zeros_like(x_ND)
        for e, a, b in spans:
            torch.mm(hidden_NF[a:b], down[e].t(), out=rows_ND[a:b])
        ctx.spans = spans
        ctx.save_for_backward(
            x_ND, gate_up_N2F, hidden_NF, rows_ND, token_N, weights_N, row_of_slot, weights_TK, gate_up, down
        )
        return weighted_sum(rows_ND.index_select(0, row_of_slot).view(T, K, -1), weights_TK)

    @staticmethod
    def backward(ctx, grad_TD):
        x_ND, gate_up_N2F, hidden_NF, rows_ND, token_N, weights_N, row_of_slot, weights_TK, gate_up, down = (
            ctx.saved_tensors
        )
        grad_ND = grad_TD.to(x_ND.dtype).index_select(0, token_N)
        grad_rows_ND, grad_weights_N = weighted_sum_backward(grad_ND, rows_ND, weights_N)
        grad_hidden_NF, grad_x_ND = torch.zeros_like(hidden_NF), torch.empty_like(x_ND)
        grad_gate_up, grad_down = torch.zeros_like(gate_up), torch.zeros_like(down)
        for e, a, b in ctx.spans:
            torch.mm(grad_rows_ND[a:b], down[e], out=grad_hidden_NF[a:b])
            torch.mm(grad_rows_ND[a:b].t(), hidden_NF[a:b], out=grad_down[e])
        grad_gate_up_N2F = swiglu_backward(gate_up_N2F, grad_hidden_NF)
        for e, a, b in ctx.spans:
            torch.mm(grad_gate_up_N2F[a:b], gate_up[e], out=grad_x_ND[a:b])
            torch.mm(grad_gate_up_N2F[a:b].t(), x_ND[a:b], out=grad_gate_up[e])
        per_slot = grad_x_ND.index_select(0, row_of_slot).view(*weights_TK.shape, -1)
        grad_x_TD = weighted_sum(per_slot, torch.ones_like(weights_TK)).to(x_ND.dtype)
        grad_weights_TK = grad_weights_N.index_select(0, row_of_slot).view_as(weights_TK)
        return grad_x_TD, grad_weights_TK, None, grad_gate_up, grad_down


@Fused
def cross_entropy_chunk(logits_CV: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor]:
    """Per-token loss (float32) and its gradient with respect to the logits."""
    logits = logits_CV.float()
    shifted = logits - logits.amax(dim=-1, keepdim=True)
    exponent = shifted.exp()
    total = exponent.sum(dim=-1, keepdim=True)
    hit = torch.arange(logits.shape[1]) == targets_C.unsqueeze(-1)
    loss = total.log().squeeze(-1) - shifted.gather(1, targets_C.unsqueeze(-1)).squeeze(-1)
    return loss, (exponent / total - hit.float()).to(logits_CV.dtype)


class ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross entropy of ``x @ embedding.T``; the gradients are computed with the loss, a few rows at a time."""

    rows = 256  # 256 x 8,192 float32 logits are 8 MB: they stay in the cache

    @staticmethod
    def forward(ctx, x_TD, embedding_VD, targets_T):
        grad_x, grad_embedding = torch.empty_like(x_TD), torch.zeros_like(embedding_VD, dtype=torch.float32)
        total = torch.zeros(())
        for x, targets, grad in zip(
            *(t.split(ChunkedCrossEntropy.rows) for t in (x_TD, targets_T, grad_x)), strict=True
        ):
            loss, grad_logits = cross_entropy_chunk(x @ embedding_VD.t(), targets)
            total += loss.sum()
            torch.mm(grad_logits, embedding_VD, out=grad)
            grad_embedding += grad_logits.t() @ x
        ctx.save_for_backward(grad_x, grad_embedding)
        ctx.dtype = embedding_VD.dtype
        return total / len(targets_T)

    @staticmethod
    def backward(ctx, grad):
        grad_x, grad_embedding = ctx.saved_tensors
        scale = grad / len(grad_x)
        return grad_x * scale.to(grad_x.dtype), (grad_embedding * scale).to(ctx.dtype), None


def forward(
    model: OlmoeForCausalLM, ids_BS: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """What the model computes, written out for speed: (last hidden state [B, S, D] after the final norm, mean balancing
    loss, mean z-loss, experts [T, K] of each layer). Matmuls run in ``dtype``; router, norms and residual in float32.
    """
    config = model.config
    B, S = ids_BS.shape
    cos, sin = (t[:, None] for t in model.model.rotary_emb(torch.zeros(1), torch.arange(S)[None]))
    hidden = model.model.embed_tokens.weight[ids_BS]
    balances, zs, experts = [], [], []
    for layer in model.model.layers:
        a = layer.self_attn
        weights = (
            layer.input_layernorm.weight, a.q_proj.weight, a.k_proj.weight, a.v_proj.weight, a.q_norm.weight,
            a.k_norm.weight, a.o_proj.weight, layer.post_attention_layernorm.weight,
        )  # fmt: skip
        hidden, x = attention_block(
            hidden, weights, cos, sin, config.num_attention_heads, config.rms_norm_eps, dtype
        )
        x_TD = x.view(B * S, -1)
        weights_TK, experts_TK, balance, z = router(x_TD, layer.mlp.gate.weight, config.num_experts_per_tok)
        stacks = (layer.mlp.experts.gate_up_proj.to(dtype), layer.mlp.experts.down_proj.to(dtype))
        mixed_TD = SortedExperts.apply(x_TD.to(dtype), weights_TK, experts_TK, *stacks)
        hidden = hidden + mixed_TD.view_as(hidden)
        balances.append(balance)
        zs.append(z)
        experts.append(experts_TK)
    hidden = rms_norm(hidden, model.model.norm.weight, config.rms_norm_eps)
    return hidden, torch.stack(balances).mean(), torch.stack(zs).mean(), experts


def losses(
    model: OlmoeForCausalLM, windows: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Cross entropy, balancing loss and z-loss of ``windows [B, S + 1]``, and the experts [T, K] of each layer."""
    hidden, balance, z, experts = forward(model, windows[:, :-1], dtype)
    embedding = model.model.embed_tokens.weight.to(dtype)
    targets = windows[:, 1:].reshape(-1)
    return ChunkedCrossEntropy.apply(hidden.flatten(0, 1).to(dtype), embedding, targets), balance, z, experts
