"""Times of the CUDA backend, beside those of torch and transformers."""
