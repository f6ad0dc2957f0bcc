"""The Python names users call, each a few lines over the two halves."""
