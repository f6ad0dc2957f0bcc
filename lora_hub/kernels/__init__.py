"""The grouped product on a GPU: every row of a batch with adapters of its own."""
