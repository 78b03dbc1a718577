"""Blocks by the structure of a model, embeddings and heads by their names."""

import pytest
from torch import nn

from rawloop.layers import block_lists, is_embedding_or_head


def block() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2))


def test_blocks_are_the_outermost_lists_of_one_class_of_modules_with_layers() -> None:
    model = nn.Module()
    model.encoder = nn.ModuleList([block() for _ in range(3)])
    model.encoder[0].experts = nn.ModuleList([block(), block()])  # inside of a list
    model.heads = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])  # single layers
    model.mixed = nn.ModuleList([block(), nn.Linear(2, 2)])
    model.empty = nn.ModuleList()
    assert list(block_lists(model)) == ["encoder"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.embed_tokens.weight", True),
        ("lm_head", True),
        ("transformer.wte.weight", True),
        ("transformer.wpe.weight", True),
        ("audio_codebook_embeddings.0", True),
        ("model.layers.0.mlp.up_proj.weight", False),
        ("model.layers.0.self_attn.heads_proj", False),
    ],
)
def test_embeddings_and_heads_are_known_by_name(name: str, expected: bool) -> None:
    assert is_embedding_or_head(name) is expected
