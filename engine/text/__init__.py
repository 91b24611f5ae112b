"""Bytes to tokens and back: tokenizing, chat templates, incremental detokenizing, stop strings."""

from engine.text.stops import StopMatcher
from engine.text.text import Text

__all__ = ["StopMatcher", "Text"]
