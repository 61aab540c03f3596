"""What an export did, and how it is shown."""
