"""Hugging Face checkpoints in and out of Megatron-Core models."""
