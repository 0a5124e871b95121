"""Train language models to explain their own computations (Li et al., arXiv 2511.08579), on Ray."""
