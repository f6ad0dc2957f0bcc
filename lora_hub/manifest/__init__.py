"""The documents an adapter travels with: bytes ↔ values, and their JSON Schema."""
