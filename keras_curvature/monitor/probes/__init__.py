"""What is measured, and on which data."""
