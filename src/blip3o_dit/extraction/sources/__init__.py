"""Where images come from, by their makers' conventions: one module per maker behind `list_images`."""
