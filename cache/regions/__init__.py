"""Answers from other regions, and copies for them."""
