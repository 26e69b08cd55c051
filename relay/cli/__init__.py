"""The commands: mcrd starts the relay, mcrctl talks to it."""
