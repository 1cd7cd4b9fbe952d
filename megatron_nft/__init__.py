"""Negative-aware Fine-Tuning (arXiv 2505.18116) on Megatron-Core and vLLM."""

__version__ = "0.1.0"
