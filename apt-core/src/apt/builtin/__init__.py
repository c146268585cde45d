"""apt-core's own providers; they come through the same entry points as anybody's."""
