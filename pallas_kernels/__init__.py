"""Attention over paged keys and values: what it means (`reference`), how each platform computes it, and who picks (`dispatch`)."""
