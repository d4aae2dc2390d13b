"""The baseline: the same GPT as a plain PyTorch module and a plain training step."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, h: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(h), nn.LayerNorm(h)
        self.qkv, self.out = nn.Linear(h, 3 * h), nn.Linear(h, h)
        self.up, self.down = nn.Linear(h, 4 * h), nn.Linear(4 * h, h)

    def forward(self, x: Tensor) -> Tensor:
        fused = self.qkv(self.norm1(x))
        b, s = fused.shape[:2]  # x may be a part of the sequence
        q, k, v = fused.view(b, s, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, s, -1))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class PlainGPT(nn.Module):
    """tokens [b, s] -> logits [b, s, v]; the head is the token table, or a matrix of its own."""

    def __init__(
        self, layers: int, h: int, heads: int, s: int, v: int, *, tied: bool = True
    ) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(v, h), nn.Embedding(s, h)
        self.blocks = nn.ModuleList(Block(h, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(h)
        self.head = nn.Linear(h, v, bias=False)
        if tied:
            self.head.weight = self.tokens.weight
        for parameter in self.parameters():
            if parameter.dim() > 1:  # PyTorch's N(0, 1) embedding would drown a tied head
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class PlainTrainer:
    """Forward, backward, clip, fused AdamW: what one would write in an afternoon."""

    def __init__(self, model: PlainGPT, lr: float, device: torch.device) -> None:
        self.model = model.to(device)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1, fused=True)

    def step(self, tokens: Tensor) -> Tensor:
        """tokens: int64 [b, s + 1] on the device."""
        logits = self.model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()
