"""The world of coloured shapes, in which the bundled model will be trained and measured."""
