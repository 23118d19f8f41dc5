"""The command `acon`: everything that a person types."""
