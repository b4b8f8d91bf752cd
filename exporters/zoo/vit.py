"""A tiny Vision Transformer that takes prompt tokens at run time.

Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021 (pre-norm encoder, CLS token, learned
position embedding); the width, depth and heads of "Ti" are those of Touvron et al., "Training Data-Efficient
Image Transformers & Distillation through Attention", ICML 2021. Prompts stand between CLS and the patches and
get no position, as in Niu et al., "Test-Time Model Adaptation with Only Forward Passes" (FOA), ICML 2024.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head self-attention, [N, T, D] -> [N, T, D].

    Written as matrix products and a softmax: with torch 2.13 the exported ONNX then has no shape arithmetic
    in the blocks, while `F.scaled_dot_product_attention` adds ten nodes to each, for the same speed.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.heads = heads
        self.scale = (dim // heads) ** -0.5

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, D] -> [N, T, D]."""
        qkv: Tensor = self.qkv(x)
        q, k, v = (self._split(part) for part in qkv.chunk(3, -1))
        weights = (q * self.scale @ k.transpose(-2, -1)).softmax(-1)  # [N, heads, T, T]
        mixed = (weights @ v).transpose(1, 2).flatten(2)  # [N, T, D]
        out: Tensor = self.proj(mixed)
        return out

    def _split(self, x: Tensor) -> Tensor:
        """[N, T, D] -> [N, heads, T, D / heads]."""
        return torch.unflatten(x, -1, (self.heads, -1)).transpose(1, 2)


class Mlp(nn.Module):
    """Two linear layers with a GELU between them, [N, T, D] -> [N, T, D]."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, D] -> [N, T, D]."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class Block(nn.Module):
    """A pre-norm encoder block, [N, T, D] -> [N, T, D]."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, D] -> [N, T, D]."""
        mixed: Tensor = x + self.attn(self.norm1(x))
        out: Tensor = mixed + self.mlp(self.norm2(mixed))
        return out


class PatchEmbed(nn.Module):
    """Linear embedding of square patches, [N, 3, H, W] -> [N, H/p * W/p, D]."""

    def __init__(self, patch: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, H/p * W/p, D], row by row."""
        patches: Tensor = self.proj(x)
        return patches.flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """ViT with optional prompt tokens; tap the CLS token of any depth at the output of `blocks.<i>`, index 0.

    Args:
        image: side of the square input in pixels, a multiple of `patch`.
        patch: side of a patch in pixels.
        dim: width D.
        depth: number of blocks.
        heads: attention heads, a divisor of `dim`.
        classes: number of classes K.
    """

    def __init__(
        self,
        *,
        image: int = 96,
        patch: int = 8,
        dim: int = 192,
        depth: int = 12,
        heads: int = 3,
        classes: int = 10,
    ) -> None:
        super().__init__()
        self.prompt_width = dim
        self.patch_embed = PatchEmbed(patch, dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + (image // patch) ** 2, dim))
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, classes)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, x: Tensor, prompts: Tensor | None = None) -> Tensor:
        """Classify images, with prompt tokens if there are any.

        Args:
            x: normalised RGB [N, 3, image, image].
            prompts: [P, D], the same ones for every image; P may be 0, which answers as without prompts.
        Returns: logits [N, K].
        """
        patches: Tensor = self.patch_embed(x)
        cls = self.cls_token.expand(patches.shape[0], -1, -1)
        tokens = torch.cat([cls, patches], 1) + self.pos_embed  # [N, 1 + patches, D]
        if prompts is not None:
            shared = prompts.expand(tokens.shape[0], -1, -1)
            tokens = torch.cat([tokens[:, :1], shared, tokens[:, 1:]], 1)  # [N, 1 + P + patches, D]
        for block in self.blocks:
            tokens = block(tokens)
        logits: Tensor = self.head(self.norm(tokens)[:, 0])
        return logits
