"""From image files to pixels, and from pixels to the input of networks."""
