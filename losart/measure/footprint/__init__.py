"""What losart takes beside torch + transformers: on disk, in memory, and in time to the first token.

Each side runs the same generation in processes of its own; `probes` is what they run.
"""
