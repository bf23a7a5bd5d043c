"""What is built, when, by whom and how."""
