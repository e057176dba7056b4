"""What a model needs on given devices, before it is run: memory, operations, traffic and time, by arithmetic alone."""
