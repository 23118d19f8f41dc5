"""Blobs from registries (OCI distribution specification 1.1)."""
