"""What the rest rests on: configuration, registries, files, several processes, errors."""
