"""The trie against a dictionary of prefixes."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from genrec.generation.trie import Trie
from genrec.interfaces import SemanticIds

CODES = st.integers(1, 4).flatmap(
    lambda levels: st.lists(st.tuples(*[st.integers(0, 5)] * levels), min_size=1, max_size=40, unique=True)
)


def build(codes):
    rows = np.array(codes, np.int64)
    return Trie(SemanticIds(np.concatenate([np.zeros((1, rows.shape[1]), np.int64), rows]), (6,) * rows.shape[1]))


@given(CODES)
def test_expand_gives_exactly_the_existing_children(codes):
    trie = build(codes)
    item_of = {code: item for item, code in enumerate(codes, start=1)}
    nodes = {(): 0}  # prefix → node number of its level
    for level in range(len(codes[0])):
        prefixes = list(nodes)
        children, next_codes, alive = trie.expand(level, torch.tensor([[nodes[p] for p in prefixes]]))
        assert children.shape == next_codes.shape == alive.shape
        assert alive.any(-1).all(), "a node that leads nowhere"
        assert int(alive.sum(-1).max()) == alive.shape[-1], "wider than the widest node"
        found = {}
        for row, prefix in enumerate(prefixes):
            for child, code, exists in zip(children[0, row], next_codes[0, row], alive[0, row], strict=True):
                assert 0 <= child < trie.nodes[level], "a number that cannot be gathered"
                if exists:
                    assert (*prefix, int(code)) not in found
                    found[(*prefix, int(code))] = int(child)
        assert set(found) == {code[: level + 1] for code in codes}
        nodes = found
    assert {code: int(trie.items[node]) for code, node in nodes.items()} == item_of


@given(CODES, st.integers(0, 10))
def test_expand_does_not_depend_on_the_other_nodes(codes, seed):
    trie = build(codes)
    generator = torch.Generator().manual_seed(seed)
    above = trie.nodes[-2] if trie.levels > 1 else 1
    nodes = torch.randint(above, (3, 4), generator=generator)
    together = trie.expand(trie.levels - 1, nodes)
    for b in range(3):
        for w in range(4):
            alone = trie.expand(trie.levels - 1, nodes[b : b + 1, w : w + 1])
            assert all(torch.equal(x[b, w], y[0, 0]) for x, y in zip(together, alone, strict=True))


@given(CODES, st.integers(0, 10), st.integers(1, 9))
def test_exclude_marks_exactly_the_children_that_are_these_items(codes, seed, beams):
    trie = build(codes)
    generator = torch.Generator().manual_seed(seed)
    above = trie.nodes[-2] if trie.levels > 1 else 1
    nodes = torch.randint(above, (3, beams), generator=generator)
    items = torch.randint(len(codes) + 1, (3, 6), generator=generator)
    children, _, alive = trie.expand(trie.levels - 1, nodes)
    marked = trie.exclude(nodes, items)
    assert marked.shape == alive.shape
    for b in range(3):
        for w in range(beams):
            expected = torch.isin(trie.items[children[b, w]], items[b]) & alive[b, w]
            if nodes[b, w] in nodes[b, :w]:  # a dead beam
                expected = torch.zeros_like(expected)
            assert torch.equal(marked[b, w].isneginf(), expected)
    assert not trie.exclude(nodes, torch.zeros_like(items)).any(), "item 0 is no leaf"


def test_no_items_and_shared_ids_are_refused():
    with pytest.raises(ValueError, match="semantic_ids holds no items; expected at least one"):
        Trie(SemanticIds(np.zeros((1, 3), np.int64), (4, 4, 4)))
    with pytest.raises(ValueError, match="two items share one semantic id"):
        build([(1, 2), (3, 4), (1, 2)])
