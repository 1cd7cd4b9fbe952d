"""The policy: a Megatron-Core model, its objective and its optimizer step."""
