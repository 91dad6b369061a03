"""The study: what drops cost, and what wins it back, on the bundled model. `make study`."""
