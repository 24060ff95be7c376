"""PaliGemma learns to ground phrases in images by reinforcement."""
