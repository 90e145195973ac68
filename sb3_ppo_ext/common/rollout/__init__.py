"""From environments to samples: what acts, what is collected, and what is said of it."""
