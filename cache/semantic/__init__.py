"""Answers to similar requests."""
