"""The decode loop: sequences, batches, the KV cache, sampling, output."""
