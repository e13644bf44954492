"""Content keys: which blocks of which requests hold the same whole prefix (1.8), as dense integers.

A trace lists content ids, each for `unit` tokens from the start of the prompt on. Two requests share a prefix as
far as their ids agree, so the ids make a tree: a node is a prefix of ids. Block k ends in some unit; its key is
that unit's node and the block's place within it. A block that reaches beyond the listed ids is the request's own:
it has a key, which only this request ever looks up (after a preemption).

Everything is interned once, before the run: the loop compares integers and hashes nothing.
"""

from __future__ import annotations

import numpy as np

from kvsim._jit import njit
from kvsim.engine.state import SPAN, Keys, table

_EMPTY = -1


def intern_keys(
    num_tokens: np.ndarray, block_size: int, offsets: np.ndarray | None, ids: np.ndarray | None, unit: int
) -> Keys:
    """Keys of every block that n requests can fill.

    num_tokens: int64[n], the most tokens a request can hold. offsets int64[n + 1] and ids int64[m]: row i lists
    `ids[offsets[i]:offsets[i + 1]]`, each for `unit` tokens; None: nothing is shared.
    """
    n = len(num_tokens)
    num_blocks = num_tokens // block_size
    if offsets is None or len(ids) == 0:
        offsets, ids, unit = np.zeros(n + 1, np.int64), np.zeros(0, np.int64), block_size
    offsets, ids = np.ascontiguousarray(offsets, np.int64), np.ascontiguousarray(ids, np.int64)
    num_shared = np.minimum(num_blocks, np.diff(offsets) * unit // block_size)
    nodes, depths = np.empty(len(ids), np.int64), np.empty(len(ids), np.int64)
    size = 1 << max(4, int(2 * len(ids)).bit_length())
    slots = np.full((3, size), _EMPTY, np.int64)
    num_nodes = _make_tree(offsets, ids, nodes, depths, *slots) if len(ids) else 0
    depths = depths[:num_nodes]
    blocks_in_unit = (depths + 1) * unit // block_size - depths * unit // block_size
    node_base = np.concatenate([[0], np.cumsum(blocks_in_unit)]).astype(np.int64)
    shared_from = np.concatenate([[0], np.cumsum(num_shared)]).astype(np.int64)
    shared = np.empty(int(shared_from[-1]), np.int32)
    if len(shared):
        _fill_keys(offsets, nodes, node_base, shared_from, block_size, unit, shared)
    own_from = int(node_base[-1]) + np.concatenate([[0], np.cumsum(num_blocks - num_shared)]).astype(np.int64)
    spans = table(SPAN, n + 1, shared_from=shared_from, own_from=own_from)
    return Keys(spans, shared, np.zeros(0, np.int32))


@njit
def _make_tree(offsets, ids, nodes, depths, slot_parent, slot_id, slot_node):
    """Number the prefixes of ids. `nodes[j]` becomes the node of the prefix that ends with `ids[j]`, `depths` the
    units before it, by node. The slots are a hash table from (parent, id) to node. Returns the number of nodes."""
    mask = len(slot_node) - 1
    num_nodes = 0
    for r in range(len(offsets) - 1):
        parent = np.int64(-1)
        for j in range(offsets[r], offsets[r + 1]):
            at = _mix(parent, ids[j]) & mask
            while slot_node[at] >= 0 and (slot_parent[at] != parent or slot_id[at] != ids[j]):
                at = (at + 1) & mask
            if slot_node[at] < 0:
                slot_parent[at], slot_id[at], slot_node[at] = parent, ids[j], num_nodes
                depths[num_nodes] = j - offsets[r]
                num_nodes += 1
            parent = slot_node[at]
            nodes[j] = parent
    return num_nodes


@njit
def _mix(parent, content):
    """A well-spread non-negative hash of two integers, by shifts and exclusive ors that cannot overflow."""
    x = (parent + 1) ^ (content << 21) ^ (content >> 7)
    x ^= (x >> 33) ^ (x << 13)
    x ^= x >> 17
    x ^= x << 5
    return (x ^ (x >> 29)) & 0x7FFFFFFFFFFFFFFF


@njit
def _fill_keys(offsets, nodes, node_base, shared_from, block_size, unit, shared):
    """The key of each shared block: its unit's node, and its place among the blocks that end in that unit."""
    for r in range(len(offsets) - 1):
        for j in range(shared_from[r], shared_from[r + 1]):
            k = j - shared_from[r]
            depth = ((k + 1) * block_size - 1) // unit
            node = nodes[offsets[r] + depth]
            shared[j] = node_base[node] + k - depth * unit // block_size
