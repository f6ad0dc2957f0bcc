"""Adapters in memory: the normal form of an update, loading and saving."""
