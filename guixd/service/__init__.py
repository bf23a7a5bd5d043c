"""The daemon: connections, sessions, options, and the Twisted service."""
