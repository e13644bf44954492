"""Vision towers: from `vision_config` of a Hugging Face config.json to the tensors of an encoder and its projector,
and what an image is to it. The text part is `architecture`'s.

A tower that is not known here is not guessed: the model has none, and a note says that it comes on top.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec


class TowerTensor(NamedTuple):
    """Parameters of one tensor, and whether tensor parallelism divides them."""

    elements: int
    divided: bool = True


class Tower(msgspec.Struct, frozen=True, kw_only=True):
    """A vision encoder with its projector: `layer_tensors` in each of `layers`, `tensors` once.

    The largest image, which is the one that engines profile: so many patches of so many numbers each, that become
    `tokens_per_image` embeddings of `elems_per_token` numbers. With `is_divided` False every rank of a tensor-parallel
    group has all of it.
    """

    kind: str
    layers: int
    hidden_size: int
    intermediate_size: int
    gated_mlp: bool = False
    layer_tensors: tuple[TowerTensor, ...]
    tensors: tuple[TowerTensor, ...]
    patches_per_image: int
    elems_per_patch: int
    tokens_per_image: int
    elems_per_token: int
    is_divided: bool = True

    @property
    def num_params(self) -> int:
        return sum(t.elements for t in self.tensors) + self.layers * sum(
            t.elements for t in self.layer_tensors
        )

    def rank_elems(self, tp: int) -> list[int]:
        """Parameters of each tensor on one of `tp` ranks, in the order of loading."""
        every = [*self.tensors, *self.layer_tensors * self.layers]
        return [t.elements // tp if t.divided and self.is_divided else t.elements for t in every]


class _NotKnown(Exception):
    """What is missing to size a tower."""


class _Fields:
    """A vision_config: whole numbers by name, with what the class assumes if they are left out."""

    def __init__(self, fields: dict):
        self.fields = fields

    def size(self, *names: str, default: int | None = None) -> int:
        for name in names:
            value = self.fields.get(name)
            if value is not None:
                break
        else:
            value = default
        if type(value) is not int or not 0 < value < 10**9:
            raise _NotKnown(f"its {names[0]!r} is {'missing' if value is None else repr(value)}")
        return value

    def list(self, name: str) -> list:
        value = self.fields.get(name)
        return value if isinstance(value, list) else []


def tower_of(config: dict, text_hidden: int) -> tuple[Tower | None, str | None]:
    """(the tower, None) of a whole config, (None, None) of a text model's, and (None, why not) where there is a tower
    that cannot be sized."""
    vision = config.get("vision_config")
    if vision is None:
        names = config.get("architectures")
        names = [str(name) for name in names] if isinstance(names, list) else []
        if any(name.endswith("ForConditionalGeneration") for name in names):
            return None, "the vision tower is not in the facts, and comes on top"
        return None, None
    model_type = config.get("model_type")
    if not isinstance(vision, dict) or model_type not in _TOWERS:
        return None, f"the vision tower of model_type {model_type!r} is not sized, and comes on top"
    try:
        return _TOWERS[model_type](config, _Fields(vision), text_hidden), None
    except _NotKnown as error:
        return None, f"the vision tower is not sized ({error}), and comes on top"


def _plain_layer(hidden: int, width: int) -> tuple[TowerTensor, ...]:
    """Attention, an MLP of two matrices, two LayerNorms, biases everywhere."""
    return (
        TowerTensor(3 * hidden * hidden), TowerTensor(3 * hidden),
        TowerTensor(hidden * hidden), TowerTensor(hidden, False),
        TowerTensor(hidden * width), TowerTensor(width),
        TowerTensor(width * hidden), TowerTensor(hidden, False), TowerTensor(4 * hidden, False),
    )  # fmt: skip


def _once(*sizes: int, divided: bool = False) -> tuple[TowerTensor, ...]:
    return tuple(TowerTensor(size, divided) for size in sizes)


# ---------------------------------------------------------------- SigLIP: Gemma 3, LLaVA-NeXT (Granite Vision)


def _siglip(v: _Fields) -> dict:
    hidden, width, patch = v.size("hidden_size"), v.size("intermediate_size"), v.size("patch_size")
    side = v.size("image_size") // patch
    pixels = 3 * patch * patch
    return {
        "kind": "siglip",
        "layers": v.size("num_hidden_layers"),
        "hidden_size": hidden,
        "intermediate_size": width,
        "layer_tensors": _plain_layer(hidden, width),
        "tensors": _once(pixels * hidden, hidden, side * side * hidden, 2 * hidden),
        "patches_per_image": side * side,
        "elems_per_patch": pixels,
    }


def _gemma3(config: dict, v: _Fields, text: int) -> Tower:
    common = _siglip(v)
    projector = _once(common["hidden_size"] * text, common["hidden_size"])
    return Tower(
        **common | {"tensors": common["tensors"] + projector},
        tokens_per_image=_Fields(config).size("mm_tokens_per_image", default=256),
        elems_per_token=text,
    )


def _llava_next(config: dict, v: _Fields, text: int) -> Tower:
    """An image is a small whole and tiles, of which the grid with the most counts; a row of tokens has one more for
    its end. The features of several layers may go to the projector together."""
    if v.fields.get("model_type") != "siglip_vision_model":
        raise _NotKnown(f"its model_type is {v.fields.get('model_type')!r}")
    common, image = _siglip(v), v.size("image_size")
    side = image // v.size("patch_size")
    grids = []
    for grid in _Fields(config).list("image_grid_pinpoints"):
        if not (isinstance(grid, list) and len(grid) == 2 and all(type(n) is int and n > 0 for n in grid)):
            raise _NotKnown(f"{grid!r} in image_grid_pinpoints is no pair of sizes")
        rows, cols = grid[0] // image, grid[1] // image
        grids.append((side * rows * (side * cols + 1), rows * cols))
    if not grids:
        raise _NotKnown("image_grid_pinpoints are missing")
    tokens, tiles = max(grids)
    layers = config.get("vision_feature_layer")
    features = common["hidden_size"] * (len(layers) if isinstance(layers, list) else 1)
    projector = _once(features * text, text, text * text, divided=True)
    return Tower(
        **common
        | {
            "tensors": common["tensors"] + projector,
            "patches_per_image": side * side * (tiles + 1),
        },
        tokens_per_image=tokens + side * side,
        elems_per_token=text,
    )


# ---------------------------------------------------------------- Pixtral: Mistral Small 3.1 and 3.2


def _mistral3(config: dict, v: _Fields, text: int) -> Tower:
    """vLLM loads a repository of Mistral's own format (`config_format` mistral) with plain layers, which every rank has
    in full; a Hugging Face one with parallel layers."""
    hidden, width, patch = v.size("hidden_size"), v.size("intermediate_size"), v.size("patch_size")
    merge = _Fields(config).size("spatial_merge_size", default=2)
    side = v.size("image_size") // patch
    pixels = 3 * patch * patch
    layer = (
        *_once(3 * hidden * hidden, hidden * hidden, 2 * hidden * width, width * hidden, divided=True),
        *_once(2 * hidden),
    )
    return Tower(
        kind="pixtral",
        layers=v.size("num_hidden_layers"),
        hidden_size=hidden,
        intermediate_size=width,
        gated_mlp=True,
        layer_tensors=layer,
        tensors=(
            *_once(pixels * hidden, hidden, hidden, merge * merge * hidden * hidden),
            *_once(hidden * text, text * text, divided=True),
        ),
        patches_per_image=side * side,
        elems_per_patch=pixels,
        tokens_per_image=(side // merge) ** 2,
        elems_per_token=text,
        is_divided=config.get("config_format") != "mistral",
    )


# ---------------------------------------------------------------- MoonViT: Kimi-VL

# Patches of the largest image: in_token_limit of Kimi-VL's preprocessor_config.json.
_KIMI_VL_PATCHES = 4096


def _kimi_vl(config: dict, v: _Fields, text: int) -> Tower:
    hidden, width, patch = v.size("hidden_size"), v.size("intermediate_size"), v.size("patch_size")
    merge = 1
    for kernel in v.list("merge_kernel_size") or [2, 2]:
        if type(kernel) is not int or kernel < 1:
            raise _NotKnown("its 'merge_kernel_size' is no list of whole numbers")
        merge *= kernel
    grid = v.size("init_pos_emb_height", default=64) * v.size("init_pos_emb_width", default=64)
    pixels, wide = 3 * patch * patch, merge * hidden
    return Tower(
        kind="moonvit",
        layers=v.size("num_hidden_layers"),
        hidden_size=hidden,
        intermediate_size=width,
        layer_tensors=_plain_layer(hidden, width),
        tensors=_once(
            pixels * hidden,
            hidden,
            grid * hidden,
            2 * hidden,
            2 * hidden,
            wide * wide,
            wide,
            wide * text,
            text,
        ),
        patches_per_image=_KIMI_VL_PATCHES,
        elems_per_patch=pixels,
        tokens_per_image=_KIMI_VL_PATCHES // merge,
        elems_per_token=text,
    )


# ---------------------------------------------------------------- Llama 4

# Tiles of the largest image (max_patches of its preprocessor), and the whole image once more beside them.
_LLAMA_4_TILES = 16 + 1


def _llama4(config: dict, v: _Fields, text: int) -> Tower:
    hidden, width, patch = v.size("hidden_size"), v.size("intermediate_size"), v.size("patch_size")
    side, ratio = v.size("image_size") // patch, v.fields.get("pixel_shuffle_ratio", 0.5)
    if not isinstance(ratio, int | float) or not 0 < ratio <= 1:
        raise _NotKnown(f"its 'pixel_shuffle_ratio' is {ratio!r}")
    shuffled, inner = round(hidden / ratio**2), v.size("projector_input_dim")
    outer = v.size("projector_output_dim")
    pixels = 3 * patch * patch
    return Tower(
        kind="llama4",
        layers=v.size("num_hidden_layers"),
        hidden_size=hidden,
        intermediate_size=width,
        layer_tensors=_plain_layer(hidden, width),
        tensors=(
            *_once(hidden, (side * side + 1) * hidden, 4 * hidden),
            *_once(pixels * hidden, shuffled * inner, inner * outer, outer * text, divided=True),
        ),
        patches_per_image=_LLAMA_4_TILES * (side * side + 1),
        elems_per_patch=pixels,
        tokens_per_image=_LLAMA_4_TILES * round(side * side * ratio**2),
        elems_per_token=text,
    )


# ---------------------------------------------------------------- Qwen2-VL, Qwen2.5-VL, Qwen3-VL

# Patches of the largest image: max_pixels of the preprocessors, 12,845,056 = 65,536 of 14 x 14 (Qwen2-VL and
# Qwen2.5-VL) and 16,777,216 = 65,536 of 16 x 16 (Qwen3-VL).
_QWEN_VL_PATCHES = 65_536


def _qwen_vl(config: dict, v: _Fields, text: int) -> Tower:
    kind = config["model_type"]
    hidden = v.size("embed_dim" if kind == "qwen2_vl" else "hidden_size", default=1280)
    width = 4 * hidden if kind == "qwen2_vl" else v.size("intermediate_size", default=3420)
    patch, frames = v.size("patch_size", default=14), v.size("temporal_patch_size", default=2)
    merge = v.size("spatial_merge_size", default=2) ** 2
    pixels, wide, out = 3 * frames * patch * patch, merge * hidden, text
    gated = kind == "qwen2_5_vl"
    layer = _plain_layer(hidden, width)
    if gated:
        layer = (*layer[:4], TowerTensor(2 * hidden * width), TowerTensor(2 * width), *layer[6:8])
        layer += _once(2 * hidden)
    tensors = _once(pixels * hidden, hidden if gated else 2 * hidden)
    merger = _once(wide * wide, wide, wide * out, divided=True) + _once(out)
    extra = len(v.list("deepstack_visual_indexes"))
    if kind not in ("qwen2_vl", "qwen2_5_vl"):
        tensors += _once(v.size("num_position_embeddings", default=2304) * hidden, hidden)
    tensors += merger * (1 + extra) + _once(*[2 * wide] * extra)
    return Tower(
        kind=kind,
        layers=v.size("depth", default=32 if kind in ("qwen2_vl", "qwen2_5_vl") else None),
        hidden_size=hidden,
        intermediate_size=width,
        gated_mlp=gated,
        layer_tensors=layer,
        tensors=tensors,
        patches_per_image=_QWEN_VL_PATCHES,
        elems_per_patch=pixels,
        tokens_per_image=_QWEN_VL_PATCHES // merge,
        elems_per_token=out * (1 + extra),
    )


_TOWERS = {
    "gemma3": _gemma3,
    "llava_next": _llava_next,
    "granite_vision": _llava_next,
    "mistral3": _mistral3,
    "kimi_vl": _kimi_vl,
    "llama4": _llama4,
    "qwen2_vl": _qwen_vl,
    "qwen2_5_vl": _qwen_vl,
    "qwen3_vl": _qwen_vl,
    "qwen3_vl_moe": _qwen_vl,
    "qwen3_5": _qwen_vl,
    "qwen3_5_moe": _qwen_vl,
}
