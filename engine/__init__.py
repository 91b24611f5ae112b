"""Serac's engine. `from engine.llm import LLM` is the offline door; `serac serve` the other."""
