"""Attention on Hopper as Mosaic GPU kernels: one producer of tiles, consumers that multiply on tensor cores."""
