"""One command, one file; nothing heavy is imported before a command runs."""
