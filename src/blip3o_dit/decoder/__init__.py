"""A small decoder: target tokens become pictures. See docs/pixels.md."""
