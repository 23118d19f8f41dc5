"""Decompression of bytes that nobody has verified yet, in a process that can do nothing else."""
