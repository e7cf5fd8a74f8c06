"""Comparing variants of the architecture at small scale."""
