"""Images wherever an owner has them: layouts, archives, registries, ACON's own repository."""
