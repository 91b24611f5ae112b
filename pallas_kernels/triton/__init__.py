"""Attention through the Pallas Triton lowering: the NVIDIA GPUs that no Mosaic kernel serves."""
