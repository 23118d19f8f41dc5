"""Bytes on their way in: uploaded or read from a source, hashed, and sealed in memory."""
