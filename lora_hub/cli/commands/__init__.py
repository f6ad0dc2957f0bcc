"""One file a command; each has a `command` that `cli/main.py` loads when it is used."""
