"""kvsim.kernels.quant: quantization of KV caches, equal to the byte on every backend."""
