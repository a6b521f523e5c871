"""The bundled model of coloured shapes: its synthetic data, training and measurement."""
