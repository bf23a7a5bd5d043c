"""The privileged corner: what a container is, and the process that makes it."""
