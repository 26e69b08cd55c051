"""mcrlog: look at log rings from a shell, also those of a dead process. Disturbs neither writers nor the drain."""
