"""Attention over paged keys and values: its meaning, the computation per platform, and who picks between them."""
