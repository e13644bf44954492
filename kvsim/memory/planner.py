"""From layers and bytes to groups, blocks, tokens and concurrency: the engine's own planner, on plain data.

    plan([LayerSpec(kind="full", block_size=16, page_bytes=65536)] * 32, available_bytes=60 << 30,
         max_model_len=131072, max_in_flight_tokens=16384).num_blocks

Rules 5.3 to 5.7 and 6.1 to 6.2 of the scheduler's text are cited where they apply. Sizes are bytes on one
rank, lengths are tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import msgspec

from kvsim.errors import UserError


class LayerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What one layer keeps. Layers with equal specs can share a group.

    kind: full, sliding or chunked (`window` tokens), mla, or mamba. `page_bytes` is one block of the layer
    (5.3), `padded_bytes` what the page was padded to. A mamba page is all states of one sequence; with
    `align` (prefix caching) it is one every `block_size` tokens, without it one a request (6.2). The head
    sizes tell apart what has pages of the same size.
    """

    kind: str
    block_size: int
    page_bytes: int
    padded_bytes: int | None = None
    window: int | None = None
    kv_heads: int | None = None
    head_size: int | None = None
    head_size_v: int | None = None
    align: bool = False

    @property
    def page(self) -> int:
        """Bytes that a block takes in this layer, padding included."""
        return self.page_bytes if self.padded_bytes is None else self.padded_bytes


class KvGroup(msgspec.Struct, frozen=True, kw_only=True):
    """Layers that share a block table.

    `layer_numbers` count the model's layers from 0 (on a pipeline stage: those that it has), `layer_pages` are
    the bytes of a block in each of them on one rank.
    """

    kind: str
    layer_numbers: tuple[int, ...]
    layer_pages: tuple[int, ...]
    block_size: int
    window: int | None = None
    align: bool = False

    @property
    def layers(self) -> int:
        """How many layers there are, padding not counted."""
        return len(self.layer_numbers)

    @property
    def page_bytes(self) -> int:
        """A block of one layer, of the widest where they differ."""
        return max(self.layer_pages, default=0)

    @property
    def block_bytes(self) -> int:
        """A block of all layers."""
        return sum(self.layer_pages)

    def pages(self, max_model_len: int, max_in_flight_tokens: int) -> int:
        """The most blocks that one request of `max_model_len` tokens holds in this group (5.6)."""
        if self.kind == "mamba":
            return 2 if self.align else 1
        if self.kind == "sliding":  # and one more, since a window need not start at a block's start
            tokens = min(self.window - 1 + max_in_flight_tokens, max_model_len)
            return -(-tokens // self.block_size) + 1
        tokens = max_model_len
        if self.kind == "chunked":
            tokens = min(self.window + max_in_flight_tokens, max_model_len)
        return -(-tokens // self.block_size)


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """`num_blocks` counts the null block. `longest_len` is None if a request of max_model_len fits; else the
    engine refuses to start and names this length, 0 for none."""

    groups: tuple[KvGroup, ...]
    bytes_per_block: int
    num_blocks: int
    pages_per_request: int
    kv_cache_tokens: int
    max_concurrency: float
    longest_len: int | None


def plan(
    layers: Sequence[LayerSpec],
    *,
    available_bytes: int,
    max_model_len: int,
    max_in_flight_tokens: int,
    num_gpu_blocks_override: int | None = None,
) -> Plan:
    """Groups and blocks of one rank that has all `layers`.

    `max_in_flight_tokens` is max_num_batched_tokens, twice that with async scheduling (4.6). Raises
    UserError if pages cannot be brought to one size.
    """
    return plan_groups(
        group_layers(layers),
        available_bytes=available_bytes,
        max_model_len=max_model_len,
        max_in_flight_tokens=max_in_flight_tokens,
        num_gpu_blocks_override=num_gpu_blocks_override,
    )


def plan_groups(
    groups: tuple[KvGroup, ...],
    *,
    available_bytes: int,
    max_model_len: int,
    max_in_flight_tokens: int,
    num_gpu_blocks_override: int | None = None,
) -> Plan:
    """The blocks that `available_bytes` give to these groups (5.4, 5.6, 5.7)."""
    bytes_per_block = max(g.block_bytes for g in groups)
    num_blocks = max(0, available_bytes) // bytes_per_block
    if num_gpu_blocks_override is not None:
        num_blocks = num_gpu_blocks_override
    pages = pages_per_request(groups, max_model_len, max_in_flight_tokens)
    longest = None
    if pages > num_blocks - 1:  # the null block holds nothing
        longest = longest_len(groups, num_blocks, max_model_len, max_in_flight_tokens)
    concurrency = num_blocks / pages
    return Plan(
        groups=groups,
        bytes_per_block=bytes_per_block,
        num_blocks=num_blocks,
        pages_per_request=pages,
        kv_cache_tokens=int(concurrency * max_model_len),
        max_concurrency=concurrency,
        longest_len=longest,
    )


def pages_per_request(groups: Sequence[KvGroup], max_model_len: int, max_in_flight_tokens: int) -> int:
    """Blocks of one request of `max_model_len` tokens, in all groups together."""
    return sum(g.pages(max_model_len, max_in_flight_tokens) for g in groups)


def longest_len(
    groups: Sequence[KvGroup], num_blocks: int, max_model_len: int, max_in_flight_tokens: int
) -> int:
    """The longest request, of at most `max_model_len` tokens, that fits beside the null block (5.6); 0: none."""
    low, high = 0, max_model_len
    while low < high:
        middle = (low + high + 1) // 2
        if pages_per_request(groups, middle, max_in_flight_tokens) <= num_blocks - 1:
            low = middle
        else:
            high = middle - 1
    return low


def stage_groups(groups: Sequence[KvGroup], stage: Collection[int]) -> tuple[KvGroup, ...]:
    """The groups of the whole model as the layers of one pipeline stage see them. A group that has no layer
    there stays: a request takes blocks in it all the same."""
    out = []
    for g in groups:
        kept = [pair for pair in zip(g.layer_numbers, g.layer_pages, strict=True) if pair[0] in stage]
        numbers, pages = tuple(i for i, _ in kept), tuple(page for _, page in kept)
        out.append(msgspec.structs.replace(g, layer_numbers=numbers, layer_pages=pages))
    return tuple(out)


# ---------------------------------------------------------------- groups


def group_layers(layers: Sequence[LayerSpec]) -> tuple[KvGroup, ...]:
    """Layers in their order to groups: one if they are of one type (5.5), else by 6.1 on pages of one size
    (6.2). In order of first appearance."""
    if _one_type(layers):
        return (_group(layers, range(len(layers))),)
    sized = _one_page_size(layers)
    if sized is None:
        promoted = _all_full(layers)
        if promoted is None:
            raise UserError(
                "layers with multi-head latent attention have pages that can neither be padded nor divide"
                " the widest layer's, so the engine cannot plan this model's KV cache"
            )
        return (_group(promoted, range(len(promoted))),)
    buckets: dict[LayerSpec, list[int]] = {}
    for number, spec in enumerate(sized):
        buckets.setdefault(spec, []).append(number)
    counts = [len(numbers) for numbers in buckets.values()]
    smallest, largest = min(counts), max(counts)
    size = largest if 2 * largest < 3 * smallest else smallest
    groups = []
    for numbers in buckets.values():
        num_groups = -(-len(numbers) // size)
        groups += [_group(sized, numbers[i::num_groups]) for i in range(num_groups)]
    return tuple(groups)


def _group(layers: Sequence[LayerSpec], numbers: Sequence[int]) -> KvGroup:
    first = layers[numbers[0]]
    return KvGroup(
        kind=first.kind,
        layer_numbers=tuple(numbers),
        layer_pages=tuple(layers[i].page for i in numbers),
        block_size=first.block_size,
        window=first.window,
        align=first.align,
    )


def _one_type(layers: Sequence[LayerSpec]) -> bool:
    """Whether all layers need blocks for the same tokens, whatever their widths (5.5)."""

    def type_of(spec: LayerSpec) -> tuple:
        kind = "full" if spec.kind == "mla" else spec.kind
        return (kind, spec.block_size, spec.window, spec.page if kind == "mamba" else None)

    return len({type_of(spec) for spec in layers}) == 1


def _one_page_size(layers: Sequence[LayerSpec]) -> list[LayerSpec] | None:
    """The layers with the widest page each: by more tokens a block where that comes out even, else by padding
    (mamba always); None if an MLA layer can have neither (6.2)."""
    widest = max(spec.page for spec in layers)
    out = []
    for spec in layers:
        factor, rest = divmod(widest, spec.page)
        if spec.page == widest:
            out.append(spec)
        elif spec.kind != "mamba" and rest == 0:
            size, page = spec.block_size * factor, spec.page_bytes * factor
            out.append(msgspec.structs.replace(spec, block_size=size, page_bytes=page))
        elif spec.kind != "mla":
            out.append(msgspec.structs.replace(spec, padded_bytes=widest))
        else:
            return None
    return out


def _all_full(layers: Sequence[LayerSpec]) -> list[LayerSpec] | None:
    """MLA beside sliding windows that no page size unites: the windows are allocated like full attention
    (6.2). None if that does not make one type of them."""
    if {spec.kind for spec in layers} - {"full", "mla", "sliding"}:
        return None
    whole = {spec.block_size for spec in layers if spec.kind != "sliding"}
    out = []
    for spec in layers:
        if spec.kind == "sliding":
            size = next(iter(whole)) if len(whole) == 1 else spec.block_size
            page = spec.page_bytes * size // spec.block_size
            spec = msgspec.structs.replace(spec, kind="full", window=None, block_size=size, page_bytes=page)
        out.append(spec)
    return out if _one_type(out) else None
