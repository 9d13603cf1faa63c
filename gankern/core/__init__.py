"""The cellar: what every floor stands on, and what imports nothing above it."""
