"""Adapters on a running model, which stays as it is."""
