"""From samples to parameters: losses, gradient steps, and what follows them."""
