"""Judging answers: extraction, equivalence, and the processes that do it."""
