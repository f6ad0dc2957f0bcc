"""Adapters and weights → one adapter."""
