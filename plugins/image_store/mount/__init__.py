"""From trees to what a container sees: layers and roots, mounted and taken away again."""
