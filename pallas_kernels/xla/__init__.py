"""Attention in plain XLA: CPUs, TPUs, and whatever has no kernel."""
