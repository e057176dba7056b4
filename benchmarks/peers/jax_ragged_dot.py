"""jax.lax.ragged_dot, compiled: sort by expert, two ragged products, scatter-add."""

from typing import Any

import numpy as np
import torch
from common import LayerCalls, LayerWork, MissingError

INSTALL = "pip install jax"
GRADIENTS = False


def layer_calls(work: LayerWork) -> LayerCalls:
    try:
        import jax
        import jax.numpy as jnp
    except ImportError as error:
        raise MissingError(f"not installed: {INSTALL} ({error})") from None
    dtype = jnp.bfloat16 if work.tokens.dtype == torch.bfloat16 else jnp.float32

    def array(x: torch.Tensor, kind: Any = dtype) -> Any:
        return jnp.asarray(x.detach().float().cpu().numpy()).astype(kind)

    tokens, gate = array(work.tokens), array(work.gate, jnp.float32)
    up, down = array(work.up.transpose(1, 2)), array(work.down.transpose(1, 2))
    up_bias, down_bias = array(work.up_bias), array(work.down_bias)
    k, experts = work.num_selected_experts, work.num_experts

    @jax.jit
    def layer(tokens: Any, gate: Any, up: Any, up_bias: Any, down: Any, down_bias: Any) -> Any:
        probs = jax.nn.softmax(tokens.astype(jnp.float32) @ gate.T, axis=-1)
        weights, chosen = jax.lax.top_k(probs, k)
        flat = chosen.reshape(-1)
        order = jnp.argsort(flat, stable=True)
        token, expert = order // k, flat[order]
        sizes = jnp.bincount(flat, length=experts).astype(jnp.int32)
        hidden = jax.nn.gelu(jax.lax.ragged_dot(tokens[token], up, sizes) + up_bias[expert], approximate=True)
        out = jax.lax.ragged_dot(hidden, down, sizes) + down_bias[expert]
        out = out * weights.reshape(-1)[order][:, None].astype(out.dtype)
        return jnp.zeros_like(tokens).at[token].add(out)

    arguments = (tokens, gate, up, up_bias, down, down_bias)
    return {"jax ragged_dot (jit)": lambda: layer(*arguments).block_until_ready()}


def as_tensor(out: Any) -> torch.Tensor:
    return torch.from_numpy(np.asarray(out.astype("float32")).copy())
