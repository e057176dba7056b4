"""Training: losses, optimizers, schedules, and the loop that resumes exactly."""
