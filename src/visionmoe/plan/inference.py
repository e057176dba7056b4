"""The widest moment of a forward pass without gradients, in bytes; kept is only what some frame still names."""

from collections.abc import Iterator

from visionmoe.config import ModelConfig
from visionmoe.distributed.layout import Layout
from visionmoe.model import packed
from visionmoe.plan.work import Routed, Work, routed

FLOAT, INDEX = 4, 8


def widest_moment(work: Work, layout: Layout) -> tuple[str, int, int]:
    """(name, bytes of images and activations at that moment, bytes of packed copies of weights)."""
    config, images, c = work.config, work.images(layout.size), work.compute_bytes
    height, width = config.image_hw
    pixels = c * images * config.in_channels * height * width
    moments = {"patch_embed": 3 * c * images * config.num_tokens * config.hidden_size}
    for layer, sparse, tokens in _layers(config, images):
        row = c * tokens * config.hidden_size
        block = f"blocks.{layer}"
        # the block's input, the norm's output, q, k and v, the attention's output, the projection's
        moments[f"{block}.attn"] = 7 * row + (2 * row if config.attention_qk_norm else 0)
        if sparse:
            moments[f"{block}.mlp.experts"] = _sparse(work, layout, tokens, routed(config, layer, images))
        else:
            moments[f"{block}.mlp"] = _mlp(work, tokens)
    moment = max(moments, key=lambda name: moments[name])
    return moment, pixels + moments[moment], _packed(work, layout)


def _mlp(work: Work, tokens: int) -> int:
    """The block's input and sum, the norm's output, and the hidden values: twice, but where oneDNN has GELU inside."""
    c, dim, width = work.compute_bytes, work.config.hidden_size, work.config.mlp_dim
    fused = _fused(work, tokens)
    first = 3 * dim + (1 if fused else 2) * width
    return c * tokens * max(first, 4 * dim + width)


def _sparse(work: Work, layout: Layout, tokens: int, rows: Routed) -> int:
    """`model.inference.infer_segments`: input, sum, norm's output; the gathered rows, the results one by one and in
    one, and the combined tokens. On a GPU the hidden values and results of all places; with ep > 1 both buffers."""
    c, dim, width = work.compute_bytes, work.config.hidden_size, work.config.mlp_dim
    row = c * tokens * dim
    before = 3 * row
    indices = INDEX * rows.kept * 6
    if work.config.moe.router == "soft" or layout.ep > 1:
        wide, hidden = c * rows.places * dim, c * rows.places * width
        return before + max(wide + 2 * hidden, hidden + 2 * wide, 2 * wide + row + wide) + INDEX * rows.places
    if work.gpu:
        return before + row + c * rows.places * (dim + width) + INDEX * rows.places
    hidden = c * rows.largest * width * (1 if _fused(work, rows.largest) else 2)
    gathered = c * rows.kept * dim
    router = FLOAT * tokens * (dim if c < FLOAT else 0) + 4 * FLOAT * tokens * work.config.moe.num_experts
    return max(before + router, before + indices + max(2 * gathered + hidden, 3 * gathered + row))


def _fused(work: Work, rows: int) -> bool:
    """Whether GELU is inside the product, as `packed.linear` chooses on a CPU."""
    if work.gpu or not packed.available():
        return False
    size = work.config.hidden_size * work.config.mlp_dim
    return rows * size >= packed.FUSED_PRODUCT or _packs(size, 1, rows, work.compute_bytes)


def _packed(work: Work, layout: Layout) -> int:
    """Copies of weights in oneDNN's layout, which `packed.PackedWeights` keeps on a CPU: all matrices in bfloat16, and
    in float32 the larger ones that few rows meet, or all of the larger where MKL is slow; no stack of more than
    MAX_PACKED_BYTES."""
    config, images, c = work.config, work.images(layout.size), work.compute_bytes
    if work.gpu or not packed.available():
        return 0
    dim, width, experts, total = config.hidden_size, config.mlp_dim, config.moe.num_experts, 0
    for layer, sparse, rows in _layers(config, images):
        stacks = [(3 * dim * dim, 1, rows), (dim * dim, 1, rows)]
        if not sparse:
            stacks += 2 * [(dim * width, 1, rows)]
        elif config.moe.router != "soft" and layout.ep == 1:  # those run on buffers, through torch's own product
            stacks += 2 * [(dim * width, experts, routed(config, layer, images).kept // experts)]
        total += sum(c * size * count for size, count, rows in stacks if _packs(size, count, rows, c))
    return total


def _layers(config: ModelConfig, images: int) -> Iterator[tuple[int, bool, int]]:
    """(block, whether it has experts, its tokens)."""
    for layer in range(config.num_layers):
        yield layer, layer in config.moe.layers, images * config.copies(layer) * config.num_tokens


def _packs(size: int, count: int, rows: int, item: int) -> bool:
    """As `packed.PackedWeights` chooses for `count` weights of `size` values, with `rows` rows each."""
    if item * size * count > packed.MAX_PACKED_BYTES:
        return False
    few = rows <= packed.PACKED_ROWS or packed.mkl_is_slow()
    return item < FLOAT or (few and size >= packed.PACKED_SIZE)
