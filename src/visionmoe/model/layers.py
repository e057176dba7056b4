"""The parts of an encoder: attention, MLP, attention pooling, and the block that holds them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionmoe.config import ModelConfig
from visionmoe.model.cpu_training import attention
from visionmoe.model.moe import MoE, SoftMoE
from visionmoe.model.packed import Linear


class Attention(nn.Module):
    """Multi-head self-attention; qkv rows are all queries, then keys, then values, each head by head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.num_heads = config.num_heads
        self.dropout_rate = config.attention_dropout_rate
        self.qkv = Linear(dim, 3 * dim)
        self.q_norm, self.k_norm = qk_norms(config)
        self.proj = Linear(dim, dim)

    def reset_parameters(self) -> None:
        for weight in self.qkv.weight.chunk(3):
            nn.init.xavier_uniform_(weight)
        nn.init.zeros_(self.qkv.bias)
        nn.init.xavier_uniform_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, -1).unbind(2)  # 3 of (B, T, H, D/H)
        q, k, v = (part.transpose(1, 2) for part in qkv)  # (B, H, T, D/H)
        rate = self.dropout_rate if self.training else 0.0
        q, k = self.q_norm(q), self.k_norm(k)
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=rate) if rate else attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, dim))


class Mlp(nn.Module):
    """Two dense layers with GELU between them; approximate: "tanh" or "none", as torch names its forms."""

    def __init__(self, hidden_size: int, mlp_dim: int, dropout_rate: float = 0.0, *, approximate: str = "tanh") -> None:
        super().__init__()
        self.approximate = approximate
        self.fc1 = Linear(hidden_size, mlp_dim)
        self.fc2 = Linear(mlp_dim, hidden_size)
        self.dropout = nn.Dropout(dropout_rate)

    def reset_parameters(self) -> None:
        for layer in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.normal_(layer.bias, std=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.fc2(self.dropout(self.fc1(x, gelu=self.approximate))))


class AttentionPool(nn.Module):
    """Attention pooling ("MAP head"): a learned probe attends over the tokens. (B, T, D) -> (B, D)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.num_heads = config.num_heads
        self.latent = nn.Parameter(torch.empty(1, 1, dim))
        self.q = Linear(dim, dim)
        self.kv = Linear(dim, 2 * dim)
        self.q_norm, self.k_norm = qk_norms(config)
        self.proj = Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.mlp = Mlp(dim, config.mlp_dim, approximate=config.gelu_approximate)

    def reset_parameters(self) -> None:
        for weight in (self.latent[0], self.q.weight, *self.kv.weight.chunk(2), self.proj.weight):
            nn.init.xavier_uniform_(weight)
        for layer in (self.q, self.kv, self.proj):
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        q = self.q(self.latent).view(1, 1, self.num_heads, -1).transpose(1, 2).expand(batch, -1, -1, -1)
        kv = self.kv(x).view(batch, tokens, 2, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # (2, B, H, T, D/H)
        k, v = kv.unbind()
        out = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        out = self.proj(out.transpose(1, 2).reshape(batch, dim))
        return out + self.mlp(self.norm(out))


class Block(nn.Module):
    """Pre-norm encoder block whose MLP may be a sparse layer."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        dim, mlp_dim, moe, gelu = config.hidden_size, config.mlp_dim, config.moe, config.gelu_approximate
        self.norm1 = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.attn = Attention(config)
        self.dropout = nn.Dropout(config.dropout_rate)
        self.norm2 = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.mlp: Mlp | MoE | SoftMoE
        if layer not in moe.layers:
            self.mlp = Mlp(dim, mlp_dim, config.dropout_rate, approximate=gelu)
        elif moe.router == "soft":
            self.mlp = SoftMoE(moe, config.num_tokens, dim, mlp_dim, approximate=gelu)
        else:
            self.mlp = MoE(moe, layer, dim, mlp_dim, approximate=gelu)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """(B, T, D) -> tokens, auxiliary loss () of a sparse layer or None, metrics."""
        x = x + self.dropout(self.attn(self.norm1(x)))
        y = self.mlp(self.norm2(x))
        if isinstance(y, Tensor):
            return x + y, None, {}
        return x + y.tokens, y.auxiliary_loss, y.metrics


def qk_norms(config: ModelConfig) -> tuple[nn.Module, nn.Module]:
    """LayerNorm without bias over the head dimension for queries and keys, or nothing."""
    if not config.attention_qk_norm:
        return nn.Identity(), nn.Identity()
    size, eps = config.hidden_size // config.num_heads, config.layer_norm_eps
    return nn.LayerNorm(size, eps=eps, bias=False), nn.LayerNorm(size, eps=eps, bias=False)
