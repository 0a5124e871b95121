"""A synthetic world with known truth, and small target models trained on it."""

RECIPE = 1  # part of a small target's fingerprint: raise it when the corpus or the training changes what it learns
