"""Places that keep bytes under paths. They know nothing of what the bytes mean."""
