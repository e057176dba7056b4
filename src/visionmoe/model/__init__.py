"""The model: pure routing functions, and thin modules that hold the parameters."""
