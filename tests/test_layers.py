"""Blocks by the structure of a model, embeddings and heads by their names."""

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from rawloop.layers import Kind, block_kinds, block_lists, is_embedding_or_head, remove_blocks


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


def test_blocks_of_other_types_are_of_other_kinds_and_each_list_keeps_its_own_types() -> None:
    model: Any = nn.Module()
    for name, types in (("encoder", "aabb"), ("decoder", "abab")):
        part: Any = nn.Module()
        part.config = SimpleNamespace(layer_types=[*types])
        part.layers = nn.ModuleList([block() for _ in types])
        setattr(model, name, part)
    kinds = [Kind("encoder.layers", [0, 1]), Kind("encoder.layers", [2, 3])]
    assert block_kinds(model) == [*kinds, Kind("decoder.layers", [0, 2]), Kind("decoder.layers", [1, 3])]
    remove_blocks(model, {"encoder.layers": [1, 3], "decoder.layers": [2]})
    assert model.encoder.config.layer_types == ["a", "b"]
    assert model.decoder.config.layer_types == ["a", "b", "b"]
    model.decoder.layers[2] = nn.Sequential(nn.Linear(2, 4))  # of another shape
    assert [kind.places for kind in block_kinds(model)] == [[0], [1], [0], [1], [2]]
    remove_blocks(model, {"decoder.layers": [0]})
    assert [len(blocks) for blocks in block_lists(model).values()] == [2, 2]
    assert model.decoder.config.layer_types == ["b", "b"]


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
