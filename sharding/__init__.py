"""Placements: axis letters, meshes of a lane, and what the two say about an array."""
