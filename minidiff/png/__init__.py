"""What a picture file says about its making: A1111's text and our own chunk, both ways."""
