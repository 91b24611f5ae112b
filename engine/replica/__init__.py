"""Lanes and what clients see of them: main loop, text of running requests, streams."""
