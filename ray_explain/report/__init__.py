"""Scores turned into pages that a person reads."""
