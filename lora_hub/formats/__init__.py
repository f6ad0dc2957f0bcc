"""One dialect a file: what people's adapter files mean, as an `AdapterSource`."""
