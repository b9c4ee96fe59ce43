"""Where images come from, by the conventions of those who made them: one module per maker behind `list_images`."""
