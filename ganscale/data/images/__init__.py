"""Image files to pixels, and pixels to what networks take."""
