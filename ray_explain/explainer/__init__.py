"""Language models that answer questions about a target's vectors."""
