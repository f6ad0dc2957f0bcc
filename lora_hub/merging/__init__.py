"""Base and adapters → a checkpoint: a plan, and its execution."""
