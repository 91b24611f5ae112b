"""What an operator sees: metrics and log lines. Neither ever holds prompt text or tokens."""
