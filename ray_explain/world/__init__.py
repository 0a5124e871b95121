"""A synthetic world with known truth, and small target models trained on it."""
