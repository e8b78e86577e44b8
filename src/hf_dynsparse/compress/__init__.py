"""Smaller models: int8 values, and fewer heads and neurons."""
