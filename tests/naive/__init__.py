"""The plain-object twin of the compiled engine, and its tests."""
