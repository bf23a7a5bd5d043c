"""Files and SQLite, in bounded blocking steps, without Twisted."""
