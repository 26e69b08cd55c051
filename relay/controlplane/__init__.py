"""The control plane process: the only one that parses what clients send."""
