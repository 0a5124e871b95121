"""Activation patching, ablation and extraction on Hugging Face causal language models."""
