"""Look at an adapter: its summary and the norms of its deltas, without torch."""
