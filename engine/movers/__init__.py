"""Moving KV blocks from lane to lane."""
