"""Parts for edge-adapt that live in a package of their own."""
