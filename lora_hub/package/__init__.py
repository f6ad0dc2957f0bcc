"""The folder we publish: what may lie in it, making one, and reading one back."""
