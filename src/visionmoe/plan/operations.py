"""The operations of a training step in their order, with the bytes that each one makes and keeps for the backward pass.

N tokens of one part of a device's batch; c bytes of a value in a product (4, or 2 under autocast to bfloat16); the
residual stream and LayerNorms stay in float32 under autocast, too, because the learned positions are. What autograd
keeps is said beside each operation; a tensor that two operations keep is counted at the first.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from visionmoe.config import ModelConfig
from visionmoe.distributed.layout import Layout
from visionmoe.model.cpu_training import MAX_TOKENS
from visionmoe.plan.work import Routed, Work, routed

FLOAT, INDEX = 4, 8


@dataclass(frozen=True)
class Operation:
    """Bytes, but for dense and experts: values of the parameters whose gradients this operation's backward makes.

    saved: kept from forward to backward. made: output and temporary values of the forward pass that are not in
    `saved`. backward: gradients that come in and go out, of the residual stream beside it, and temporary values.
    """

    name: str
    saved: int
    made: int
    backward: int
    dense: int = 0
    experts: int = 0


def operations(work: Work, layout: Layout) -> list[Operation]:
    """All operations of one part of a device's batch, in the order of the forward pass."""
    config, images = work.config, work.images(layout.size)
    found = list(_embedding(config, work, images))
    for layer in range(config.num_layers):
        tokens = images * config.copies(layer) * config.num_tokens
        found += _attention(config, work, f"blocks.{layer}", tokens)
        if layer not in config.moe.layers:
            found += _mlp(config, work, f"blocks.{layer}", tokens)
            continue
        found += _sparse(config, work, layout, layer, tokens, routed(config, layer, images))
    return found + list(_head(config, work, images * config.ensemble_size))


def _embedding(config: ModelConfig, work: Work, images: int) -> Iterator[Operation]:
    """The convolution keeps its images: the batch itself, or a copy in bfloat16. Its output and torch.cat's go."""
    c, dim = work.compute_bytes, config.hidden_size
    (rows, columns), tokens = config.image_hw, images * config.num_tokens
    patch = config.patch_hw[0] * config.patch_hw[1] * config.in_channels * dim
    parameters = patch + dim + (dim if config.pooling == "token" else 0)
    parameters += config.num_tokens * dim if config.pos_embed == "learned" else 0
    pixels = images * config.in_channels * rows * columns
    yield Operation("patch_embed", pixels * c * (c < FLOAT) + _cast(patch, c), 3 * FLOAT * tokens * dim,
                    2 * FLOAT * tokens * dim, dense=parameters)  # fmt: skip
    yield from _dropout("dropout", config.dropout_rate, FLOAT * tokens * dim)


def _norm(name: str, tokens: int, dim: int) -> Operation:
    """Keeps its input and each row's mean and deviation. In backward: gradient in and out, and of the residual."""
    row = FLOAT * tokens * dim
    return Operation(name, row + 2 * FLOAT * tokens, row, 3 * row, dense=2 * dim)


def _attention(config: ModelConfig, work: Work, block: str, tokens: int) -> Iterator[Operation]:
    c, dim, heads = work.compute_bytes, config.hidden_size, config.num_heads
    row, residual = c * tokens * dim, FLOAT * tokens * dim
    cast = residual if c < FLOAT else 0  # a gradient in bfloat16 and its copy in float32 (or the other way round)
    yield _norm(f"{block}.norm1", tokens, dim)
    # keeps the norm's output (under autocast its copy, and that of the weights)
    yield Operation(f"{block}.attn.qkv", row + _cast(3 * dim * dim, c), 3 * row, 3 * row + row + cast + residual,
                    dense=3 * dim * dim + 3 * dim)  # fmt: skip
    if config.attention_qk_norm:  # each keeps its rows' mean and deviation, and the attention the outputs
        yield Operation(f"{block}.attn.norms", 2 * (row + 2 * FLOAT * tokens * heads), 0, 5 * row + residual,
                        dense=2 * dim // heads)  # fmt: skip
    # the gradients of q, k and v, and what unbind's backward stacks of them
    yield Operation(f"{block}.attn.unbind", 0, 0, 6 * row + residual)
    if c < FLOAT and not work.gpu and config.num_tokens <= MAX_TOKENS and not config.attention_dropout_rate:
        # `cpu_training.attention` keeps q, k, v and the probabilities, which it makes of float32 scores; the output is
        # kept by the product behind it. Gradients of q, k, v and the output, and of the scores twice
        scores = tokens * heads * config.num_tokens
        yield Operation(f"{block}.attn.sdpa", 4 * row + c * scores, 2 * FLOAT * scores + row,
                        4 * row + 2 * c * scores + residual)  # fmt: skip
    else:  # scaled_dot_product_attention keeps q, k, v, its output and the log of each row's sum
        yield Operation(f"{block}.attn.sdpa", 4 * row + FLOAT * tokens * heads, 0, 4 * row + residual)
    yield Operation(f"{block}.attn.proj", _cast(dim * dim, c), row + residual, row + (row if cast else 0) + residual,
                    dense=dim * dim + dim)  # fmt: skip
    yield from _dropout(f"{block}.dropout", config.dropout_rate, row)


def _mlp(config: ModelConfig, work: Work, block: str, tokens: int) -> Iterator[Operation]:
    c, dim, width = work.compute_bytes, config.hidden_size, config.mlp_dim
    row, hidden, residual = c * tokens * dim, c * tokens * width, FLOAT * tokens * dim
    cast = residual if c < FLOAT else 0
    yield _norm(f"{block}.norm2", tokens, dim)
    yield Operation(f"{block}.mlp.fc1", row + _cast(dim * width, c), hidden, hidden + row + cast + residual,
                    dense=dim * width + width)  # fmt: skip
    yield Operation(f"{block}.mlp.gelu", hidden, hidden, 2 * hidden + residual)  # keeps the values before it
    yield from _dropout(f"{block}.mlp.dropout", config.dropout_rate, hidden)
    yield Operation(f"{block}.mlp.fc2", hidden + _cast(dim * width, c), row + residual,
                    hidden + (row if cast else 0) + residual, dense=dim * width + dim)  # fmt: skip
    yield from _dropout(f"{block}.mlp.dropout2", config.dropout_rate, row)


def _dropout(name: str, rate: float, size: int) -> Iterator[Operation]:
    """Keeps the mask in the values' dtype; nothing at a rate of 0."""
    if rate:
        yield Operation(name, size, size, 2 * size)


def _sparse(
    config: ModelConfig, work: Work, layout: Layout, layer: int, tokens: int, rows: Routed
) -> Iterator[Operation]:
    block, dim = f"blocks.{layer}", config.hidden_size
    yield _norm(f"{block}.norm2", tokens, dim)
    if config.moe.router == "soft":
        yield _soft_router(config, work, block, tokens, rows)
        yield from _buffers(config, work, layout, block, tokens, rows)
        return
    yield _router(config, work, block, tokens, rows)
    if layout.ep > 1 or config.moe.expert_dropout_rate:
        yield from _buffers(config, work, layout, block, tokens, rows)
    else:
        yield _triton(config, work, block, tokens, rows) if work.gpu else _segments(config, work, block, tokens, rows)


def _router(config: ModelConfig, work: Work, block: str, tokens: int, rows: Routed) -> Operation:
    """Keeps its tokens in float32; with noise two softmaxes (N, E) and two factors of the load loss' normal
    distribution, else one softmax; the chosen experts (N, K) of the weights and of the load loss' threshold."""
    moe, dim = config.moe, config.hidden_size
    logits = FLOAT * tokens * moe.num_experts // config.ensemble_size
    noisy = moe.router_noise > 0 and moe.router == "top_k"
    chosen = INDEX * (tokens * rows.k * (2 if noisy else 1) if rows.k else rows.kept)
    row = FLOAT * tokens * dim
    return Operation(
        f"{block}.mlp.router", row + (4 if noisy else 1) * logits + chosen, 4 * logits,
        # gradient of the tokens from here and from the experts, of the residual; those of the logits
        3 * row + 3 * logits, dense=moe.num_experts * dim,
    )  # fmt: skip


def _segments(config: ModelConfig, work: Work, block: str, tokens: int, rows: Routed) -> Operation:
    """`model.segments.SegmentExperts` keeps of every row the values before and behind GELU and the result, the tokens
    (the router's, or a copy in bfloat16), two indices and a weight per row, and autocast's copies of the weights. Its
    backward holds one expert's rows at a time: two of its output's width, two of the hidden width, the tokens' (and in
    bfloat16 a transposed copy and one gradient)."""
    c, dim, width = work.compute_bytes, config.hidden_size, config.mlp_dim
    row, residual = c * tokens * dim, FLOAT * tokens * dim
    copies = row if c < FLOAT else 0
    of_expert = c * rows.largest * (2 * width + 3 * dim) + _cast(dim * width + rows.largest * width, c)
    weights = _cast(2 * config.moe.num_experts * dim * width, c)
    return Operation(
        f"{block}.mlp.experts",
        copies + c * rows.kept * (2 * width + dim) + rows.kept * (2 * INDEX + FLOAT) + weights,
        row + c * rows.largest * 2 * dim + 5 * INDEX * rows.kept,
        residual + 2 * copies + row + of_expert,
        experts=config.moe.num_experts * (2 * dim * width + width + dim),
    )


def _triton(config: ModelConfig, work: Work, block: str, tokens: int, rows: Routed) -> Operation:
    """`model.gpu.ops` keeps the tokens, the values before GELU of all places and their weights and tokens; it casts
    the weights of the layer anew in both passes, and computes GELU again in the backward pass."""
    c, dim, width = work.compute_bytes, config.hidden_size, config.mlp_dim
    row, residual = c * tokens * dim, FLOAT * tokens * dim
    copies = row if c < FLOAT else 0
    weights = _cast(2 * config.moe.num_experts * dim * width, c)
    hidden, wide = c * rows.places * width, c * rows.places * dim
    return Operation(
        f"{block}.mlp.experts",
        copies + hidden + rows.places * (INDEX + FLOAT),
        row + hidden + wide + weights,
        residual + copies + row + 2 * hidden + wide + weights,
        experts=config.moe.num_experts * (2 * dim * width + width + dim),
    )


def _buffers(
    config: ModelConfig, work: Work, layout: Layout, block: str, tokens: int, rows: Routed
) -> Iterator[Operation]:
    """`Experts.forward` on all places keeps its rows, the values before and behind GELU, the results and, under
    autocast, copies of the weights. With ep > 1 an all-to-all before and behind it holds the rows twice a moment."""
    c, dim, width = work.compute_bytes, config.hidden_size, config.mlp_dim
    row, residual = c * tokens * dim, FLOAT * tokens * dim
    copies = row if c < FLOAT else 0
    hidden, wide = c * rows.places * width, c * rows.places * dim
    sent = wide if layout.ep > 1 else 0
    experts = config.moe.num_experts
    weights = _cast(experts // layout.ep * dim * width, c)
    yield Operation(f"{block}.mlp.dispatch", INDEX * rows.places, row + wide + sent,
                    residual + copies + row + wide + sent)  # fmt: skip
    yield Operation(f"{block}.mlp.experts.fc1", wide + weights, 2 * hidden, residual + row + hidden + wide,
                    experts=experts * (dim * width + width))  # fmt: skip
    yield Operation(f"{block}.mlp.experts.gelu", hidden, hidden, residual + row + 2 * hidden)
    yield from _dropout(f"{block}.mlp.experts.dropout", config.moe.expert_dropout_rate, hidden)
    yield Operation(f"{block}.mlp.experts.fc2", hidden + weights, 2 * wide + sent, residual + row + hidden + wide,
                    experts=experts * (dim * width + dim))  # fmt: skip
    yield Operation(f"{block}.mlp.combine", wide + rows.places * (FLOAT + INDEX), 2 * row + wide,
                    residual + row + 2 * wide + sent)  # fmt: skip


def _soft_router(config: ModelConfig, work: Work, block: str, tokens: int, rows: Routed) -> Operation:
    """`SoftRouter` keeps tokens and slots and their unit forms, both softmaxes (N, slots of a group), and the copies
    of these that the two einsums make of them."""
    moe, dim = config.moe, config.hidden_size
    size = moe.group_size if isinstance(moe.group_size, int) else config.num_tokens
    slots = rows.places // (tokens // size)
    logits, row = FLOAT * tokens * slots, FLOAT * tokens * dim
    return Operation(f"{block}.mlp.router", 2 * row + 2 * logits + 2 * FLOAT * slots * dim, 2 * logits + row,
                     4 * row + 3 * logits, dense=slots * dim + 1)  # fmt: skip


def _head(config: ModelConfig, work: Work, images: int) -> Iterator[Operation]:
    """images: with ensemble copies. In float32 the class token is a view, so that all of the norm's output stays; the
    losses keep about their float32 input and the targets."""
    c, dim, tokens = work.compute_bytes, config.hidden_size, images * config.num_tokens
    row, classes = FLOAT * tokens * dim, config.num_classes or 0
    yield Operation("norm", row + 2 * FLOAT * tokens, row, 2 * row, dense=2 * dim)
    if config.pooling == "map":
        parameters = dim + 4 * dim * dim + 4 * dim + 2 * dim + 2 * dim * config.mlp_dim + config.mlp_dim + dim
        parameters += 2 * dim // config.num_heads if config.attention_qk_norm else 0
        kept = c * tokens * dim * (4 if config.attention_qk_norm else 3) + c * images * (6 * dim + 2 * config.mlp_dim)
        yield Operation("attn_pool", kept + _cast(4 * dim * dim + 2 * dim * config.mlp_dim, c), 0,
                        2 * row + 2 * c * tokens * dim, dense=parameters)  # fmt: skip
    else:
        yield Operation("pool", row if config.pooling == "token" and c == FLOAT else 0, 0, row)
    width = config.representation_size or dim
    if config.representation_size:
        yield Operation("pre_logits", images * width * FLOAT + _cast(dim * width, c), 0, 2 * images * width * FLOAT,
                        dense=dim * width + width)  # fmt: skip
    if classes:
        logits = c * images * classes
        yield Operation("head", (c * images * width if c < FLOAT else 0) + _cast(width * classes, c), logits,
                        logits + c * images * width, dense=width * classes + classes)  # fmt: skip
        scores = FLOAT * images * classes
        yield Operation("loss", scores + c * images * classes, 2 * scores, 2 * scores)


def _cast(values: int, c: int) -> int:
    """Bytes of autocast's copy of so many values of weights."""
    return values * c if c < FLOAT else 0
