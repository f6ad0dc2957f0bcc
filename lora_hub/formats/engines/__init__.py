"""What serving engines get right, and adapters said so that they do.

`table.py` holds what is known of each engine; `fit.py` makes of any adapter one that the
engine computes exactly, or refuses it by name.
"""
