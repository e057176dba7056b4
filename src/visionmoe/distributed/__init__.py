"""Many processes: who they are, how they start, and how they talk. Nothing here knows a model."""

LAUNCHED = "VISIONMOE_LAUNCHED"  # environment variable of processes that `--nproc` started: the id of who did
