"""What the algorithms share, built on Stable-Baselines3: collecting, evaluating, updating."""
