"""kvsim.kernels.quant: what quantizing a KV cache does to its numbers and to attention."""
