"""The command `lorahub`: parse, call one function, print. One file a command."""
