"""Recipes, and what takes them to a machine."""
