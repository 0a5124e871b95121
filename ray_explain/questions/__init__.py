"""Effects turned into questions and answers for an explainer."""
