"""Which model a base is, told by its content, and whether an adapter belongs to it."""
