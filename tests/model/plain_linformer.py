"""The encoder and the heads as their formulas read: one cell, one head at a time, all islands, no tricks.

Formula 1 of the paper adds the embedding of an island's value to the embedding of its position; formula 2 is
Linformer's attention. As in the released code, one E with bias serves keys and values in all layers, and
``input_mask`` zeroes keys and values of masked-out islands before E.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from annatac_scale.model.linformer import EncoderConfig

Weights = dict[str, Tensor]


def leaves(module: nn.Module) -> Weights:
    """Copies of all parameters that require gradients of their own, and of all buffers."""
    parameters = {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters()}
    return parameters | {name: b.detach().clone() for name, b in module.named_buffers()}


def encode(weights: Weights, config: EncoderConfig, tokens: Tensor, input_mask: Tensor) -> Tensor:
    """Hidden states [N, width] of one cell with tokens int64 [N], attending to the islands in bool [N]."""
    x = weights["token_embedding.weight"][tokens] + weights["positions"]
    if config.depth:
        n_open = max(int(((tokens > 0) & (tokens < 6)).sum()), 1)
        x = x + weights["depth"] * math.log(n_open / config.tokens_per_cell) * input_mask[:, None]
    closed = weights["token_embedding.weight"][0] + weights["positions"]
    everything = torch.ones_like(input_mask)
    for i in range(config.layers):
        seen = input_mask
        if config.closed == "every" or (config.closed == "first" and i == 0):
            # Islands that are not listed are seen as they start, whatever became of the listed ones.
            x, seen = torch.where(input_mask[:, None], x, closed), everything
        x = _layer(weights, f"layers.{i}.", config, x, seen)
    return _norm(weights, "final_norm.", x) if config.norm == "pre" else x


def _layer(weights: Weights, prefix: str, config: EncoderConfig, x: Tensor, mask: Tensor) -> Tensor:
    def norm_1(x: Tensor) -> Tensor:
        return _norm(weights, f"{prefix}attention_norm.", x)

    def norm_2(x: Tensor) -> Tensor:
        return _norm(weights, f"{prefix}feed_forward_norm.", x)

    if config.norm == "pre":
        x = x + _attention(weights, prefix, config, norm_1(x), mask)
        return x + _feed_forward(weights, prefix, norm_2(x))
    x = norm_1(x + _attention(weights, prefix, config, x, mask))
    return norm_2(x + _feed_forward(weights, prefix, x))


def _attention(weights: Weights, prefix: str, config: EncoderConfig, x: Tensor, mask: Tensor) -> Tensor:
    e_NK, b_K = weights["projection"], weights["projection_bias"]
    heads = []
    for h in range(config.heads):
        rows = slice(h * config.head_dim, (h + 1) * config.head_dim)
        query = x @ weights[f"{prefix}attention.query.weight"][rows].T
        key = (x @ weights[f"{prefix}attention.key.weight"][rows].T) * mask[:, None]
        value = (x @ weights[f"{prefix}attention.value.weight"][rows].T) * mask[:, None]
        projected_key = e_NK.T @ key + b_K[:, None]
        projected_value = e_NK.T @ value + b_K[:, None]
        scores = query @ projected_key.T / math.sqrt(config.head_dim)
        heads.append(torch.softmax(scores, dim=1) @ projected_value)
    output, bias = weights[f"{prefix}attention.output.weight"], weights[f"{prefix}attention.output.bias"]
    return torch.cat(heads, dim=1) @ output.T + bias


def _feed_forward(weights: Weights, prefix: str, x: Tensor) -> Tensor:
    x = _linear(weights, f"{prefix}feed_forward.0.", x)
    x = 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
    return _linear(weights, f"{prefix}feed_forward.2.", x)


def _linear(weights: Weights, prefix: str, x: Tensor) -> Tensor:
    return x @ weights[f"{prefix}weight"].T + weights[f"{prefix}bias"]


def _norm(weights: Weights, prefix: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return scaled * weights[f"{prefix}weight"] + weights[f"{prefix}bias"]


def cnn_logits(weights: Weights, hidden_BND: Tensor, listed_BN: Tensor, n_layers: int) -> Tensor:
    """The CNN head on dense cells; islands that are not listed give zero. ``n_layers``: after the first."""
    scalar_BN = torch.relu(_linear(weights, "filter.", hidden_BND)[..., 0]) * listed_BN
    table_NM = weights["table"]
    if "expand.weight" in weights:
        table_NM = table_NM @ weights["expand.weight"].T
    x = torch.relu(functional.linear(scalar_BN, table_NM.T, weights["bias"]))
    for i in range(n_layers):
        x = torch.relu(_linear(weights, f"layers.{i}.", x))
    return _linear(weights, "classifier.", x)


def pooled_logits(weights: Weights, hidden_BND: Tensor | None, open_BN: Tensor) -> Tensor:
    """The pooled head on dense cells, ``open_BN`` bool; None leaves the encoder out."""
    values_BN = weights["pool.idf"] * open_BN
    if hidden_BND is not None:
        values_BN = values_BN * (1 + _linear(weights, "pool.gate.", hidden_BND)[..., 0])
    norms_B1 = torch.linalg.vector_norm(values_BN, dim=1, keepdim=True)
    unit_BN = torch.where(norms_B1 > 0, values_BN / norms_B1.clamp_min(1e-30), torch.zeros_like(values_BN))
    z_BM = unit_BN @ weights["pool.table"]
    if "pool.sum.weight" in weights:
        z_BM = z_BM + torch.einsum("bn,bnd->bd", unit_BN, hidden_BND) @ weights["pool.sum.weight"].T
    return _linear(weights, "classifier.", _norm(weights, "pool.norm.", z_BM))
