"""Weights: from a model folder, an Orbax artifact or an nnx state to arrays on a lane's mesh."""
