"""A GPT-2-style decoder made of nn.Linear layers and torch's scaled dot-product attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a `GPT`. `vocab_size` 256 means bytes; 50304 is GPT-2's 50257 padded to a multiple of 128."""

    vocab_size: int = 256
    context: int = 128
    layers: int = 2
    heads: int = 4
    width: int = 128
    dropout: float = 0.0
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads = {self.heads}; got {self.width}")


# Layers, heads and width of the GPT-2 family (Radford et al. 2019, table 2).
SIZES: dict[str, GPTConfig] = {
    "gpt": GPTConfig(),
    "gpt-tiny": GPTConfig(),
    # One block as wide as those of 7-billion-parameter language models, without their vocabulary.
    "gpt-block": GPTConfig(context=2048, layers=1, heads=32, width=4096),
    "gpt2": GPTConfig(vocab_size=50304, context=1024, layers=12, heads=12, width=768),
    "gpt2-medium": GPTConfig(vocab_size=50304, context=1024, layers=24, heads=16, width=1024),
    "gpt2-large": GPTConfig(vocab_size=50304, context=1024, layers=36, heads=20, width=1280),
    "gpt2-xl": GPTConfig(vocab_size=50304, context=1024, layers=48, heads=25, width=1600),
}


class _Block(nn.Module):
    """Pre-norm attention and MLP, each added to its input."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        self.norm1 = nn.LayerNorm(config.width)
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.attention_out = nn.Linear(config.width, config.width)
        self.norm2 = nn.LayerNorm(config.width)
        self.mlp_in = nn.Linear(config.width, 4 * config.width)
        self.mlp_out = nn.Linear(4 * config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        attention = self.attention_out(mixed.transpose(1, 2).reshape(batch, tokens, width))
        x = x + F.dropout(attention, dropout)
        mlp = self.mlp_out(F.gelu(self.mlp_in(self.norm2(x)), approximate="tanh"))
        return x + F.dropout(mlp, dropout)


class GPT(nn.Module):
    """tokens [B, T] int64, T <= config.context -> logits [B, T, vocab_size] float."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.context, config.width)
        self.blocks = nn.Sequential(*(_Block(config) for _ in range(config.layers)))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self._init_weights()
        if config.tie_embeddings:
            self.head.weight = self.token_embedding.weight

    def _init_weights(self) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() > 1:
                # GPT-2's scheme: 0.02, and less on the two layers of a block that write to the residual stream.
                writes_residual = name.endswith(("attention_out.weight", "mlp_out.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * self.config.layers) ** 0.5 if writes_residual else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        if length > self.config.context:
            raise ValueError(f"tokens has length {length}; this model's context is {self.config.context}")
        positions = torch.arange(length, device=tokens.device)
        x = self.token_embedding(tokens) + self.position_embedding(positions)
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits
