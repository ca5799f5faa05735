"""What the package's measures and tests are worth, tried where the truth is known."""
