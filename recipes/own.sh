# Your own images: a folder or a zip.

recipe_labels=0
shape=""
config_labels=""
