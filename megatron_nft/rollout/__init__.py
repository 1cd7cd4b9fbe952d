"""Samples: what was asked, what was answered, how it was judged."""
