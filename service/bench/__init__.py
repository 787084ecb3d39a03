"""``kiln bench``: how many requests a second a server answers within a goal, by protocol."""
