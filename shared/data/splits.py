from shared.data.classes import *  # noqa: F403
