"""A small language model: text, a BPE vocabulary, a transformer. Nothing here distils."""

import random
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

import tokenizers
import torch
import torch.nn.functional as F
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn

SMALLEST_VOCAB = len(ByteLevel.alphabet()) + 1  # every byte, and the end of a text
TEXT_CAP = 20_000_000  # characters; more would only keep the tokenizer busy
HOLD_OUT = 20  # one file in 20 is for validation; of fewer files, the last 20th of each


def standard_library() -> list[Path]:
    """Its source files less tests, tables and what pip installed; shuffled, but always alike."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"}
    paths = sorted(p for p in root.rglob("*.py") if not skipped & set(p.relative_to(root).parts))
    random.Random(0).shuffle(paths)
    return paths


def read_texts(paths: list[Path]) -> tuple[list[str], list[str]]:
    """The texts to train on and the texts held out."""
    texts, left = [], TEXT_CAP
    for path in paths:
        text = path.read_text(encoding="utf-8", errors="replace")[:left]
        left -= len(text)
        if text.strip():
            texts.append(text)
    if len(texts) >= HOLD_OUT:
        return [text for i, text in enumerate(texts) if i % HOLD_OUT], texts[::HOLD_OUT]
    cuts = [len(text) - len(text) // HOLD_OUT for text in texts]
    return (
        [text[:cut] for text, cut in zip(texts, cuts, strict=True)],
        [text[cut:] for text, cut in zip(texts, cuts, strict=True)],
    )


def train_tokenizer(texts: list[str], vocab: int) -> tokenizers.Tokenizer:
    """A byte-level BPE, which encodes any text, of `vocab` tokens or as many as the text yields."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=sys.stdout.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    return tokenizer


def encode(tokenizer: tokenizers.Tokenizer, texts: list[str]) -> Tensor:
    """The tokens of all texts in one row, each text after an end-of-text token (0)."""
    encoded = tokenizer.encode_batch_fast(texts)
    return torch.tensor([token for text in encoded for token in (0, *text.ids)])


def windows(tokens: Tensor, starts: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """The inputs [B, S] of windows that begin at `starts` [B], and their labels [B * S]."""
    index = starts[:, None] + torch.arange(context + 1)
    block = tokens[index.to(tokens.device)]
    return block[:, :-1], block[:, 1:].flatten()


class Size(NamedTuple):
    width: int
    layers: int
    heads: int
    learning_rate: float


class Block(nn.Module):
    """Attention and MLP, each behind a norm and added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.project = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # [B, head, S, width / heads]
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """A decoder-only model, [B, S] tokens -> [B * S, V] logits. Its head is its embedding."""

    def __init__(self, size: Size, vocab: int, context: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocab, size.width)
        self.position = nn.Embedding(context, size.width)
        self.blocks = nn.Sequential(*(Block(size.width, size.heads) for _ in range(size.layers)))
        self.norm = nn.LayerNorm(size.width)
        for embedding in (self.token, self.position):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        # Scaled (Vaswani et al. 2017, section 3.4): the weights are small for the head's sake.
        x = self.token(tokens) * self.token.embedding_dim**0.5
        x = x + self.position.weight[: tokens.shape[1]]
        return F.linear(self.norm(self.blocks(x)).flatten(0, 1), self.token.weight)
