"""Many processes: who they are, how they start, and how they talk. Nothing here knows a model."""
