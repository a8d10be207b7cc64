from shared.data.classes import *  # noqa: F403
from shared.data.images import open_image, to_chw  # noqa: F401
