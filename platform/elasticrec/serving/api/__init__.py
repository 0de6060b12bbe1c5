"""JSON bodies in, checked requests out; answers and problems as the API shows them (OpenAPI is made from these)."""
