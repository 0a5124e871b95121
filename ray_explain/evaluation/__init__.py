"""Answers parsed and scored, with controls, baselines and intervals."""
