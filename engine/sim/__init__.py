"""The production core under a clock that a test moves and a device that is a hash."""
